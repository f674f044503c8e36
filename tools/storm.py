#!/usr/bin/env python3
"""Run a large batch through a server's faults and SIGKILLs: nothing lost, nothing paid twice.

    python3 tools/storm.py                              # 1,000 jobs, 6 kills
    python3 tools/storm.py --jobs 60 --kills 20 --seed 7
    python3 tools/storm.py --deferred                   # the same through the Batch API
    python3 tools/storm.py --calls --kills 300          # one call with -o a kill

The tool alone is killed, as a caller's time-out does, at a random time, request or journal line;
its curls live on. Then the same command is run until it ends the same way twice. What becomes of
each job is drawn beforehand (PLAIN, DEFERRED); of deferred jobs every 10th is an edit.

With --calls some of caller, shell, script and curl are killed, at a random time, and then the same
command is run one to five times at once: no second request may be sent.

Prints a Markdown table. Ends with 1 if an image was lost or doubled, or a job was paid for twice.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import os
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
from tests.server import Api, Chunk, Reply, Request, answer, refusal

SOON = [("Retry-After", "1")]
PLAIN = {"429": 5, "503": 1, "500": 2, "cut": 1}  # what befalls jobs, in percent
DEFERRED = {"refused": 3, "failed": 5, "expired": 7}
PHASES = 4  # of a deferred batch: submitted, fetched, the rest submitted, fetched
VICTIMS = ("caller", "shell", "script", "curl")  # each the child of the one before
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


class CallStorm:
    """Single calls with -o, each with a folder of its own, killed and repeated."""

    def __init__(self, seed: int, root: Path) -> None:
        self.draw, self.root = random.Random(seed), root
        self.api = Api(otherwise=self.answered)
        self.env = {**clean_environment(), "GPT_IMAGE2_BASE_URL": self.api.base_url}
        self.env["GPT_IMAGE2_API_KEY"] = self.api.key
        for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "TMPDIR"):
            self.env[name] = str(root / name)
            (root / name).mkdir()
        self.told: dict[str, list[int]] = collections.defaultdict(list)
        self.sums: collections.Counter[str] = collections.Counter()
        self.log: list[str] = []

    def answered(self, request: Request) -> Reply:
        """Return the images of a prompt, which come bit by bit."""
        prompt, number = request.json["prompt"], request.json.get("n", 1)
        draw = random.Random(f"{prompt} {len(self.told[prompt])}")
        self.told[prompt].append(number)
        whole = answer(*(image_of(prompt, k) for k in range(1, number + 1)))
        cuts = sorted(draw.randrange(len(whole.body)) for _ in range(4))
        chunks: list[Chunk] = []
        for start, end in zip([0, *cuts], [*cuts, len(whole.body)]):
            chunks += [functools.partial(time.sleep, draw.uniform(0, 0.2)), whole.body[start:end]]
        return whole._replace(chunks=chunks, content_length=len(whole.body))

    def blow(self, number: int) -> None:
        """Kill one call, and repeat it."""
        draw, folder, prompt = self.draw, self.root / f"{number}", f"job {number}"
        folder.mkdir()
        images = draw.choice((1, 1, 3))
        words = ["generate", prompt, "--n", str(images), "-o", "fox.png"]
        words += ["--json"] * draw.randint(0, 1)
        nested = ["sh", "-c", '"$@"; true', "sh"]  # one that waits for its child
        argv = [*nested, *nested, sys.executable, str(SCRIPT), *words]
        killed = draw.sample(range(len(VICTIMS)), draw.randint(1, len(VICTIMS)))
        with (folder / "stderr.txt").open("ab") as log:
            started = time.monotonic()
            caller = subprocess.Popen(argv, cwd=folder, env=self.env, stdout=log, stderr=log)
            time.sleep(draw.uniform(0, 1.0))
            tree = descendants(caller.pid)
            for index in killed:
                for pid in tree[index : index + 1]:
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        os.kill(pid, signal.SIGKILL)
                        self.sums[f"kills of {VICTIMS[index]}"] += 1
            caller.wait() if 0 in killed else None
            moment = time.monotonic() - started
            time.sleep(draw.choice((0, draw.uniform(0, 0.5))))
            again = [
                subprocess.Popen(argv[8:], cwd=folder, env=self.env, stdout=log, stderr=log)
                for _ in range(draw.randint(1, 5))
            ]
            codes = [tool.wait() for tool in again]
            caller.wait()
        curl_died = 3 in killed and len(tree) > 3
        self.look(number, images, codes, curl_died)
        self.log.append(f"{number}: kills {sorted(killed)} at {moment:.2f} s, then {codes}")

    def look(self, number: int, images: int, codes: list[int], curl_died: bool) -> None:
        """Add up what one kill has led to."""
        folder, prompt = self.root / f"{number}", f"job {number}"
        due = {image_of(prompt, k) for k in range(1, images + 1)}
        found = [path.read_bytes() for path in folder.glob("*.png")]
        posts = len(self.told[prompt])
        bad = {
            "POSTs beyond the first": max(0, posts - 1),
            "images lost": len(due - set(found)) if posts and not curl_died else 0,
            "images doubled or foreign": len(found) - len(set(found) & due),
            "tracebacks": (folder / "stderr.txt").read_text().count("Traceback"),
            "odd exit codes": len(set(codes) - {0, 2, 8}),
        }
        self.sums.update({**bad, "POSTs": posts, "calls after a kill": len(codes)})
        self.sums.update(f"exit {code}" for code in codes)
        if any(bad.values()):
            told = {name: value for name, value in bad.items() if value}
            print(f"{number}: {told}", self.log[-1:], file=sys.stderr)
            self.sums["faults"] += 1

    def table(self, seconds: float) -> tuple[str, bool]:
        """Return a table, and whether all is well."""
        rows = {**dict(sorted(self.sums.items())), "seconds": round(seconds)}
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
        return "\n".join(lines), not self.sums["faults"]


def descendants(pid: int) -> list[int]:
    """Return a process and its only child, and so on."""
    found = [pid]
    while True:
        try:
            children = Path(f"/proc/{found[-1]}/task/{found[-1]}/children").read_text().split()
        except OSError:
            return found
        if not children:
            return found
        found.append(int(children[0]))


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def counted(words: Iterable[str]) -> str:
    counts = sorted(collections.Counter(words).items())
    return ", ".join(f"{word} x {number}" for word, number in counts)


def storm_of_calls(seed: int, kills: int) -> None:
    root, started = Path(tempfile.mkdtemp(prefix="gpt-image-2-storm-")), time.monotonic()
    storm = CallStorm(seed, root)
    for number in range(1, kills + 1):
        storm.blow(number)
    table, well = storm.table(time.monotonic() - started)
    storm.api.close()
    print(table)
    if not well:
        (root / "log.txt").write_text("\n".join(storm.log) + "\n")
        sys.exit(f"\nall of it is in {root}")
    shutil.rmtree(root)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deferred", action="store_true", help="through the Batch API")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=6, help="about so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calls", action="store_true", help="single calls instead of a batch")
    args = parser.parse_args()
    if args.calls:
        storm_of_calls(args.seed, args.kills)
        return
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
