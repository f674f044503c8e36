"""The case that every test stands on: a world of temporary folders, and two ways to run the tool.

    api = self.serve_base(answer(png(8, 8)))
    run = self.check(self.run_tool("generate", "a fox"), 0)
    self.assertEqual(run.saved[0].read_bytes(), png(8, 8))
    self.assertEqual(api.posts[0].json["prompt"], "a fox")

`run_tool` calls gpt_image2.main(argv) in this process; `start_tool` starts a child, for tests in
which a process is the point. Both talk through a real curl to a real socket.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence, Union

import gpt_image2
from tests.server import Api, Script

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "gpt_image2.py"
HANG = 120.0  # seconds after which a run counts as hung; no test takes a hundredth of it

Argument = Union[str, "os.PathLike[str]"]
Child = subprocess.Popen  # the tool as a process of its own

# A shell's `&` may have us ignore Ctrl-C, and so would each tool that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# So may nohup have us ignore a hang-up; a handler keeps it from us alone.
if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


class Run(NamedTuple):
    """One run of the tool that has ended."""

    argv: list[str]
    code: int
    raw_out: bytes
    err: str

    @property
    def out(self) -> str:
        return decoded(self.raw_out)

    @property
    def saved(self) -> list[Path]:
        """The paths of the `Saved:` lines."""
        return [Path(path) for path in re.findall(r"(?m)^Saved: (.+) \(\d+ KB\)$", self.out)]

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def __str__(self) -> str:
        command = f"$ gpt_image2.py {' '.join(map(repr, self.argv))}  -> {self.code}"
        return f"{command}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


class Case(unittest.TestCase):
    """A test with folders, an environment, servers and children of its own."""

    script = SCRIPT
    launcher: Sequence[str] = ()
    """A command that starts the interpreter of each child, like `setsid`."""
    maxDiff = None

    def setUp(self) -> None:
        self.tmp = Path(os.path.realpath(tempfile.mkdtemp(prefix="gpt-image-2-test-")))
        self.addCleanup(remove_tree, self.tmp)
        self.home, self.state, self.config, self.work = (
            self.new_folder(name) for name in ("home", "state", "config", "work")
        )
        self.env = clean_environment()
        self.env.update(HOME=str(self.home), TMPDIR=str(self.new_folder("tmp")))
        self.env.update(XDG_CONFIG_HOME=str(self.config), XDG_STATE_HOME=str(self.state))
        self.servers: list[Api] = []
        self.hurried = False
        warnings.simplefilter("error", ResourceWarning)  # what the tool leaves open fails the test
        left_open: list[str] = []
        self.addCleanup(lambda: self.assertEqual(left_open, [], "left open"))
        self.addCleanup(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = lambda error: left_open.append(f"{error.exc_value!r}")
        self.addCleanup(gc.collect)

    def new_folder(self, name: str) -> Path:
        """Make a folder beside the work folder."""
        folder = self.tmp / name
        folder.mkdir()
        return folder

    def serve(self, *replies: Script, **options: Any) -> Api:
        """Start a server (replies and options: see Api); it is checked when the test ends."""
        api = Api(*replies, **options)
        self.servers.append(api)
        self.addCleanup(api.check)
        self.addCleanup(api.close)
        return api

    def serve_base(self, *replies: Script, **options: Any) -> Api:
        """Start a server and let the environment name it, and its key, to the tool."""
        api = self.serve(*replies, **options)
        self.env.update(GPT_IMAGE2_BASE_URL=api.base_url, GPT_IMAGE2_API_KEY=api.key)
        return api

    def configure(self, **settings: Any) -> Path:
        """Write the config file that the tool finds, and return its path."""
        path = self.config / "gpt-image-2" / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
        path.chmod(0o600)
        return path

    def run_tool(
        self,
        *argv: Argument,
        stdin: str | bytes | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: Argument | None = None,
    ) -> Run:
        """Run the tool in the work folder; `env` adds to self.env, a None there takes away.

        A call of main(), or a child where the test needs one: another script, a launcher, what an
        interpreter reads before it starts, or a hurried clock.
        """
        wanted = self._wanted(env)
        in_child = self.script != SCRIPT or self.launcher or self.hurried
        if in_child or at_start(wanted) != at_start(clean_environment()):
            return self.finish(self.start_tool(*argv, stdin=stdin, env=env, cwd=cwd))
        words = [os.fspath(word) for word in argv]
        source = stdin.encode() if isinstance(stdin, str) else stdin or b""
        with tool_process(source, wanted, cwd or self.work) as (out, err):
            code = gpt_image2.main(words)
        return Run(words, code, out.getvalue(), decoded(err.getvalue()))

    def start_tool(
        self,
        *argv: Argument,
        stdin: str | bytes | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: Argument | None = None,
        **options: Any,
    ) -> Child[bytes]:
        """Start the tool as a child and leave it running; the test's end kills it.

        `options` go to Popen. The child runs the module, whose bytecode is cached; with a launcher
        or another script it runs the script, which takes 70 ms more.
        """
        words = [os.fspath(word) for word in argv]
        wanted, start = self._wanted(env), [str(self.script)]
        if self.script == SCRIPT and not self.launcher:
            start = ["-m", "gpt_image2"]
            path = filter(None, [wanted.get("PYTHONPATH"), str(ROOT)])
            wanted["PYTHONPATH"] = os.pathsep.join(path)
        with tempfile.TemporaryFile() as source:
            source.write(stdin.encode() if isinstance(stdin, str) else stdin or b"")
            source.seek(0)
            streams = {"stdin": source, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            command = [*self.launcher, sys.executable, *start, *words]
            options = {"env": wanted, "cwd": cwd or self.work, **streams, **options}
            child = subprocess.Popen(command, **options)
        self.addCleanup(stop, child)
        return child

    def _wanted(self, env: Mapping[str, str | None] | None) -> dict[str, str]:
        merged = {**self.env, **(env or {})}
        return {name: value for name, value in merged.items() if value is not None}

    def finish(self, child: Child[bytes]) -> Run:
        """Wait until a started tool ends, and return what it said."""
        assert isinstance(child.args, list)
        start = str(self.script) if str(self.script) in child.args else "gpt_image2"
        argv = child.args[child.args.index(start) + 1 :]
        try:
            out, err = child.communicate(timeout=HANG)
        except subprocess.TimeoutExpired as late:
            so_far = Run(argv, 0, late.stdout or b"", decoded(late.stderr or b""))
            self.fail(f"no end within {HANG:.0f} s\n{self.story(so_far)}")
        return Run(argv, child.wait(), out or b"", decoded(err or b""))

    def hurry(self, times: float) -> None:
        """Let time go so many times as fast in every later run, which is a child then."""
        folder = self.new_folder("hurry")
        (folder / "sitecustomize.py").write_text(HURRY.format(times=times))
        self.env["PYTHONPATH"], self.hurried = str(folder), True

    def check(self, run: Run, code: int) -> Run:
        """Assert the exit code, and that there is no traceback; a failure tells the whole story."""
        if run.code != code or "Traceback" in run.err:
            self.fail(f"expected exit code {code} and no traceback\n{self.story(run)}")
        return run

    def story(self, run: Run) -> str:
        """Return everything known about a run: command, output, requests."""
        return "\n".join([str(run), *map(str, self.servers)])

    def no_request(self, api: Api) -> None:
        """Assert that nobody even connected to a server."""
        self.assertEqual(api.connections, 0, f"expected no request\n{api}")

    def jobs(self) -> list[Path]:
        """Return the job folders left in the state folder."""
        return sorted((self.state / "gpt-image-2" / "jobs").glob("*"))

    def listing(self, folder: Path | None = None) -> list[str]:
        """Return the files below a folder (the work folder), as sorted relative names."""
        base = folder or self.work
        found = [path for path in base.rglob("*") if path.is_symlink() or not path.is_dir()]
        return sorted(path.relative_to(base).as_posix() for path in found)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for what only polling can show, such as the size of a file that curl writes."""
        end = time.monotonic() + HANG
        while not condition():
            if time.monotonic() > end:
                self.fail(f"not so within {HANG:.0f} s")
            time.sleep(0.005)


