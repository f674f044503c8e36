"""The fault table: what a server or a system may do wrong, and what comes of it.

FAULTS is the table: each row says how something misbehaves and what is expected then. Every row is
played with a real curl, real sockets and real signals, in folders of its own; after it `recover`
is run on what was kept. tests/test_faults.py asserts the table, and

    python3 tests/faults.py

plays it and prints what was seen; with --markdown it prints docs/faults.md: what is expected,
which tests/test_faults.py asserts row by row.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import ssl
import sys
import threading
import unittest
from pathlib import Path
from typing import IO, Any, Callable, NamedTuple, Sequence, Union
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.case import HANG, Argument, Child, Run, SystemCase
from tests.images import png
from tests.server import (
    KEY,
    Chunk,
    Reply,
    Script,
    answer,
    b64,
    completed_event,
    event_stream,
    json_reply,
    page,
    partial_event,
    ranged,
    refusal,
)

FIRST, SECOND, THIRD = (png(40, 30 + i, seed=i) for i in range(3))  # about 4 KB each
LARGE = png(300, 300, seed=3)  # 270 KB, more than a small disk holds
PREVIEW = png(10, 10, seed=4)  # never to be taken for an image
IMAGES = {FIRST, SECOND, THIRD, LARGE}

FOX = ("generate", "a fox")
FOXES = (*FOX, "--n", "3")
BAD_KEY = refusal(401, "invalid_api_key", "No.")
INT, TERM = signal.SIGINT, signal.SIGTERM
HUP, KILL = (getattr(signal, f"SIG{name}", TERM) for name in ("HUP", "KILL"))
RELAY, ODD = "https://relay.example/v1", "odd://fox:secret@h"
BRIEF = ("--timeout", "1")
ONCE = ("--retries", "0")


# ---- A stage: the world of one fault ----------------------------------------------------------


class Outcome(NamedTuple):
    """What comes of one call: exit code, POSTs, images on disk, and what recover brings."""

    exit: int
    posts: int = 1
    saved: int = 0
    recover: tuple[int, int] | None = None
    """The exit code of recover, and the images that it saves; None: nothing is kept."""

    @property
    def came(self) -> int:
        """The images that came whole: none of them may be lost."""
        return max(self.saved, self.recover[1] if self.recover else 0)

    @property
    def unknown(self) -> bool:
        """Whether the request may have been billed, so that no second one may be sent."""
        return self.exit == 8 or self.recover is not None


class Seen(NamedTuple):
    """What was seen when a fault was played."""

    outcome: Outcome
    lost: int
    """Whole images that came, and that neither the call nor recover saved."""
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
        saved = self.images(run)
        recovered = None
        if self.jobs_anywhere():
            self.repair()
            recovered = self.run_tool("recover", "--all")
        brought = images_at(recovered.saved) if recovered else set()
        brings = (recovered.code, len(brought)) if recovered else None
        posts = sum(len(api.posts) for api in self.servers)
        for one in filter(None, (run, recovered)):
            self.assertNotRegex(one.err + one.out, f"Traceback|{KEY}", self.story(one))
        self.assertEqual(self.processes(), [], "processes are left behind")
        self.assertEqual(self.files_with(KEY), [], "the key is in a file")
        for api in self.servers:
            api.check()
        lost = max(0, fault.outcome.came - len(saved | brought))
        return Seen(Outcome(run.code, posts, len(saved), brings), lost, run, recovered)

    def images(self, run: Run) -> set[bytes]:
        """Return the known images that a run has left, wherever it says they are."""
        visible = [self.work / name for name in self.listing() if "/." not in f"/{name}"]
        told = run.json["images"] if run.out.startswith("{") else []
        return images_at([*visible, *run.saved, *[Path(image["path"]) for image in told]])


def images_at(paths: Sequence[Path]) -> set[bytes]:
    """Return those of IMAGES that are in these files, byte for byte."""
    return {path.read_bytes() for path in paths if path.is_file()} & IMAGES


Play = Callable[[Stage], Run]
Place = Union[str, Callable[[Stage], str]]


class Fault(NamedTuple):
    """One row: how something misbehaves, how that is played, and what is expected."""

    name: str
    play: Play
    outcome: Outcome
    says: str = ""
    """Words that the error line must hold: the server's own, or the way out."""
    code: str = ""
    """The code of the error in the document, where the API gives one."""


# ---- Servers that fail ------------------------------------------------------------------------


def answers(*replies: Script, argv: Sequence[Argument] = FOX) -> Play:
    """Play a call that gets these replies, one a POST."""

    def play(stage: Stage) -> Run:
        stage.serve_base(*replies, otherwise=answer(FIRST))
        return stage.run_tool(*argv, "--json")

    return play


