"""A batch in bad weather: many jobs, a server that fails, and SIGKILLs; not part of the tests.

    python3 tests/storm.py                 # 1,000 jobs, 3 kills
    python3 tests/storm.py --jobs 60 --kills 20 --seed 7

5 % of the jobs first meet a 429, 1 % a 503 with Retry-After, 2 % a JSON 500, 1 % a cut connection.
The tool alone is killed, as a caller's time-out does; its curls live on. Then the same command is
run again, until it says that it is done. Prints what came of it as a Markdown table.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.pictures import png
from tests.support import SCRIPT, Api, Reply, Request, answer, clean_environment, refusal

FINAL = ("ok", "500", "cut")


def picture_of(prompt: str) -> bytes:
    """Return the picture that a prompt gets: no two have the same."""
    red, green, blue = hashlib.sha256(prompt.encode()).digest()[:3]
    number = int(re.findall(r"\d+", prompt)[0])
    return png(16 + number % 50, 16 + number // 50, rgb=(red, green, blue))


class Weather:
    """Answers POSTs by a plan drawn beforehand, and keeps what it answered to each prompt."""

    def __init__(self, jobs: int, seed: int) -> None:
        draw = random.Random(seed)
        kinds = ["429"] * 5 + ["503"] + ["500"] * 2 + ["cut"] + ["ok"] * 91
        self.first = {f"job {number}": draw.choice(kinds) for number in range(jobs)}
        self.told: dict[str, list[str]] = collections.defaultdict(list)
        self.lock = threading.Lock()

    def __call__(self, request: Request) -> Reply:
        prompt = request.json["prompt"]
        with self.lock:
            again = bool(self.told[prompt])
            kind = "ok" if again else self.first[prompt]
            self.told[prompt].append(kind)
        time.sleep(0.05)
        return {
            "429": refusal(429, "rate_limit_exceeded", "slow", headers=[("Retry-After", "1")]),
            "503": refusal(503, "slow_down", "busy", headers=[("Retry-After", "1")]),
            "500": refusal(500, "server_error", "upstream time-out"),
            "cut": answer(picture_of(prompt))._replace(cut=60),
            "ok": answer(picture_of(prompt)),
        }[kind]


class Result(NamedTuple):
    """What a storm came to."""

    runs: int
    killed: int
    seconds: float
    posts: int
    saved: int
    wrong: int
    unknown: int
    resent: int
    codes: list[int]
    folder: Path


def storm(jobs: int, kills: int, concurrency: int, seed: int, root: Path) -> Result:
    """Run one batch to its end through so many kills."""
    weather, draw = Weather(jobs, seed), random.Random(seed)
    api = Api(otherwise=weather)
    env = clean_environment()
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        env[name] = str(root / name)
        (root / name).mkdir()
    env.update(GPT_IMAGE2_BASE_URL=api.base_url, GPT_IMAGE2_API_KEY=api.key)
    lines = [json.dumps({"prompt": prompt}) for prompt in weather.first]
    (root / "jobs.jsonl").write_text("\n".join(lines))
    argv = [sys.executable, str(SCRIPT), "batch", "jobs.jsonl", "--concurrency", str(concurrency)]
    started, killed, codes = time.monotonic(), 0, []
    log = (root / "stderr.txt").open("wb")
    while True:
        tool = subprocess.Popen(argv, cwd=root, env=env, stdout=log, stderr=log)
        if killed < kills:
            before = len(api.posts)
            after = before + draw.randint(0, max(2, (jobs - before) // (kills - killed)))
            pause = draw.random() * 0.1
            while tool.poll() is None and len(api.posts) < after:
                time.sleep(0.002)
            time.sleep(pause)
            if tool.poll() is None:
                os.kill(tool.pid, signal.SIGKILL)
                killed += 1
        codes.append(tool.wait())
        if killed >= kills and codes[-1] >= 0:
            break
    log.close()
    seconds = time.monotonic() - started
    saved = collections.Counter(path.read_bytes() for path in (root / "jobs").glob("*.png"))
    due = {picture_of(prompt): prompt for prompt in weather.first}
    wrong = sum(saved.values()) - len(set(saved) & set(due))
    states = {}
    for line in (root / "jobs" / "results.jsonl").read_text().splitlines():
        entry = json.loads(line)
        states[entry["identity"]] = entry["state"]
    unknown = sum(state in ("unknown", "sent") for state in states.values())
    resent = sum(any(kind in FINAL for kind in told[:-1]) for told in weather.told.values())
    posts = len(api.posts)
    api.close()
    return Result(
        len(codes), killed, seconds, posts, len(saved), wrong, unknown, resent, codes, root / "jobs"
    )


def main() -> None:
    """Print the table of one storm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the folder to be looked at")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="gpt-image-2-storm-"))
    kinds = collections.Counter(Weather(args.jobs, args.seed).first.values())
    result = storm(args.jobs, args.kills, args.concurrency, args.seed, root)
    rows = [
        ("jobs", args.jobs),
        ("first answers", ", ".join(f"{kind} {kinds[kind]}" for kind in sorted(kinds))),
        ("runs, of these killed", f"{result.runs}, {result.killed}"),
        ("exit codes", " ".join(map(str, result.codes))),
        ("seconds", f"{result.seconds:.1f}"),
        ("POSTs", result.posts),
        ("pictures saved", result.saved),
        ("pictures twice or foreign", result.wrong),
        ("jobs of unknown outcome", result.unknown),
        ("jobs sent again after an outcome that may be billed", result.resent),
    ]
    for name, value in rows:
        print(f"| {name} | {value} |")
    if args.keep:
        print(root)
    else:
        shutil.rmtree(root)
    lost = args.jobs - result.saved - result.unknown
    sys.exit(bool(result.resent or result.wrong or lost))


if __name__ == "__main__":
    main()