class SystemCase(Case):
    """A case that can also look at processes, listen while a child runs, and break the system."""

    def setUp(self) -> None:
        super().setUp()
        self.heard: dict[int, bytes] = {}

    def processes(self, name: str = "") -> list[int]:
        """Return the running processes of this test (of a name): children and their curls."""
        marker = f"XDG_STATE_HOME={self.state}".encode()
        pids = {int(path.name) for path in Path("/proc").glob("[0-9]*")} - {os.getpid()}
        return [pid for pid in pids if belongs(pid, marker, name)]

    def the_curl(self) -> int:
        """Return the one curl that this test runs, once it does; skip where nobody can tell."""
        if not Path("/proc/self").exists():
            self.skipTest("needs /proc to find curl's process")
        self.wait_until(lambda: len(self.processes("curl")) == 1)
        return self.processes("curl")[0]

    def hear(self, tool: Child[bytes], text: str) -> None:
        """Wait until a child has said something on stderr; finish() gives that back."""
        assert tool.stderr
        said = b""
        while text.encode() not in said:
            ready, _, _ = select.select([tool.stderr], [], [], HANG)
            piece = os.read(tool.stderr.fileno(), 65536) if ready else b""
            if not piece:
                self.fail(f"not said: {text!r}, but:\n{decoded(said)}")
            said += piece
        self.heard[tool.pid] = self.heard.get(tool.pid, b"") + said

    def finish(self, child: Child[bytes]) -> Run:
        """Wait until a child ends; what was heard of it before is part of its run."""
        run = super().finish(child)
        return run._replace(err=decoded(self.heard.pop(child.pid, b"")) + run.err)

    def shell(self, line: str) -> None:
        """Let every later run of the tool be started by this line of sh, ending in exec "$@"."""
        self.launcher = ("sh", "-c", line, "sh")

    def jobs_anywhere(self) -> list[Path]:
        """Return the job folders in the state folder and in its stand-in below TMPDIR."""
        return self.jobs() + sorted((self.tmp / "tmp").glob("gpt-image-2-*/jobs/*"))

    def answered(self) -> int:
        """Return how many bytes of answers are in the job folders."""
        files = [path for job in self.jobs_anywhere() for path in job.glob("response.json")]
        return sum(file.stat().st_size for file in files)

    def aged(self, job: Path, days: float) -> Path:
        """Return a job folder made to look so many days old."""
        then = time.time() - days * 86400
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(then))
        old = job.rename(job.with_name(stamp + job.name[16:]))
        record = json.loads((old / "job.json").read_bytes())
        (old / "job.json").write_text(json.dumps({**record, "started": then}))
        return old

    def files_with(self, text: str) -> list[Path]:
        """Return the files, anywhere in this test's folders, that hold a text."""
        paths = filter(Path.is_file, self.tmp.rglob("*"))
        return [path for path in paths if text.encode() in path.read_bytes()]

    def small_disk(self, name: str, size: int = 65536) -> Path:
        """Return a folder that is a disk of its own, or skip where that can't be made."""
        folder = self.new_folder(name)
        self.system("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
        self.addCleanup(subprocess.run, ["umount", "--lazy", str(folder)], check=False)
        return folder

    def system(self, *command: str) -> None:
        """Run a command of the system's, or skip where it can't be done here."""
        if not shutil.which(command[0]):
            self.skipTest(f"there is no {command[0]} here")
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            reason = decoded(done.stdout + done.stderr).strip() or f"ended with {done.returncode}"
            self.skipTest(f"{' '.join(command[:2])}: {reason}")

    def heed_permissions(self) -> None:
        """Run the tool as a child that file modes bind, also where the tests run as root."""
        if sys.platform != "win32" and os.geteuid() == 0:
            bounds = "--bounding-set=-dac_override,-dac_read_search"
            self.system("setpriv", bounds, "true")
            self.launcher = ("setpriv", bounds)

    def closed_port(self) -> int:
        """Return a port that refuses connections for as long as the test runs."""
        taken = socket.socket()
        self.addCleanup(taken.close)
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])

    def certificate(self) -> Path:
        """Return a file with a key and a certificate that nobody vouches for."""
        both = self.tmp / "server.pem"
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        files = ["-keyout", str(both), "-out", str(self.tmp / "crt.pem")]
        self.system("openssl", "req", "-x509", *new_key, *names, *files)
        both.write_bytes(both.read_bytes() + (self.tmp / "crt.pem").read_bytes())
        return both


