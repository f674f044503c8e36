"""A nursery of tools: one interpreter that has read the script, and forks for every run of it.

    nursery = Nursery(SCRIPT, environment)
    tool = nursery.start(["generate", "a fox"], stdin=source, env=environment, cwd=folder)
    out, err = tool.communicate(timeout=60)

Starting Python, importing modules and compiling the script takes longer than most runs do; here it
is done once. Each run is a process of its own all the same, with its own pid, pipes, signals and
end, and it finds what a fresh interpreter would find: argv, environment, folder, streams, signals.

Three things differ, and TESTS_SPAWN=plain takes them all away, by starting every run afresh:

  * the script has been run up to its `if __name__ == "__main__"`, in the nursery's environment;
  * all that it imports anywhere is imported, so that a module it forgot may seem to be there;
  * sys.exit(NUMBER) flushes and leaves at once, without taking down the interpreter.

This file is both sides: tests import it, and it runs itself as the nursery, in which no thread ever
runs. The nursery ends when its socket does, so with the process that started it.
"""

from __future__ import annotations

import array
import ast
import atexit
import gc
import io
import json
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import CodeType, ModuleType
from typing import IO, Any, Mapping, NamedTuple, Sequence

SIZE = struct.Struct("=Q")  # of a request, before it
WORD = struct.Struct("=i")  # of an answer: first the pid, in the end the status of wait()
INHERITED = [  # where a parent ignores them
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
    if hasattr(signal, name)
]


# ---- The side of the tests --------------------------------------------------------------------


class Nursling:
    """A run of the script: what the tests use of subprocess.Popen."""

    stdin = None

    def __init__(
        self, args: list[str], line: socket.socket, stdout: IO[bytes], stderr: IO[bytes] | None
    ) -> None:
        self.args = args
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None
        self._line = line
        self._said: list[list[bytes]] = [[], []]
        self.pid = self._word()

    def poll(self) -> int | None:
        """Return the exit code, minus the number of the signal that killed it, or None."""
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit code; raise TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Read both streams to their ends, and wait; what was read before a timeout is kept."""
        end = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for stream, said in zip((self.stdout, self.stderr), self._said):
                if stream and not stream.closed:
                    selector.register(stream, selectors.EVENT_READ, (stream, said))
            while selector.get_map():
                left = None if end is None else end - time.monotonic()
                if left is not None and left < 0:
                    out, err = (b"".join(said) for said in self._said)
                    raise subprocess.TimeoutExpired(self.args, timeout or 0, out, err)
                for key, _ in selector.select(left):
                    readable, said = key.data
                    piece = os.read(key.fd, 65536)
                    said.append(piece)
                    if not piece:
                        selector.unregister(readable)
                        readable.close()
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        out, err = (b"".join(said) for said in self._said)
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass  # it ended just now

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _end(self) -> None:
        status = self._word()
        self.returncode = exit_code(status)
        self._line.close()

    def _word(self) -> int:
        word = received(self._line, WORD.size)
        if word is None:
            self.returncode = -signal.SIGKILL  # nobody will ever tell
            self._line.close()
            raise RuntimeError("the nursery is dead")
        return int(WORD.unpack(word)[0])


def exit_code(status: int) -> int:
    """Return what Popen makes of a status of wait()."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


class Nursery:
    """The interpreter that forks, as the tests see it; any thread may start a run."""

    def __init__(self, script: Path, env: Mapping[str, str]) -> None:
        self.script, self.env = script, dict(env)
        self.stamp = stamp(script)  # before it is read
        self._lock = threading.Lock()
        self._door, inside = socket.socketpair()
        with inside:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(inside.fileno()), str(script)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self.env,
                pass_fds=[inside.fileno()],
            )
        self.ready = received(self._door, 1) is not None  # or the script can't be run at all

    @property
    def fresh(self) -> bool:
        """Whether it has read the script as it is now, and lives if it could."""
        lives = self.process.poll() is None or not self.ready
        return lives and self.stamp == stamp(self.script)

    def start(
        self,
        argv: Sequence[str],
        *,
        stdin: IO[bytes],
        stderr: int | None = None,
        env: Mapping[str, str],
        cwd: str | os.PathLike[str],
    ) -> Nursling:
        """Start a run of the script; its stderr is a pipe unless a descriptor is given."""
        args = [sys.executable, str(self.script), *argv]
        request = {
            "args": args,
            "env": dict(env),
            "cwd": os.fspath(cwd),
            "ignored": [n for n in INHERITED if signal.getsignal(n) == signal.SIG_IGN],
        }
        line, line_end = socket.socketpair()
        out, out_end = pipe()
        err, err_end = pipe() if stderr is None else (None, open(stderr, "wb", closefd=False))
        with line_end, out_end, err_end:
            handed = [file.fileno() for file in (stdin, out_end, err_end, line_end)]
            with self._lock:
                send(self._door, json.dumps(request).encode(), handed)
        return Nursling(args, line, out, err)

    def close(self) -> None:
        """End the nursery; what it has started goes on."""
        self._door.close()
        self.process.wait(20)


def pipe() -> tuple[IO[bytes], IO[bytes]]:
    """Return both ends of a pipe."""
    reader, writer = os.pipe()
    return open(reader, "rb"), open(writer, "wb")


def stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes whenever a file does."""
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


# ---- The line between them --------------------------------------------------------------------


def send(line: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
    """Send bytes, and file descriptors with them (socket.send_fds came with Python 3.9)."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    line.sendmsg([SIZE.pack(len(data))], [rights])
    line.sendall(data)


