"""The fault table: what a server or a system may do wrong, and what comes of it.

FAULTS is the table: each row says how something misbehaves and what is expected then. Every row is
played with a real curl, real sockets and real signals, in folders of its own; after it `recover`
is run on what was kept. tests/test_faults.py asserts the table, and

    python3 tests/faults.py

plays it and prints what was seen as Markdown, for the README.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import ssl
import sys
import threading
import unittest
from email.utils import formatdate
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Sequence, Union
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.case import Argument, Child, Run, SystemCase
from tests.pictures import png
from tests.server import (
    KEY,
    Api,
    Chunk,
    Reply,
    Script,
    answer,
    b64,
    completed_event,
    event_stream,
    in_pieces,
    json_reply,
    page,
    partial_event,
    ranged,
    refusal,
)

FIRST, SECOND, THIRD = (png(40, 30 + i, seed=i) for i in range(3))  # about 4 KB each
LARGE = png(300, 300, seed=3)  # 270 KB, more than a small disk holds
PREVIEW = png(10, 10, seed=4)  # never to be taken for a picture
PICTURES = {FIRST, SECOND, THIRD, LARGE}

FOX = ("generate", "a fox")
FOXES = (*FOX, "--n", "3")
BRIEF = ("--timeout", "1")
ONCE = ("--retries", "0")


# ---- A stage: the world of one fault ----------------------------------------------------------


class Outcome(NamedTuple):
    """What comes of one call: exit code, POSTs, pictures on disk, and what recover brings."""

    exit: int
    posts: int = 1
    saved: int = 0
    recover: tuple[int, int] | None = None
    """The exit code of recover, and the pictures that it saves; None: nothing is kept."""

    @property
    def came(self) -> int:
        """The pictures that came whole: none of them may be lost."""
        return max(self.saved, self.recover[1] if self.recover else 0)

    @property
    def unknown(self) -> bool:
        """Whether the request may have been billed, so that no second one may be sent."""
        return self.exit == 8 or self.recover is not None


class Seen(NamedTuple):
    """What was seen when a fault was played."""

    outcome: Outcome
    lost: int
    """Whole pictures that came, and that neither the call nor recover saved."""
    run: Run
    recovered: Run | None


class Stage(SystemCase):
    """A case that plays a fault, mends what was broken, and recovers what was kept."""

    def setUp(self) -> None:
        super().setUp()
        self.repair: Callable[[], object] = lambda: None

    def play(self, fault: Fault) -> Seen:
        """Play a fault, then recover what was kept; the whole world is looked over at the end."""
        with mock.patch("random.uniform", return_value=0):  # so that waits of our own are none
            run = fault.play(self)
        saved = self.pictures(run)
        recovered = None
        if self.jobs_anywhere():
            self.repair()
            recovered = self.run_tool("recover", "--all")
        brought = pictures_at(recovered.saved) if recovered else set()
        brings = (recovered.code, len(brought)) if recovered else None
        posts = sum(len(api.posts) for api in self.servers)
        self.look_over(run, recovered)
        lost = max(0, fault.outcome.came - len(saved | brought))
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

    def pictures(self, run: Run) -> set[bytes]:
        """Return the known pictures that a run has left, wherever it says they are."""
        visible = [self.work / name for name in self.listing() if "/." not in f"/{name}"]
        told = run.json["images"] if run.out.startswith("{") else []
        return pictures_at([*visible, *run.saved, *[Path(image["path"]) for image in told]])

    def point_at(self, url: str, **env: str) -> None:
        """Let the environment name a base URL that no Api serves, and the key."""
        self.env.update(GPT_IMAGE2_BASE_URL=url, GPT_IMAGE2_API_KEY=KEY, **env)


def pictures_at(paths: Sequence[Path]) -> set[bytes]:
    """Return those of PICTURES that are in these files, byte for byte."""
    return {path.read_bytes() for path in paths if path.is_file()} & PICTURES


Play = Callable[[Stage], Run]
Told = Union[Play, Reply, Sequence[Script]]  # a play, or the replies to one POST after the other


class Fault(NamedTuple):
    """One row: how something misbehaves, how that is played, and what is expected."""

    name: str
    play: Play
    outcome: Outcome
    says: str = ""
    """Words that the error line must hold: the server's own, or the way out."""
    code: str = ""
    """The code of the error in the document, where the API gives one."""


# ---- Ways to play -----------------------------------------------------------------------------


def answers(*replies: Script, argv: Sequence[Argument] = FOX) -> Play:
    """Play a call that gets these replies, one a POST."""

    def play(stage: Stage) -> Run:
        stage.serve_base(*replies, otherwise=answer(FIRST))
        return stage.run_tool(*argv, "--json")

    return play


