#!/usr/bin/env python3
"""Measure how fast and how small the tool is, next to curl and Python themselves.

    python3 tools/bench.py                   # the Markdown table, in about five minutes
    python3 tools/bench.py --quick           # fewer rounds
    python3 tools/bench.py start one batch   # some of the measurements

It runs a copy of the script with a venv of this Python. "Installed" is what pip makes of the tool,
a module with its bytecode and a launcher; "as a script" Python compiles the text at every start.

What is compared runs in turn (A B A B ...), and a ratio is the median of the rounds' ratios. The
first round doesn't count. The processes measured are started by a Python smaller than any of them:
a peak of memory counts what stood there before the exec.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import py_compile
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.case import SCRIPT, clean_environment
from tests.images import png_file
from tests.server import KEY, b64

MODULES = "argparse, json, re, subprocess, tempfile"
JOBS, CONCURRENCY, JOB_SECONDS = 200, 20, 1.0
MANY_JOBS = 10_000


def noise(width: int, height: int, size: int) -> bytes:
    """Return a PNG of about so many bytes: noise on top, black below."""
    stride = 1 + width * 3
    rows = [b"\0" + os.urandom(stride - 1) for _ in range(min(size // stride, height))]
    return png_file(width, height, 2, b"".join(rows) + bytes(stride * (height - len(rows))))


@functools.lru_cache(maxsize=None)
def canned(name: str) -> bytes:
    """Return the bytes of an answer, by the first name in the URL's path."""
    count, *shape = {
        "one": (1, 1024, 1024, 1_500_000),
        "ten": (10, 3840, 2160, 12_000_000),
        "job": (1, 64, 64, 12_000),
    }[name]
    images = [{"b64_json": b64(noise(*shape))} for _ in range(count)]
    body = json.dumps({"created": 1763694000, "data": images}, indent=2).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\nConnection: close\r\n\r\n" + body


class Answers(BaseHTTPRequestHandler):
    """Sends what is canned for the path of a request."""

    def do_POST(self) -> None:
        name = self.path.split("/")[1]
        self.rfile.read(int(self.headers["Content-Length"]))
        if name == "job":
            time.sleep(JOB_SECONDS)
        self.wfile.write(canned(name))

    def log_message(self, *_: object) -> None:
        pass


class Run(NamedTuple):
    """What one run took, with all children that it waited for."""

    seconds: float
    cpu: float
    mb: float


class Command(NamedTuple):
    """A command, and how many images it has to save in the folder out/."""

    argv: Sequence[str]
    images: int = 0


# Reads commands (a line each, words divided by NUL) and answers each with what it took.
SPAWNER = """
import os, sys, time
log = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
actions += [(os.POSIX_SPAWN_DUP2, log, number) for number in (1, 2)]
for line in sys.stdin:
    words = line[:-1].split("\\0")
    os.ftruncate(log, 0)
    os.lseek(log, 0, os.SEEK_SET)
    start = time.perf_counter()
    pid = os.posix_spawn(words[0], words, os.environ, file_actions=actions)
    _, status, used = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    print(status, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss, flush=True)
"""
MB = 1024 if sys.platform != "darwin" else 1024 * 1024


