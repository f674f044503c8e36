"""The fault matrix: what a server or a system may do wrong, and what comes of it.

FAULTS is the table: each row says how something misbehaves and what is expected then. Every row is
played with a real curl, real sockets and real signals, in a folder of its own; after it `recover`
is run on what was kept. tests/test_faults.py asserts the table, and

    python3 tests/faults.py

plays it and prints what was seen as Markdown, for the README.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import unittest
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.pictures import png
from tests.support import (
    KEY,
    Api,
    Argument,
    Case,
    Child,
    Chunk,
    Reply,
    Run,
    Script,
    answer,
    b64,
    completed_event,
    decoded,
    event_stream,
    in_pieces,
    json_reply,
    page,
    partial_event,
    ranged,
    refusal,
)

FIRST, SECOND, THIRD = (png(40, 30 + i, seed=i) for i in range(3))  # about 4 KB each
LARGE = png(300, 300, seed=3)  # 270 KB, more than SMALL_DISK holds
PREVIEW = png(10, 10, seed=4)  # never to be taken for a picture
PICTURES = (FIRST, SECOND, THIRD, LARGE)
SMALL_DISK = 64 * 1024

FOX = ("generate", "a fox")
FOXES = (*FOX, "--n", "3")


# ---- A stage: the world of one fault ----------------------------------------------------------


class Outcome(NamedTuple):
    """What comes of one call: exit code, POSTs, pictures on disk, and what recover brings."""

    exit: int
    posts: int = 1
    saved: int = 0
    recover: tuple[int, int] | None = None
    """The exit code of recover, and the pictures that it saves; None: nothing is kept."""


class Seen(NamedTuple):
    """What was seen when a fault was played."""

    outcome: Outcome
    lost: int
    """Whole pictures that came, and that neither the call nor recover saved."""
    run: Run
    recovered: Run | None


class Stage(Case):
    """A case that can also look at processes, listen while the tool runs, and break the system."""

    def setUp(self) -> None:
        super().setUp()
        self.heard: dict[int, bytes] = {}
        self.repair: Callable[[], object] = lambda: None

    def play(self, fault: Fault) -> Seen:
        """Play a fault, then recover what was kept; the whole world is looked over at the end."""
        run = fault.play(self)
        saved = self.pictures(run)
        recovered = None
        if self.jobs_anywhere():
            self.repair()
            recovered = self.run_tool("recover", "--all")
        brought = self.pictures_at(recovered.saved) if recovered else set()
        brings = (recovered.code, len(brought)) if recovered else None
        posts = sum(len(api.posts) for api in self.servers)
        self.look_over(run, recovered)
        lost = max(0, fault.came - len(saved | brought))
        return Seen(Outcome(run.code, posts, len(saved), brings), lost, run, recovered)

    def look_over(self, *runs: Run | None) -> None:
        """Assert what holds whatever went wrong: no traceback, no curl left, the key nowhere."""
        for run in runs:
            if run and ("Traceback" in run.err or KEY in run.err + run.out):
                self.fail(f"a traceback, or the key\n{self.story(run)}")
        self.assertEqual(self.processes(), [], "processes are left behind")
        self.assertEqual(self.files_with(KEY), [], "the key is in a file")
        for api in self.servers:
            api.check()

    # What is on disk

    def pictures(self, run: Run) -> set[bytes]:
        """Return the known pictures that a run has left, wherever it says they are."""
        visible = [self.work / name for name in self.listing() if "/." not in f"/{name}"]
        return self.pictures_at([*visible, *run.saved])

    def pictures_at(self, paths: Sequence[Path]) -> set[bytes]:
        """Return those of PICTURES that are in these files, byte for byte."""
        found = {path.read_bytes() for path in paths if path.is_file()}
        return found & set(PICTURES)

    def jobs_anywhere(self) -> list[Path]:
        """Return the job folders in the state folder and in its stand-in below TMPDIR."""
        spare = (self.tmp / "tmp").glob("gpt-image-2-*/jobs/*")
        return self.jobs() + sorted(spare)

    def aged(self, job: Path, days: float) -> Path:
        """Return a job folder made to look so many days old."""
        then = time.time() - days * 86400
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(then))
        old = job.rename(job.with_name(stamp + job.name[16:]))
        record = json.loads((old / "job.json").read_text(encoding="utf-8"))
        text = json.dumps({**record, "started": then})
        (old / "job.json").write_text(text, encoding="utf-8")
        return old

    def answered(self) -> int:
        """Return how many bytes of answers are in the job folders."""
        sizes = []
        for job in self.jobs_anywhere():
            with contextlib.suppress(OSError):
                sizes.append((job / "response.json").stat().st_size)
        return sum(sizes)

    def files_with(self, text: str) -> list[Path]:
        """Return the files, anywhere in this world, that hold a text."""
        paths = (self.tmp / name for name in self.listing(self.tmp))
        return [path for path in paths if path.is_file() and text.encode() in path.read_bytes()]

    # Processes

    def processes(self, name: str = "") -> list[int]:
        """Return the running processes of this world (of a name): the tool and its curls."""
        marker = f"XDG_STATE_HOME={self.state}".encode()
        found = [pid for pid in all_processes() if belongs(pid, marker, name)]
        forked = [child for child in self.children if isinstance(child, Nursling) and not name]
        return found + [child.pid for child in forked if child.poll() is None]

    def the_curl(self) -> int:
        """Return the one curl that runs in this world, once it does; skip where nobody can tell."""
        if not all_processes():
            self.skipTest("needs /proc to find curl's process")
        self.wait_until(lambda: len(self.processes("curl")) == 1)
        return self.processes("curl")[0]

    def holds_lock(self, process: Child) -> bool:
        """Return whether a process has a job's lock open, which recover has while it waits."""
        if not all_processes():
            self.skipTest("needs /proc to see what a process has open")
        opened = []
        for descriptor in Path(f"/proc/{process.pid}/fd").glob("*"):
            with contextlib.suppress(OSError):  # closed meanwhile
                opened.append(os.readlink(descriptor))
        return any(name.endswith("/lock") for name in opened)

    def hear(self, tool: Child, text: str, timeout: float = 20) -> None:
        """Wait until a running tool has said something on stderr; finish() gives that back."""
        assert tool.stderr
        said = b""
        end = time.monotonic() + timeout
        while text.encode() not in said:
            ready, _, _ = select.select([tool.stderr], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(tool.stderr.fileno(), 65536) if ready else b""
            if not piece:
                self.fail(f"not said: {text!r}, but:\n{decoded(said)}")
            said += piece
        self.heard[tool.pid] = self.heard.get(tool.pid, b"") + said

    def finish(self, process: Child, timeout: float = 60) -> Run:
        """Wait until a started tool ends; what was heard of it before is part of its run."""
        run = super().finish(process, timeout)
        return run._replace(err=decoded(self.heard.pop(process.pid, b"")) + run.err)

    def through(self, *command: str) -> None:
        """Let every later run of the tool be started by a command that ends in exec "$@"."""
        self.launcher = command

    def shell(self, line: str) -> None:
        """Let every later run of the tool be started by this line of sh."""
        self.through("sh", "-c", line, "sh")

    # The system

    def small_disk(self, name: str, size: int = SMALL_DISK) -> Path:
        """Return a folder that is a disk of its own, or skip where that can't be made."""
        folder = self.tmp / name
        folder.mkdir()
        self.system("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
        self.addCleanup(subprocess.run, ["umount", "--lazy", str(folder)], check=False)
        return folder

    def system(self, *command: str) -> None:
        """Run a command of the system's, or skip where it can't be done here."""
        if not shutil.which(command[0]):
            self.skipTest(f"there is no {command[0]} here")
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode:
            reason = decoded(done.stdout).strip() or f"ended with {done.returncode}"
            self.skipTest(f"{' '.join(command[:2])}: {reason}")

    def heed_permissions(self) -> None:
        """Run the tool so that file modes bind it, also where the tests run as root."""
        if os.geteuid() == 0:
            bounds = "--bounding-set=-dac_override,-dac_read_search"
            self.system("setpriv", bounds, "true")
            self.through("setpriv", bounds)

    def closed_port(self) -> int:
        """Return a port that refuses connections for as long as the test runs."""
        taken = socket.socket()
        self.addCleanup(taken.close)
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])

    def listen(self, converse: Callable[[socket.socket], object], backlog: int = 16) -> int:
        """Give every connection to a function that speaks no HTTP; return the port."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        over = threading.Event()

        def accept() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    connection = listener.accept()[0]
                    connection.settimeout(20)
                    with connection:
                        converse(connection)

        def close() -> None:
            over.set()
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            listener.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        self.addCleanup(close)
        return int(listener.getsockname()[1])

    def certificate(self) -> Path:
        """Return a file with a key and a certificate that nobody vouches for."""
        both = self.tmp / "server.pem"
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        names = ["-subj", "/CN=localhost", "-keyout", str(both), "-out", str(self.tmp / "crt.pem")]
        self.system("openssl", "req", "-x509", *new_key, *names)
        both.write_bytes(both.read_bytes() + (self.tmp / "crt.pem").read_bytes())
        return both

    def point_at(self, url: str, **env: str) -> None:
        """Let the environment name a base URL that no Api serves, and the key."""
        self.env.update(GPT_IMAGE2_BASE_URL=url, GPT_IMAGE2_API_KEY=KEY, **env)


def all_processes() -> list[int]:
    """Return the ids of all processes, as far as the system has /proc."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def belongs(pid: int, marker: bytes, name: str) -> bool:
    """Return whether a process has a variable in its environment, and a name if one is given."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return marker in variables and Path(f"/proc/{pid}/comm").read_text().strip().startswith(
            name
        )
    except OSError:
        return False


Play = Callable[[Stage], Run]


class Fault(NamedTuple):
    """One row: how something misbehaves, how that is played, and what is expected."""

    name: str
    play: Play
    outcome: Outcome
    came: int = 0
    """Whole pictures that came: none of them may be lost."""

    @property
    def unknown(self) -> bool:
        """Whether the request may have been billed, so that no second one may be sent."""
        return self.outcome.exit == 8 or self.outcome.recover is not None


# ---- Ways to play -----------------------------------------------------------------------------


def answers(
    *replies: Script, argv: Sequence[Argument] = FOX, more: Sequence[Argument] = ()
) -> Play:
    """Play a call that gets these replies, one a POST; `more` are more options."""

    def play(stage: Stage) -> Run:
        stage.serve_base(*replies, otherwise=answer(FIRST))
        return stage.run_tool(*argv, *more)

    return play


def links(
    files: dict[str, Script | list[Script] | bytes],
    *,
    later: dict[str, bytes] | None = None,
    more: Sequence[Argument] = (),
) -> Play:
    """Play an answer of links to these files; `later` is what the links give to recover."""

    def play(stage: Stage) -> Run:
        api = stage.serve_base()
        put_all(api, files)
        api.script.append(answer(*(api.origin + path for path in files if path.endswith(".png"))))
        stage.repair = lambda: put_all(api, later or {})
        return stage.run_tool(*FOX, "--n", str(sum(p.endswith(".png") for p in files)), *more)

    return play


def put_all(api: Api, files: Any) -> None:
    """Serve files, each bytes, a reply, or a list of replies."""
    for path, script in files.items():
        api.put(path, b"" if isinstance(script, list) else script)
        if isinstance(script, list):
            api.files[path] = list(script)  # which serving uses up


def meanwhile(act: Callable[[Stage], object], argv: Sequence[Argument], *pictures: bytes) -> Play:
    """Play a call during whose answer something else happens."""

    def play(stage: Stage) -> Run:
        reply = answer(*(pictures or [FIRST]))
        stage.serve_base(in_two(reply, len(reply.body) // 2, lambda: act(stage)))
        return stage.run_tool(*argv)

    return play


def in_two(reply: Reply, at: int, between: Chunk) -> Reply:
    """Return a reply that comes in two parts, with something between them."""
    return reply._replace(chunks=[reply.body[:at], between, reply.body[at:]])


def cut_in(reply: Reply, picture: bytes) -> Reply:
    """Return a reply that is cut in the middle of one of its pictures."""
    return reply._replace(cut=middle_of(reply, picture))


def middle_of(reply: Reply, picture: bytes) -> int:
    """Return where in the body the middle of a picture's base64 is."""
    return reply.body.index(b64(picture).encode()) + len(b64(picture)) // 2


