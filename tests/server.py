"""A server on 127.0.0.1 that answers as it is told, and misbehaves on cue.

api = Api(answer(png(8, 8)), refusal(400, "invalid_value", "No such size."))
api.posts[0].json["prompt"]
"""

from __future__ import annotations

import base64
import contextlib
import http
import io
import json
import re
import socket
import struct
import sys
import threading
import traceback
from collections import deque
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence, Tuple, Union

PATIENCE = 30.0  # seconds that the server waits for an event or for its peer
KEY = "sk-test-0123456789abcdefghijkl"

Headers = Sequence[Tuple[str, str]]
Json = Mapping[str, Any]


# ---- What the server saw ----------------------------------------------------------------------


class Part(NamedTuple):
    """One part of a multipart body."""

    name: str
    filename: str | None
    content_type: str | None
    body: bytes


class Request(NamedTuple):
    """One request as it arrived; `headers` has lower-case names and joins repeated ones."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def parts(self) -> list[Part]:
        """The parts of a multipart body, in order; a ValueError where it is malformed."""
        return parse_multipart(self.headers.get("content-type", ""), self.body)

    @property
    def fields(self) -> dict[str, str]:
        """The plain fields of a multipart body."""
        return {part.name: part.body.decode() for part in self.parts if part.filename is None}

    @property
    def uploads(self) -> list[Part]:
        """The files of a multipart body."""
        return [part for part in self.parts if part.filename is not None]

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.headers.items()]
        body = repr(self.body[:1000]) + ("..." if len(self.body) > 1000 else "")
        start = f"{self.method} {self.target}"
        return "\n".join([start, *lines, f"({len(self.body)} bytes) {body}"])


def parse_head(head: bytes) -> Request:
    """Return the request that a head announces, with no body yet; strict about its form."""
    first, *lines = head.decode("utf-8", "surrogateescape").split("\r\n")
    start = re.fullmatch(r"([A-Z]+) (\S+) HTTP/1\.[01]", first)
    if not start:
        raise ValueError(f"not a request line: {first!r}")
    return Request(start[1], start[2], parse_headers(lines))


def parse_headers(lines: list[str]) -> dict[str, str]:
    """Return header lines by lower-case name; the values of a repeated one are joined."""
    found: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r"([!#-'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*", line)
        if not match:
            raise ValueError(f"not a header: {line!r}")
        name = match[1].lower()
        found[name] = f"{found[name]}, {match[2]}" if name in found else match[2]
    return found


def parse_multipart(content_type: str, body: bytes) -> list[Part]:
    """Split a multipart/form-data body into its parts; every byte must be where RFC 7578 has it."""
    boundary = r"multipart/form-data; boundary=([0-9A-Za-z'()+_,./:=?-]{1,70})"
    match = re.fullmatch(boundary, content_type)
    if not match:
        raise ValueError(f"not multipart/form-data: {content_type!r}")
    first, *pieces = (b"\r\n" + body).split(b"\r\n--" + match[1].encode())
    if first or not pieces or pieces.pop() != b"--\r\n":
        raise ValueError("the multipart body doesn't start and end with its boundary")
    return [parse_part(piece) for piece in pieces]


def parse_part(piece: bytes) -> Part:
    """Parse what stands between two boundaries."""
    head, blank, body = piece.partition(b"\r\n\r\n")
    if not head.startswith(b"\r\n") or not blank:
        raise ValueError(f"a part without a head: {piece[:80]!r}")
    headers = parse_headers(head.decode("utf-8", "surrogateescape").split("\r\n")[1:])
    disposition = headers.get("content-disposition", "")
    match = re.fullmatch(r'form-data; name="([^"]*)"(?:; filename="([^"]*)")?', disposition)
    if not match:
        raise ValueError(f"not a form field: {disposition!r}")
    return Part(match[1], match[2], headers.get("content-type"), body)


# ---- What the server answers ------------------------------------------------------------------

Chunk = Union[bytes, threading.Event, Callable[[], object]]


class Reply(NamedTuple):
    """One answer, or the way in which it fails to come. `reply._replace(cut=100)` varies one."""

    status: int = 200
    body: bytes = b""
    headers: Headers = ()
    before: threading.Event | None = None  # answer only once this is set
    # Instead of `body`: bytes are sent as they come, an Event is waited for, a function called.
    chunks: Sequence[Chunk] = ()
    cut: int | None = None  # send only so many bytes of the body, then close
    silent: bool = False  # close without a byte
    # End by a TCP reset: without a byte, or after what `cut`, `chunks` or `raw` say.
    reset: bool = False
    framing: str = "length"  # how the end is told: "length" (Content-Length), "chunked", "close"
    content_length: int | None = None  # other than the true one
    # Send exactly this instead of status line, headers and body; `chunks` may follow it.
    raw: bytes | None = None
    early: bool = False  # answer a POST after its head, without reading its body


def b64(data: bytes) -> str:
    """Return bytes as standard base64."""
    return base64.b64encode(data).decode()


def data_url(data: bytes) -> str:
    """Return bytes as a data: URL, which always says PNG, as relays' do."""
    return "data:image/png;base64," + b64(data)