def belongs(pid: int, marker: bytes, name: str) -> bool:
    """Return whether a process has a variable in its environment, and a name if one is given."""
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return marker in variables and Path(f"/proc/{pid}/comm").read_text().startswith(name)
    return False


@contextlib.contextmanager
def tool_process(
    stdin: bytes, env: Mapping[str, str], cwd: Argument
) -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    """Let main() find the world as a process of its own would; yield its output and errors."""
    if threading.current_thread() is not threading.main_thread():
        raise AssertionError("signal handlers belong to the main thread: use start_tool here")
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    handlers = [(one, signal.getsignal(one)) for one in signal.Signals if one.name in names]
    kept = sys.stdin, sys.stdout, sys.stderr, os.getcwd(), dict(os.environ), tempfile.tempdir
    out, err = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(data, "utf-8") for data in (io.BytesIO(stdin), out, err)]
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        sys.stdin, sys.stdout, sys.stderr = streams
        tempfile.tempdir = None
        gpt_image2.SIGNALS = gpt_image2.Signals()
        yield out, err
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.stdin, sys.stdout, sys.stderr, folder, environment, tempfile.tempdir = kept
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers:
            signal.signal(number, handler)
        for stream in streams:
            stream.detach()


# Time goes faster for everything in a child: its clock, its sleeps and its waits.
HURRY = """
import selectors, time

def hurried(select):
    return lambda self, timeout=None: select(self, timeout and timeout / {times})

clock, sleep = time.monotonic, time.sleep
time.monotonic = lambda: clock() * {times}
time.sleep = lambda seconds: sleep(seconds / {times})
for name in ("SelectSelector", "PollSelector", "EpollSelector", "KqueueSelector"):
    kind = getattr(selectors, name, None)
    if kind:
        kind.select = hurried(kind.select)
"""

