"""How fast and how small the tool is, next to curl and Python themselves; not part of the tests.

    python3 tests/bench.py                 # the Markdown table, in about five minutes
    python3 tests/bench.py --only one      # one row; --help names them
    python3 tests/bench.py --quick --json

Everything runs on a copy of the script in a temporary folder, with a venv of this Python: there
the packages of this machine don't slow the start. "Installed" is what pip makes of the tool, a
module with its bytecode and a launcher; "as a script" Python compiles the text at every start.

What is compared runs in turn (A B A B ...), and a ratio is the median of the rounds' ratios. The
first round doesn't count. Each run leaves the pictures on the disk and no answer. The server is a
process of its own. The processes measured are started by a Python smaller than any of them: a
peak of memory counts what stood there before the exec.
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
import socket
import subprocess
import sys
import tempfile
import threading
import time
import venv
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.pictures import png_file
from tests.support import KEY, SCRIPT, b64, clean_environment

MODULES = "argparse, json, re, subprocess, tempfile"
JOBS = 200
CONCURRENCY = 20
JOB_SECONDS = 1.0
MANY_JOBS = 10_000
SAME_MEMORY = 1.0  # MB between one picture and ten that count as the same


# ---- The server -------------------------------------------------------------------------------


def noise(width: int, height: int, size: int) -> bytes:
    """Return a PNG of about so many bytes: noise on top, black below."""
    stride = 1 + width * 3
    rows = [b"\0" + os.urandom(stride - 1) for _ in range(min(size // stride, height))]
    return png_file(width, height, 2, b"".join(rows) + bytes(stride * (height - len(rows))))


ANSWERS: dict[str, Callable[[], list[bytes]]] = {  # by the first name in the URL's path
    "one": lambda: [noise(1024, 1024, 1_500_000)],
    "ten": lambda: [noise(3840, 2160, 12_000_000) for _ in range(10)],
    "job": lambda: [noise(64, 64, 12_000)],
}


@functools.lru_cache(maxsize=None)
def canned(name: str) -> bytes:
    """Return the bytes of one answer."""
    pictures = [{"b64_json": b64(picture)} for picture in ANSWERS[name]()]
    body = json.dumps({"created": 1763694000, "data": pictures}, indent=2).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\nConnection: close\r\n\r\n" + body


def serve() -> None:
    """Answer every request on 127.0.0.1 until standard input ends; the port goes to stdout."""
    for name in ANSWERS:
        canned(name)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
    sys.stdin.read()


def accept(listener: socket.socket) -> None:
    """Give every connection a thread."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=reply, args=(connection,), daemon=True).start()


def reply(connection: socket.socket) -> None:
    """Read one request and send what is canned for its path."""
    with connection, connection.makefile("rb") as reader:
        name, length = reader.readline().split(b"/")[1].decode(), 0
        while True:
            line = reader.readline().lower().strip()
            if not line:
                break
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        reader.read(length)
        if name == "job":
            time.sleep(JOB_SECONDS)
        connection.sendall(canned(name))
        connection.shutdown(socket.SHUT_WR)
        reader.read()


# ---- Running and measuring --------------------------------------------------------------------


class Run(NamedTuple):
    """What one run took, with all children that it waited for."""

    seconds: float
    cpu: float
    mb: float


class Command(NamedTuple):
    """A command, and the pictures it has to save in the folder out/: how many, of what size."""

    argv: Sequence[str]
    pictures: int = 0
    least: int = 0


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
KILOBYTES = 1 / 1024 if sys.platform != "darwin" else 1 / 1024 / 1024


