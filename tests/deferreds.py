"""A server with OpenAI's /v1/files and /v1/batches, as the SDK's types describe them.

Read in the `openai` package 3.52.0: batch_create_params.py, batch.py, batch_list_params.py,
file_create_params.py, file_object.py. A batch stays where it is until a test moves it on.
"""

from __future__ import annotations

import collections
import json
import re
import threading
from typing import Any, Callable, NamedTuple, Sequence
from urllib.parse import parse_qs, urlsplit

from tests.pictures import png
from tests.support import (
    OPENAI_USAGE,
    PATIENCE,
    Api,
    Reply,
    Request,
    Script,
    b64,
    json_reply,
    ranged,
    refusal,
)

CHECK = "GET /v1/batches"  # the look-up too
UPLOAD = "POST /v1/files"
CREATE = "POST /v1/batches"
STATE = "GET /v1/batches/ID"
CONTENT = "GET /v1/files/ID/content"
CANCEL = "POST /v1/batches/ID/cancel"
ENDED = ("completed", "failed", "expired", "cancelled")


def picture_of(prompt: str, k: int = 1) -> bytes:
    """Return the k-th picture of a prompt like "job 7": no two have the same."""
    digits = re.findall(r"\d+", prompt)
    return png(16 + int(digits[0] if digits else 0), 15 + k)


def made(line: dict[str, Any]) -> dict[str, Any]:
    """Return what the Batch API says of a request that went well: the prompt's own pictures."""
    asked = int(line["body"].get("n", 1))
    pictures = [picture_of(str(line["body"]["prompt"]), k) for k in range(1, asked + 1)]
    return served(*({"b64_json": b64(picture)} for picture in pictures))


def served(*data: dict[str, Any]) -> dict[str, Any]:
    """Return what it says of a request that went well, with these entries."""
    body = {"created": 1763694000, "data": data, "usage": OPENAI_USAGE}
    return {"response": {"status_code": 200, "request_id": "req_1", "body": body}, "error": None}


