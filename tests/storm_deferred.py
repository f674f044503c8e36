"""batch --deferred in bad weather, and its memory; not part of the tests.

    python3 tests/storm_deferred.py                  # 300 jobs, 20 kills
    python3 tests/storm_deferred.py --jobs 60 --kills 40 --seed 7
    python3 tests/storm_deferred.py --memory         # results of 1 GB against 2 MB

Of the jobs every 10th is an edit; 3 % are refused (400) whenever they are asked for, and when they
are asked for first 5 % fail (500) and 7 % expire. The tool alone is killed, at random moments and
requests; its curls live on. Batches come to their ends meanwhile. Then the same command is run
until nothing is pending or all that is left was refused. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import collections
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
from typing import Any, Iterable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.deferreds import BatchApi, lost, made, picture_of, refused
from tests.pictures import png, png_chunk
from tests.support import SCRIPT, b64, clean_environment

PHASES = 4  # submitted, fetched, the rest submitted, fetched: so many kills in each
MOST_RUNS = 20  # after the last kill


class Weather:
    """Says what becomes of each job, by a plan drawn beforehand."""

    def __init__(self, jobs: int, seed: int) -> None:
        draw = random.Random(seed)
        kinds = ["refused"] * 3 + ["failed"] * 5 + ["expired"] * 7 + ["made"] * 85
        self.kinds = {f"job {number}": draw.choice(kinds) for number in range(1, jobs + 1)}
        self.seen: dict[str, int] = collections.Counter()

    def __call__(self, line: dict[str, Any]) -> dict[str, Any]:
        prompt = line["body"]["prompt"]
        kind = self.kinds[prompt]
        again = bool(self.seen[prompt])
        self.seen[prompt] += 1
        if kind == "refused":
            return refused(400, "moderation_blocked")
        if kind == "failed" and not again:
            return refused(500, "server_error")
        if kind == "expired" and not again:
            return lost("batch_expired", "This request could not be executed before it expired.")
        return made(line)


class Result(NamedTuple):
    """What a storm came to."""

    runs: int
    kills: int
    batches: int
    twice: int  # jobs that were in two batches while neither had failed them
    saved: int
    refused: int
    lost: int  # jobs that were made and have no picture, or were neither made nor refused
    doubled: int  # pictures that are there twice, or are nobody's
    seconds: float
    codes: list[int]


def world(root: Path, api: BatchApi) -> dict[str, str]:
    """Return the environment of the runs, their folders made."""
    env = clean_environment()
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "TMPDIR"):
        env[name] = str(root / name)
        (root / name).mkdir()
    env.update(GPT_IMAGE2_BASE_URL=api.base_url, GPT_IMAGE2_API_KEY=api.key)
    return env


def await_moment(
    tool: subprocess.Popen[bytes], draw: random.Random, api: BatchApi, journal: Path
) -> None:
    """Wait for a moment to kill: a time, a request, or some lines more in the journal."""
    kind = draw.choice(("time", "request", "line"))
    limit = time.monotonic() + draw.uniform(0.1, 0.5)
    requests = len(api.requests) + draw.randint(1, 5)
    size = size_of(journal) + draw.randint(1, 40_000)
    while tool.poll() is None and time.monotonic() < limit:
        if kind == "request" and len(api.requests) >= requests:
            time.sleep(draw.random() * 0.01)
            return
        if kind == "line" and size_of(journal) >= size:
            return
        time.sleep(0.0005)


def size_of(path: Path) -> int:
    """Return the size of a file that may not be there."""
    return path.stat().st_size if path.exists() else 0


def storm(jobs: int, kills: int, seed: int, root: Path) -> Result:
    """Run one batch to its end through so many kills."""
    weather, draw = Weather(jobs, seed), random.Random(seed)
    api = BatchApi(weather)
    env = world(root, api)
    (root / "in.png").write_bytes(png(64, 64))
    lines: list[dict[str, Any]] = [{"prompt": prompt} for prompt in weather.kinds]
    for line in lines[::10]:
        line["images"] = ["in.png"]
    (root / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = [sys.executable, str(SCRIPT), "batch", "jobs.jsonl", "--deferred"]
    journal = root / "jobs" / "results.jsonl"
    started, killed, codes = time.monotonic(), 0, []

    def run(kill: bool) -> bool:
        """Run the command once; return whether it was killed."""
        with (root / "stderr.txt").open("ab") as log:
            tool = subprocess.Popen(argv, cwd=root, env=env, stdout=log, stderr=log)
            if kill:
                await_moment(tool, draw, api, journal)
                if tool.poll() is None:
                    os.kill(tool.pid, signal.SIGKILL)
            codes.append(tool.wait())
        return codes[-1] == -signal.SIGKILL

    for phase in range(1, PHASES + MOST_RUNS):
        for _ in range(kills):
            killed += killed < kills * min(phase, PHASES) // PHASES and run(True)
        run(False)
        names = [name for name in api.own() if api.batches[name]["status"] == "validating"]
        for name in names:
            expires = any(weather.kinds[prompt] == "expired" for prompt in api.prompts(name))
            api.end(name, "expired" if expires else "completed")
        if phase >= PHASES and not names and codes[-1] == codes[-2]:
            break
    seconds = time.monotonic() - started
    saved = collections.Counter(path.read_bytes() for path in (root / "jobs").glob("*.png"))
    due_pictures = {picture_of(p) for p, kind in weather.kinds.items() if kind != "refused"}
    result = Result(
        len(codes),
        killed,
        len(api.own()),
        len(api.doubled()),
        len(set(saved) & due_pictures),
        sum(kind == "refused" for kind in weather.kinds.values()),
        len(due_pictures - set(saved)),
        sum(saved.values()) - len(set(saved) & due_pictures),
        seconds,
        codes,
    )
    api.close()
    return result


def counted(codes: Iterable[int]) -> str:
    """Return how often each code came."""
    return ", ".join(f"{code} x {many}" for code, many in collections.Counter(codes).items())


def storm_table(result: Result, kinds: dict[str, str]) -> str:
    """Return a storm as a Markdown table."""
    drawn = collections.Counter(kinds.values())
    rows: list[tuple[str, object]] = [
        ("jobs", len(kinds)),
        ("of these", ", ".join(f"{kind} {drawn[kind]}" for kind in sorted(drawn))),
        ("runs", result.runs),
        ("killed (SIGKILL)", result.kills),
        ("exit codes of the others", counted(code for code in result.codes if code >= 0)),
        ("batches made", result.batches),
        ("jobs in two batches while neither had failed them", result.twice),
        ("pictures saved", result.saved),
        ("refused, final", result.refused),
        ("pictures lost", result.lost),
        ("pictures doubled or foreign", result.doubled),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


MEASURED = """
import os, sys
child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[1:]])
_, status, usage = os.wait4(child, 0)
print(usage.ru_maxrss, os.waitstatus_to_exitcode(status) if hasattr(os, "waitstatus_to_exitcode")
      else os.WEXITSTATUS(status))