class Lab:
    """A folder with the tool in it, a server, and what runs and measures commands."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work, self.out = root / "work", root / "work" / "out"
        env = clean_environment()
        for name in ("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
            env[name] = str(root / name)
            (root / name).mkdir()
        self.out.mkdir(parents=True)
        self._install()
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = f"http://127.0.0.1:{heard(self.server)}"
        self.spawner = subprocess.Popen(
            [self.python, "-ISc", SPAWNER, str(root / "log.txt")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**env, "GPT_IMAGE2_API_KEY": KEY},
            cwd=self.work,
        )

    def _install(self) -> None:
        """Make the venv, and in it what pip would: the module, its bytecode and a launcher."""
        folder = self.root / "venv"
        venv.create(str(folder), symlinks=True)
        self.python = str(folder / "bin" / "python")
        self.script = str(shutil.copy(SCRIPT, self.root))
        packages = next(folder.glob("lib/python*/site-packages"))
        py_compile.compile(str(shutil.copy(SCRIPT, packages)), doraise=True)
        launcher = folder / "bin" / "gpt-image2"
        launcher.write_text(
            f"#!{self.python}\nimport sys\nfrom gpt_image2 import main\n"
            'if __name__ == "__main__":\n    sys.exit(main())\n'
        )
        launcher.chmod(0o755)
        self.forms = {"installed": [str(launcher)], "as a script": [self.python, self.script]}

    def close(self) -> None:
        """End the processes."""
        for process in (self.spawner, self.server):
            process.communicate()

    def run(self, command: Command) -> Run:
        """Run a command and check what it saved; out/ is empty before."""
        shutil.rmtree(self.out)
        self.out.mkdir()
        os.sync()  # what other runs have written is not this one's to wait for
        assert self.spawner.stdin
        self.spawner.stdin.write("\0".join(command.argv) + "\n")
        self.spawner.stdin.flush()
        status, seconds, cpu, memory = map(float, heard(self.spawner).split())
        sizes = [path.stat().st_size for path in self.out.iterdir()]
        saved = len(sizes) == command.pictures and all(size >= command.least for size in sizes)
        if status or (command.pictures and not saved):
            log = (self.root / "log.txt").read_text(encoding="utf-8", errors="replace")
            sys.exit(
                f"{shlex.join(command.argv)}\nended {status:.0f}; saved {sizes}\n{log[-3000:]}"
            )
        return Run(seconds, cpu, memory * KILOBYTES)

    def in_turn(self, rounds: int, *commands: Command) -> list[list[Run]]:
        """Run the commands in turn, and return the runs of each; one more round doesn't count."""
        series = [[self.run(command) for command in commands] for _ in range(rounds + 1)]
        return [list(runs) for runs in zip(*series[1:])]

    def compiling(self, before: str) -> Command:
        """Return a Python that does something and then compiles the script's text."""
        text = f"{before}; compile(open({self.script!r}, 'rb').read(), 'gpt_image2.py', 'exec')"
        return Command([self.python, "-c", text])

    def shell(self, text: str, pictures: int, least: int) -> Command:
        """Return a shell command."""
        return Command([shutil.which("sh") or "/bin/sh", "-c", text], pictures, least)

    def curl(self, name: str) -> str:
        """Return the curl command that gets an answer into answer.json."""
        body = json.dumps(json.dumps({"model": "gpt-image-2", "prompt": "a fox"}))
        config = self.work / f"{name}.conf"
        config.write_text(
            f'url = "{self.url}/{name}/v1/images/generations"\n'
            f'header = "Authorization: Bearer {KEY}"\n'
            'header = "Content-Type: application/json"\n'
            f"data = {body}\n"
        )
        return f"curl -sS -K {name}.conf -o answer.json"

    def one_liner(self, name: str, pictures: int, least: int) -> Command:
        """Return curl with a Python one-liner that saves what it got."""
        text = (
            "import base64, json, os; "
            "[open(f'out/{number}.png', 'wb').write(base64.b64decode(item['b64_json']))"
            " for number, item in enumerate(json.load(open('answer.json'))['data'])]; "
            "os.remove('answer.json')"
        )
        words = shlex.join([self.python, "-c", text])
        return self.shell(f"{self.curl(name)} && {words}", pictures, least)

    def written(self, name: str, pictures: int, least: int) -> Command:
        """Return curl, and after it files of that size written and synced."""
        text = (
            "import os; "
            f"data = open('answer.json', 'rb').read({least}); "
            f"files = [open(f'out/{{number}}.png', 'wb') for number in range({pictures})]; "
            "[(file.write(data), file.flush(), os.fsync(file.fileno())) for file in files]; "
            "os.remove('answer.json')"
        )
        words = shlex.join([self.python, "-ISc", text])
        return self.shell(f"{self.curl(name)} && {words}", pictures, least)

    def generate(self, form: str, name: str, pictures: int, size: str, least: int) -> Command:
        """Return the tool's own command for it."""
        options = ["--n", str(pictures), "--size", size, "--base-url", f"{self.url}/{name}/v1"]
        argv = [*self.forms[form], "generate", "a fox", *options, "-o", "out/"]
        return Command(argv, pictures, least)