AT_START = re.compile(r"PYTHON.*|LC_.*|LANG|LANGUAGE|LD_.*|DYLD_.*|MALLOC_.*|GLIBC_TUNABLES")
STEERING = re.compile(
    r".*_proxy|(openai|gpt_image2|xdg|lc)_.*|lang|language|columns|lines|no_color|force_color|"
    r"curl_home|curl_ca_bundle|ssl_cert_(file|dir)|sslkeylogfile|python(?!pycacheprefix$).*",
    re.IGNORECASE,
)


def at_start(env: Mapping[str, str]) -> dict[str, str]:
    """Return what an interpreter heeds before it runs anything."""
    return {name: value for name, value in env.items() if AT_START.fullmatch(name)}


def clean_environment() -> dict[str, str]:
    """Return this process's environment without all that could steer Python, the tool or curl."""
    kept = {name: value for name, value in os.environ.items() if not STEERING.fullmatch(name)}
    return {**kept, "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}


def decoded(data: bytes) -> str:
    """Return output as text, whatever its bytes."""
    return data.decode("utf-8", "surrogateescape")


def stop(process: Child[bytes]) -> None:
    """End a child of the test's, and close its pipes."""
    if process.poll() is None:
        process.kill()
        process.wait()
    for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
        pipe.close()


def remove_tree(folder: Path) -> None:
    """Remove a folder, read-only ones in it too, even while a killed tool's curl still writes."""
    for _ in range(3):
        if folder.exists():
            for root, names, _ in os.walk(folder):  # goes into a folder only after this body
                for path in (Path(root, name) for name in names):
                    if not path.is_symlink():
                        path.chmod(0o700)
            shutil.rmtree(folder, ignore_errors=True)