BLANKS = {"b64_json": "", "url": "", "revised_prompt": ""}  # new-api: what is not used is empty
STYLES: dict[str, Callable[[bytes], dict[str, str]]] = {
    "b64_json": lambda image: {"b64_json": b64(image)},
    "data": lambda image: {"b64_json": data_url(image)},
    "url": lambda image: {"url": data_url(image)},
    "wrapped": lambda image: {"b64_json": base64.encodebytes(image).decode()},
    "urlsafe": lambda image: {"b64_json": base64.urlsafe_b64encode(image).decode().rstrip("=")},
    "blanks": lambda image: {**BLANKS, "b64_json": b64(image)},
}

TEXT_ONLY = {"text_tokens": 6, "image_tokens": 0}
IMAGE_ONLY = {"image_tokens": 275, "text_tokens": 0}
OPENAI_USAGE: Json = {  # $0.00828 at 5 and 30 dollars a million
    "input_tokens": 6,
    "input_tokens_details": TEXT_ONLY,
    "output_tokens": 275,
    "output_tokens_details": IMAGE_ONLY,
    "total_tokens": 281,
}
NODEKEY_USAGE: Json = {
    "prompt_tokens": 6,
    "completion_tokens": 275,
    "total_tokens": 281,
    "prompt_tokens_details": {**TEXT_ONLY, "cached_tokens": 0},
    "completion_tokens_details": IMAGE_ONLY,
    "input_tokens": 0,
    "output_tokens": 0,
}


def entry(image: bytes | str, style: str) -> dict[str, str]:
    """Return one element of `data`: a link for a string, bytes as the style says."""
    if isinstance(image, str):
        return {**(BLANKS if style == "blanks" else {}), "url": image}
    return STYLES[style](image)


def answer(
    *images: bytes | str,
    usage: Json | None = None,
    style: str = "b64_json",
    revised_prompt: str | None = None,
    **extra: Any,
) -> Reply:
    """Return the images API's JSON; `usage` is OPENAI_USAGE unless given, left out when {}.

    `extra` are more top-level fields.
    """
    more = {} if revised_prompt is None else {"revised_prompt": revised_prompt}
    document = {
        "created": 1763694000,
        "data": [{**entry(image, style), **more} for image in images],
        "usage": OPENAI_USAGE if usage is None else usage,
    }
    return json_reply({**{name: value for name, value in document.items() if value != {}}, **extra})


def hk_answer(*images: bytes | str, **extra: Any) -> Reply:
    """Return OpenAI-HK's answer: URLs for strings, base64 with a data: prefix for bytes."""
    return answer(*images, style="data", **extra)