def heard(process: subprocess.Popen[str]) -> str:
    """Return the next line that a helper says."""
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        sys.exit("a helper of the benchmark has ended")
    return line.strip()


# ---- The figures ------------------------------------------------------------------------------


class Value(NamedTuple):
    """A measured number and the most it may be."""

    number: float
    limit: float
    unit: str = ""
    note: str = ""

    @property
    def text(self) -> str:
        """The number as it stands in the table."""
        digits = 1 if self.unit.startswith(("MB", "ms")) else 2
        return f"{self.number:.{digits}f}{self.unit and ' ' + self.unit}{self.note}"

    @property
    def goal(self) -> str:
        """The limit as it stands in the table."""
        return f"≤ {self.limit:g}{self.unit and ' ' + self.unit}"


class Row(NamedTuple):
    """One line of the table; what counts is the first form in which the tool was run."""

    name: str
    figure: str
    forms: dict[str, list[Value]]

    def verdict(self, form: str) -> str:
        """Say whether a form meets the goal."""
        met = all(value.number <= value.limit for value in self.forms[form])
        return "met" if met else "missed"

    @property
    def cells(self) -> list[str]:
        """The line's cells."""
        first, *others = self.forms
        measured = [", ".join(value.text for value in values) for values in self.forms.values()]
        verdict = self.verdict(first)
        for form, text in zip(others, measured[1:]):
            measured[0] += f"; {form} {text}"
            if self.verdict(form) != self.verdict(first):
                verdict += f"; {form} {self.verdict(form)}"
        goal = ", ".join(value.goal for value in self.forms[first])
        return [self.figure, measured[0], goal, verdict]

    @property
    def document(self) -> dict[str, object]:
        """The line for --json."""
        forms = {
            form: {"values": [value._asdict() for value in values], "verdict": self.verdict(form)}
            for form, values in self.forms.items()
        }
        return {"name": self.name, "figure": self.figure, "forms": forms}


def median(numbers: Sequence[float]) -> float:
    """Return the middle number, or the mean of the two in the middle."""
    ordered = sorted(numbers)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else sum(ordered[middle - 1 : middle + 1]) / 2


def seconds(runs: Sequence[Run]) -> float:
    """Return the median time of runs."""
    return median([run.seconds for run in runs])


def peak(runs: Sequence[Run]) -> float:
    """Return the median of the peaks of memory of runs."""
    return median([run.mb for run in runs])


def ratio(ours: Sequence[Run], theirs: Sequence[Run], limit: float) -> Value:
    """Return the median of the rounds' ratios."""
    ratios = [one.seconds / other.seconds for one, other in zip(ours, theirs)]
    note = f" ({seconds(ours) * 1000:.0f} / {seconds(theirs) * 1000:.0f} ms)"
    return Value(median(ratios), limit, "", note)


