"""What version 0.1 left behind when it was stopped, as test data: its folders in a JSON file each.

Made once, with the script of that version:

    python3 -m tests.today PATH/TO/gpt_image2.py

tests/test_today_batch.py goes on from them with the script of today.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import unittest
from pathlib import Path
from typing import Any

from tests.batches import Painter, drawn
from tests.deferreds import CREATE, STATE, UPLOAD, BatchApi
from tests.faults import Stage
from tests.support import Api, Reply, answer, refusal

DATA = Path(__file__).resolve().parent / "data" / "today"
SILENT = Reply(silent=True)


def pack(case: Stage, api: Api, name: str, **more: Any) -> None:
    """Write a case's work and state folders into a data file; what differs by test gets a mark."""
    files: dict[str, Any] = {}
    marks = {api.base_url: "@BASE@", str(case.work): "@WORK@", str(case.state): "@STATE@"}
    for root in (case.work, case.state):
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.name not in ("lock", "results.lock"):
                label = f"{root.name}/{path.relative_to(root).as_posix()}"
                try:
                    text = path.read_text("utf-8")
                    for found, mark in marks.items():
                        text = text.replace(found, mark)
                    files[label] = text
                except UnicodeDecodeError:
                    files[label] = {"base64": base64.b64encode(path.read_bytes()).decode()}
    DATA.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"files": files, **more}, indent=1, sort_keys=True)
    (DATA / f"{name}.json").write_text(text + "\n", encoding="ascii")


def unpack(case: Stage, api: Api, name: str) -> Any:
    """Put a data file's folders into a case, and return the whole of it."""
    data = json.loads((DATA / f"{name}.json").read_text("ascii"))
    marks = {"@BASE@": api.base_url, "@WORK@": str(case.work), "@STATE@": str(case.state)}
    for label, held in data["files"].items():
        path = case.tmp / label
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if isinstance(held, str):
            for mark, found in marks.items():
                held = held.replace(mark, found)
            path.write_text(held, encoding="utf-8")
        else:
            path.write_bytes(base64.b64decode(held["base64"]))
        if path.name == "job.json":
            (path.parent / "lock").touch()
    return data


class Make(Stage):
    """Runs the older script, kills it, and packs what is left."""

    def batch_of(self, *lines: dict[str, Any]) -> tuple[Api, Painter]:
        painter = Painter()
        api = self.serve_base(otherwise=painter)
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (self.work / "jobs.jsonl").write_text(text)
        return api, painter

    def test_killed(self) -> None:
        """One job saved, two answers that came later, a curl that died, one that never began."""
        api, painter = self.batch_of(*({"prompt": name} for name in "abcdef"))
        release = painter.hold("b", "c")
        painter.hold("d", "e")
        tool = self.start_tool("batch", "jobs.jsonl", "--concurrency", "4", "--provider", "openai")
        api.wait_for_request(5)
        self.wait_until(lambda: "saved" in (self.work / "jobs" / "results.jsonl").read_text())
        tool.send_signal(signal.SIGKILL)
        self.finish(tool)
        release.set()
        self.wait_until(lambda: len(self.processes("curl")) == 2)
        for curl in self.processes("curl"):
            os.kill(curl, signal.SIGKILL)
        self.wait_until(lambda: not self.processes("curl"))
        for job in self.jobs():
            if '"prompt": "e"' in (job / "body.json").read_text():  # as it is before curl connects
                (job / "headers.txt").write_bytes(b"\n")
        pack(self, api, "killed")

    def test_states(self) -> None:
        """A batch that has ended: saved, failed, refused, unknown with half an answer, partial."""
        api, painter = self.batch_of(*({"prompt": name} for name in "abcde"))
        painter.order("b", refusal(401, "invalid_api_key", "Wrong key."))
        painter.order("c", refusal(400, "moderation_blocked", "Not this."))
        two = answer(drawn("d"), drawn("d, 2"))
        painter.order("d", two._replace(cut=two.body.rindex(b"b64_json") + 60))
        painter.order("e", answer(drawn("e"), b"no picture"))
        argv = ("--concurrency", "1", "--provider", "openai", "--quality", "low")
        self.check(self.run_tool("batch", "jobs.jsonl", *argv), 9)
        pack(self, api, "states")

    def test_redo(self) -> None:
        """A --redo all of three jobs, killed when one was done and one at the server."""
        api, painter = self.batch_of(*({"prompt": name} for name in "abc"))
        self.check(self.run_tool("batch", "jobs.jsonl"), 0)
        release = painter.hold("b")
        tool = self.start_tool("batch", "jobs.jsonl", "--redo", "all", "--concurrency", "1")
        api.wait_for_request(5)
        tool.send_signal(signal.SIGKILL)
        self.finish(tool)
        release.set()
        self.wait_until(lambda: not self.processes("curl"))
        pack(self, api, "redo")

    def deferred(self, name: str, what: str, done: bool) -> None:
        api = BatchApi()
        self.servers.append(api)
        self.addCleanup(api.close)
        self.env.update(GPT_IMAGE2_BASE_URL=api.base_url, GPT_IMAGE2_API_KEY=api.key)
        lines = [{"prompt": "job 1"}, {"prompt": "job 2", "id": "two"}, {"prompt": "job 3", "n": 2}]
        (self.work / "jobs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
        held = api.order(what, hold=True, done=done)
        tool = self.start_tool("batch", "jobs.jsonl", "--deferred", "--provider", "openai")
        held.reached.wait(20)
        tool.send_signal(signal.SIGKILL)
        self.finish(tool)
        held.release.set()
        self.wait_until(lambda: not self.processes("curl"))
        contents = {name: data.decode("ascii") for name, data in api.contents.items()}
        pack(self, api, name, batches=api.batches, contents=contents)

    def test_deferred_created(self) -> None:
        """Its batch is made and on record, and runs."""
        self.deferred("deferred-created", STATE, True)

    def test_deferred_creating(self) -> None:
        """Killed while it asked for the batch, which the server made."""
        self.deferred("deferred-creating", CREATE, True)

    def test_deferred_uploading(self) -> None:
        """Killed while it handed in the requests: no batch was made."""
        self.deferred("deferred-uploading", UPLOAD, True)


if __name__ == "__main__":
    Make.script = Path(sys.argv.pop()).resolve()
    unittest.main()