"""  # a small process between: a child starts with the peak of what it was forked from


class Peak(NamedTuple):
    """What one fetch took."""

    megabytes: float  # of results
    pictures: int
    rss: float  # MB
    seconds: float


def fetch(count: int, size: int, root: Path) -> Peak:
    """Return what it takes to fetch results of `count` pictures of `size` bytes each."""
    api = BatchApi()
    env = world(root, api)
    lines = [json.dumps({"prompt": f"job {number}"}) for number in range(count)]
    (root / "jobs.jsonl").write_text("\n".join(lines))
    argv = [str(SCRIPT), "batch", "jobs.jsonl", "--deferred"]
    runs = [sys.executable, "-c", MEASURED, *argv]
    subprocess.run(runs, cwd=root, env=env, check=True, capture_output=True)
    base = picture_of("job 1")
    noise = random.Random(1).getrandbits(8 * size).to_bytes(size, "big")
    picture = base[:-12] + png_chunk(b"noIs", noise) + base[-12:]
    tail = b64(picture).encode() + b'"}]}}}\n'
    chunks: list[bytes] = []
    head = '"response": {"status_code": 200, "body": {"data": [{"b64_json": "'
    for line in api.lines():
        chunks += [f'{{"custom_id": "{line["custom_id"]}", {head}'.encode(), tail]
    api.batches["batch_0"].update(status="completed", output_file_id="file_99")
    api.streams["file_99"] = chunks
    started = time.monotonic()
    run = subprocess.run(runs, cwd=root, env=env, check=True, capture_output=True, text=True)
    seconds = time.monotonic() - started
    rss, code = run.stdout.split()[-2:]
    sizes = [path.stat().st_size for path in (root / "jobs").glob("*.png")]
    api.close()
    if int(code) or sizes != [len(picture)] * count:
        raise SystemExit(f"exit {code}, {len(sizes)} pictures\n{run.stderr}")
    scale = 1 if sys.platform == "darwin" else 1024
    return Peak(sum(map(len, chunks)) / 1e6, count, int(rss) * scale / 1e6, seconds)


def memory_table(peaks: list[Peak]) -> str:
    """Return peaks of memory as a Markdown table."""
    rows = [
        f"| {peak.megabytes:,.1f} MB | {peak.pictures} | {peak.rss:.1f} MB | {peak.seconds:.1f} |"
        for peak in peaks
    ]
    head = ["| results | pictures | peak memory of the tool | seconds |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def main() -> None:
    """Print the table of one storm, or of the memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--keep", action="store_true", help="leave the folder to be looked at")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="gpt-image-2-storm-"))
    failed = False
    try:
        if args.memory:
            peaks = []
            for count, size in ((2, 750_000), (100, 7_500_000)):
                (root / str(count)).mkdir()
                peaks.append(fetch(count, size, root / str(count)))
                shutil.rmtree(root / str(count))
            print(memory_table(peaks))
        else:
            result = storm(args.jobs, args.kills, args.seed, root)
            print(storm_table(result, Weather(args.jobs, args.seed).kinds))
            failed = bool(result.twice or result.lost or result.doubled)
    finally:
        if args.keep:
            print(root)
        else:
            shutil.rmtree(root, ignore_errors=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