class Bench:
    """The rows; rows that come from the same runs share them."""

    def __init__(self, lab: Lab, quick: bool) -> None:
        self.lab = lab
        self.short, self.long, self.batches = (5, 3, 1) if quick else (21, 9, 3)

    def version(self) -> Row:
        """Measure row 1."""
        ours = Command([*self.lab.forms["as a script"], "--version"])
        runs = self.lab.in_turn(self.short, ours, self.lab.compiling("pass"))
        return Row(
            "version",
            "`--version` / compiling the script's text",
            {"as a script": [ratio(runs[0], runs[1], 1.2)]},
        )

    def help(self) -> Row:
        """Measure row 2."""
        ours = Command([*self.lab.forms["as a script"], "generate", "--help"])
        runs = self.lab.in_turn(self.short, ours, self.lab.compiling(f"import {MODULES}"))
        return Row(
            "help",
            f"`generate --help` / importing {MODULES} and compiling the text",
            {"as a script": [ratio(runs[0], runs[1], 1.2)]},
        )

    @functools.cached_property
    def _one(self) -> list[list[Run]]:
        """One picture: installed, as a script, curl and Python one-liner."""
        expected = ("one", 1, "1024x1024", 1_450_000)
        ours = [self.lab.generate(form, *expected) for form in self.lab.forms]
        return self.lab.in_turn(self.short, *ours, self.lab.one_liner("one", 1, 1_450_000))

    def one(self) -> Row:
        """Measure row 3."""
        return Row(
            "one",
            "one 1024x1024 picture, start to saved / curl + Python one-liner, installed by pip",
            {"installed": [ratio(self._one[0], self._one[2], 1.4)]},
        )

    def one_script(self) -> Row:
        """Measure row 4."""
        return Row(
            "one-script",
            "the same, run as a script (Python compiles it at each start)",
            {"as a script": [ratio(self._one[1], self._one[2], 1.8)]},
        )

    @functools.cached_property
    def _ten(self) -> list[list[Run]]:
        """Ten pictures: installed, as a script, one-liner, written and synced."""
        size, least = "3840x2160", 11_900_000
        ours = [self.lab.generate(form, "ten", 10, size, least) for form in self.lab.forms]
        theirs = self.lab.one_liner("ten", 10, least), self.lab.written("ten", 10, 12_000_000)
        return self.lab.in_turn(self.long, *ours, *theirs)

    def ten(self) -> Row:
        """Measure row 5."""
        forms = zip(self.lab.forms, self._ten)
        return Row(
            "ten",
            "ten 12 MB pictures in one answer / curl + Python one-liner",
            {form: [ratio(runs, self._ten[2], 0.75)] for form, runs in forms},
        )

    def ten_floor(self) -> Row:
        """Measure row 6."""
        forms = zip(self.lab.forms, self._ten)
        return Row(
            "ten-floor",
            "the same / `curl -o` and ten 12 MB files written and synced",
            {form: [ratio(runs, self._ten[3], 1.7)] for form, runs in forms},
        )

    def memory(self) -> Row:
        """Measure row 7."""
        forms = {}
        for form, ten, one in zip(self.lab.forms, self._ten, self._one):
            more = peak(ten) - peak(one)
            distance = Value(abs(more), SAME_MEMORY, "MB from that for one picture")
            forms[form] = [Value(peak(ten), 32, "MB"), distance]
        return Row("memory", "peak memory of that", forms)

    def _batch(self, form: str, folder: str) -> Command:
        """Return the command of the batch, which saves below a folder of its own."""
        jobs = self.lab.work / "jobs.jsonl"
        jobs.write_text("".join(f'{{"prompt": "job {number}"}}\n' for number in range(JOBS)))
        url = f"{self.lab.url}/job/v1"
        options = ["--concurrency", str(CONCURRENCY), "--output-dir", folder, "--base-url", url]
        return Command([*self.lab.forms[form], "batch", jobs.name, *options])

    @functools.cached_property
    def _batches(self) -> dict[str, list[Run]]:
        """The batch from its start to its end, in both forms."""
        runs: dict[str, list[Run]] = {form: [] for form in self.lab.forms}
        for number in range(self.batches):
            for form in self.lab.forms:
                folder = self.lab.work / f"{form} {number}"
                runs[form].append(self.lab.run(self._batch(form, folder.name)))
                saved = len(list(folder.glob("*.png")))
                if saved != JOBS:
                    sys.exit(f"the batch saved {saved} pictures, not {JOBS}")
        return runs

    def wall(self) -> Row:
        """Measure row 8."""
        ideal = JOBS / CONCURRENCY * JOB_SECONDS
        return Row(
            "wall",
            f"{JOBS} jobs of {JOB_SECONDS:g} s at concurrency {CONCURRENCY}: wall / ideal",
            {form: [Value(seconds(runs) / ideal, 1.1)] for form, runs in self._batches.items()},
        )

    def cpu(self) -> Row:
        """Measure row 9."""
        forms = {}
        for form, runs in self._batches.items():
            a_job = median([run.cpu for run in runs]) / JOBS * 1000
            forms[form] = [Value(a_job, 12, "ms")]
        return Row("cpu", "CPU per batch job, script and curl together", forms)

    def again(self) -> Row:
        """Measure row 10."""
        commands = [self._batch(form, f"{form} 0") for form in self._batches]
        series = self.lab.in_turn(self.long, *commands)
        forms = {form: [Value(seconds(runs), 1, "s")] for form, runs in zip(self.lab.forms, series)}
        return Row("again", "the same batch again, all done", forms)

    def dry_run(self) -> Row:
        """Measure row 11."""
        jobs = self.lab.work / "many.jsonl"
        jobs.write_text("".join(f'{{"prompt": "job {number}"}}\n' for number in range(MANY_JOBS)))
        options = ["batch", jobs.name, "--dry-run", "--base-url", f"{self.lab.url}/job/v1"]
        commands = [Command([*words, *options]) for words in self.lab.forms.values()]
        forms = {}
        for form, runs in zip(self.lab.forms, self.lab.in_turn(self.long, *commands)):
            forms[form] = [Value(seconds(runs), 2, "s"), Value(peak(runs), 48, "MB")]
        return Row("dry-run", f"batch of {MANY_JOBS:,} jobs, --dry-run", forms)


