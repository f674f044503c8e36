"""A server with OpenAI's /v1/files and /v1/batches, as the SDK's types describe them.

Read in the `openai` package 3.52.0, batch*.py and file*.py. A batch stays until a test moves it on.
"""

from __future__ import annotations

import collections
import json
import re
import threading
from typing import Any, Callable, Dict, Optional, Tuple
from urllib.parse import parse_qs, urlsplit

from tests.case import HANG
from tests.images import png
from tests.server import OPENAI_USAGE, Api, Reply, Request, b64, json_reply, ranged, refusal

CHECK = "GET /v1/batches"  # the look-up too
UPLOAD = "POST /v1/files"
CREATE = "POST /v1/batches"
STATE = "GET /v1/batches/ID"
CONTENT = "GET /v1/files/ID/content"
CANCEL = "POST /v1/batches/ID/cancel"
ENDED = ("completed", "failed", "expired", "cancelled")
PAGE = 2  # batches on one page of the list

Json = Dict[str, Any]
Shape = Callable[[bytes], bytes]
Order = Tuple[Optional[Reply], bool, Optional["Hold"]]
ORDINARY: Order = (None, True, None)


def image_of(prompt: str, k: int = 1) -> bytes:
    """Return the k-th image of a prompt like "job 7": no two have the same."""
    return png(16 + int(prompt.split()[-1]), 15 + k)


def made(line: Json) -> Json:
    """Return what the Batch API says of a request that went well: the prompt's own images."""
    prompt, asked = str(line["body"]["prompt"]), int(line["body"].get("n", 1))
    return served(*({"b64_json": b64(image_of(prompt, k))} for k in range(1, asked + 1)))


def served(*data: Json) -> Json:
    """Return what it says of a request that went well, with these entries."""
    body = {"created": 1763694000, "data": data, "usage": OPENAI_USAGE}
    return {"response": {"status_code": 200, "body": body}, "error": None}


def refused(status: int, code: str, message: str = "No.") -> Json:
    """Return what it says of a request that failed with an HTTP status."""
    body = json.loads(refusal(status, code, message).body)
    return {"response": {"status_code": status, "body": body}, "error": None}


def lost(code: str, message: str) -> Json:
    """Return what it says of a request that was never made: batch_expired, batch_cancelled."""
    return {"response": None, "error": {"code": code, "message": message}}


class Hold:
    """Where a request is held: it sets `reached`, and goes on once `release` is set."""

    def __init__(self) -> None:
        self.reached, self.release = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        self.release.wait(HANG)


