#!/usr/bin/env python3
"""Run a large batch through a server's faults and SIGKILLs: nothing lost, nothing paid twice.

    python3 tools/storm.py                              # 1,000 jobs, 6 kills
    python3 tools/storm.py --jobs 60 --kills 20 --seed 7
    python3 tools/storm.py --deferred                   # the same through the Batch API

The tool alone is killed, as a caller's time-out does, at a random time, request or journal line;
its curls live on. Then the same command is run until it says the same twice. What becomes of each
job is drawn beforehand:

plain: 5 % meet a 429 first, 1 % a 503 with Retry-After, 2 % a JSON 500, 1 % a cut connection;
deferred: every 10th is an edit; 3 % are refused, 5 % fail and 7 % expire when asked for first.

Prints a Markdown table. Ends with 1 if a picture was lost or doubled, or a job was paid for twice.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.case import SCRIPT, clean_environment
from tests.deferreds import ENDED, BatchApi, lost, made, picture_of, refused
from tests.pictures import png
from tests.server import Api, Reply, Request, answer, refusal

MOST_RUNS = 30  # after the last kill
SOON = [("Retry-After", "1")]


def drawn(jobs: int, seed: int, shares: dict[str, int], usual: str) -> dict[str, str]:
    """Return what becomes of each job; the shares are in percent."""
    kinds = [kind for kind, share in shares.items() for _ in range(share)]
    kinds += [usual] * (100 - len(kinds))
    draw = random.Random(seed)
    return {f"job {number}": draw.choice(kinds) for number in range(1, jobs + 1)}


class Plain:
    """A server of the images API, and what it told of each job; `without` a picture ends what is
    in these states.
    """

    phases, option, without = 1, "--concurrency=20", ("unknown", "sent")

    def __init__(self, jobs: int, seed: int) -> None:
        self.kinds = drawn(jobs, seed, {"429": 5, "503": 1, "500": 2, "cut": 1}, "made")
        self.told: dict[str, list[str]] = collections.defaultdict(list)
        self.lock = threading.Lock()
        self.api = Api(otherwise=self.answered)

    def answered(self, request: Request) -> Reply:
        """Answer a POST as it is drawn, and one that is sent again with its picture."""
        prompt = request.json["prompt"]
        with self.lock:
            kind = "made" if self.told[prompt] else self.kinds[prompt]
            self.told[prompt].append(kind)
        time.sleep(0.05)
        picture = answer(picture_of(prompt))
        return {
            "429": refusal(429, "rate_limit_exceeded", "slow", headers=SOON),
            "503": refusal(503, "slow_down", "busy", headers=SOON),
            "500": refusal(500, "server_error", "upstream time-out"),
            "cut": picture._replace(cut=60),
            "made": picture,
        }[kind]

    def move_on(self) -> bool:
        """Change nothing, and say so."""
        return False

    def paid_twice(self) -> int:
        """Return how many jobs were sent again after an answer that may be billed."""
        billed = {"made", "500", "cut"}
        return sum(bool(billed & set(told[:-1])) for told in self.told.values())


class Deferred:
    """A server of the Batch API; jobs are submitted and fetched, and then the rest of them."""

    phases, option, without = 4, "--deferred", ("refused",)

    def __init__(self, jobs: int, seed: int) -> None:
        self.kinds = drawn(jobs, seed, {"refused": 3, "failed": 5, "expired": 7}, "made")
        self.seen: set[str] = set()
        self.api = BatchApi(self.result)

    def result(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return what becomes of a request as it is drawn, and of one that comes again."""
        prompt = line["body"]["prompt"]
        kind, again = self.kinds[prompt], prompt in self.seen
        self.seen.add(prompt)
        return {
            "refused": refused(400, "moderation_blocked"),
            "failed": made(line) if again else refused(500, "server_error"),
            "expired": made(line) if again else lost("batch_expired", "It expired."),
            "made": made(line),
        }[kind]

    def move_on(self) -> bool:
        """Bring the batches to their ends; return whether there were any."""
        names = [name for name in self.api.own() if self.api.batches[name]["status"] not in ENDED]
        for name in names:
            expires = any(self.kinds[prompt] == "expired" for prompt in self.api.prompts(name))
            self.api.end(name, "expired" if expires else "completed")
        return bool(names)

    def paid_twice(self) -> int:
        """Return how many jobs were in two batches while neither had failed them."""
        return len(self.api.doubled())