ROWS: dict[str, Callable[[Bench], Row]] = {
    "version": Bench.version,
    "help": Bench.help,
    "one": Bench.one,
    "one-script": Bench.one_script,
    "ten": Bench.ten,
    "ten-floor": Bench.ten_floor,
    "memory": Bench.memory,
    "wall": Bench.wall,
    "cpu": Bench.cpu,
    "again": Bench.again,
    "dry-run": Bench.dry_run,
}


def circumstances() -> dict[str, str]:
    """Return what the figures were measured with."""
    curl = subprocess.run(["curl", "--version"], stdout=subprocess.PIPE, check=True).stdout.split()
    return {
        "Python": platform.python_version(),
        "curl": curl[1].decode(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "lines of gpt_image2.py": str(len(SCRIPT.read_bytes().splitlines())),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    around = circumstances()
    with tempfile.TemporaryDirectory(prefix="gpt-image-2-bench-") as folder:
        lab = Lab(Path(os.path.realpath(folder)))
        try:
            bench = Bench(lab, args.quick)
            rows = [ROWS[name](bench) for name in ([args.only] if args.only else ROWS)]
        finally:
            lab.close()
    if args.json:
        document = {**around, "rows": [row.document for row in rows]}
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return None
    print("| figure | measured | goal | |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row.cells)} |")
    print("\n" + "; ".join(f"{name}: {value}" for name, value in around.items()))
    return None


if __name__ == "__main__":
    main()