def receive(line: socket.socket) -> tuple[bytes, list[int]] | None:
    """Return the bytes and descriptors of one send(); None at the end."""
    descriptors = array.array("i")
    head, rights, _, _ = line.recvmsg(SIZE.size, socket.CMSG_SPACE(16 * descriptors.itemsize))
    for level, kind, data in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    body = received(line, SIZE.unpack(head)[0]) if len(head) == SIZE.size else None
    return None if body is None else (body, list(descriptors))


def received(line: socket.socket, size: int) -> bytes | None:
    """Return so many bytes; None if the line ends before."""
    data = b""
    while len(data) < size:
        piece = line.recv(size - len(data))
        if not piece:
            return None
        data += piece
    return data


# ---- The nursery's side -----------------------------------------------------------------------


class Request(NamedTuple):
    """What a forked process has to become."""

    args: list[str]
    env: dict[str, str]
    cwd: str
    ignored: list[int]
    streams: list[int]


class Script(NamedTuple):
    """The script, all of it run but its last statement, `if __name__ == "__main__": ...`."""

    module: ModuleType
    last: CodeType


def prepared(path: str) -> Script:
    """Read the script and do what each run of it would do first: imports, classes, tables."""
    with open(path, "rb") as file:
        tree = ast.parse(file.read(), path)
    last = tree.body.pop()
    if not (isinstance(last, ast.If) and "__main__" in ast.dump(last.test)):
        raise ValueError(f"{path} doesn't end in: if __name__ == '__main__'")
    module = ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=__builtins__, __cached__=None)
    exec(compile(tree, path, "exec", dont_inherit=True), module.__dict__)  # noqa: S102
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bring_in(*(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and node.module:
            bring_in(node.module)
    del tree, node
    gc.collect()
    gc.freeze()  # so that no child's collector copies all this
    return Script(module, compile(ast.Module([last], []), path, "exec", dont_inherit=True))


def bring_in(*names: str) -> None:
    """Import modules that functions of the script import, where the system has them."""
    for name in names:
        try:
            __import__(name)
        except ImportError:
            pass  # the script will know


def bring_up(door: socket.socket) -> Request:
    """Fork for every request, and tell how each child ended; only in a child does it return."""
    awake, alarm = socket.socketpair()
    awake.setblocking(False)
    alarm.setblocking(False)
    signal.set_wakeup_fd(alarm.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # Ctrl-C; a child lets it through
    lines: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([door, awake], [], [])
        if awake in ready:
            awake.recv(65536)
            tell_ended(lines)
        if door in ready:
            message = receive(door)
            if message is None:
                os._exit(0)
            body, (*streams, line) = message
            request = Request(**json.loads(body), streams=streams)
            pid = os.fork()
            if pid == 0:
                for opened in (door, awake, alarm, *lines.values()):
                    opened.detach()  # become() closes them
                return request
            lines[pid] = socket.socket(fileno=line)
            tell(lines[pid], pid)
            for stream in streams:
                os.close(stream)


def tell_ended(lines: dict[int, socket.socket]) -> None:
    """Tell the ends of children, each on its line."""
    while lines:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with lines.pop(pid) as line:
            tell(line, status)


def tell(line: socket.socket, word: int) -> None:
    """Send one word to whoever started a run, if that still wants to know."""
    try:
        line.sendall(WORD.pack(word))
    except OSError:
        pass


def become(request: Request) -> None:
    """Make this process look like an interpreter that has just been started on the script."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in INHERITED:
        usual: Any = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request.ignored else usual)
    for target, stream in enumerate(request.streams):
        os.dup2(stream, target)
    os.closerange(3, 1024)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.env)
    time.tzset()
    sys.argv = request.args[1:]
    sys.orig_argv = request.args  # type: ignore[attr-defined,unused-ignore]
    sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))
    for target, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        setattr(sys, name, stream_like(getattr(sys, name), target, mode))
        setattr(sys, f"__{name}__", getattr(sys, name))


def stream_like(model: Any, descriptor: int, mode: str) -> IO[str]:
    """Return a standard stream as the interpreter makes it, like the nursery's own."""
    unbuffered = isinstance(model.buffer, io.RawIOBase)  # PYTHONUNBUFFERED
    buffer: Any = open(descriptor, mode + "b", 0 if unbuffered else -1, closefd=False)
    getattr(buffer, "raw", buffer).name = model.name
    lines = os.isatty(descriptor) or (descriptor == 2 and sys.version_info >= (3, 9))
    stream: Any = io.TextIOWrapper(
        buffer,
        encoding=model.encoding,
        errors=model.errors,
        newline="\n",
        line_buffering=not unbuffered and lines,
        write_through=model.write_through,
    )
    stream.mode = mode
    return stream  # type: ignore[no-any-return]


def run(script: Script) -> None:
    """Run the script to its end; a plain one is made short, any other is the interpreter's."""
    sys.modules["__main__"] = script.module
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    try:
        exec(script.last, script.module.__dict__)  # noqa: S102
    except SystemExit as stop:
        if not isinstance(stop.code, int) or threading.active_count() > 1:
            raise
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            raise stop from None  # let the interpreter try, and tell
        os._exit(stop.code & 0xFF)  # without taking down, object by object, what it has from here


if __name__ == "__main__":
    DOOR = socket.socket(fileno=int(sys.argv[1]))
    try:
        SCRIPT = prepared(sys.argv[2])
    except Exception:  # noqa: BLE001  a plain run will show what is wrong with it
        sys.exit(1)
    DOOR.sendall(b".")
    become(bring_up(DOOR))
    run(SCRIPT)
