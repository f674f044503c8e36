"""A server with OpenAI's /v1/files and /v1/batches, as the SDK's types describe them.

Read in the `openai` package 3.52.0: batch_create_params.py, batch.py, batch_list_params.py,
file_create_params.py, file_object.py. A batch stays where it is until a test moves it on.
"""

from __future__ import annotations

import collections
import json
import re
import threading
from typing import Any, Callable, Dict, Optional, Tuple
from urllib.parse import parse_qs, urlsplit

from tests.pictures import png
from tests.server import (
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
PAGE = 2  # batches on one page of the list

Json = Dict[str, Any]
Order = Tuple[Optional[Reply], bool, Optional["Hold"]]
ORDINARY: Order = (None, True, None)


def picture_of(prompt: str, k: int = 1) -> bytes:
    """Return the k-th picture of a prompt like "job 7": no two have the same."""
    digits = re.findall(r"\d+", prompt)
    return png(16 + int(digits[0] if digits else 0), 15 + k)


def made(line: Json) -> Json:
    """Return what the Batch API says of a request that went well: the prompt's own pictures."""
    prompt, asked = str(line["body"]["prompt"]), int(line["body"].get("n", 1))
    return served(*({"b64_json": b64(picture_of(prompt, k))} for k in range(1, asked + 1)))


def served(*data: Json) -> Json:
    """Return what it says of a request that went well, with these entries."""
    body = {"created": 1763694000, "data": data, "usage": OPENAI_USAGE}
    return {"response": {"status_code": 200, "request_id": "req_1", "body": body}, "error": None}


def refused(status: int, code: str, message: str = "No.") -> Json:
    """Return what it says of a request that failed with an HTTP status."""
    body = json.loads(refusal(status, code, message).body)
    response = {"status_code": status, "request_id": "req_1", "body": body}
    return {"response": response, "error": None}


def lost(code: str, message: str) -> Json:
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


class BatchApi(Api):
    """The server; `result` says what becomes of each request of a batch, None for nothing."""

    def __init__(self, result: Callable[[Json], Json | None] = made) -> None:
        self.result = result
        self.contents: dict[str, bytes] = {}
        self.batches: dict[str, Json] = {}
        self.good: dict[str, set[str]] = {}  # the custom_ids that an ended batch made
        self.orders: dict[str, list[Order]] = collections.defaultdict(list)
        self.always: Reply | None = None  # the answer to everything
        self.cut: int | None = None  # cut every download after so many bytes
        self.busy = threading.RLock()
        super().__init__(otherwise=self.answered)

    def _file(self, request: Request) -> Script:
        return super()._file(request) if request.path in self.files else self.answered

    def answered(self, request: Request) -> Reply:
        """Return the answer to any request."""
        if self.always:
            return self.always
        what = f"{request.method} {re.sub('(batch|file)_[a-z0-9]+', 'ID', request.path)}"
        with self.busy:
            own, done, hold = self.orders[what].pop(0) if self.orders[what] else ORDINARY
        if hold and not done:
            hold.wait()
        with self.busy:
            reply = self.routed(what, request) if done or not own else own
        if hold and done:
            hold.wait()
        return own or reply

    def routed(self, what: str, request: Request) -> Reply:
        """Do what a request asks for."""
        name = (re.findall("(?:batch|file)_[a-z0-9]+", request.path) or [""])[0]
        routes: dict[str, Callable[[], Reply]] = {
            UPLOAD: lambda: self.upload(request),
            CONTENT: lambda: ranged(self.contents[name], cut=self.cut)(request),
            CREATE: lambda: self.create(request.json),
            CHECK: lambda: self.listed(request),
            STATE: lambda: json_reply(self.batches[name]),
            CANCEL: lambda: self.cancel(self.batches[name]),
        }
        known = not name or name in self.contents or name in self.batches
        if what in routes and known:
            return routes[what]()
        return refusal(404, None, f"There is no {name or what}.")

    def upload(self, request: Request) -> Reply:
        """Take in a file."""
        (part,) = request.uploads
        if request.fields != {"purpose": "batch"} or part.name != "file":
            return refusal(400, "invalid_value", "Not a batch file.")
        name = f"file_{len(self.contents)}"
        self.contents[name] = part.body
        return json_reply({"id": name, "object": "file", "purpose": "batch"})

    def create(self, asked: Json) -> Reply:
        """Make a batch of a file."""
        if asked["completion_window"] != "24h" or asked["input_file_id"] not in self.contents:
            return refusal(400, "invalid_value", "Not a batch.")
        name = f"batch_{len(self.batches)}"
        total = self.contents[asked["input_file_id"]].count(b"\n")
        batch = {"id": name, "object": "batch", "status": "validating", **asked}
        batch.update(request_counts={"total": total, "completed": 0, "failed": 0})
        batch.update(output_file_id=None, error_file_id=None, errors=None)
        self.batches[name] = batch
        return json_reply(batch)

    def listed(self, request: Request) -> Reply:
        """Return a page of the batches, the newest first."""
        names = list(self.batches)[::-1]
        after = parse_qs(urlsplit(request.target).query).get("after", [""])[0]
        names = names[names.index(after) + 1 :] if after else names
        page = [self.batches[name] for name in names[:PAGE]]
        return json_reply({"object": "list", "data": page, "has_more": len(names) > PAGE})

    def cancel(self, batch: Json) -> Reply:
        """Begin to cancel a batch, unless it has ended."""
        if batch["status"] in ENDED:
            return refusal(409, None, f"Cannot cancel a batch with status '{batch['status']}'.")
        batch["status"] = "cancelling"
        return json_reply(batch)

    # What tests do

    def order(
        self,
        what: str,
        reply: Reply | None = None,
        *,
        done: bool = False,
        hold: bool = False,
        skip: int = 0,
        times: int = 1,
    ) -> Hold:
        """Let a reply or a hold come instead of what the next requests of a kind ask for.

        With `done` it comes after that; `skip` ordinary requests come before.
        """
        held = Hold()
        self.orders[what] += [*[ORDINARY] * skip, *[(reply, done, held if hold else None)] * times]
        return held

    def asked(self, what: str) -> list[Request]:
        """Return the requests of one kind so far."""
        pattern = re.compile(what.replace("ID", "[a-z]+_[a-z0-9]+"))
        found = list(self.requests)
        return [one for one in found if pattern.fullmatch(f"{one.method} {one.path}")]

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

    def lines(self, name: str = "batch_0") -> list[Json]:
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
        """Bring a batch to its end, with the files of its results; `shape` changes the good one."""
        with self.busy:
            batch, good, bad = self.batches[name], [], []
            self.good[name] = set()
            for number, line in enumerate(self.lines(name)):
                told = self.result(line)
                if told is None:
                    continue
                row = {"id": f"batch_req_{number}", "custom_id": line["custom_id"], **told}
                text = f"{json.dumps(row)}\n".encode()
                if told["response"] and told["response"]["status_code"] == 200:
                    good.append(text)
                    self.good[name].add(line["custom_id"])
                else:
                    bad.append(text)
            bodies = {"output_file_id": shape(b"".join(good)), "error_file_id": b"".join(bad)}
            for field, body in bodies.items():
                if body:
                    batch[field] = f"file_{len(self.contents)}"
                    self.contents[batch[field]] = body
            batch["request_counts"].update(completed=len(good), failed=len(bad))
            batch["status"] = status

    def end_all(self) -> int:
        """Bring every batch to its end that has not come to it; return how many that were."""
        names = [name for name in self.own() if self.batches[name]["status"] not in ENDED]
        for name in names:
            self.end(name)
        return len(names)