def stalled(reply: Reply, sent: int) -> Play:
    """Play an answer that stops after so many bytes of its body."""
    chunks: list[Chunk] = [reply.body[:sent], threading.Event()]
    held = reply._replace(chunks=chunks, content_length=len(reply.body))
    return answers(held, argv=(*FOXES, *BRIEF))


def link(*replies: Script, more: Sequence[Argument] = ()) -> Play:
    """Play an answer that is a link, which gives these replies and is gone when recover comes."""

    def play(stage: Stage) -> Run:
        api = stage.serve_base()
        api.files["/a.png"] = list(replies)
        stage.repair = lambda: api.put("/a.png", Reply(404))
        api.script.append(answer(api.origin + "/a.png"))
        return stage.run_tool(*FOX, "--json", *more)

    return play


def own_loopback(stage: Stage) -> Run:
    """Play an answer with a link to the port at which the server itself listens."""
    closed = stage.serve()
    closed.close()
    api = stage.serve_base(answer(closed.origin + "/a.png"))
    api.put("/a.png", FIRST)
    return stage.run_tool(*FOX)


def three_links(stage: Stage) -> Run:
    """Play an answer of three links, of which one leads nowhere until recover comes."""
    api = stage.serve_base()
    found = [api.put("/a.png", FIRST), api.put("/b.png", THIRD)]
    stage.repair = lambda: api.put("/c.png", SECOND)
    api.script.append(answer(found[0], api.origin + "/c.png", found[1]))
    return stage.run_tool(*FOXES)


def in_two(reply: Reply, at: int, between: Chunk) -> Reply:
    """Return a reply that comes in two parts, with something between them."""
    return reply._replace(chunks=[reply.body[:at], between, reply.body[at:]])


def cut_in(reply: Reply, image: bytes) -> Reply:
    return reply._replace(cut=middle_of(reply, image))


def middle_of(reply: Reply, image: bytes) -> int:
    """Return where in the body the middle of an image's base64 is."""
    return reply.body.index(b64(image).encode()) + len(b64(image)) // 2


# ---- Networks that fail -----------------------------------------------------------------------


def nowhere(url: Place, *more: Argument, proxy: Place = "") -> Play:
    """Play a call, without a second try, to a base URL where no Api answers."""

    def play(stage: Stage) -> Run:
        base, through = (one(stage) if callable(one) else one for one in (url, proxy))
        stage.env.update(GPT_IMAGE2_BASE_URL=base, GPT_IMAGE2_API_KEY=KEY, GPT_IMAGE2_PROXY=through)
        return stage.run_tool(*FOX, *ONCE, "--json", *more)

    return play


def closed_port(stage: Stage) -> str:
    return f"http://127.0.0.1:{stage.closed_port()}"


def https_to_plain(stage: Stage) -> str:
    return stage.serve(strict=False).origin.replace("http:", "https:")


def silent_port(stage: Stage, backlog: int = 8) -> str:
    """Return the address of a port where the system lets callers in, and nobody says a word."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
    stage.addCleanup(listener.close)
    return f"https://127.0.0.1:{listener.getsockname()[1]}"


def full_queue(stage: Stage) -> str:
    """Return the address of a port whose queue is full, so that it drops what knocks."""
    url = silent_port(stage, backlog=0)
    for _ in range(4):
        knocking = socket.socket()
        stage.addCleanup(knocking.close)
        knocking.setblocking(False)
        knocking.connect_ex(("127.0.0.1", int(url.rpartition(":")[2])))
    return url


def tls_port(stage: Stage) -> str:
    """Return the address of a port that takes one caller, by TLS, as nobody that is trusted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(stage.certificate())
    listener = socket.create_server(("127.0.0.1", 0))

    def converse() -> None:
        with contextlib.suppress(OSError):
            caller = listener.accept()[0]
            with context.wrap_socket(caller, server_side=True) as connection:
                connection.recv(65536)

    thread = threading.Thread(target=converse)
    thread.start()
    stage.addCleanup(listener.close)
    stage.addCleanup(thread.join)
    return f"https://localhost:{listener.getsockname()[1]}"