def stalled(reply: Reply, sent: int) -> Script:
    """Return a script that sends so many bytes of the body, and then nothing for ever."""
    whole = len(reply.body)
    return lambda _: reply._replace(
        chunks=[reply.body[:sent], threading.Event()], content_length=whole
    )


def drip(piece: bytes, pause: float) -> Iterator[Chunk]:
    """Yield a piece again and again, with pauses, for longer than --timeout 1."""
    for _ in range(int(3 / pause)):
        yield from (piece, lambda: time.sleep(pause))


THREE = answer(FIRST, SECOND, THIRD)
UPSTREAM = json_reply({"error": {"message": "Timed out", "type": "upstream_error", "code": None}})
CUT_END = answer(FIRST)._replace(cut=len(answer(FIRST, usage={}).body) - 2)  # ... "b64"}
BRIEF = ("--timeout", "1")
ONCE = ("--retries", "0")
NOW: Sequence[tuple[str, str]] = [("Retry-After", "0")]
HOUR = [("Retry-After", "3600")]
NOTHING_CAME = (10, 0)  # what recover says of a kept job without a picture


# ---- Networks that fail -----------------------------------------------------------------------


def refused_connection(stage: Stage) -> Run:
    stage.point_at(f"http://127.0.0.1:{stage.closed_port()}/v1")
    return stage.run_tool(*FOX, *ONCE)