def models(*names: str) -> Reply:
    """Return the answer of GET /v1/models."""
    return json_reply(
        {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}
    )


def refusal(
    status: int, code: str | int | None, message: str, *, headers: Headers = (), **fields: Any
) -> Reply:
    """Return an error as OpenAI phrases it; `fields` (type, param ...) change or add to it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return json_reply({"error": {**error, **fields}}, status, headers)


def json_reply(value: Any, status: int = 200, headers: Headers = ()) -> Reply:
    """Return any JSON."""
    return Reply(
        status, json.dumps(value).encode(), [("Content-Type", "application/json"), *headers]
    )


def page(status: int, text: str, headers: Headers = ()) -> Reply:
    """Return an HTML page, as gateways answer."""
    body = f"<!DOCTYPE html>\n<html><body><h1>{text}</h1></body></html>\n".encode()
    return Reply(status, body, [("Content-Type", "text/html; charset=UTF-8"), *headers])


def event_stream(*events: Json | str | Chunk, headers: Headers = ()) -> Reply:
    """Return an SSE answer, sent event by event: see sse(), and the chunks of a Reply."""
    typed = [("Content-Type", "text/event-stream; charset=utf-8"), *headers]
    return Reply(headers=typed, chunks=[sse(event) for event in events], framing="chunked")


def sse(event: Json | str | Chunk) -> Chunk:
    """Return one event as it goes over the line: a mapping with its type, or a text as data."""
    if isinstance(event, str):
        return f"data: {event}\n\n".encode()
    if isinstance(event, Mapping):
        name = f"event: {event['type']}\n" if "type" in event else ""
        return f"{name}data: {json.dumps(event)}\n\n".encode()
    return event


def partial_event(image: bytes, index: int = 0, *, kind: str = "image_generation") -> Json:
    """Return the event that carries a preview; `kind` may be "image_edit"."""
    fields = {"b64_json": b64(image), "partial_image_index": index, "created_at": 1763694000}
    return {"type": f"{kind}.partial_image", **fields}


def completed_event(image: bytes, *, kind: str = "image_generation") -> Json:
    """Return the event that carries a finished image."""
    fields = {"b64_json": b64(image), "created_at": 1763694000}
    return {"type": f"{kind}.completed", **fields, "usage": OPENAI_USAGE}


def in_pieces(reply: Reply, size: int) -> Reply:
    """Return the reply with its body sent `size` bytes at a time."""
    starts = range(0, len(reply.body), size)
    return reply._replace(chunks=[reply.body[at : at + size] for at in starts])


def file_reply(body: bytes) -> Reply:
    """Return an image as a download gives it."""
    return Reply(200, body, [("Content-Type", "image/png")])


def ranged(body: bytes, *, cut: int | None = None) -> Callable[[Request], Reply]:
    """Return a script that serves a file and honours `Range: bytes=N-`; `cut` as in Reply."""

    def reply(request: Request) -> Reply:
        match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        start = int(match[1]) if match else 0
        if start >= len(body):
            return Reply(416, b"", [("Content-Range", f"bytes */{len(body)}")])
        span = ("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        whole = file_reply(body[start:])._replace(cut=cut)
        return whole._replace(status=206, headers=[*whole.headers, span]) if match else whole

    return reply


def wire(reply: Reply) -> Iterator[Chunk]:
    """Yield what goes over the line, in order."""
    says_nothing = reply.cut is None and reply.raw is None and not reply.chunks
    if reply.silent or (reply.reset and says_nothing):
        return
    if reply.raw is not None:
        yield reply.raw
        yield from reply.chunks
        return
    yield reply_head(reply)
    left = sys.maxsize if reply.cut is None else reply.cut
    for chunk in reply.chunks or [reply.body]:
        if left <= 0:
            return
        if not isinstance(chunk, bytes):
            yield chunk
            continue
        piece = chunk[:left]
        left -= len(piece)
        chunked = reply.framing == "chunked" and piece  # an empty chunk would be the last
        yield b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
    if reply.framing == "chunked" and reply.cut is None:
        yield b"0\r\n\r\n"


def reply_head(reply: Reply) -> bytes:
    """Return the status line and headers of a reply."""
    phrases = {status.value: status.phrase for status in http.HTTPStatus}
    lines = [f"HTTP/1.1 {reply.status} {phrases.get(reply.status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in reply.headers]
    if reply.framing == "length":
        sizes = [len(chunk) for chunk in reply.chunks or [reply.body] if isinstance(chunk, bytes)]
        length = sum(sizes) if reply.content_length is None else reply.content_length
        lines.append(f"Content-Length: {length}")
    if reply.framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("utf-8", "surrogateescape")


# ---- The server -------------------------------------------------------------------------------

Script = Union[Reply, Callable[[Request], Reply]]


class Api:
    """A server on 127.0.0.1 that answers the i-th POST with the i-th of its scripted replies.

    A POST beyond the script gets `otherwise`, or is a fault; so is, when the test ends, a reply
    that nobody asked for. Other methods are answered from `files`, by target or by path: one reply
    for ever, or a list of them used up one by one; 404 where there is none. Instead of a reply a
    function of the request may stand anywhere. Each connection carries one request.
    """

    key = KEY

    def __init__(
        self, *replies: Script, strict: bool = True, otherwise: Script | None = None
    ) -> None:
        self.script, self.otherwise, self.strict = deque(replies), otherwise, strict
        self.files: dict[str, Script | list[Script]] = {}
        self.requests: list[Request] = []
        self.faults: list[str] = []
        self.connections = 0
        self._changed = threading.Condition()
        self._closed = False
        self._held: list[threading.Event] = []
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.origin = f"http://127.0.0.1:{self.port}"
        self.base_url = f"{self.origin}/v1"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    # What tests ask and tell

    @property
    def posts(self) -> list[Request]:
        return [request for request in self.requests if request.method == "POST"]

    @property
    def gets(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]

    def wait_for_request(self, n: int = 1) -> Request:
        """Return the n-th request (from 1) as soon as it has arrived whole, mostly unanswered."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.requests) >= n, PATIENCE):
                raise AssertionError(f"no request {n} within {PATIENCE} s\n{self}")
            return self.requests[n - 1]

    def put(self, path: str, script: Script | bytes) -> str:
        """Serve a file or a reply under a path like "/a.png", and return its URL."""
        self.files[path] = file_reply(script) if isinstance(script, bytes) else script
        return self.origin + path

    def check(self) -> None:
        """Raise an AssertionError if anything went otherwise than scripted."""
        left = [f"{len(self.script)} scripted replies were not asked for"] if self.script else []
        if self.strict and (self.faults or left):
            raise AssertionError("\n".join([*self.faults, *left, str(self)]))

    def close(self) -> None:
        """End every connection and thread; an Event that a reply is held by is set."""
        with self._changed:
            self._closed = True
            held, sockets = list(self._held), list(self._sockets)
        for event in held:
            event.set()
        for connection in sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):  # wakes the accepting thread
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        for thread in [self._accepting, *self._threads]:
            thread.join(timeout=5)
        self._listener.close()

    def __str__(self) -> str:
        seen = [f"--- request {i} at {self.origin}\n{r}" for i, r in enumerate(self.requests, 1)]
        return "\n".join(seen) or f"--- no request at {self.origin}, {self.connections} connections"

    # Connections, each in a thread of its own

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with self._changed:
                if self._closed:
                    connection.close()
                    return
                self.connections += 1
                self._sockets.add(connection)
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(PATIENCE)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection.makefile("rb") as reader:
                self._converse(connection, reader)
        except OSError:
            pass  # the client is gone, or the test is over
        except Exception:  # noqa: BLE001  whatever it is, the test shall fail by it
            self.faults.append(traceback.format_exc())
        finally:
            with self._changed:
                self._sockets.discard(connection)
            connection.close()

    def _converse(self, connection: socket.socket, reader: io.BufferedReader) -> None:
        """Read one request, answer it, and see the client off."""
        head = read_head(reader)
        if head is None:
            return
        request = parse_head(head)
        script = self._taken(request, early=True)
        if script is None:
            size = int(request.headers.get("content-length", 0))
            request = request._replace(body=reader.read(size))
            if len(request.body) < size:
                return  # the client left before the body was whole
            script = self._taken(request)
        reply = script if isinstance(script, Reply) else self._called(script, request)
        self._deliver(connection, reply._replace(cut=0) if request.method == "HEAD" else reply)
        if reply.reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        connection.shutdown(socket.SHUT_WR)
        self._drain(reader, request, reply)

    def _drain(self, reader: io.BufferedReader, request: Request, reply: Reply) -> None:
        """Wait until the client closes, so that no reset eats the answer; it may send no more."""
        tail = b""
        while piece := reader.read(65536):
            tail = tail or piece[:80]
        if tail and not reply.early:
            self.faults.append(f"sent after the end of {request.method}: {tail!r}")

    def _called(self, script: Callable[[Request], Reply], request: Request) -> Reply:
        """Return what a function answers; a failing one is a fault and answers with silence."""
        try:
            return script(request)
        except Exception:  # noqa: BLE001  an OSError of the test's is not the client's
            self.faults.append(traceback.format_exc())
            return Reply(silent=True)

    def _deliver(self, connection: socket.socket, reply: Reply) -> None:
        for chunk in [*([reply.before] if reply.before else []), *wire(reply)]:
            if isinstance(chunk, bytes):
                connection.sendall(chunk)
            elif isinstance(chunk, threading.Event):
                self._wait(chunk)
            else:
                chunk()

    def _wait(self, event: threading.Event) -> None:
        """Wait for an Event of the test's; a ConnectionAbortedError once the test is over."""
        with self._changed:
            self._held.append(event)
            over = self._closed
        if not over and not event.wait(PATIENCE):
            self.faults.append(f"an event that a reply waits for was not set in {PATIENCE:.0f} s")
        if self._closed:
            raise ConnectionAbortedError

    def _taken(self, request: Request, early: bool = False) -> Any:
        """Record a request and return what answers it, in one step; `early`: only if the next
        reply is one that doesn't wait for the body, else None."""
        with self._changed:
            following = self.script[0] if self.script and request.method == "POST" else None
            if early and not (isinstance(following, Reply) and following.early):
                return None
            self.requests.append(request)
            self._changed.notify_all()
            return self._next_post(request) if request.method == "POST" else self._file(request)

    def _next_post(self, request: Request) -> Script:
        following = self.script.popleft() if self.script else self.otherwise
        if following is not None:
            return following
        self.faults.append(f"unscripted {request.method} {request.target}")
        return refusal(400, "unscripted", "The test has no reply for this request.")

    def _file(self, request: Request) -> Script:
        script = self.files.get(request.target, self.files.get(request.path))
        if script == []:
            self.faults.append(f"no more replies for {request.method} {request.target}")
        if not script:
            return refusal(404, None, f"Nothing at {request.target}")
        return script.pop(0) if isinstance(script, list) else script


def read_head(reader: io.BufferedReader) -> bytes | None:
    """Return the head of a request without its blank line; None if the client leaves before."""
    if reader.peek(1)[:1] == b"\x16":
        raise ValueError("a TLS handshake, and this server speaks plain HTTP")
    lines = []
    while (line := reader.readline(1 << 20)) != b"\r\n":
        if not line.endswith(b"\n"):
            return None
        lines.append(line)
    return b"".join(lines)[:-2]