class Lab:
    """A folder with the tool in it, a server, and what runs and measures commands."""

    def __init__(self, root: Path, rounds: tuple[int, int, int]) -> None:
        self.root, self.work, self.out = root, root / "work", root / "work" / "out"
        self.short, self.long, self.batches = rounds
        env = {**clean_environment(), "GPT_IMAGE2_API_KEY": KEY}
        for name in ("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
            env[name] = str(root / name)
            (root / name).mkdir()
        self.out.mkdir(parents=True)
        self.forms = self.install()
        for name in ("one", "ten", "job"):
            canned(name)
        ThreadingHTTPServer.request_queue_size = 512
        server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        argv, pipe = [self.python, "-ISc", SPAWNER, str(root / "log.txt")], subprocess.PIPE
        self.spawner = subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, text=True, env=env, cwd=self.work
        )

    def install(self) -> dict[str, list[str]]:
        """Make a venv, and in it what pip would; return the two ways to start the tool."""
        folder = self.root / "venv"
        venv.create(str(folder), symlinks=True)
        self.python = str(folder / "bin" / "python")
        packages = next(folder.glob("lib/python*/site-packages"))
        py_compile.compile(str(shutil.copy(str(SCRIPT), str(packages))), doraise=True)
        launcher = folder / "bin" / "gpt-image2"
        text = f"#!{self.python}\nimport sys\nfrom gpt_image2 import main\nsys.exit(main())\n"
        launcher.write_text(text)
        launcher.chmod(0o755)
        self.script = str(shutil.copy(str(SCRIPT), str(self.root)))
        return {"installed": [str(launcher)], "as a script": [self.python, self.script]}

    def run(self, command: Command) -> Run:
        """Run a command and check what it saved; out/ is empty before."""
        shutil.rmtree(self.out)
        self.out.mkdir()
        os.sync()  # what other runs have written is not this one's to wait for
        assert self.spawner.stdin
        self.spawner.stdin.write("\0".join(command.argv) + "\n")
        self.spawner.stdin.flush()
        assert self.spawner.stdout
        status, seconds, cpu, memory = map(float, self.spawner.stdout.readline().split())
        saved = len(list(self.out.iterdir()))
        if status or saved != command.images:
            log = (self.root / "log.txt").read_text(encoding="utf-8", errors="replace")
            sys.exit(f"{command.argv}\nended {status:.0f}; saved {saved}\n{log[-3000:]}")
        return Run(seconds, cpu, memory / MB)

    def in_turn(self, rounds: int, *commands: Command) -> list[list[Run]]:
        """Run the commands in turn, and return the runs of each; one more round doesn't count."""
        series = [[self.run(command) for command in commands] for _ in range(rounds + 1)]
        return [list(runs) for runs in zip(*series[1:])]

    def compare(self, name: str, images: int, size: str, *limits: float) -> Iterator[Row]:
        """Compare the tool, in both forms, with curl and a Python one-liner that save the same."""
        body = json.dumps(json.dumps({"model": "gpt-image-2", "prompt": "a fox"}))
        (self.work / f"{name}.conf").write_text(
            f'url = "{self.url}/{name}/v1/images/generations"\n'
            f'header = "Authorization: Bearer {KEY}"\n'
            f'header = "Content-Type: application/json"\ndata = {body}\n'
        )
        text = (
            "import base64, json, os; "
            "[open(f'out/{number}.png', 'wb').write(base64.b64decode(item['b64_json']))"
            " for number, item in enumerate(json.load(open('answer.json'))['data'])]; "
            "os.remove('answer.json')"
        )
        python = f"{shlex.quote(self.python)} -c {shlex.quote(text)}"
        line = f"curl -sS -K {name}.conf -o answer.json && {python}"
        options = ["--n", str(images), "--size", size, "--base-url", f"{self.url}/{name}/v1"]
        words = ["generate", "a fox", *options, "-o", "out/"]
        argvs = [*([*form, *words] for form in self.forms.values()), ["/bin/sh", "-c", line]]
        commands = [Command(argv, images) for argv in argvs]
        *ours, theirs = self.in_turn(self.short if images == 1 else self.long, *commands)
        figure = f"{images} x {size} / curl + Python one-liner"
        for form, runs, limit in zip(self.forms, ours, limits):
            yield ratio(figure, form, runs, theirs, limit)
            yield Row("its peak memory", form, middle(runs, "mb"), 32, "MB")

    def batch(self, form: str, jobs: int, *options: str) -> Command:
        path = self.work / f"{jobs}.jsonl"
        path.write_text("".join(f'{{"prompt": "job {number}"}}\n' for number in range(jobs)))
        url = ["--base-url", f"{self.url}/job/v1"]
        return Command([*self.forms[form], "batch", path.name, *url, *options])


class Row(NamedTuple):
    """One line of the table: a figure, the form of the tool, and the most that it may be."""

    figure: str
    form: str
    number: float
    limit: float
    unit: str = ""
    note: str = ""

    def __str__(self) -> str:
        unit = self.unit and f" {self.unit}"
        verdict = "met" if self.number <= self.limit else "missed"
        measured = f"{self.number:.3g}{unit}{self.note}"
        return f"| {self.figure} | {self.form} | {measured} | ≤ {self.limit:g}{unit} | {verdict} |"


