"""A server with OpenAI's /v1/files and /v1/batches, as the SDK's types describe them.

Read in the `openai` package 3.52.0: batch_create_params.py, batch.py, batch_list_params.py,
file_create_params.py, file_object.py. A batch stays where it is until a test moves it on.
"""

from __future__ import annotations

import json
import re
from typing import Any, Callable
from urllib.parse import parse_qs, urlsplit

from tests.pictures import png
from tests.support import OPENAI_USAGE, Api, Reply, Request, b64, json_reply, ranged, refusal

Line = "dict[str, Any]"


def made(line: dict[str, Any]) -> dict[str, Any]:
    """Return what the Batch API says of a request that went well: a picture as wide as told."""
    digits = re.findall(r"\d+", str(line["body"]["prompt"]))
    picture = png(16 + int(digits[0] if digits else 0), 16)
    body = {"created": 1763694000, "data": [{"b64_json": b64(picture)}], "usage": OPENAI_USAGE}
    return {"response": {"status_code": 200, "request_id": "req_1", "body": body}, "error": None}


def refused(status: int, code: str, message: str = "No.") -> dict[str, Any]:
    """Return what it says of a request that failed with an HTTP status."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    response = {"status_code": status, "request_id": "req_1", "body": {"error": error}}
    return {"response": response, "error": None}


def lost(code: str, message: str) -> dict[str, Any]:
    """Return what it says of a request that was never made: batch_expired, batch_cancelled."""
    return {"response": None, "error": {"code": code, "message": message}}


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
        super().__init__(otherwise=self.answered)

    def _file(self, request: Request) -> Callable[[Request], Reply]:
        return self.answered

    def answered(self, request: Request) -> Reply:
        """Return the answer to any request."""
        early = self.before(request)
        if early is not None:
            return early
        what = f"{request.method} {re.sub('(batch|file)_[a-z0-9]+', 'ID', request.path)}"
        name = (re.findall("(?:batch|file)_[a-z0-9]+", request.path) or [""])[0]
        routes: dict[str, Callable[[], Reply]] = {
            "POST /v1/files": lambda: self.upload(request),
            "GET /v1/files/ID/content": lambda: self.content(name, request),
            "POST /v1/batches": lambda: self.create(request),
            "GET /v1/batches": lambda: self.listed(request),
            "GET /v1/batches/ID": lambda: json_reply(self.batches[name]),
            "POST /v1/batches/ID/cancel": lambda: self.cancel(name),
        }
        return routes[what]() if what in routes else refusal(404, "not_found", "No such thing.")

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

    def cancel(self, name: str) -> Reply:
        """Begin to cancel a batch."""
        self.batches[name]["status"] = "cancelling"
        return json_reply(self.batches[name])

    # What tests do

    def lines(self, name: str = "batch_0") -> list[dict[str, Any]]:
        """Return the requests of a batch."""
        text = self.contents[self.batches[name]["input_file_id"]].decode()
        return [json.loads(line) for line in text.splitlines()]

    def end(self, name: str = "batch_0", status: str = "completed") -> None:
        """Bring a batch to its end, with the files that hold its results."""
        batch = self.batches[name]
        found: dict[str, list[str]] = {"output_file_id": [], "error_file_id": []}
        for number, line in enumerate(self.lines(name)):
            told = self.result(line)
            if told is not None:
                good = told["response"] is not None and told["response"]["status_code"] == 200
                row = {"id": f"batch_req_{number}", "custom_id": line["custom_id"], **told}
                found["output_file_id" if good else "error_file_id"].append(json.dumps(row))
        for field, rows in found.items():
            if rows:
                batch[field] = f"file_{len(self.contents)}"
                self.contents[batch[field]] = "".join(f"{row}\n" for row in rows).encode()
        counts = batch["request_counts"]
        counts.update(completed=len(found["output_file_id"]), failed=len(found["error_file_id"]))
        batch["status"] = status