class Storm:
    """A batch in a folder of its own, run again and again."""

    def __init__(self, weather: Plain | Deferred, seed: int, root: Path) -> None:
        self.weather, self.draw, self.root = weather, random.Random(seed), root
        self.env = clean_environment()
        for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "TMPDIR"):
            self.env[name] = str(root / name)
            (root / name).mkdir()
        url = weather.api.base_url
        self.env.update(GPT_IMAGE2_BASE_URL=url, GPT_IMAGE2_API_KEY=weather.api.key)
        lines: list[dict[str, Any]] = [{"prompt": prompt} for prompt in weather.kinds]
        if isinstance(weather, Deferred):
            (root / "in.png").write_bytes(png(64, 64))
            for line in lines[::10]:
                line["images"] = ["in.png"]
        (root / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.argv = [sys.executable, str(SCRIPT), "batch", "jobs.jsonl", weather.option]
        self.journal = root / "jobs" / "results.jsonl"
        self.codes: list[int] = []

    def blow(self, kills: int) -> None:
        """Run the batch to its end through about so many kills."""
        phases = self.weather.phases
        for phase in range(phases):
            for _ in range(kills * (phase + 1) // phases - kills * phase // phases):
                self.run(kill=True)
            self.run()
            self.weather.move_on()
        for _ in range(MOST_RUNS):
            self.run()
            if not self.weather.move_on() and self.codes[-1] == self.codes[-2]:
                return

    def run(self, kill: bool = False) -> None:
        """Run the command once."""
        with (self.root / "stderr.txt").open("ab") as log:
            tool = subprocess.Popen(self.argv, cwd=self.root, env=self.env, stdout=log, stderr=log)
            now = self.moment()
            while kill and tool.poll() is None and not now():
                time.sleep(0.001)
            if kill:
                tool.kill()
            self.codes.append(tool.wait())

    def moment(self) -> Callable[[], bool]:
        """Return what tells when to kill: a time, so many requests, or so large a journal."""
        api, jobs, draw = self.weather.api, len(self.weather.kinds), self.draw
        end = time.monotonic() + draw.uniform(0.05, 0.5 + jobs / 500)
        requests = len(api.requests) + draw.randint(1, 5 + jobs // 10)
        size = size_of(self.journal) + draw.randint(1, 200 * jobs)
        kind = draw.choice(("time", "requests", "journal"))
        return lambda: (
            time.monotonic() >= end
            or (kind == "requests" and len(api.requests) >= requests)
            or (kind == "journal" and size_of(self.journal) >= size)
        )

    def table(self, seconds: float) -> tuple[str, bool]:
        """Return what came of it as a Markdown table, and whether all is well."""
        weather, entries = self.weather, map(json.loads, self.journal.read_text().splitlines())
        states = {entry["prompt"]: entry["state"] for entry in entries if "prompt" in entry}
        due = {picture_of(prompt): prompt for prompt in weather.kinds}
        found = [path.read_bytes() for path in (self.root / "jobs").glob("*.png")]
        saved = {due[picture] for picture in found if picture in due}
        ended = {prompt for prompt, state in states.items() if state in weather.without}
        faults = {
            "pictures lost": len(set(weather.kinds) - saved - ended),
            "pictures doubled or foreign": len(found) - len(saved),
            "jobs paid for twice": weather.paid_twice(),
            "tracebacks": (self.root / "stderr.txt").read_text().count("Traceback"),
        }
        ends = [code for code in self.codes if code != -signal.SIGKILL]
        rows = {
            "jobs": counted(weather.kinds.values()),
            "runs": f"{len(self.codes)}, of these killed {len(self.codes) - len(ends)}",
            "exit codes of the others": counted(map(str, ends)),
            "requests": len(weather.api.requests),
            "states": counted(states.values()),
            **faults,
            "seconds": f"{seconds:.1f}",
        }
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
        return "\n".join(lines), not any(faults.values())


def size_of(path: Path) -> int:
    """Return the size of a file that may not be there."""
    return path.stat().st_size if path.exists() else 0


def counted(words: Any) -> str:
    """Return how often each word comes."""
    counts = collections.Counter(words)
    return ", ".join(f"{word} x {counts[word]}" for word in sorted(counts))


def main() -> int:
    """Print the table of one storm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deferred", action="store_true", help="through the Batch API")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=6, help="about so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the folder to be looked at")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="gpt-image-2-storm-"))
    kind = Deferred if args.deferred else Plain
    storm = Storm(kind(args.jobs, args.seed), args.seed, root)
    started = time.monotonic()
    try:
        storm.blow(args.kills)
        table, well = storm.table(time.monotonic() - started)
    finally:
        storm.weather.api.close()
        if args.keep:
            print(root)
        else:
            shutil.rmtree(root, ignore_errors=True)
    print(table)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