def refused(status: int, code: str, message: str = "No.") -> dict[str, Any]:
    """Return what it says of a request that failed with an HTTP status."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    response = {"status_code": status, "request_id": "req_1", "body": {"error": error}}
    return {"response": response, "error": None}


def lost(code: str, message: str) -> dict[str, Any]:
    """Return what it says of a request that was never made: batch_expired, batch_cancelled."""
    return {"response": None, "error": {"code": code, "message": message}}


class Hold:
    """Where a request is held: it sets `reached`, and goes on once `release` is set."""

    def __init__(self) -> None:
        self.reached, self.release = threading.Event(), threading.Event()

    def wait(self) -> None:
        """Hold the request."""
        self.reached.set()
        self.release.wait(PATIENCE)


class Order(NamedTuple):
    """What happens to one request instead of, or after, what it asks for."""

    reply: Script | None
    done: bool  # what it asks for is done before that
    hold: Hold | None


class BatchApi(Api):
    """The server; `result` says what becomes of each request, None for nothing at all."""

    def __init__(self, result: Callable[[dict[str, Any]], dict[str, Any] | None] = made) -> None:
        self.result = result
        self.contents: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.cut: int | None = None  # cut every download after so many bytes
        self.page_size = 2
        self.before: Callable[[Request], Reply | None] = lambda request: None
        """Called first: what it returns is the answer."""
        self.streams: dict[str, Sequence[bytes]] = {}  # instead of contents, too large to hold
        self.good: dict[str, set[str]] = {}  # the custom_ids that an ended batch made, by batch
        self.orders: dict[str, list[Order | None]] = collections.defaultdict(list)
        self.busy = threading.RLock()
        super().__init__(otherwise=self.answered)

    def _file(self, request: Request) -> Script:
        known = request.target in self.files or request.path in self.files
        return super()._file(request) if known else self.answered

    def answered(self, request: Request) -> Reply:
        """Return the answer to any request."""
        early = self.before(request)
        if early is not None:
            return early
        what = f"{request.method} {re.sub('(batch|file)_[a-z0-9]+', 'ID', request.path)}"
        name = (re.findall("(?:batch|file)_[a-z0-9]+", request.path) or [""])[0]
        routes: dict[str, Callable[[], Reply]] = {
            UPLOAD: lambda: self.upload(request),
            CONTENT: lambda: self.content(name, request),
            CREATE: lambda: self.create(request),
            CHECK: lambda: self.listed(request),
            STATE: lambda: self.told(name),
            CANCEL: lambda: self.cancel(name),
        }
        with self.busy:
            order = self.orders[what].pop(0) if self.orders[what] else None
        if order and order.hold and not order.done:
            order.hold.wait()
        reply = refusal(404, "not_found", "No such thing.")
        if what in routes and (not order or order.done or not order.reply):
            with self.busy:
                reply = routes[what]()
        if order and order.hold and order.done:
            order.hold.wait()
        if order and order.reply:
            return order.reply if isinstance(order.reply, Reply) else order.reply(request)
        return reply

    def upload(self, request: Request) -> Reply:
        """Take in a file."""
        (part,) = request.uploads
        if request.fields != {"purpose": "batch"} or part.name != "file":
            return refusal(400, "invalid_value", "Not a batch file.")
        name = f"file_{len(self.contents)}"
        self.contents[name] = part.body
        told = {"id": name, "object": "file", "bytes": len(part.body), "created_at": 1763694000}
        return json_reply({**told, "filename": part.filename, "purpose": "batch"})

    def content(self, name: str, request: Request) -> Reply:
        """Return a file, or what is left of it."""
        if name in self.streams:
            return Reply(chunks=self.streams[name])
        if name not in self.contents:
            return refusal(404, "not_found", f"No such File object: {name}")
        return ranged(self.contents[name], cut=self.cut)(request)

    def create(self, request: Request) -> Reply:
        """Make a batch of a file."""
        asked = request.json
        if asked["completion_window"] != "24h" or asked["input_file_id"] not in self.contents:
            return refusal(400, "invalid_value", "Not a batch.")
        name = f"batch_{len(self.batches)}"
        total = self.contents[asked["input_file_id"]].count(b"\n")
        counts = {"total": total, "completed": 0, "failed": 0}
        self.batches[name] = {
            "id": name,
            "object": "batch",
            "status": "validating",
            "request_counts": counts,
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            **asked,
        }
        return json_reply(self.batches[name])

    def listed(self, request: Request) -> Reply:
        """Return a page of the batches, the newest first."""
        names = list(self.batches)[::-1]
        after = parse_qs(urlsplit(request.target).query).get("after", [""])[0]
        names = names[names.index(after) + 1 :] if after else names
        page = [self.batches[name] for name in names[: self.page_size]]
        more = len(names) > self.page_size
        return json_reply({"object": "list", "data": page, "has_more": more})

    def told(self, name: str) -> Reply:
        """Return how a batch is."""
        if name not in self.batches:
            return refusal(404, None, f"No batch found with id '{name}'.")
        return json_reply(self.batches[name])

    def cancel(self, name: str) -> Reply:
        """Begin to cancel a batch, unless it has ended."""
        status = self.batches[name]["status"]
        if status in ENDED:
            return refusal(409, None, f"Cannot cancel a batch with status '{status}'.")
        self.batches[name]["status"] = "cancelling"
        return json_reply(self.batches[name])

    # What tests do

    def order(
        self,
        what: str,
        reply: Script | None = None,
        *,
        done: bool = False,
        hold: bool = False,
        skip: int = 0,
        times: int = 1,
    ) -> Hold:
        """Let something happen to the next requests of a kind, after `skip` ordinary ones.

        `done` tells that what is asked for happens all the same, before the reply or hold.
        """
        held = Hold()
        order = Order(reply, done, held if hold else None)
        self.orders[what] += [*[None] * skip, *[order] * times]
        return held

    def asked(self, what: str) -> list[Request]:
        """Return the requests of one kind so far."""
        method, _, path = what.partition(" ")
        pattern = path.replace("ID", "[a-z]+_[a-z0-9]+")
        return [
            request
            for request in list(self.requests)
            if request.method == method and re.fullmatch(pattern, request.path)
        ]

    def own(self) -> list[str]:
        """Return the ids of the batches that the tool made."""
        return [name for name, batch in list(self.batches.items()) if "input_file_id" in batch]

    def foreign(self, number: int) -> None:
        """Add batches of somebody else's; they are newer than those which are there."""
        for _ in range(number):
            name = f"batch_{len(self.batches)}"
            self.batches[name] = {"id": name, "status": "completed", "metadata": None}

    def forget(self) -> None:
        """Be as new."""
        for found in (self.batches, self.contents, self.good, self.orders):
            found.clear()

    def lines(self, name: str = "batch_0") -> list[dict[str, Any]]:
        """Return the requests of a batch."""
        text = self.contents[self.batches[name]["input_file_id"]].decode()
        return [json.loads(line) for line in text.splitlines()]

    def prompts(self, name: str = "batch_0") -> list[str]:
        """Return the prompts of a batch."""
        return [line["body"]["prompt"] for line in self.lines(name)]

    def doubled(self) -> set[str]:
        """Return the custom_ids that are in two batches, and the earlier had not failed them."""
        taken: set[str] = set()
        found: set[str] = set()
        for name in self.own():
            names = {line["custom_id"] for line in self.lines(name)}
            found |= names & taken
            taken |= self.good.get(name, names)
        return found

    def end(
        self,
        name: str = "batch_0",
        status: str = "completed",
        shape: Callable[[bytes], bytes] = bytes,
    ) -> None:
        """Bring a batch to its end, with the files that hold its results.

        `shape` changes the bytes of its output file.
        """
        with self.busy:
            batch = self.batches[name]
            rows: dict[str, list[str]] = {"output_file_id": [], "error_file_id": []}
            self.good[name] = set()
            for number, line in enumerate(self.lines(name)):
                told = self.result(line)
                if told is not None:
                    good = told["response"] is not None and told["response"]["status_code"] == 200
                    row = {"id": f"batch_req_{number}", "custom_id": line["custom_id"], **told}
                    rows["output_file_id" if good else "error_file_id"].append(json.dumps(row))
                    self.good[name] |= {line["custom_id"]} if good else set()
            for field, texts in rows.items():
                if texts:
                    batch[field] = f"file_{len(self.contents)}"
                    body = "".join(f"{text}\n" for text in texts).encode()
                    shaped = shape(body) if field == "output_file_id" else body
                    self.contents[batch[field]] = shaped
            completed, failed = map(len, rows.values())
            batch["request_counts"].update(completed=completed, failed=failed)
            batch["status"] = status

    def end_all(self) -> int:
        """Bring every batch to its end that has not come to it; return how many that were."""
        names = [name for name in self.own() if self.batches[name]["status"] not in ENDED]
        for name in names:
            self.end(name)
        return len(names)
