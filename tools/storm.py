#!/usr/bin/env python3
"""Run a large batch through a server's faults and SIGKILLs: nothing lost, nothing paid twice.

    python3 tools/storm.py                              # 1,000 jobs, 6 kills
    python3 tools/storm.py --jobs 60 --kills 20 --seed 7
    python3 tools/storm.py --deferred                   # the same through the Batch API

The tool alone is killed, as a caller's time-out does, at a random time, request or journal line;
its curls live on. Then the same command is run until it ends the same way twice. What becomes of
each job is drawn beforehand (PLAIN, DEFERRED); of deferred jobs every 10th is an edit.

Prints a Markdown table. Ends with 1 if an image was lost or doubled, or a job was paid for twice.
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
import time
from pathlib import Path
from typing import Any, Callable, Iterable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.case import SCRIPT, clean_environment
from tests.deferreds import BatchApi, image_of, lost, made, refused
from tests.images import png
from tests.server import Reply, Request, answer, refusal

SOON = [("Retry-After", "1")]
PLAIN = {"429": 5, "503": 1, "500": 2, "cut": 1}  # what befalls jobs, in percent
DEFERRED = {"refused": 3, "failed": 5, "expired": 7}
PHASES = 4  # of a deferred batch: submitted, fetched, the rest submitted, fetched
MOST_RUNS = 30  # after the last kill


class Weather:
    """A server of both APIs, and what becomes of each job there."""

    def __init__(self, jobs: int, seed: int, shares: dict[str, int]) -> None:
        kinds = [kind for kind, share in shares.items() for _ in range(share)]
        kinds += ["made"] * (100 - len(kinds))
        draw = random.Random(seed)
        self.kinds = {f"job {number}": draw.choice(kinds) for number in range(1, jobs + 1)}
        self.told: dict[str, list[str]] = collections.defaultdict(list)
        self.api = BatchApi(self.result)
        self.api.otherwise = self.answered

    def next_of(self, prompt: str) -> str:
        # Only a refusal comes more than once.
        first = self.kinds[prompt] == "refused" or not self.told[prompt]
        self.told[prompt].append(self.kinds[prompt] if first else "made")
        return self.told[prompt][-1]

    def answered(self, request: Request) -> Reply:
        if not request.path.startswith("/v1/images"):
            return self.api.answered(request)
        prompt = request.json["prompt"]
        image = answer(image_of(prompt))
        time.sleep(0.05)
        return {
            "429": refusal(429, "rate_limit_exceeded", "slow", headers=SOON),
            "503": refusal(503, "slow_down", "busy", headers=SOON),
            "500": refusal(500, "server_error", "upstream time-out"),
            "cut": image._replace(cut=60),
            "made": image,
        }[self.next_of(prompt)]

    def result(self, line: dict[str, Any]) -> dict[str, Any]:
        return {
            "refused": refused(400, "moderation_blocked"),
            "failed": refused(500, "server_error"),
            "expired": lost("batch_expired", "It expired."),
            "made": made(line),
        }[self.next_of(line["body"]["prompt"])]

    def paid_twice(self) -> int:
        """Return how many jobs were asked for again though they may have been billed."""
        billed = {"made", "500", "cut"}
        again = [prompt for prompt, told in self.told.items() if billed & set(told[:-1])]
        return len(again) + len(self.api.doubled())


class Storm:
    """A batch in a folder of its own, run again and again."""

    def __init__(self, weather: Weather, seed: int, deferred: bool, root: Path) -> None:
        self.weather, self.draw, self.root = weather, random.Random(seed), root
        self.env = clean_environment()
        for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "TMPDIR"):
            self.env[name] = str(root / name)
            (root / name).mkdir()
        api = weather.api
        self.env.update(GPT_IMAGE2_BASE_URL=api.base_url, GPT_IMAGE2_API_KEY=api.key)
        (root / "in.png").write_bytes(png(64, 64))
        lines: list[dict[str, Any]] = [{"prompt": prompt} for prompt in weather.kinds]
        for line in lines[::10] if deferred else ():
            line["images"] = ["in.png"]
        (root / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        how = "--deferred" if deferred else "--concurrency=20"
        self.argv = [sys.executable, str(SCRIPT), "batch", "jobs.jsonl", how]
        self.journal = root / "jobs" / "results.jsonl"
        self.codes: list[int] = []

    def blow(self, kills: int) -> None:
        """Run the batch to its end through about so many kills."""
        for phase in range(PHASES):
            for _ in range(kills * (phase + 1) // PHASES - kills * phase // PHASES):
                self.run(kill=True)
            self.run()
            self.weather.api.end_all()
        for _ in range(MOST_RUNS):
            self.run()
            if not self.weather.api.end_all() and self.codes[-1] == self.codes[-2]:
                return

    def run(self, kill: bool = False) -> None:
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
        kind = draw.choice(("time", "requests", "journal"))
        end = time.monotonic() + draw.uniform(0.05, 0.5 + jobs / 500)
        requests = len(api.requests) + draw.randint(1, 5 + jobs // 10)
        size = size_of(self.journal) + draw.randint(1, 200 * jobs)
        return lambda: (
            time.monotonic() >= end
            or (kind == "requests" and len(api.requests) >= requests)
            or (kind == "journal" and size_of(self.journal) >= size)
        )

    def table(self, seconds: float, without: Iterable[str]) -> tuple[str, bool]:
        """Return a table, and whether all is well; jobs in a state of `without` need no image."""
        weather, entries = self.weather, map(json.loads, self.journal.read_text().splitlines())
        states = {entry["prompt"]: entry["state"] for entry in entries if "prompt" in entry}
        due = {image_of(prompt): prompt for prompt in weather.kinds}
        found = [path.read_bytes() for path in (self.root / "jobs").glob("*.png")]
        saved = {due[image] for image in found if image in due}
        ended = {prompt for prompt, state in states.items() if state in without}
        faults = {
            "images lost": len(set(weather.kinds) - saved - ended),
            "images doubled or foreign": len(found) - len(saved),
            "jobs paid for twice": weather.paid_twice(),
            "tracebacks": (self.root / "stderr.txt").read_text().count("Traceback"),
        }
        ends = [str(code) for code in self.codes if code != -signal.SIGKILL]
        rows = {
            "jobs": counted(weather.kinds.values()),
            "runs killed": len(self.codes) - len(ends),
            "exit codes of the others": counted(ends),
            "states": counted(states.values()),
            **faults,
            "seconds": round(seconds),
        }
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
        return "\n".join(lines), not any(faults.values())


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def counted(words: Iterable[str]) -> str:
    counts = sorted(collections.Counter(words).items())
    return ", ".join(f"{word} x {number}" for word, number in counts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deferred", action="store_true", help="through the Batch API")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=6, help="about so many")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    weather = Weather(args.jobs, args.seed, DEFERRED if args.deferred else PLAIN)
    root = Path(tempfile.mkdtemp(prefix="gpt-image-2-storm-"))
    storm, started = Storm(weather, args.seed, args.deferred, root), time.monotonic()
    storm.blow(args.kills)
    without = ("refused",) if args.deferred else ("unknown", "sent")
    table, well = storm.table(time.monotonic() - started, without)
    weather.api.close()
    print(table)
    if not well:
        sys.exit(f"\nall of it is in {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