def late_server(stage: Stage) -> Run:
    """Nothing listens at the first try; the second one is answered."""
    api = stage.serve_base(answer(FIRST))
    door = socket.socket()
    stage.addCleanup(door.close)
    door.bind(("127.0.0.1", 0))  # bound, but not listening: connections are refused
    stage.env.update(GPT_IMAGE2_BASE_URL=f"http://127.0.0.1:{door.getsockname()[1]}/v1")
    tool = stage.start_tool(*FOX)
    stage.hear(tool, "before retry")
    door.listen()
    door.settimeout(HANG)
    api._serve(door.accept()[0])  # as if it had come by the server's own port
    return stage.finish(tool)


# ---- Systems that fail ------------------------------------------------------------------------


def no_curl(stage: Stage) -> Run:
    stage.env["PATH"] = str(stage.home)
    return answers()(stage)


def meanwhile(act: Callable[[Stage], object]) -> Play:
    """Play a call during whose answer something else happens."""

    def play(stage: Stage) -> Run:
        reply = answer(FIRST)
        stage.serve_base(in_two(reply, len(reply.body) // 2, lambda: act(stage)))
        (stage.work / "out").mkdir()
        return stage.run_tool(*FOX, "-o", "out/fox.png")

    return play


def remove_the_folder(stage: Stage) -> None:
    shutil.rmtree(stage.work / "out")


def remove_the_state(stage: Stage) -> None:
    shutil.rmtree(stage.state / "gpt-image-2")


def waited_for(reply: Reply, act: Callable[[Stage], object] = lambda stage: None) -> Play:
    """Play the same call twice at once; something happens while the second one waits."""

    def play(stage: Stage) -> Run:
        held = threading.Event()
        api = stage.serve_base(reply._replace(before=held))
        first = stage.start_tool(*FOX, "-o", "fox.png")
        api.wait_for_request()
        second = stage.start_tool(*FOX, "-o", "fox.png")
        stage.hear(second, "waiting for it")
        act(stage)
        held.set()
        stage.finish(first)
        return stage.finish(second)

    return play


def kept_refusal(stage: Stage) -> Run:
    """Kill a call whose curl gets a refusal, and repeat it."""
    held = threading.Event()
    api = stage.serve_base(BAD_KEY._replace(before=held), otherwise=answer(FIRST))
    tool = stage.start_tool(*FOX, "-o", "fox.png")
    api.wait_for_request()
    tool.kill()
    stage.finish(tool)
    held.set()
    stage.wait_until(lambda: not stage.processes("curl"))
    return stage.run_tool(*FOX, "-o", "fox.png")


def no_locks(stage: Stage) -> Run:
    import fcntl

    real = fcntl.flock

    def flock(file: IO[bytes], how: int) -> None:
        if file.name.startswith(str(stage.state)):
            raise OSError(errno.ENOLCK, "No locks available")
        real(file, how)

    with mock.patch("fcntl.flock", flock):
        return answers()(stage)


def block_the_folder(stage: Stage) -> None:
    """Put a file where the output folder was; recover finds it away again."""
    remove_the_folder(stage)
    (stage.work / "out").write_bytes(b"")
    stage.repair = (stage.work / "out").unlink


def folder_read_only(stage: Stage) -> Run:
    stage.heed_permissions()
    (stage.work / "out").mkdir(0o500)
    return answers(argv=(*FOX, "-o", "out/fox.png"))(stage)


def state_disk(reply: Reply, *, full: bool = False) -> Play:
    """Play a call whose state folder has room for a job, but not for its answer; or none."""

    def play(stage: Stage) -> Run:
        use_state(stage, stage.small_disk("state-disk"))
        if full:
            fill_up(stage.state)
        return answers(reply)(stage)

    return play


def state_disk_fills_up(stage: Stage) -> Run:
    """Two of three images are on the disk when it becomes full."""
    use_state(stage, stage.small_disk("state-disk", 128 * 1024 * 1024))
    at = middle_of(THREE, THIRD)

    def fill() -> None:
        stage.wait_until(lambda: stage.answered() >= at)
        fill_up(stage.state)

    # The third can't end in what is left of the disk's last block.
    chunks: list[Chunk] = [THREE.body[:at], fill, b"A" * 65_536 + THREE.body[at:]]
    return answers(THREE._replace(chunks=chunks), argv=FOXES)(stage)


def no_state(stage: Stage) -> Run:
    """Play a call whose state folder can't be made."""
    (stage.tmp / "file").write_bytes(b"")
    use_state(stage, stage.tmp / "file" / "state")
    return answers(answer(FIRST))(stage)


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


# ---- Signals ----------------------------------------------------------------------------------

Act = Callable[[Stage, "Child[bytes]"], object]


def before_a_byte(act: int | Act) -> Play:
    """Play a signal, or what else happens, while the server has the request and is silent."""

    def play(stage: Stage) -> Run:
        release = threading.Event()
        api = stage.serve_base(answer(FIRST)._replace(before=release))
        tool = stage.start_tool(*FOX)
        api.wait_for_request()
        hit(act, stage, tool)
        run = stage.finish(tool)
        release.set()
        return run

    return play


def mid_answer(act: int | Act, *, comes: bool = False) -> Play:
    """Play it when two of three images have come; if the third `comes`, it does so then."""

    def play(stage: Stage) -> Run:
        release, at = threading.Event(), middle_of(THREE, THIRD)
        stage.serve_base(in_two(THREE, at, release))
        tool = stage.start_tool(*FOXES)
        stage.wait_until(lambda: stage.answered() >= at)
        hit(act, stage, tool)
        if comes:
            release.set()
        return stage.finish(tool)

    return play


def hit(act: int | Act, stage: Stage, tool: Child[bytes]) -> None:
    """Send a signal to the tool, or do what else shall happen to it."""
    if callable(act):
        act(stage, tool)
    else:
        tool.send_signal(act)


def kill_curl(stage: Stage, _: object) -> None:
    os.kill(stage.the_curl(), KILL)


def waits_in_vain(stage: Stage) -> Run:
    """Stop a call whose answer stays away; the 10 s that it gets pass in a half."""
    stage.hurry(20)
    return mid_answer(TERM)(stage)


THIRD_SIGNAL = """
import os, signal, subprocess

def terminate(self, end=subprocess.Popen.terminate):
    os.kill(os.getpid(), signal.SIGINT)
    end(self)

subprocess.Popen.terminate = terminate
"""


def interrupted_again(stage: Stage) -> Run:
    """Interrupt a call twice, where the 10 s that its answer gets would take minutes.

    A third signal comes just when the tool is about to stop its curl.
    """

    def interrupt_twice(_: Stage, tool: Child[bytes]) -> None:
        tool.send_signal(INT)
        stage.hear(tool, "10 s")
        tool.send_signal(INT)

    stage.hurry(0.05)
    with open(stage.tmp / "hurry" / "sitecustomize.py", "a", encoding="utf-8") as file:
        file.write(THIRD_SIGNAL)
    return mid_answer(interrupt_twice)(stage)


def while_waiting_to_retry(stage: Stage) -> Run:
    stage.serve_base(limit(("Retry-After", "60")))
    tool = stage.start_tool(*FOX)
    stage.hear(tool, " 60")
    tool.send_signal(INT)
    return stage.finish(tool)


def while_downloading(stage: Stage) -> Run:
    api = stage.serve_base()
    api.script.append(answer(api.put("/fox.png", Reply(before=threading.Event()))))
    stage.repair = lambda: api.put("/fox.png", FIRST)
    tool = stage.start_tool(*FOX)
    api.wait_for_request(2)
    tool.send_signal(INT)
    return stage.finish(tool)


# ---- The table --------------------------------------------------------------------------------

NOTHING = (10, 0)  # what recover says of a kept job without an image
REFUSED, AUTH, POLICY, LIMIT = (Outcome(code) for code in (1, 4, 5, 6))  # nothing is kept
SENT_NOTHING = Outcome(7, 0)
SAVED, ALL = Outcome(0, saved=1), Outcome(0, saved=3)
RETRIED = Outcome(0, 2, 1)
UNKNOWN = Outcome(8, recover=NOTHING)
UNKNOWN_RETRIED = Outcome(8, 2, recover=NOTHING)
NO_IMAGE = Outcome(10, recover=NOTHING)
ONE_LOST = Outcome(9, saved=2, recover=(9, 2))
ONE_KEPT = Outcome(8, recover=(9, 1))
TWO_KEPT = Outcome(8, recover=(9, 2))
KEPT = Outcome(9, saved=1, recover=(0, 1))  # saved beside the answer, which stays

CHAT = {"content": f"![fox](data:image/png;base64,{b64(FIRST)})"}
NOW, HOUR = ("Retry-After", "0"), ("Retry-After", "3600")
BLOCKED_TOLD = ("No way", "moderation_blocked")
BLOCKED = dict(zip(("message", "code"), BLOCKED_TOLD))
EARLY = partial_event(PREVIEW)
HEADS = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"
THREE = answer(FIRST, SECOND, THIRD)
ONE_BAD = THREE.body.replace(b64(SECOND).encode(), b"!!!!" * 999)
UPSTREAM = json_reply({"error": {"message": "Timed out", "type": "upstream_error", "code": None}})
BUSY_THEN_BLOCKED = Reply(200, b"\n\n \n" + json_reply({"error": BLOCKED}).body)
EARLY_HINTS = Reply(raw=HEADS + b"HTTP/1.1 200 OK\r\n\r\n" + answer(FIRST).body)
NO_LAST_CHUNK = answer(FIRST)._replace(framing="chunked", cut=len(answer(FIRST).body))
SHORT = THREE._replace(content_length=middle_of(THREE, SECOND))
NAMED_ERROR = event_stream(f"event: error\ndata: {json.dumps(BLOCKED)}\n\n".encode())
BLOCKED_LATER = event_stream(EARLY, {"type": "error", "error": BLOCKED})
ONE_AND_EARLY = event_stream(completed_event(FIRST), EARLY)
CUT_STREAM = ONE_AND_EARLY._replace(framing="length", content_length=99_999)
CUT_END = answer(FIRST)._replace(cut=len(answer(FIRST, usage={}).body) - 2)  # ... "b64"}
SILENCE, HELD = Reply(before=threading.Event()), Reply(before=threading.Event())
CUT = cut_in(THREE, THIRD)
QUOTA = refusal(429, None, "Add credit.", type="insufficient_quota", headers=[NOW])
AGAIN = ("X-Should-Retry", "true")
VIOLATION = "safety_violations=[violence]"
UNSAFE = refusal(400, "invalid_value", VIOLATION)
UNVERIFIED = "Your organization must be verified."
UNSENT = "nothing was sent"
IMPATIENT = ("--connect-timeout", "1")
ELSEWHERE = "https://elsewhere.example/v1"
MOVED = Reply(headers=[("Location", ELSEWHERE)])
STREAM_HINT = "--stream --partial-images 1"


def row(
    name: str,
    outcome: Outcome,
    told: Play | Reply | Sequence[Script],
    says: str = "",
    code: str = "",
    *,
    n: int = 1,
) -> Fault:
    """Return a row: a play, or the replies of a server to one POST after the other."""
    if not callable(told):
        told = answers(*([told] if isinstance(told, Reply) else told), argv=FOXES if n > 1 else FOX)
    return Fault(name, told, outcome, says, code)


def coded(status: int, outcome: Outcome, *codes: str) -> list[Fault]:
    """Return the rows of errors as the API words them, all of one status."""
    replies = {code: refusal(status, code, f"Sorry: {code}, no.", headers=[NOW]) for code in codes}
    return [
        row(f"HTTP {status} {code}", outcome, reply, f"Sorry: {code}, no", code)
        for code, reply in replies.items()
    ]


def told(status: int, code: str) -> Reply:
    """Return an error with a code and no more."""
    return json_reply({"error": {"code": code, "message": "No."}}, status)


def plain(status: int, message: str = "No such thing.", **fields: Any) -> Reply:
    """Return an error without a code."""
    return refusal(status, None, message, **fields)


def limit(*headers: tuple[str, str]) -> Reply:
    """Return a rate limit with these headers."""
    return refusal(429, "rate_limit_exceeded", "Slow.", headers=headers)


REFUSALS = [
    *coded(400, POLICY, "moderation_blocked", "content_policy_violation"),
    row("HTTP 400 with safety_violations", POLICY, UNSAFE, VIOLATION),
    *coded(400, REFUSED, "invalid_value", "unknown_parameter", "invalid_image_file"),
    *coded(400, LIMIT, "billing_hard_limit_reached"),
    *coded(401, AUTH, "invalid_api_key"),
    row("HTTP 401 that echoes the key", AUTH, plain(401, f"Wrong key: {KEY}."), "Wrong key: "),
    row("HTTP 401, empty body", AUTH, Reply(401), "config --check"),
    row("HTTP 402", LIMIT, plain(402, "Pay first"), "Pay first"),
    row("HTTP 403, organisation not verified", AUTH, plain(403, UNVERIFIED), "15 minutes"),
    row("HTTP 403, HTML body", REFUSED, page(403, "Forbidden"), "HTTP 403"),
    row("HTTP 404, HTML body", REFUSED, page(404, "Not Found"), "base_url"),
    row("out of credit, as an HTTP 500", LIMIT, told(500, "INSUFFICIENT_BALANCE"), "credit"),
    row(
        "no channel for the model, as an HTTP 503", REFUSED, told(503, "model_not_found"), "--model"
    ),
    row(
        "content policy, non-OpenAI error code",
        POLICY,
        told(400, "ResponsibleAIPolicyViolation"),
        "policy",
    ),
    row("200 with a task", UNKNOWN, json_reply({"task_id": "t7", "status": "queued"}), "task t7"),
    row("200 with a refusal as text", UNKNOWN, json_reply({"content": "I can't."}), "I can't."),
    row("200 with a chat completion", SAVED, json_reply({"choices": [{"message": CHAT}]})),
    row(
        "HTTP 400 with non-standard fields",
        REFUSED,
        json_reply({"errorMessage": "Odd"}, 400),
        "Odd",
    ),
    row("HTTP 413 before the request is read", REFUSED, Reply(413, early=True), "too large"),
    *(
        row(f"HTTP {status} redirect", REFUSED, MOVED._replace(status=status), ELSEWHERE)
        for status in (301, 302, 303, 307, 308)
    ),
]

SECOND_TRIES = {
    "HTTP 429, Retry-After: 0": limit(NOW),
    "HTTP 429, retry-after-ms: 20": limit(("retry-after-ms", "20"), HOUR),
    "HTTP 429, no Retry-After": limit(),
    "HTTP 503, Retry-After: 0": page(503, "Unavailable", [NOW]),
    "HTTP 429, try again in 20ms": refusal(429, None, "Please try again in 20ms."),
    "HTTP 503 slow_down": refusal(503, "slow_down", "Busy."),
}

LIMITS = [
    *(
        row(f"{name}, then success", RETRIED, [reply, answer(FIRST)])
        for name, reply in SECOND_TRIES.items()
    ),
    row("HTTP 429 three times, Retry-After: 0", Outcome(6, 3), [limit(NOW)] * 3, "Slow"),
    row("HTTP 429, and no retries", LIMIT, answers(limit(NOW), argv=(*FOX, *ONCE)), "Slow"),
    row("HTTP 429, Retry-After: 3600", LIMIT, limit(HOUR), "3600 s"),
    *coded(429, LIMIT, "insufficient_quota", "credit_balance_exhausted"),
    *coded(429, LIMIT, "organization_spend_limit_exceeded", "organization_usage_limit_exceeded"),
    row("HTTP 429, quota error only in `type`", LIMIT, QUOTA, "Add credit", "insufficient_quota"),
]

SERVER_ERRORS = [
    *coded(500, UNKNOWN, "server_error", "do_request_failed"),
    row("HTTP 500 that echoes the key", UNKNOWN, plain(500, f"Bad key {KEY}."), "Bad key "),
    row("HTTP 500, HTML body", UNKNOWN, page(500, "Internal Server Error"), "billed"),
    row("HTTP 500, X-Should-Retry: true", UNKNOWN, plain(500, headers=[AGAIN, NOW]), "billed"),
    *(
        row(f"HTTP {status}, HTML body", UNKNOWN, page(status, "Gateway"), STREAM_HINT)
        for status in (502, 504, 520, 521, 522, 524)
    ),
    row("HTTP 503, no Retry-After", UNKNOWN, page(503, "Unavailable"), "billed"),
    row("HTTP 408", UNKNOWN, Reply(408, headers=[NOW]), "billed"),
    row("HTTP 409", UNKNOWN, plain(409, headers=[NOW]), "No such thing"),
    row("HTTP 429, then 500", UNKNOWN_RETRIED, [limit(NOW), page(500, "Error")]),
    row("HTTP 429, then no response", UNKNOWN_RETRIED, [limit(NOW), Reply(silent=True)]),
    row("HTTP 429, then 200 without a body", UNKNOWN_RETRIED, [limit(NOW), Reply(200)]),
]

BODIES = [
    row("200, empty body", UNKNOWN, Reply(200), "billed"),
    row("204", UNKNOWN, Reply(204, framing="none"), "billed"),
    row("200, HTML body", UNKNOWN, page(200, "Log in"), "Log in"),
    row("200, no image: {}", UNKNOWN, json_reply({}), "billed"),
    row("200, no image: a bare null", UNKNOWN, json_reply(None), "billed"),
    row("200, no image: data is []", UNKNOWN, json_reply({"data": []}), "billed"),
    row("200, no image: data holds a null", UNKNOWN, json_reply({"data": [None]}), "billed"),
    row("200 with an upstream error in it", UNKNOWN, UPSTREAM, "Timed out"),
    row("200, blank lines, then a policy refusal", POLICY, BUSY_THEN_BLOCKED, *BLOCKED_TOLD),
    *coded(200, AUTH, "invalid_api_key"),
    *coded(200, REFUSED, "unknown_parameter"),
    row("100 and 103 before the 200", SAVED, EARLY_HINTS),
    row("HTTP 500 with the image in its body", SAVED, answer(FIRST)._replace(status=500)),
    row("invalid base64", NO_IMAGE, json_reply({"data": [{"b64_json": "!" + b64(FIRST)[1:]}]})),
    row("one of three images has invalid base64", ONE_LOST, Reply(200, ONE_BAD), "image 2", n=3),
    row("truncated PNG in valid base64", NO_IMAGE, answer(FIRST[:2000])),
    row("two images of three", Outcome(9, 1, 2), answer(FIRST, SECOND), n=3),
    row("a stream that ends in a policy refusal", POLICY, BLOCKED_LATER, *BLOCKED_TOLD),
    row("a stream whose event is named error", POLICY, NAMED_ERROR, *BLOCKED_TOLD),
    row("a stream truncated after one of three images", Outcome(9, saved=1), CUT_STREAM, n=3),
]

CONNECTIONS = [
    row("connection refused", SENT_NOTHING, nowhere(closed_port), UNSENT),
    row("connection refused at first, then success", SAVED, late_server),
    row("host unknown", SENT_NOTHING, nowhere("https://api.invalid/v1"), UNSENT),
    row("connection timeout", SENT_NOTHING, nowhere(full_queue, *IMPATIENT), UNSENT),
    row("TLS handshake timeout", SENT_NOTHING, nowhere(silent_port, *IMPATIENT), UNSENT),
    row("https to a plain http port", SENT_NOTHING, nowhere(https_to_plain), UNSENT),
    row("untrusted certificate", SENT_NOTHING, nowhere(tls_port), UNSENT),
    row("proxy down", SENT_NOTHING, nowhere(RELAY, proxy=closed_port), UNSENT),
    row(
        "unsupported proxy scheme, with a login", SENT_NOTHING, nowhere(RELAY, proxy=ODD), "****@h"
    ),
    row("closed without a byte", UNKNOWN, Reply(silent=True), "billed"),
    row("reset without a byte", UNKNOWN, Reply(reset=True), "billed"),
    row("garbage instead of HTTP", UNKNOWN, Reply(raw=b"SSH-2.0-Server_9.2\r\n"), "billed"),
    row("truncated headers", UNKNOWN, Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Ty"), "billed"),
    row("an image as the body, truncated", UNKNOWN, Reply(200, FIRST, cut=2000), "billed"),
    row("truncated: 0 of 3 images complete", UNKNOWN, cut_in(THREE, FIRST), n=3),
    row("truncated: 2 of 3 images complete", TWO_KEPT, CUT, n=3),
    row("truncated: 2 of 3 images complete, by a reset", TWO_KEPT, CUT._replace(reset=True), n=3),
    row(
        "truncated: 2 of 3 images complete, chunked", TWO_KEPT, CUT._replace(framing="chunked"), n=3
    ),
    row("truncated after the only image", Outcome(8, recover=(0, 1)), CUT_END),
    row("Content-Length too large", SAVED, answer(FIRST)._replace(content_length=99_999)),
    row("Content-Length too small", ONE_KEPT, SHORT, n=3),
    row("chunked, complete, but the last chunk is missing", SAVED, NO_LAST_CHUNK),
    row("time-out before the headers", UNKNOWN, answers(SILENCE, argv=(*FOX, *BRIEF)), "--timeout"),
    row("time-out after blank lines", UNKNOWN, stalled(Reply(200, b"\n\n{}"), 2), "--timeout"),
    row("time-out with 2 of 3 images complete", TWO_KEPT, stalled(THREE, middle_of(THREE, THIRD))),
]

LINKS = [
    row("link: 403, expired", NO_IMAGE, link(*[page(403, "Expired")] * 2), "HTTP 403"),
    row("link: one of three is 404 at first", Outcome(9, 1, 2, (0, 3)), three_links),
    row("link: 429, then the file", SAVED, link(Reply(429), ranged(FIRST))),
    row("link: to the server's own loopback", SAVED, own_loopback),
    row("link: no byte, then the file", SAVED, link(Reply(silent=True), ranged(FIRST))),
    row("link: time-out, then the file", SAVED, link(HELD, ranged(FIRST), more=BRIEF)),
]

SYSTEM = [
    row("curl is not installed", Outcome(3, 0), no_curl, "curl"),
    row("the state folder is removed meanwhile", Outcome(8), meanwhile(remove_the_state), "billed"),
    row("the same, while the same call waits", Outcome(8), waited_for(BAD_KEY, remove_the_state)),
    row("the same command while the first runs", SAVED, waited_for(answer(FIRST))),
    row("SIGKILL, then a 401, then the same command", Outcome(0, 2, 1), kept_refusal),
    row("file locks do not work", SAVED, no_locks),
    row("the output folder is removed meanwhile", SAVED, meanwhile(remove_the_folder)),
    row("the output folder becomes a file meanwhile", KEPT, meanwhile(block_the_folder)),
    row("the output folder is read-only", Outcome(2, 0), folder_read_only),
    row("the state disk is full", SAVED, state_disk(answer(FIRST), full=True), "warning"),
    row("the state disk is too small for the response", SAVED, state_disk(answer(LARGE))),
    row("the state disk fills up with 2 of 3 images there", TWO_KEPT, state_disk_fills_up),
    row("the state folder can't be written", SAVED, no_state, "warning"),
]

SIGNALS = [
    row("SIGINT before any byte", Outcome(130, recover=NOTHING), before_a_byte(INT), "billed"),
    row("SIGTERM before any byte", Outcome(143, recover=NOTHING), before_a_byte(TERM), "billed"),
    row("SIGHUP before any byte", Outcome(129, recover=NOTHING), before_a_byte(HUP), "billed"),
    *(
        row(
            f"{one.name} mid-response, the rest arrives within 10 s",
            ALL,
            mid_answer(one, comes=True),
        )
        for one in (INT, TERM, HUP)
    ),
    row(
        "SIGTERM with 2 of 3 images complete, no more", Outcome(143, recover=(9, 2)), waits_in_vain
    ),
    row("Ctrl-C repeatedly", Outcome(130, recover=(9, 2)), interrupted_again),
    row("SIGINT while waiting to retry a 429", Outcome(130), while_waiting_to_retry),
    row("SIGINT during a download", Outcome(130, recover=(0, 1)), while_downloading),
    row("SIGKILL before any byte", Outcome(-9, recover=(0, 1)), before_a_byte(KILL)),
    row("SIGKILL mid-response", Outcome(-9, recover=(0, 3)), mid_answer(KILL, comes=True)),
    row("SIGKILL of curl with 2 of 3 images complete", TWO_KEPT, mid_answer(kill_curl)),
]

FAULTS = [*REFUSALS, *LIMITS, *SERVER_ERRORS, *BODIES, *CONNECTIONS, *LINKS, *SYSTEM, *SIGNALS]


# ---- The table as Markdown --------------------------------------------------------------------


HEAD = """| fault | exit | requests | images saved | response kept | `recover` saves |
|---|---|---|---|---|---|"""
INTRODUCTION = """<!-- Made by: python3 tests/faults.py --markdown -->

# Faults

Each row is a test: a local server or the system misbehaves as named, and the other columns show the
result of one call. *Requests* counts the POSTs that arrived. No image that arrived is lost, and
no request that may have been billed is sent again.
"""


def document() -> str:
    """Return docs/faults.md."""
    rows = [markdown_row(fault.name, fault.outcome) for fault in FAULTS]
    return "\n".join([INTRODUCTION, HEAD, *rows, ""])


def main() -> int:
    """Play every fault, print the table, and return 1 if anything was not as expected."""
    if "--markdown" in sys.argv:
        print(document(), end="")
        return 0
    print(HEAD)
    skipped = wrong = lost = again = 0
    for fault in FAULTS:
        stage = Stage()
        stage.setUp()
        try:
            seen = stage.play(fault)
            print(markdown_row(fault.name, seen.outcome), flush=True)
            lost += seen.lost
            more = seen.outcome.posts - fault.outcome.posts
            again += max(0, more) if fault.outcome.unknown else 0
            stage.assertEqual(seen.outcome, fault.outcome, str(seen.run))
        except unittest.SkipTest as reason:
            print(f"| {fault.name} | skipped: {reason} |" + " |" * 4)
            skipped += 1
        except AssertionError as error:
            print(f"{fault.name}: {error}", file=sys.stderr)
            wrong += 1
        finally:
            stage.doCleanups()
    counts = f"{len(FAULTS)} faults, {skipped} skipped, {wrong} not as expected"
    print(f"\n{counts}: {lost} images lost, {again} second POSTs after an unknown outcome.")
    return 1 if wrong or lost else 0


def markdown_row(name: str, outcome: Outcome) -> str:
    """Return one line of the table."""
    exit_code = "killed" if outcome.exit < 0 else str(outcome.exit)
    kept, brings = ("no", "")
    if outcome.recover:
        code, images = outcome.recover
        counted = f"{images} image" + "s" * (images > 1) if images else "nothing"
        kept, brings = "yes", f"{counted}, exit {code}"
    cells = [name, exit_code, str(outcome.posts), str(outcome.saved), kept, brings]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