def links(
    files: dict[str, Script | list[Script] | bytes],
    *,
    later: Mapping[str, bytes] | None = None,
    more: Sequence[Argument] = (),
) -> Play:
    """Play an answer of links to these files; `later` is what the links give to recover."""

    def play(stage: Stage) -> Run:
        api = stage.serve_base()
        put_all(api, files)
        stage.repair = lambda: put_all(api, later or {})
        api.script.append(answer(*(api.origin + path for path in files)))
        return stage.run_tool(*FOX, "--n", str(len(files)), "--json", *more)

    return play


def put_all(api: Api, files: Mapping[str, Any]) -> None:
    """Serve files, each bytes, a reply, or a list of replies, which serving uses up."""
    for path, script in files.items():
        if isinstance(script, list):
            api.files[path] = list(script)
        else:
            api.put(path, script)


def meanwhile(act: Callable[[Stage], object], *, folder: bool = True) -> Play:
    """Play a call, into a folder of its own, during whose answer something else happens."""

    def play(stage: Stage) -> Run:
        reply = answer(FIRST)
        stage.serve_base(in_two(reply, len(reply.body) // 2, lambda: act(stage)))
        if folder:
            (stage.work / "out").mkdir()
        return stage.run_tool(*FOX, "-o", "out/fox.png" if folder else "fox.png")

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


def stalled(reply: Reply, sent: int) -> Play:
    """Play an answer that stops after so many bytes of its body."""
    chunks = [reply.body[:sent], threading.Event()]
    held = reply._replace(chunks=chunks, content_length=len(reply.body))
    return answers(held, argv=(*FOXES, *BRIEF))


# ---- Networks that fail -----------------------------------------------------------------------


def nowhere(url: Callable[[Stage], str], *more: Argument, **env: Callable[[Stage], str]) -> Play:
    """Play a call, without a second try, to a base URL where no Api answers."""

    def play(stage: Stage) -> Run:
        stage.point_at(url(stage), **{name: value(stage) for name, value in env.items()})
        return stage.run_tool(*FOX, *ONCE, "--json", *more)

    return play


def closed_port(stage: Stage) -> str:
    """Return an address that refuses connections."""
    return f"http://127.0.0.1:{stage.closed_port()}"


def silent_port(stage: Stage, backlog: int = 8) -> socket.socket:
    """Return a socket to which the system lets callers connect, and that never says a word."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
    stage.addCleanup(listener.close)
    return listener


def full_queue(stage: Stage) -> str:
    """Return the address of a listener whose queue is full, so that it drops what knocks."""
    listener = silent_port(stage, backlog=0)
    for _ in range(4):
        knocking = socket.socket()
        stage.addCleanup(knocking.close)
        knocking.setblocking(False)
        knocking.connect_ex(listener.getsockname())
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def tls_port(stage: Stage) -> int:
    """Return a port that takes one caller, by TLS, under a certificate that nobody trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(stage.certificate())
    listener = socket.create_server(("127.0.0.1", 0))

    def converse() -> None:
        with contextlib.suppress(OSError):
            plain = listener.accept()[0]
            with context.wrap_socket(plain, server_side=True) as connection:
                connection.recv(65536)

    thread = threading.Thread(target=converse)
    thread.start()
    stage.addCleanup(listener.close)
    stage.addCleanup(thread.join)
    return int(listener.getsockname()[1])


def refusing_proxy(stage: Stage) -> str:
    """Return the address of a proxy that can't reach the relay."""
    api = stage.serve()
    api.files["relay.example:443"] = Reply(502)
    return api.origin


def late_server(stage: Stage) -> Run:
    """Nothing listens at the first try; the second one is answered."""
    api = stage.serve(answer(FIRST))
    door = socket.socket()
    stage.addCleanup(door.close)
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
            for end in select.select([caller, server], [], [])[0]:
                data = end.recv(65536)
                if not data:
                    return
                other[end].sendall(data)


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
    claim_the_name(stage)
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


def folder_read_only(stage: Stage) -> Run:
    stage.serve_base()
    stage.heed_permissions()
    (stage.work / "out").mkdir(0o500)
    return stage.run_tool(*FOX, "-o", "out/fox.png")


def folder_made_read_only(stage: Stage) -> Run:
    stage.heed_permissions()
    folder = stage.work / "out"
    stage.repair = lambda: folder.chmod(0o700)
    return meanwhile(lambda _: folder.chmod(0o500))(stage)


def full_disk(stage: Stage) -> Run:
    """The picture doesn't fit; recover finds a larger disk."""
    disk = stage.small_disk("disk")
    stage.repair = lambda: stage.system("mount", "-o", "remount,size=8m", str(disk))
    return answers(answer(LARGE), argv=(*FOX, "-o", disk / "fox.png"))(stage)


def full_state_disk(stage: Stage) -> Run:
    use_state(stage, stage.small_disk("state-disk"))
    fill_up(stage.state)
    return answers(answer(FIRST))(stage)


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
    return answers(answer(FIRST))(stage)


def no_state_at_all(stage: Stage) -> Run:
    (stage.tmp / "file").write_bytes(b"")
    use_state(stage, stage.tmp / "file" / "state")
    (stage.tmp / "tmp" / f"gpt-image-2-{os.getuid()}").write_bytes(b"")
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


def before_a_byte(act: Callable[[Stage, Child[bytes]], object]) -> Play:
    """Play something that happens while the server has the request and has said nothing."""

    def play(stage: Stage) -> Run:
        tool, release = held(stage)
        act(stage, tool)
        run = stage.finish(tool)
        release.set()
        return run

    return play


def held(stage: Stage) -> tuple[Child[bytes], threading.Event]:
    """Return a call that waits for its answer, and the Event that lets it come."""
    release = threading.Event()
    api = stage.serve_base(answer(FIRST)._replace(before=release))
    tool = stage.start_tool(*FOX)
    api.wait_for_request()
    return tool, release


def mid_answer(act: Callable[[Stage, Child[bytes]], object], *, comes: bool = False) -> Play:
    """Play something that happens after two of three pictures; if the third `comes`, soon after."""

    def play(stage: Stage) -> Run:
        release = threading.Event()
        middle = middle_of(THREE, THIRD)
        stage.serve_base(in_two(THREE, middle, release))
        tool = stage.start_tool(*FOXES)
        stage.wait_until(lambda: stage.answered() >= middle)
        act(stage, tool)
        if comes:
            release.set()
        return stage.finish(tool)

    return play


def sent(number: int) -> Callable[[Stage, Child[bytes]], object]:
    """Return what sends a signal to the tool."""
    return lambda _, tool: tool.send_signal(number)


def kill_curl(stage: Stage, _: object) -> None:
    os.kill(stage.the_curl(), signal.SIGKILL)


def waits_in_vain(stage: Stage) -> Run:
    """Stop a call whose answer stays away; the 10 s that it gets pass in a half."""
    stage.hurry(20)
    return mid_answer(sent(signal.SIGTERM))(stage)


def interrupt_twice(stage: Stage, tool: Child[bytes]) -> None:
    tool.send_signal(signal.SIGINT)
    stage.hear(tool, "10 s")
    tool.send_signal(signal.SIGINT)


def hammer(stage: Stage, tool: Child[bytes]) -> None:
    interrupt_twice(stage, tool)
    for _ in range(50):
        tool.send_signal(signal.SIGINT)


def hammered(stage: Stage) -> Run:
    run = mid_answer(hammer)(stage)
    return run._replace(code=130) if run.code == -signal.SIGINT else run  # one to a shell


def while_waiting_to_retry(stage: Stage) -> Run:
    stage.serve_base(limit(("Retry-After", "60")))
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
    stage.shell('trap "" HUP; exec "$@"')
    tool, release = held(stage)
    tool.send_signal(signal.SIGHUP)
    release.set()
    return stage.finish(tool)


def let_curl_end(stage: Stage, tool: Child[bytes], release: threading.Event) -> None:
    """Stop the tool, let its answer come, and kill the tool when curl has ended."""
    curl = stage.the_curl()
    tool.send_signal(signal.SIGSTOP)
    release.set()
    stage.wait_until(lambda: curl not in stage.processes())
    tool.kill()


def killed_after_the_answer(stage: Stage) -> Run:
    tool, release = held(stage)
    let_curl_end(stage, tool, release)
    return stage.finish(tool)


def killed_and_run_again(stage: Stage) -> Run:
    """The agent's harness kills the call at its own limit, and the agent runs it again."""
    tool, release = held(stage)
    tool.kill()
    stage.finish(tool)
    again = stage.start_tool(*FOX)
    stage.hear(again, "resumed")
    release.set()
    return stage.finish(again)


# ---- The table --------------------------------------------------------------------------------


def refused(exit_code: int = 1, posts: int = 1) -> Outcome:
    """Return what comes of a request that the server surely didn't serve: nothing is kept."""
    return Outcome(exit_code, posts)


NOTHING_CAME = (10, 0)  # what recover says of a kept job without a picture
SENT_NOTHING = Outcome(7, 0)
SAVED = Outcome(0, saved=1)
AT_THE_SECOND = Outcome(0, 2, 1)
MAYBE_BILLED = Outcome(8, recover=NOTHING_CAME)
NO_PICTURE = Outcome(10, recover=NOTHING_CAME)

NOW = ("Retry-After", "0")
HOUR = ("Retry-After", "3600")
THREE = answer(FIRST, SECOND, THIRD)
UPSTREAM = json_reply({"error": {"message": "Timed out", "type": "upstream_error", "code": None}})
CUT_END = answer(FIRST)._replace(cut=len(answer(FIRST, usage={}).body) - 2)  # ... "b64"}
ELSEWHERE = "https://elsewhere.example/v1"
STREAM_HINT = "--stream --partial-images 1"


def rows(
    outcome: Outcome,
    plays: Mapping[str, Told],
    *,
    argv: Sequence[Argument] = FOX,
    says: str = "",
    code: str = "",
) -> list[Fault]:
    """Return rows of one outcome: plays, or the replies of a server, by name."""
    faults = []
    for name, told in plays.items():
        if callable(told):
            play = told
        else:
            play = answers(*([told] if isinstance(told, Reply) else told), argv=argv)
        faults.append(Fault(name, play, outcome, says, code))
    return faults


def coded(status: int, outcome: Outcome, *codes: str, headers: Any = ()) -> list[Fault]:
    """Return the rows of errors as the API words them, all of one status."""
    faults = []
    for code in codes:
        words = f"Sorry: {code}, no"
        reply = refusal(status, code, f"{words}.", headers=headers)
        faults.append(Fault(f"HTTP {status} {code}", answers(reply), outcome, words, code))
    return faults


def limit(*headers: tuple[str, str]) -> Reply:
    """Return a rate limit with these headers."""
    return refusal(429, "rate_limit_exceeded", "Slow.", headers=headers)


def plain(status: int, message: str = "No such thing.", **fields: Any) -> Reply:
    """Return an error without a code."""
    return refusal(status, None, message, **fields)


REFUSALS = [
    *coded(400, refused(5), "moderation_blocked", "content_policy_violation"),
    *rows(
        refused(5),
        {
            "HTTP 400 with safety_violations in its message": plain(400, "safety_violations=[x]."),
            "HTTP 400 invalid_value with safety_violations in its message": refusal(
                400, "invalid_value", "safety_violations=[x]."
            ),
        },
        says="safety_violations=[x]",
    ),
    *coded(400, refused(), "invalid_value", "unknown_parameter", "duplicate_parameter"),
    *coded(400, refused(), "invalid_image_file", "invalid_input_fidelity_model"),
    *coded(400, refused(6), "billing_hard_limit_reached"),
    *rows(
        refused(),
        {
            "HTTP 400, HTML body": page(400, "Bad Request"),
            "HTTP 400, empty body": Reply(400),
            "HTTP 400, error as a string": json_reply({"error": "no"}, 400),
        },
        says="HTTP 400",
    ),
    *coded(401, refused(4), "invalid_api_key"),
    *rows(
        refused(4),
        {
            "HTTP 401 that echoes the key": refusal(401, "invalid_api_key", f"Wrong key: {KEY}."),
            "HTTP 401, empty body": Reply(401),
        },
        says="config --check",
    ),
    *rows(refused(6), {"HTTP 402": plain(402, "Pay first")}, says="Pay first"),
    *rows(
        refused(4),
        {"HTTP 403, organisation not verified": plain(403, "Your organization must be verified.")},
        says="15 minutes",
    ),
    *rows(refused(4), {"HTTP 403, HTML body": page(403, "Forbidden")}, says="HTTP 403"),
    *coded(404, refused(), "model_not_found"),
    *rows(
        refused(),
        {"HTTP 404, HTML body": page(404, "Not Found"), "HTTP 405, empty body": Reply(405)},
        says="base_url",
    ),
    *rows(
        refused(),
        {"HTTP 413 before the request is read": page(413, "Too Large")._replace(early=True)},
        says="too large",
    ),
    *rows(refused(), {"HTTP 415": plain(415)}, says="No such thing"),
    *coded(422, refused(), "never_heard_of_it"),
    *rows(
        refused(),
        {
            "HTTP 422, FastAPI's detail": json_reply(
                {"detail": [{"loc": ["body", "size"], "msg": "too bad"}]}, 422
            )
        },
        says="too bad",
    ),
    *rows(
        refused(),
        {
            f"HTTP {status} to another place": Reply(status, headers=[("Location", ELSEWHERE)])
            for status in (301, 302, 303, 307, 308)
        },
        says=ELSEWHERE,
    ),
    *rows(refused(), {"HTTP 302 to nowhere": Reply(302)}, says="base URL"),
]

LIMITS = [
    *rows(
        refused(6, 3),
        {
            "HTTP 429 three times, Retry-After: 0": [limit(NOW)] * 3,
            "HTTP 503 three times, Retry-After: 0": [page(503, "Unavailable", [NOW])] * 3,
        },
    ),
    *rows(
        AT_THE_SECOND,
        {
            f"{name}, then the answer": [reply, answer(FIRST)]
            for name, reply in {
                "HTTP 429, Retry-After: 0": limit(NOW),
                "HTTP 429, retry-after-ms: 20": limit(("retry-after-ms", "20"), HOUR),
                "HTTP 429, Retry-After as a date": limit(
                    ("Retry-After", formatdate(0, usegmt=True))
                ),
                "HTTP 429, Retry-After that is junk": limit(("Retry-After", "nan")),
                "HTTP 429, no Retry-After": limit(),
                "HTTP 429, HTML body": page(429, "Too Many Requests", [NOW]),
                "HTTP 503, Retry-After: 0": page(503, "Unavailable", [NOW]),
                "HTTP 503 slow_down": refusal(503, "slow_down", "Busy."),
                "HTTP 503 server_is_overloaded": refusal(
                    503, "server_is_overloaded", "Busy.", headers=[NOW]
                ),
            }.items()
        },
    ),
    *rows(
        refused(6),
        {
            "HTTP 429, Retry-After: 3600": limit(HOUR),
            "HTTP 503, Retry-After: 3600": page(503, "Unavailable", [HOUR]),
        },
        says="3600 s",
    ),
    *rows(refused(6), {"HTTP 429, and no retries": limit(NOW)}, argv=(*FOX, *ONCE), says="Slow"),
    *coded(429, refused(6), "insufficient_quota", "credit_balance_exhausted", headers=[NOW]),
    *coded(429, refused(6), "organization_spend_limit_exceeded", headers=[NOW]),
    *coded(429, refused(6), "project_spend_limit_exceeded", headers=[NOW]),
    *coded(429, refused(6), "organization_usage_limit_exceeded", headers=[NOW]),
    *rows(
        refused(6),
        {
            "HTTP 429, quota told by type alone": plain(
                429, "Add credit.", type="insufficient_quota", headers=[NOW]
            )
        },
        says="Add credit",
        code="insufficient_quota",
    ),
]

SERVER_ERRORS = [
    *coded(500, MAYBE_BILLED, "server_error", "bad_response_status_code", headers=[NOW]),
    *coded(500, MAYBE_BILLED, "do_request_failed", "upstream_error", headers=[NOW]),
    *rows(
        MAYBE_BILLED,
        {
            "HTTP 500 that echoes the key": plain(500, f"Bad upstream, key {KEY}."),
            "HTTP 500, HTML body": page(500, "Internal Server Error"),
            "HTTP 500, empty body": Reply(500),
            "HTTP 501": plain(501),
            "HTTP 503, no Retry-After": page(503, "Unavailable"),
            "HTTP 529": page(529, "Overloaded"),
            "HTTP 408": Reply(408, headers=[NOW]),
            "HTTP 409": plain(409, headers=[NOW]),
            "HTTP 500, X-Should-Retry: true": plain(500, headers=[("X-Should-Retry", "true"), NOW]),
        },
        says="billed",
    ),
    *rows(
        MAYBE_BILLED,
        {
            f"HTTP {status}, HTML body": page(status, "Gateway")
            for status in (502, 504, 520, 521, 522, 524)
        },
        says=STREAM_HINT,
    ),
    *rows(
        AT_THE_SECOND._replace(recover=NOTHING_CAME),
        {"HTTP 500, and --retry-unsafe asks for another": [page(500, "Error"), answer(FIRST)]},
        argv=(*FOX, "--retry-unsafe"),
    ),
    *rows(
        Outcome(8, 2, recover=NOTHING_CAME),
        {
            "HTTP 429, then 500": [limit(NOW), page(500, "Error")],
            "HTTP 429, then closed without a byte": [limit(NOW), Reply(silent=True)],
            "HTTP 429, then 200 without a body": [limit(NOW), Reply(200)],
        },
    ),
]

BODIES = [
    *rows(
        MAYBE_BILLED,
        {
            "200, empty body": Reply(200),
            "200, blank lines alone": Reply(200, b"\n \r\n"),
            "204": Reply(204, framing="none"),
            "200, HTML body": page(200, "Log in"),
            "200, plain text": Reply(200, b"ok"),
            "200, no picture: data is []": answer(),
            "200, no picture: data is null": json_reply({"data": None}),
            "200, no picture: data holds a null": json_reply({"data": [None]}),
            "200, no picture: data is a word": json_reply({"data": "pending"}),
            "200, no picture: empty strings": answer("", style="blanks"),
            "200, no picture: a task's id": json_reply({"data": {"task_id": "t1"}}),
            "200, no picture: {}": json_reply({}),
            "200, no picture: an empty list": json_reply([]),
            "200, no picture: a bare null": json_reply(None),
            "200, 100,000 brackets deep": Reply(200, b"[" * 100_000),
        },
        says="billed",
    ),
    *rows(
        MAYBE_BILLED,
        {
            "200 with an upstream error in it": UPSTREAM,
            "200 with a sentence as its error": json_reply({"error": "Timed out"}),
            "200, blank lines to keep the line busy, then an error": in_pieces(
                Reply(200, b"\n\n \n" + UPSTREAM.body), 1
            ),
            "a stream that ends in an error": event_stream(
                partial_event(PREVIEW), {"error": {"message": "Timed out"}}
            ),
        },
        says="Timed out",
    ),
    *(
        Fault(name, answers(reply), refused(exit_code), "No way", code)
        for name, exit_code, code, lead in (
            ("200, blank lines, then a policy refusal", 5, "moderation_blocked", b"\n\n"),
            ("200 with a quota's end in it", 6, "insufficient_quota", b""),
            ("200 with a wrong key in it", 4, "invalid_api_key", b""),
            ("200 with an unknown parameter in it", 1, "unknown_parameter", b""),
        )
        for reply in [Reply(200, lead + refusal(200, code, "No way.").body)]
    ),
    *rows(
        refused(5),
        {
            "a stream that is a policy refusal": event_stream(
                {"type": "error", "error": {"message": "No way", "code": "moderation_blocked"}}
            ),
            "a stream whose event is named error": event_stream(
                b'event: error\ndata: {"message": "No way", "code": "moderation_blocked"}\n\n'
            ),
            "a preview, then a policy refusal": event_stream(
                partial_event(PREVIEW),
                {"error": {"message": "No way", "code": "moderation_blocked"}},
            ),
        },
        says="No way",
        code="moderation_blocked",
    ),
    *rows(
        SAVED,
        {
            "200, blank lines, then the answer": Reply(200, b"\n" * 5000 + answer(FIRST).body),
            "200, BOM and a wrong Content-Type": Reply(
                200, b"\xef\xbb\xbf" + answer(FIRST).body, [("Content-Type", "text/html")]
            ),
            "100 and 103 before the 200": Reply(
                raw=b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"
                b"HTTP/1.1 200 OK\r\n\r\n" + answer(FIRST).body
            ),
            "HTTP 500 with the picture in its body": answer(FIRST)._replace(status=500),
            "a stream, though none was asked for": event_stream(
                partial_event(PREVIEW), completed_event(FIRST), "[DONE]"
            ),
        },
    ),
    *rows(
        NO_PICTURE,
        {
            "base64 broken": json_reply({"data": [{"b64_json": "!" + b64(FIRST)[1:]}]}),
            "half a PNG in whole base64": answer(FIRST[:2000]),
            "an HTML page as base64": answer(page(200, "Log in").body * 50),
        },
    ),
    *rows(
        Outcome(9, saved=2, recover=(9, 2)),
        {
            "base64 of one of three broken": Reply(
                200, THREE.body.replace(b64(SECOND).encode(), b"!!!!" * 999)
            )
        },
        argv=FOXES,
        says="picture 2",
    ),
    *rows(Outcome(9, 1, 2), {"two pictures of three": answer(FIRST, SECOND)}, argv=FOXES),
    *rows(Outcome(0, 1, 3), {"three pictures for one": THREE}),
    *rows(
        MAYBE_BILLED,
        {
            "a stream without its completed event": event_stream(partial_event(PREVIEW)),
            "a stream that is done without it": event_stream(partial_event(PREVIEW), "[DONE]"),
        },
    ),
    *rows(
        Outcome(9, saved=1),
        {
            "a stream cut after one of three pictures": event_stream(
                completed_event(FIRST), partial_event(PREVIEW)
            )._replace(content_length=99_999, framing="length")
        },
        argv=FOXES,
    ),
]

CONNECTIONS = [
    *rows(
        SENT_NOTHING,
        {
            "nothing listens": nowhere(closed_port),
            "host unknown": nowhere(lambda _: "https://api.invalid/v1"),
            "no answer to the connection": nowhere(full_queue, "--connect-timeout", "1"),
            "no answer to the TLS handshake": nowhere(
                lambda stage: f"https://127.0.0.1:{silent_port(stage).getsockname()[1]}/v1",
                *("--connect-timeout", "1"),
            ),
            "https to a plain port": nowhere(
                lambda stage: f"https://127.0.0.1:{stage.serve(strict=False).port}/v1"
            ),
            "certificate that nobody vouches for": nowhere(
                lambda stage: f"https://localhost:{tls_port(stage)}/v1"
            ),
            "proxy down": nowhere(
                lambda _: "https://relay.example/v1", GPT_IMAGE2_PROXY=closed_port
            ),
        },
        says="nothing was sent",
    ),
    Fault("nothing listens at first, then the answer", late_server, SAVED),
    *rows(
        MAYBE_BILLED._replace(posts=0),
        {
            "plain http to a TLS port": nowhere(
                lambda stage: f"http://127.0.0.1:{tls_port(stage)}/v1"
            ),
            "proxy refuses to connect": nowhere(
                lambda _: "https://relay.example/v1", GPT_IMAGE2_PROXY=refusing_proxy
            ),
        },
    ),
    *rows(
        MAYBE_BILLED,
        {
            "closed without a byte": Reply(silent=True),
            "reset without a byte": Reply(reset=True),
            "garbage instead of HTTP": Reply(raw=b"SSH-2.0-Server_9.2\r\n"),
            "an HTML page instead of HTTP": Reply(raw=b"<html>hello</html>"),
            "400 KB of headers": Reply(
                raw=b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 400_000 + b"\r\n\r\n"
            ),
            "headers cut": Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Ty"),
        },
        says="billed",
    ),
    *(
        fault
        for whole, picture in enumerate((FIRST, SECOND, THIRD))
        for fault in rows(
            Outcome(8, recover=(9 if whole else 10, whole)),
            {f"cut with {whole} of 3 pictures whole": cut_in(THREE, picture)},
            argv=FOXES,
        )
    ),
    *rows(Outcome(8, recover=(0, 1)), {"cut after the only picture": CUT_END}),
    *rows(
        Outcome(8, recover=(9, 2)),
        {
            "cut with 2 of 3 pictures whole, by a reset": cut_in(THREE, THIRD)._replace(reset=True),
            "cut with 2 of 3 pictures whole, no length told": cut_in(THREE, THIRD)._replace(
                framing="close"
            ),
            "cut with 2 of 3 pictures whole, chunked": cut_in(THREE, THIRD)._replace(
                framing="chunked"
            ),
        },
        argv=FOXES,
    ),
    *rows(MAYBE_BILLED, {"a picture as the body, cut": Reply(200, FIRST, cut=2000)}),
    *rows(
        SAVED,
        {
            "Content-Length too large": answer(FIRST)._replace(content_length=99_999),
            "chunked, whole, but its end is missing": answer(FIRST)._replace(
                framing="chunked", cut=len(answer(FIRST).body)
            ),
            "an answer byte by byte": in_pieces(answer(FIRST), 64),
        },
    ),
    *rows(
        Outcome(8, recover=(9, 1)),
        {"Content-Length too small": THREE._replace(content_length=middle_of(THREE, SECOND))},
        argv=FOXES,
    ),
    *rows(
        MAYBE_BILLED,
        {
            "time-out before the headers": answers(
                answer(FIRST)._replace(before=threading.Event()), argv=(*FOX, *BRIEF)
            ),
            "time-out after blank lines": stalled(Reply(200, b"\n\n\n{}"), 3),
        },
        says="--timeout",
    ),
    Fault(
        "time-out with 2 of 3 pictures whole",
        stalled(THREE, middle_of(THREE, THIRD)),
        Outcome(8, recover=(9, 2)),
    ),
]

LINKS = [
    *rows(
        NO_PICTURE,
        {
            "link: 404": links({"/a.png": Reply(404)}),
            "link: 403, expired": links({"/a.png": page(403, "Expired")}),
            "link: an HTML page": links({"/a.png": page(200, "Log in")}),
            "link: redirects in a circle": links(
                {"/a.png": Reply(302, headers=[("Location", "/a.png")])}
            ),
            "link: to this machine": link_to_this_machine,
        },
    ),
    Fault(
        "link: 404, later there",
        links({"/a.png": Reply(404)}, later={"/a.png": FIRST}),
        Outcome(10, recover=(0, 1)),
        says="HTTP 404",
    ),
    Fault(
        "link: one of three is 404, later there",
        links({"/a.png": FIRST, "/b.png": Reply(404), "/c.png": THIRD}, later={"/b.png": SECOND}),
        Outcome(9, saved=2, recover=(0, 3)),
    ),
    *rows(
        SAVED,
        {
            "link: 500, then the file": links({"/a.png": [Reply(500), ranged(FIRST)]}),
            "link: 429, then the file": links({"/a.png": [Reply(429), ranged(FIRST)]}),
            "link: closed without a byte, then the file": links(
                {"/a.png": [Reply(silent=True), ranged(FIRST)]}
            ),
            "link: cut, then resumed": links({"/a.png": [ranged(FIRST, cut=999), ranged(FIRST)]}),
            "link: time-out, then the file": links(
                {"/a.png": [Reply(before=threading.Event()), ranged(FIRST)]}, more=BRIEF
            ),
        },
    ),
]

SYSTEM = [
    Fault("curl is not installed", no_curl, Outcome(3, 0), says="curl"),
    Fault("the output file exists", target_exists, Outcome(2, 0), says="--force"),
    Fault("the output file appears meanwhile", meanwhile(claim_the_name, folder=False), SAVED),
    Fault("the output folder is removed meanwhile", meanwhile(remove_the_folder), SAVED),
    Fault("the output folder is read-only", folder_read_only, Outcome(2, 0)),
    *rows(
        Outcome(9, saved=1, recover=(0, 1)),
        {
            "the output folder becomes a file meanwhile": meanwhile(block_the_folder),
            "the output folder becomes read-only meanwhile": folder_made_read_only,
            "the output disk is full": full_disk,
        },
    ),
    *rows(
        SAVED,
        {
            "the state disk is full": full_state_disk,
            "the state folder can't be written": state_unwritable,
        },
        says="warning",
    ),
    Fault("the state disk is too small for the answer", small_state_disk, SAVED),
    Fault(
        "the state disk fills up with 2 of 3 pictures there",
        state_disk_fills_up,
        Outcome(8, recover=(9, 2)),
    ),
    Fault("no folder for jobs can be written", no_state_at_all, Outcome(3, 0)),
    *rows(
        SAVED,
        {
            "stdout closed": streams('exec "$@" >&-'),
            "stdout full": streams('exec "$@" >/dev/full'),
            "stdout a closed pipe": stdout_closed_pipe,
            "stderr closed": streams('exec "$@" 2>&-'),
            "stdin, stdout and stderr closed": streams('exec "$@" <&- >&- 2>&-'),
        },
    ),
]

STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

SIGNALS = [
    *(
        Fault(
            f"{number.name} before any byte",
            before_a_byte(sent(number)),
            Outcome(code, recover=NOTHING_CAME),
            says="billed",
        )
        for number, code in STOPS.items()
    ),
    *(
        Fault(
            f"{number.name} mid-answer, the rest comes within 10 s",
            mid_answer(sent(number), comes=True),
            Outcome(0, saved=3),
        )
        for number in STOPS
    ),
    Fault(
        "SIGTERM with 2 of 3 pictures whole, the rest doesn't come",
        waits_in_vain,
        Outcome(143, recover=(9, 2)),
    ),
    *rows(
        Outcome(130, recover=(9, 2)),
        {"a second SIGINT": mid_answer(interrupt_twice), "Ctrl-C hammered": hammered},
    ),
    Fault("SIGINT while waiting to retry a 429", while_waiting_to_retry, refused(130)),
    Fault("SIGINT during a download", while_downloading, Outcome(130, recover=(0, 1))),
    Fault("SIGHUP under nohup", hang_up_under_nohup, SAVED),
    Fault(
        "SIGKILL before any byte",
        before_a_byte(sent(signal.SIGKILL)),
        Outcome(-9, recover=(0, 1)),
    ),
    Fault(
        "SIGKILL mid-answer",
        mid_answer(sent(signal.SIGKILL), comes=True),
        Outcome(-9, recover=(0, 3)),
    ),
    Fault("SIGKILL after the answer", killed_after_the_answer, Outcome(-9, recover=(0, 1))),
    Fault("SIGKILL, and the same command again", killed_and_run_again, SAVED),
    Fault("SIGKILL of curl before any byte", before_a_byte(kill_curl), MAYBE_BILLED),
    Fault(
        "SIGKILL of curl with 2 of 3 pictures whole",
        mid_answer(kill_curl),
        Outcome(8, recover=(9, 2)),
    ),
]

FAULTS = [*REFUSALS, *LIMITS, *SERVER_ERRORS, *BODIES, *CONNECTIONS, *LINKS, *SYSTEM, *SIGNALS]


# ---- The table as Markdown --------------------------------------------------------------------

COLUMNS = ("fault", "exit", "POSTs", "pictures saved", "kept for recover", "recover brings")


def main() -> int:
    """Play every fault, print the table, and return 1 if anything was not as expected."""
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    skipped, wrong, lost, again = 0, 0, 0, 0
    for fault in FAULTS:
        stage = Stage()
        stage.setUp()
        try:
            seen = stage.play(fault)
        except unittest.SkipTest as reason:
            print(f"| {fault.name} | skipped: {reason} |" + " |" * 4)
            skipped += 1
            continue
        except AssertionError as error:
            print(f"{fault.name}: {error}", file=sys.stderr)
            wrong += 1
            continue
        finally:
            stage.doCleanups()
        print(markdown_row(fault.name, seen.outcome), flush=True)
        if seen.outcome != fault.outcome:
            print(f"{fault.name}: expected {fault.outcome}\n{seen.run}", file=sys.stderr)
            wrong += 1
        lost += seen.lost
        again += posts_too_many(fault, seen)
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
    return max(0, seen.outcome.posts - fault.outcome.posts) if fault.outcome.unknown else 0


if __name__ == "__main__":
    sys.exit(main())