class BatchApi(Api):
    """The server; `result` says what becomes of each request of a batch, None for nothing."""

    def __init__(self, result: Callable[[Json], Json | None] = made) -> None:
        self.result = result
        self.contents: dict[str, bytes] = {}
        self.batches: dict[str, Json] = {}
        self.good: dict[str, set[str]] = {}  # the custom_ids that an ended batch made
        self.orders: dict[str, list[Order]] = collections.defaultdict(list)
        self.always: Reply | None = None  # the answer to everything
        self.keeps_metadata = True
        self.cut: int | None = None  # cut every download after so many bytes
        self.busy = threading.RLock()
        super().__init__(otherwise=self.answered)

    def _file(self, request: Request) -> Any:
        return super()._file(request) if request.path in self.files else self.answered

    def answered(self, request: Request) -> Reply:
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
        name = (re.findall("(?:batch|file)_[a-z0-9]+", request.path) or [""])[0]
        routes: dict[str, Callable[[], Reply]] = {
            UPLOAD: lambda: self.upload(request),
            CONTENT: lambda: ranged(self.contents[name], cut=self.cut)(request),
            CREATE: lambda: self.create(request.json),
            CHECK: lambda: self.listed(request),
            STATE: lambda: json_reply(self.batches[name]),
            CANCEL: lambda: self.cancel(self.batches[name]),
        }
        known = what in routes and name in ("", *self.contents, *self.batches)
        return routes[what]() if known else refusal(404, None, f"There is no {name or what}.")

    def upload(self, request: Request) -> Reply:
        (part,) = request.uploads
        if request.fields != {"purpose": "batch"} or part.name != "file":
            return refusal(400, "invalid_value", "Not a batch file.")
        name = f"file_{len(self.contents)}"
        self.contents[name] = part.body
        return json_reply({"id": name, "object": "file", "purpose": "batch"})

    def create(self, asked: Json) -> Reply:
        if asked["completion_window"] != "24h" or asked["input_file_id"] not in self.contents:
            return refusal(400, "invalid_value", "Not a batch.")
        name = f"batch_{len(self.batches)}"
        total = self.contents[asked["input_file_id"]].count(b"\n")
        counts = {"total": total, "completed": 0, "failed": 0}
        files = dict.fromkeys(("output_file_id", "error_file_id", "errors"))
        batch = {"id": name, "status": "validating", "request_counts": counts, **files, **asked}
        batch["metadata"] = asked["metadata"] if self.keeps_metadata else None
        self.batches[name] = batch
        return json_reply(batch)

    def listed(self, request: Request) -> Reply:
        names = list(self.batches)[::-1]  # the newest first
        after = parse_qs(urlsplit(request.target).query).get("after", [""])[0]
        names = names[names.index(after) + 1 :] if after else names
        page = [self.batches[name] for name in names[:PAGE]]
        return json_reply({"object": "list", "data": page, "has_more": len(names) > PAGE})

    def cancel(self, batch: Json) -> Reply:
        if batch["status"] in ENDED:
            return refusal(409, None, f"Cannot cancel a batch with status '{batch['status']}'.")
        batch["status"] = "cancelling"
        return json_reply(batch)

    def order(self, what: str, reply: Reply, *, done: bool = False, skip: int = 0) -> None:
        """Answer a request with a reply, instead of what it asks for or after, skipping some."""
        self.orders[what] += [*[ORDINARY] * skip, (reply, done, None)]

    def hold(self, what: str, *, done: bool = False, skip: int = 0) -> Hold:
        """Hold a request of a kind, before it is done or after."""
        held = Hold()
        self.orders[what] += [*[ORDINARY] * skip, (None, done, held)]
        return held

    def asked(self, what: str) -> list[Request]:
        pattern = re.compile(what.replace("ID", "[a-z]+_[a-z0-9]+"))
        return [r for r in list(self.requests) if pattern.fullmatch(f"{r.method} {r.path}")]

    def own(self) -> list[str]:
        return [name for name, batch in list(self.batches.items()) if "input_file_id" in batch]

    def foreign(self, number: int) -> None:
        """Add batches of somebody else's; they are newer than those which are there."""
        for _ in range(number):
            name = f"batch_{len(self.batches)}"
            self.batches[name] = {"id": name, "status": "completed", "metadata": None}

    def forget(self) -> None:
        for found in (self.batches, self.contents, self.good, self.orders):
            found.clear()

    def lines(self, name: str = "batch_0") -> list[Json]:
        text = self.contents[self.batches[name]["input_file_id"]].decode()
        return [json.loads(line) for line in text.splitlines()]

    def prompts(self, name: str = "batch_0") -> list[str]:
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

    def end(self, name: str = "batch_0", status: str = "completed", shape: Shape = bytes) -> None:
        """Bring a batch to its end, with the files of its results; `shape` changes the good one."""
        with self.busy:
            batch = self.batches[name]
            files: dict[str, dict[str, Json]] = {"output_file_id": {}, "error_file_id": {}}
            for line in self.lines(name):
                told, custom_id = self.result(line), line["custom_id"]
                if told:
                    good = told["response"] and told["response"]["status_code"] == 200
                    field = "output_file_id" if good else "error_file_id"
                    files[field][custom_id] = {"custom_id": custom_id, **told}
            for field, rows in files.items():
                text = "".join(f"{json.dumps(row)}\n" for row in rows.values()).encode()
                if rows:
                    batch[field] = f"file_{len(self.contents)}"
                    self.contents[batch[field]] = shape(text) if "output" in field else text
            self.good[name] = set(files["output_file_id"])
            completed, failed = map(len, files.values())
            batch["request_counts"].update(completed=completed, failed=failed)
            batch["status"] = status

    def end_all(self) -> int:
        """Bring every batch to its end that has not come to it; return how many that were."""
        open_ones = [name for name in self.own() if self.batches[name]["status"] not in ENDED]
        for name in open_ones:
            self.end(name)
        return len(open_ones)