def middle(runs: Sequence[Run], field: str = "seconds") -> float:
    return float(statistics.median(getattr(run, field) for run in runs))


def ratio(figure: str, form: str, ours: list[Run], theirs: list[Run], limit: float) -> Row:
    """Return the median of the rounds' ratios as a line."""
    number = statistics.median(one.seconds / other.seconds for one, other in zip(ours, theirs))
    note = f" ({middle(ours) * 1000:.0f} / {middle(theirs) * 1000:.0f} ms)"
    return Row(figure, form, number, limit, "", note)


def start(lab: Lab) -> Iterator[Row]:
    form = "as a script"
    for words, before in (("--version", "pass"), ("generate --help", f"import {MODULES}")):
        text = f"{before}; compile(open({lab.script!r}, 'rb').read(), 'gpt_image2.py', 'exec')"
        commands = [*lab.forms[form], *words.split()], [lab.python, "-c", text]
        runs = lab.in_turn(lab.short, *map(Command, commands))
        yield ratio(f"`{words}` / `{before}; compile(its text)`", form, runs[0], runs[1], 1.2)


def one(lab: Lab) -> Iterator[Row]:
    return lab.compare("one", 1, "1024x1024", 1.4, 1.8)


def ten(lab: Lab) -> Iterator[Row]:
    return lab.compare("ten", 10, "3840x2160", 0.75, 0.75)


def batch(lab: Lab) -> Iterator[Row]:
    ideal = JOBS / CONCURRENCY * JOB_SECONDS
    figure = f"{JOBS} jobs of {JOB_SECONDS:g} s at concurrency {CONCURRENCY}"
    for form in lab.forms:
        options = ["--concurrency", str(CONCURRENCY), "--output-dir"]
        folders = [f"{form} {number}" for number in range(lab.batches)]
        commands = [lab.batch(form, JOBS, *options, folder) for folder in folders]
        runs = [lab.run(command) for command in commands]  # which ends the bench if a job failed
        yield Row(f"{figure}: wall / ideal", form, middle(runs) / ideal, 1.1)
        cpu = middle(runs, "cpu") / JOBS * 1000
        yield Row("CPU per job, script and curl together", form, cpu, 12, "ms")
        (again,) = lab.in_turn(lab.long, commands[0])
        yield Row("the same batch again, all done", form, middle(again), 1, "s")


def dry_run(lab: Lab) -> Iterator[Row]:
    for form in lab.forms:
        (runs,) = lab.in_turn(lab.long, lab.batch(form, MANY_JOBS, "--dry-run"))
        yield Row(f"--dry-run of {MANY_JOBS:,} jobs", form, middle(runs), 2, "s")
        yield Row("its peak memory", form, middle(runs, "mb"), 48, "MB")


MEASUREMENTS: dict[str, Callable[[Lab], Iterator[Row]]] = {
    function.__name__.replace("_", "-"): function for function in (start, one, ten, batch, dry_run)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--quick", action="store_true", help="few rounds")
    args = parser.parse_args()
    if not set(args.names) <= set(MEASUREMENTS):
        parser.error(f"choose from {', '.join(MEASUREMENTS)}")
    curl = subprocess.run(["curl", "--version"], stdout=subprocess.PIPE, check=True).stdout.split()
    print(f"Python {platform.python_version()}, curl {curl[1].decode()}, {platform.platform()},")
    print(f"{os.cpu_count()} CPUs, load before {os.getloadavg()[0]:.2f}\n")
    print("| figure | tool | measured | goal | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="gpt-image-2-bench-") as folder:
        lab = Lab(Path(os.path.realpath(folder)), (5, 3, 1) if args.quick else (21, 9, 3))
        for name in args.names or MEASUREMENTS:
            for row in MEASUREMENTS[name](lab):
                print(row, flush=True)
        lab.spawner.communicate()


if __name__ == "__main__":
    main()