def late_server(stage: Stage) -> Run:
    """Nothing listens at the first try; the second one is answered."""
    api = stage.serve(answer(FIRST))
    door = socket.socket()
    stage.addCleanup(door.close)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    door.bind(("127.0.0.1", 0))  # bound, but not listening: connections are refused
    stage.point_at(f"http://127.0.0.1:{door.getsockname()[1]}/v1")
    tool = stage.start_tool(*FOX)
    stage.hear(tool, "trying again")
    door.listen()
    threading.Thread(target=pass_on, args=(door, api.port), daemon=True).start()
    return stage.finish(tool)


def pass_on(door: socket.socket, port: int) -> None:
    """Connect the next caller to a port, both ways, until the answer has ended."""
    caller = door.accept()[0]
    server = socket.create_connection(("127.0.0.1", port))
    with caller, server:
        other = {caller: server, server: caller}
        while True:
            for end in select.select([caller, server], [], [], 20)[0]:
                data = end.recv(65536)
                if not data:
                    return
                other[end].sendall(data)


def unknown_host(stage: Stage) -> Run:
    stage.point_at("https://api.invalid/v1")
    return stage.run_tool(*FOX, *ONCE)


def silent_connect(stage: Stage) -> Run:
    """A listener whose queue is full drops what knocks."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    stage.addCleanup(listener.close)
    for _ in range(4):
        knocking = socket.socket()
        stage.addCleanup(knocking.close)
        knocking.setblocking(False)
        knocking.connect_ex(listener.getsockname())
    stage.point_at(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
    return stage.run_tool(*FOX, *ONCE, "--connect-timeout", "1")


def silent_tls(stage: Stage) -> Run:
    port = stage.listen(lambda connection: connection.recv(65536) and connection.recv(65536))
    stage.point_at(f"https://127.0.0.1:{port}/v1")
    return stage.run_tool(*FOX, *ONCE, "--connect-timeout", "1")


def tls_to_a_plain_port(stage: Stage) -> Run:
    def converse(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    stage.point_at(f"https://127.0.0.1:{stage.listen(converse)}/v1")
    return stage.run_tool(*FOX, *ONCE)


def self_signed(stage: Stage) -> Run:
    stage.point_at(f"https://localhost:{tls_port(stage)}/v1")
    return stage.run_tool(*FOX)


def plain_http_to_a_tls_port(stage: Stage) -> Run:
    stage.point_at(f"http://127.0.0.1:{tls_port(stage)}/v1")
    return stage.run_tool(*FOX)


def tls_port(stage: Stage) -> int:
    """Return a port that takes nothing but TLS, under a certificate that nobody trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(stage.certificate())

    def converse(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as speaking:
            speaking.recv(65536)

    return stage.listen(converse)


def proxy_down(stage: Stage) -> Run:
    proxy = f"http://127.0.0.1:{stage.closed_port()}"
    stage.point_at("https://relay.example/v1", GPT_IMAGE2_PROXY=proxy)
    return stage.run_tool(*FOX, *ONCE)


def proxy_refuses(stage: Stage) -> Run:
    def converse(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

    proxy = f"http://127.0.0.1:{stage.listen(converse)}"
    stage.point_at("https://relay.example/v1", GPT_IMAGE2_PROXY=proxy)
    return stage.run_tool(*FOX, *ONCE)


def link_to_this_machine(stage: Stage) -> Run:
    """The base is elsewhere (behind a proxy), its answer points at a port of this machine."""
    api = stage.serve_base()
    api.script.append(answer(api.put("/fox.png", FIRST)))
    elsewhere = {"GPT_IMAGE2_PROXY": api.origin, "GPT_IMAGE2_ALLOW_HTTP": "1"}
    stage.point_at("http://relay.example/v1", **elsewhere)
    run = stage.run_tool(*FOX)
    stage.assertEqual(api.gets, [], "the link was followed")
    return run


# ---- Systems that fail ------------------------------------------------------------------------


def no_curl(stage: Stage) -> Run:
    stage.serve_base()
    stage.env["PATH"] = str(stage.home)
    return stage.run_tool(*FOX)


def target_exists(stage: Stage) -> Run:
    stage.serve_base()
    (stage.work / "fox.png").write_bytes(b"mine")
    return stage.run_tool(*FOX, "-o", "fox.png")


def claim_the_name(stage: Stage) -> None:
    (stage.work / "fox.png").write_bytes(b"mine")


def remove_the_folder(stage: Stage) -> None:
    shutil.rmtree(stage.work / "out")


def block_the_folder(stage: Stage) -> None:
    """Put a file where the output folder was; recover finds it away again."""
    remove_the_folder(stage)
    (stage.work / "out").write_bytes(b"")
    stage.repair = (stage.work / "out").unlink


def folder_gone(stage: Stage) -> Run:
    (stage.work / "out").mkdir()
    return meanwhile(remove_the_folder, (*FOX, "-o", "out/fox.png"))(stage)


def folder_blocked(stage: Stage) -> Run:
    (stage.work / "out").mkdir()
    return meanwhile(block_the_folder, (*FOX, "-o", "out/fox.png"))(stage)


def folder_read_only(stage: Stage) -> Run:
    stage.serve_base()
    stage.heed_permissions()
    (stage.work / "out").mkdir(0o500)
    return stage.run_tool(*FOX, "-o", "out/fox.png")


def folder_made_read_only(stage: Stage) -> Run:
    stage.heed_permissions()
    folder = stage.work / "out"
    folder.mkdir()
    stage.repair = lambda: folder.chmod(0o700)
    return meanwhile(lambda _: folder.chmod(0o500), (*FOX, "-o", "out/fox.png"))(stage)


def full_disk(stage: Stage) -> Run:
    """The picture doesn't fit; recover finds a larger disk."""
    disk = stage.small_disk("disk")
    stage.repair = lambda: stage.system("mount", "-o", "remount,size=8m", str(disk))
    return answers(answer(LARGE), more=("-o", disk / "fox.png"))(stage)


def full_state_disk(stage: Stage) -> Run:
    use_state(stage, stage.small_disk("state-disk"))
    fill_up(stage.state)
    return with_a_warning(stage)


def small_state_disk(stage: Stage) -> Run:
    """The state folder has room for a job, but not for its answer."""
    use_state(stage, stage.small_disk("state-disk"))
    return answers(answer(LARGE))(stage)


def state_disk_fills_up(stage: Stage) -> Run:
    """Two of three pictures are on the disk when it becomes full."""
    use_state(stage, stage.small_disk("state-disk", 128 * 1024 * 1024))
    part, rest = THREE.body[: middle_of(THREE, THIRD)], THREE.body[middle_of(THREE, THIRD) :]
    two = THREE.body.index(b64(SECOND).encode()) + len(b64(SECOND)) + 1

    def fill() -> None:
        stage.wait_until(lambda: stage.answered() >= two)
        fill_up(stage.state)

    more = b"A" * 65_536 + rest  # so that the third can't end in what is left of the last block
    return answers(THREE._replace(chunks=[part, fill, more]), argv=FOXES)(stage)


def state_unwritable(stage: Stage) -> Run:
    (stage.tmp / "file").write_bytes(b"")
    use_state(stage, stage.tmp / "file" / "state")
    return with_a_warning(stage)


def no_state_at_all(stage: Stage) -> Run:
    (stage.tmp / "file").write_bytes(b"")
    use_state(stage, stage.tmp / "file" / "state")
    blocked = stage.tmp / "tmp" / f"gpt-image-2-{os.getuid()}"
    blocked.write_bytes(b"")
    stage.serve_base()
    return stage.run_tool(*FOX)


def use_state(stage: Stage, folder: Path) -> None:
    stage.state = folder
    stage.env["XDG_STATE_HOME"] = str(folder)


def fill_up(disk: Path) -> None:
    """Leave no byte free on a disk."""
    with open(disk / "filler", "ab", buffering=0) as filler:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(size))


def with_a_warning(stage: Stage) -> Run:
    """Run a call that must say that it keeps its job elsewhere."""
    run = answers(answer(FIRST))(stage)
    stage.assertIn("warning", run.err)
    return run


def streams(line: str) -> Play:
    """Play a call that is started by a line of sh."""

    def play(stage: Stage) -> Run:
        stage.serve_base(answer(FIRST))
        stage.shell(line)
        return stage.run_tool(*FOX)

    return play


def stdout_closed_pipe(stage: Stage) -> Run:
    stage.serve_base(answer(FIRST))
    tool = stage.start_tool(*FOX)
    assert tool.stdout
    tool.stdout.close()
    return stage.finish(tool)


# ---- Signals ----------------------------------------------------------------------------------


def before_a_byte(number: int) -> Play:
    """Play a signal while the server has the request and has said nothing."""

    def play(stage: Stage) -> Run:
        api = stage.serve_base(answer(FIRST)._replace(before=threading.Event()))
        tool = stage.start_tool(*FOX)
        api.wait_for_request()
        tool.send_signal(number)
        return stage.finish(tool)

    return play


def mid_answer(number: int, *, finishes: bool) -> Play:
    """Play a signal after the first bytes of an answer; the rest then comes, or never does."""

    def play(stage: Stage) -> Run:
        tool, release = held_mid_answer(stage)
        tool.send_signal(number)
        if finishes:
            release.set()
        return stage.finish(tool)

    return play


def held_mid_answer(stage: Stage, *more: Argument) -> tuple[Child, threading.Event]:
    """Return a call that has two of three pictures, and the Event that lets the third come."""
    release = threading.Event()
    middle = middle_of(THREE, THIRD)
    stage.serve_base(in_two(THREE, middle, release))
    tool = stage.start_tool(*FOXES, *more)
    stage.wait_until(lambda: stage.answered() >= middle)
    return tool, release


def waits_in_vain(stage: Stage) -> Run:
    """Stop a call whose answer stays away; the 10 s that it gets pass in one."""
    stage.hurry(10)
    return mid_answer(signal.SIGTERM, finishes=False)(stage)


def second_signal(stage: Stage) -> Run:
    tool, _ = held_mid_answer(stage)
    tool.send_signal(signal.SIGINT)
    stage.hear(tool, "10 s")
    tool.send_signal(signal.SIGINT)
    return stage.finish(tool)


def hammered(stage: Stage) -> Run:
    tool, _ = held_mid_answer(stage)
    while tool.poll() is None:
        tool.send_signal(signal.SIGINT)
        time.sleep(0.01)
    run = stage.finish(tool)
    return run._replace(code=130) if run.code == -signal.SIGINT else run  # one to a shell


def while_waiting_to_retry(stage: Stage) -> Run:
    stage.serve_base(refusal(429, "rate_limit_exceeded", "Slow.", headers=[("Retry-After", "60")]))
    tool = stage.start_tool(*FOX)
    stage.hear(tool, " 60")
    tool.send_signal(signal.SIGINT)
    return stage.finish(tool)


def while_downloading(stage: Stage) -> Run:
    api = stage.serve_base()
    link = api.put("/fox.png", Reply(before=threading.Event()))
    api.script.append(answer(link))
    tool = stage.start_tool(*FOX)
    api.wait_for_request(2)
    stage.repair = lambda: put_all(api, {"/fox.png": FIRST})
    tool.send_signal(signal.SIGINT)
    return stage.finish(tool)


def hang_up_under_nohup(stage: Stage) -> Run:
    release = threading.Event()
    api = stage.serve_base(answer(FIRST)._replace(before=release))
    stage.shell('trap "" HUP; exec "$@"')
    tool = stage.start_tool(*FOX)
    api.wait_for_request()
    tool.send_signal(signal.SIGHUP)
    release.set()
    return stage.finish(tool)


def killed_before_a_byte(stage: Stage) -> Run:
    release = threading.Event()
    run = kill_the_tool(stage, release)
    release.set()
    return run


def kill_the_tool(stage: Stage, release: threading.Event) -> Run:
    """Kill a call that waits for its answer; its curl goes on."""
    api = stage.serve_base(answer(FIRST)._replace(before=release))
    tool = stage.start_tool(*FOX)
    api.wait_for_request()
    tool.kill()
    return stage.finish(tool)


def killed_mid_answer(stage: Stage) -> Run:
    tool, release = held_mid_answer(stage)
    tool.kill()
    run = stage.finish(tool)
    release.set()
    return run


def killed_after_the_answer(stage: Stage) -> Run:
    tool, release = held_mid_answer(stage)
    curl = stage.the_curl()
    tool.send_signal(signal.SIGSTOP)
    release.set()
    stage.wait_until(lambda: curl not in stage.processes())
    tool.kill()
    return stage.finish(tool)


def killed_and_run_again(stage: Stage) -> Run:
    """The agent's harness kills the call at its own limit, and the agent runs it again."""
    release = threading.Event()
    kill_the_tool(stage, release)
    again = stage.start_tool(*FOX)
    stage.hear(again, "resumed")
    release.set()
    return stage.finish(again)


def curl_killed_before_a_byte(stage: Stage) -> Run:
    api = stage.serve_base(answer(FIRST)._replace(before=threading.Event()))
    tool = stage.start_tool(*FOX)
    api.wait_for_request()
    os.kill(stage.the_curl(), signal.SIGKILL)
    return stage.finish(tool)


def curl_killed_mid_answer(stage: Stage) -> Run:
    tool, _ = held_mid_answer(stage)
    os.kill(stage.the_curl(), signal.SIGKILL)
    return stage.finish(tool)


# ---- The table --------------------------------------------------------------------------------


def refused(exit_code: int = 1, posts: int = 1) -> Outcome:
    """Return what comes of a request that the server surely didn't serve: nothing is kept."""
    return Outcome(exit_code, posts)


SENT_NOTHING = Outcome(7, 0)
SAVED = Outcome(0, saved=1)
MAYBE_BILLED = Outcome(8, recover=NOTHING_CAME)


def status_row(
    status: int, code: str, outcome: Outcome, message: str = "No.", **fields: Any
) -> Fault:
    """Return the row of an error as the API words it."""
    return Fault(
        f"HTTP {status} {code}", answers(refusal(status, code, message, **fields)), outcome
    )


REFUSALS = [
    *(
        status_row(400, code, refused(5))
        for code in ("moderation_blocked", "content_policy_violation")
    ),
    Fault(
        "HTTP 400 with safety_violations in its message",
        answers(refusal(400, None, "Rejected. safety_violations=[violence].")),
        refused(5),
    ),
    *(
        status_row(400, code, refused())
        for code in (
            "invalid_value",
            "unknown_parameter",
            "duplicate_parameter",
            "invalid_image_file",
            "invalid_input_fidelity_model",
        )
    ),
    status_row(400, "billing_hard_limit_reached", refused(6)),
    Fault("HTTP 400, HTML body", answers(page(400, "Bad Request")), refused()),
    Fault("HTTP 400, empty body", answers(Reply(400)), refused()),
    Fault("HTTP 400, error as a string", answers(json_reply({"error": "no"}, 400)), refused()),
    status_row(401, "invalid_api_key", refused(4)),
    Fault(
        "HTTP 401 that echoes the key",
        answers(refusal(401, "invalid_api_key", f"Incorrect API key provided: {KEY}.")),
        refused(4),
    ),
    Fault("HTTP 401, empty body", answers(Reply(401)), refused(4)),
    Fault("HTTP 402", answers(refusal(402, None, "Payment required")), refused(6)),
    Fault(
        "HTTP 403, organisation not verified",
        answers(refusal(403, None, "Your organization must be verified to use the model.")),
        refused(4),
    ),
    Fault("HTTP 403, HTML body", answers(page(403, "Forbidden")), refused(4)),
    status_row(404, "model_not_found", refused()),
    Fault("HTTP 404, HTML body", answers(page(404, "Not Found")), refused()),
    Fault("HTTP 405, empty body", answers(Reply(405)), refused()),
    Fault(
        "HTTP 413 before the request is read",
        answers(page(413, "Too Large")._replace(early=True)),
        refused(),
    ),
    Fault("HTTP 415", answers(refusal(415, None, "Unsupported media type")), refused()),
    Fault(
        "HTTP 422, FastAPI's detail",
        answers(json_reply({"detail": [{"loc": ["body", "size"], "msg": "bad"}]}, 422)),
        refused(),
    ),
    *(
        Fault(
            f"HTTP {status} to another place",
            answers(Reply(status, headers=[("Location", "https://elsewhere.example/v1")])),
            refused(),
        )
        for status in (301, 302, 303, 307, 308)
    ),
]

LIMITS = [
    Fault(
        "HTTP 429 three times, Retry-After: 0",
        answers(*[refusal(429, "rate_limit_exceeded", "Slow.", headers=NOW)] * 3),
        refused(6, 3),
    ),
    *(
        Fault(
            f"HTTP 429, {name}, then the answer",
            answers(refusal(429, "rate_limit_exceeded", "Slow.", headers=wait), answer(FIRST)),
            Outcome(0, 2, 1),
            1,
        )
        for name, wait in {
            "Retry-After: 0": NOW,
            "retry-after-ms: 20": [("retry-after-ms", "20")],
            "Retry-After as a date": [("Retry-After", formatdate(0, usegmt=True))],
            "Retry-After that is junk": [("Retry-After", "nan")],
            "no Retry-After": [],
        }.items()
    ),
    Fault(
        "HTTP 429, Retry-After: 3600",
        answers(refusal(429, "rate_limit_exceeded", "Slow.", headers=HOUR)),
        refused(6),
    ),
    Fault(
        "HTTP 429, HTML body, then the answer",
        answers(page(429, "Too Many Requests", NOW), answer(FIRST)),
        Outcome(0, 2, 1),
        1,
    ),
    *(
        status_row(429, code, refused(6), headers=NOW)
        for code in (
            "insufficient_quota",
            "credit_balance_exhausted",
            "organization_spend_limit_exceeded",
            "project_spend_limit_exceeded",
            "organization_usage_limit_exceeded",
        )
    ),
    Fault(
        "HTTP 429, quota told by type alone",
        answers(refusal(429, None, "Add credit.", type="insufficient_quota", headers=NOW)),
        refused(6),
    ),
    Fault(
        "HTTP 503, Retry-After: 0, then the answer",
        answers(page(503, "Unavailable", NOW), answer(FIRST)),
        Outcome(0, 2, 1),
        1,
    ),
    Fault(
        "HTTP 503 three times, Retry-After: 0",
        answers(*[page(503, "Unavailable", NOW)] * 3),
        refused(6, 3),
    ),
    Fault("HTTP 503, Retry-After: 3600", answers(page(503, "Unavailable", HOUR)), refused(6)),
    *(
        Fault(
            f"HTTP 503 {code}, then the answer",
            answers(refusal(503, code, "Busy.", headers=[*wait]), answer(FIRST)),
            Outcome(0, 2, 1),
            1,
        )
        for code, wait in {"slow_down": [], "server_is_overloaded": NOW}.items()
    ),
]

SERVER_ERRORS = [
    *(
        status_row(500, code, MAYBE_BILLED, "Upstream said no.", headers=NOW)
        for code in (
            "server_error",
            "bad_response_status_code",
            "do_request_failed",
            "upstream_error",
        )
    ),
    Fault(
        "HTTP 500 that echoes the key",
        answers(refusal(500, "server_error", f"Bad upstream, key {KEY}.")),
        MAYBE_BILLED,
    ),
    Fault("HTTP 500, HTML body", answers(page(500, "Internal Server Error")), MAYBE_BILLED),
    Fault("HTTP 500, empty body", answers(Reply(500)), MAYBE_BILLED),
    Fault("HTTP 501", answers(refusal(501, None, "Not implemented")), MAYBE_BILLED),
    *(
        Fault(f"HTTP {status}, HTML body", answers(page(status, "Gateway")), MAYBE_BILLED)
        for status in (502, 504, 520, 522, 524)
    ),
    Fault("HTTP 503, no Retry-After", answers(page(503, "Unavailable")), MAYBE_BILLED),
    Fault(
        "HTTP 500, and --retry-unsafe asks for another",
        answers(page(500, "Error"), answer(FIRST), more=("--retry-unsafe",)),
        Outcome(0, 2, 1, recover=NOTHING_CAME),
        1,
    ),
    Fault(
        "HTTP 429, then 500",
        answers(refusal(429, None, "Slow.", headers=NOW), page(500, "Error")),
        Outcome(8, 2, recover=NOTHING_CAME),
    ),
    Fault("HTTP 408", answers(Reply(408, headers=NOW)), MAYBE_BILLED),
    Fault("HTTP 409", answers(refusal(409, None, "Conflict", headers=NOW)), MAYBE_BILLED),
]

BODIES = [
    Fault("200, empty body", answers(Reply(200)), MAYBE_BILLED),
    Fault("204", answers(Reply(204, framing="none")), MAYBE_BILLED),
    Fault("200, HTML body", answers(page(200, "Log in")), MAYBE_BILLED),
    Fault("200, plain text", answers(Reply(200, b"ok")), MAYBE_BILLED),
    Fault("200, no picture: data is []", answers(answer()), MAYBE_BILLED),
    Fault("200, no picture: data is null", answers(json_reply({"data": None})), MAYBE_BILLED),
    Fault("200, no picture: {}", answers(json_reply({})), MAYBE_BILLED),
    Fault("200, 100,000 brackets deep", answers(Reply(200, b"[" * 100_000)), MAYBE_BILLED),
    Fault(
        "200 with an upstream error in it",
        answers(UPSTREAM),
        MAYBE_BILLED,
    ),
    Fault(
        "200, blank lines to keep the line busy, then an error",
        answers(in_pieces(Reply(200, b"\n\n \n" + UPSTREAM.body), 1)),
        MAYBE_BILLED,
    ),
    Fault(
        "200, blank lines, then a policy refusal",
        answers(Reply(200, b"\n\n" + refusal(400, "moderation_blocked", "No.").body)),
        refused(5),
    ),
    Fault(
        "200, blank lines, then the answer",
        answers(Reply(200, b"\n" * 5000 + answer(FIRST).body)),
        SAVED,
        1,
    ),
    Fault(
        "200, BOM and a wrong Content-Type",
        answers(Reply(200, b"\xef\xbb\xbf" + answer(FIRST).body, [("Content-Type", "text/html")])),
        SAVED,
        1,
    ),
    Fault(
        "100 and 103 before the 200",
        answers(
            Reply(
                raw=b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"
                b"HTTP/1.1 200 OK\r\n\r\n" + answer(FIRST).body
            )
        ),
        SAVED,
        1,
    ),
    Fault(
        "HTTP 500 with the picture in its body",
        answers(answer(FIRST)._replace(status=500)),
        SAVED,
        1,
    ),
    Fault(
        "base64 broken",
        answers(json_reply({"data": [{"b64_json": "!" + b64(FIRST)[1:]}]})),
        Outcome(10, recover=NOTHING_CAME),
    ),
    Fault(
        "base64 of one of three broken",
        answers(Reply(200, THREE.body.replace(b64(SECOND).encode(), b"!!!!" * 999)), argv=FOXES),
        Outcome(9, saved=2, recover=(9, 2)),
        2,
    ),
    Fault(
        "half a PNG in whole base64",
        answers(answer(FIRST[:2000])),
        Outcome(10, recover=NOTHING_CAME),
    ),
    Fault(
        "an HTML page as base64",
        answers(answer(page(200, "Log in").body * 50)),
        Outcome(10, recover=NOTHING_CAME),
    ),
    Fault("two pictures of three", answers(answer(FIRST, SECOND), argv=FOXES), Outcome(9, 1, 2), 2),
    Fault("three pictures for one", answers(THREE), Outcome(0, 1, 3), 3),
    Fault(
        "a stream, though none was asked for",
        answers(event_stream(partial_event(PREVIEW), completed_event(FIRST), "[DONE]")),
        SAVED,
        1,
    ),
    Fault(
        "a stream without its completed event",
        answers(event_stream(partial_event(PREVIEW))),
        MAYBE_BILLED,
    ),
    Fault(
        "a stream that ends in an error",
        answers(event_stream(partial_event(PREVIEW), {"error": {"message": "Failed"}})),
        MAYBE_BILLED,
    ),
    Fault(
        "a stream cut after one of three pictures",
        answers(
            event_stream(completed_event(FIRST), partial_event(PREVIEW))._replace(
                content_length=99_999, framing="length"
            ),
            argv=FOXES,
        ),
        Outcome(9, saved=1),
        1,
    ),
]

CONNECTIONS = [
    Fault("nothing listens", refused_connection, SENT_NOTHING),
    Fault("nothing listens at first, then the answer", late_server, SAVED, 1),
    Fault("host unknown", unknown_host, SENT_NOTHING),
    Fault("no answer to the connection", silent_connect, SENT_NOTHING),
    Fault("no answer to the TLS handshake", silent_tls, SENT_NOTHING),
    Fault("https to a plain port", tls_to_a_plain_port, SENT_NOTHING),
    Fault("certificate that nobody vouches for", self_signed, SENT_NOTHING),
    Fault(
        "plain http to a TLS port",
        plain_http_to_a_tls_port,
        Outcome(8, 0, recover=NOTHING_CAME),
    ),
    Fault("proxy down", proxy_down, SENT_NOTHING),
    Fault("proxy refuses to connect", proxy_refuses, Outcome(8, 0, recover=NOTHING_CAME)),
    Fault("closed without a byte", answers(Reply(silent=True)), MAYBE_BILLED),
    Fault("reset without a byte", answers(Reply(reset=True)), MAYBE_BILLED),
    Fault("garbage instead of HTTP", answers(Reply(raw=b"SSH-2.0-Server_9.2\r\n")), MAYBE_BILLED),
    Fault(
        "400 KB of headers",
        answers(Reply(raw=b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 400_000 + b"\r\n\r\n")),
        MAYBE_BILLED,
    ),
    Fault(
        "headers cut",
        answers(Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Ty")),
        MAYBE_BILLED,
    ),
    *(
        Fault(
            f"cut with {whole} of 3 pictures whole",
            answers(cut_in(THREE, picture), argv=FOXES),
            Outcome(8, recover=(9 if whole else 10, whole)),
            whole,
        )
        for whole, picture in enumerate((FIRST, SECOND, THIRD))
    ),
    Fault(
        "cut after the only picture",
        answers(CUT_END),
        Outcome(8, recover=(0, 1)),
        1,
    ),
    *(
        Fault(
            f"cut with 2 of 3 pictures whole, {name}",
            answers(reply, argv=FOXES),
            Outcome(8, recover=(9, 2)),
            2,
        )
        for name, reply in {
            "by a reset": cut_in(THREE, THIRD)._replace(reset=True),
            "no length told": cut_in(THREE, THIRD)._replace(framing="close"),
            "chunked": cut_in(THREE, THIRD)._replace(framing="chunked"),
        }.items()
    ),
    Fault(
        "Content-Length too large",
        answers(answer(FIRST)._replace(content_length=99_999)),
        SAVED,
        1,
    ),
    Fault(
        "Content-Length too small",
        answers(THREE._replace(content_length=middle_of(THREE, SECOND)), argv=FOXES),
        Outcome(8, recover=(9, 1)),
        1,
    ),
    Fault(
        "chunked, whole, but its end is missing",
        answers(answer(FIRST)._replace(framing="chunked", cut=len(answer(FIRST).body))),
        SAVED,
        1,
    ),
    Fault(
        "time-out before the headers",
        answers(lambda _: answer(FIRST)._replace(before=threading.Event()), more=BRIEF),
        MAYBE_BILLED,
    ),
    Fault(
        "time-out with 2 of 3 pictures whole",
        answers(stalled(THREE, middle_of(THREE, THIRD)), argv=FOXES, more=BRIEF),
        Outcome(8, recover=(9, 2)),
        2,
    ),
    Fault(
        "time-out while blank lines trickle in",
        answers(Reply(chunks=list(drip(b"\n", 0.1)), framing="chunked"), more=BRIEF),
        MAYBE_BILLED,
    ),
    Fault("an answer byte by byte", answers(in_pieces(answer(FIRST), 64)), SAVED, 1),
]

LINKS = [
    Fault("link: 404", links({"/a.png": Reply(404)}), Outcome(10, recover=NOTHING_CAME)),
    Fault(
        "link: 404, later there",
        links({"/a.png": Reply(404)}, later={"/a.png": FIRST}),
        Outcome(10, recover=(0, 1)),
        1,
    ),
    Fault(
        "link: 403, expired",
        links({"/a.png": page(403, "Expired")}),
        Outcome(10, recover=NOTHING_CAME),
    ),
    Fault(
        "link: one of three is 404, later there",
        links({"/a.png": FIRST, "/b.png": Reply(404), "/c.png": THIRD}, later={"/b.png": SECOND}),
        Outcome(9, saved=2, recover=(0, 3)),
        3,
    ),
    Fault("link: 500, then the file", links({"/a.png": [Reply(500), ranged(FIRST)]}), SAVED, 1),
    Fault(
        "link: cut, then resumed",
        links({"/a.png": [ranged(FIRST, cut=999), ranged(FIRST)]}),
        SAVED,
        1,
    ),
    Fault(
        "link: time-out, then the file",
        links({"/a.png": [lambda _: Reply(before=threading.Event()), ranged(FIRST)]}, more=BRIEF),
        SAVED,
        1,
    ),
    Fault(
        "link: an HTML page",
        links({"/a.png": page(200, "Log in")}),
        Outcome(10, recover=NOTHING_CAME),
    ),
    Fault(
        "link: redirects in a circle",
        links({"/a.png": Reply(302, headers=[("Location", "/a.png")])}),
        Outcome(10, recover=NOTHING_CAME),
    ),
    Fault("link: to this machine", link_to_this_machine, Outcome(10, recover=NOTHING_CAME)),
]

SYSTEM = [
    Fault("curl is not installed", no_curl, Outcome(3, 0)),
    Fault("the output file exists", target_exists, Outcome(2, 0)),
    Fault(
        "the output file appears meanwhile",
        meanwhile(claim_the_name, (*FOX, "-o", "fox.png")),
        SAVED,
        1,
    ),
    Fault("the output folder is removed meanwhile", folder_gone, SAVED, 1),
    Fault(
        "the output folder becomes a file meanwhile",
        folder_blocked,
        Outcome(9, saved=1, recover=(0, 1)),
        1,
    ),
    Fault("the output folder is read-only", folder_read_only, Outcome(2, 0)),
    Fault(
        "the output folder becomes read-only meanwhile",
        folder_made_read_only,
        Outcome(9, saved=1, recover=(0, 1)),
        1,
    ),
    Fault("the output disk is full", full_disk, Outcome(9, saved=1, recover=(0, 1)), 1),
    Fault("the state disk is full", full_state_disk, SAVED, 1),
    Fault("the state disk is too small for the answer", small_state_disk, SAVED, 1),
    Fault(
        "the state disk fills up with 2 of 3 pictures there",
        state_disk_fills_up,
        Outcome(8, recover=(9, 2)),
        2,
    ),
    Fault("the state folder can't be written", state_unwritable, SAVED, 1),
    Fault("no folder for jobs can be written", no_state_at_all, Outcome(3, 0)),
    Fault("stdout closed", streams('exec "$@" >&-'), SAVED, 1),
    Fault("stdout full", streams('exec "$@" >/dev/full'), SAVED, 1),
    Fault("stdout a closed pipe", stdout_closed_pipe, SAVED, 1),
    Fault("stderr closed", streams('exec "$@" 2>&-'), SAVED, 1),
    Fault("stdin, stdout and stderr closed", streams('exec "$@" <&- >&- 2>&-'), SAVED, 1),
]

SIGNALS = [
    *(
        Fault(f"{name} before any byte", before_a_byte(number), Outcome(code, recover=NOTHING_CAME))
        for name, number, code in (
            ("SIGINT", signal.SIGINT, 130),
            ("SIGTERM", signal.SIGTERM, 143),
            ("SIGHUP", signal.SIGHUP, 129),
        )
    ),
    *(
        Fault(
            f"{name} mid-answer, the rest comes within 10 s",
            mid_answer(number, finishes=True),
            Outcome(0, saved=3),
            3,
        )
        for name, number in (
            ("SIGINT", signal.SIGINT),
            ("SIGTERM", signal.SIGTERM),
            ("SIGHUP", signal.SIGHUP),
        )
    ),
    Fault(
        "SIGTERM with 2 of 3 pictures whole, the rest doesn't come",
        waits_in_vain,
        Outcome(143, recover=(9, 2)),
        2,
    ),
    Fault("a second SIGINT", second_signal, Outcome(130, recover=(9, 2)), 2),
    Fault("Ctrl-C hammered", hammered, Outcome(130, recover=(9, 2)), 2),
    Fault("SIGINT while waiting to retry a 429", while_waiting_to_retry, refused(130)),
    Fault("SIGINT during a download", while_downloading, Outcome(130, recover=(0, 1)), 1),
    Fault("SIGHUP under nohup", hang_up_under_nohup, SAVED, 1),
    Fault("SIGKILL before any byte", killed_before_a_byte, Outcome(-9, recover=(0, 1)), 1),
    Fault("SIGKILL mid-answer", killed_mid_answer, Outcome(-9, recover=(0, 3)), 3),
    Fault("SIGKILL after the answer", killed_after_the_answer, Outcome(-9, recover=(0, 3)), 3),
    Fault("SIGKILL, and the same command again", killed_and_run_again, SAVED, 1),
    Fault("SIGKILL of curl before any byte", curl_killed_before_a_byte, MAYBE_BILLED),
    Fault(
        "SIGKILL of curl with 2 of 3 pictures whole",
        curl_killed_mid_answer,
        Outcome(8, recover=(9, 2)),
        2,
    ),
]

FAULTS = [*REFUSALS, *LIMITS, *SERVER_ERRORS, *BODIES, *CONNECTIONS, *LINKS, *SYSTEM, *SIGNALS]


# ---- Playing the whole table ------------------------------------------------------------------


def perform(fault: Fault) -> Seen:
    """Play one fault in a world of its own."""
    stage = Stage()
    stage.setUp()
    try:
        return stage.play(fault)
    finally:
        stage.doCleanups()


class Company:
    """Plays a list of faults, a few at once; who asks for one starts it and those after it."""

    def __init__(self, faults: Sequence[Fault], at_once: int = 4) -> None:
        self.faults = list(faults)
        self.pool = ThreadPoolExecutor(at_once)
        self.playing: dict[str, Future[Seen]] = {}

    def seen(self, fault: Fault) -> Seen:
        """Return what was seen of a fault; raises what its play raised, SkipTest too."""
        for following in self.faults[self.faults.index(fault) :]:
            if following.name not in self.playing:
                self.playing[following.name] = self.pool.submit(perform, following)
        return self.playing[fault.name].result()

    def close(self) -> None:
        """Forget what was not begun, and wait for the rest."""
        for future in self.playing.values():
            future.cancel()
        self.pool.shutdown()


# ---- The table as Markdown --------------------------------------------------------------------

COLUMNS = ("fault", "exit", "POSTs", "pictures saved", "kept for recover", "recover brings")


def main() -> int:
    """Play every fault, print the table, and return 1 if anything was not as expected."""
    company = Company(FAULTS)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    seen: list[tuple[Fault, Seen]] = []
    wrong, skipped = 0, 0
    for fault in FAULTS:
        try:
            seen.append((fault, company.seen(fault)))
        except unittest.SkipTest as reason:
            print(f"| {fault.name} | skipped: {reason} |" + " |" * 4)
            skipped += 1
            continue
        except AssertionError as error:
            print(f"{fault.name}: {error}", file=sys.stderr)
            wrong += 1
            continue
        print(markdown_row(fault.name, seen[-1][1].outcome), flush=True)
        if seen[-1][1].outcome != fault.outcome:
            print(f"{fault.name}: expected {fault.outcome}\n{seen[-1][1].run}", file=sys.stderr)
            wrong += 1
    company.close()
    lost = sum(result.lost for _, result in seen)
    again = sum(posts_too_many(fault, result) for fault, result in seen)
    counts = f"{len(FAULTS)} faults, {skipped} skipped, {wrong} not as expected"
    print(f"\n{counts}: {lost} images lost, {again} second POSTs after an unknown outcome.")
    return 1 if wrong or lost or again else 0


def markdown_row(name: str, outcome: Outcome) -> str:
    """Return one line of the table."""
    exit_code = "killed" if outcome.exit < 0 else str(outcome.exit)
    kept, brings = ("no", "")
    if outcome.recover:
        code, pictures = outcome.recover
        kept, brings = "yes", f"{counted(pictures)}, exit {code}"
    cells = [name, exit_code, str(outcome.posts), str(outcome.saved), kept, brings]
    return "| " + " | ".join(cells) + " |"


def counted(pictures: int) -> str:
    """Return a number of pictures in words."""
    return "nothing" if not pictures else f"{pictures} picture" + "s" * (pictures > 1)


def posts_too_many(fault: Fault, seen: Seen) -> int:
    """Return how many POSTs followed one that may have been billed, unasked."""
    return max(0, seen.outcome.posts - fault.outcome.posts) if fault.unknown else 0


if __name__ == "__main__":
    sys.exit(main())
