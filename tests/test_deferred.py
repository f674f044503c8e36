"""batch --deferred: through the Batch API, with one batch for the same jobs whatever happens."""

from __future__ import annotations

import base64
import json
from typing import Any

from tests.deferreds import BatchApi, lost, made, refused
from tests.pictures import png
from tests.support import Case, Run


class Deferred(Case):
    """A folder of jobs and a server with a Batch API."""

    def setUp(self) -> None:
        super().setUp()
        self.api = BatchApi()
        self.servers.append(self.api)
        self.addCleanup(self.api.check)
        self.addCleanup(self.api.close)
        self.env.update(GPT_IMAGE2_BASE_URL=self.api.base_url, GPT_IMAGE2_API_KEY=self.api.key)

    def jobs(self, *jobs: dict[str, Any]) -> None:  # type: ignore[override]
        """Write jobs.jsonl."""
        text = "".join(json.dumps(job) + "\n" for job in jobs)
        (self.work / "jobs.jsonl").write_text(text)

    def batch(self, *argv: str, code: int = 0) -> Run:
        """Run the batch, deferred."""
        words = ("--provider", "openai", "--deferred", *argv)
        return self.check(self.run_tool("batch", "jobs.jsonl", *words), code)


class Way(Deferred):
    """From the jobs file to the pictures."""

    def test_submits_tells_and_fetches(self) -> None:
        self.jobs({"prompt": "job 1", "size": "1024x1024"}, {"prompt": "job 2", "id": "two"})
        run = self.batch()
        self.assertEqual(run.out, "")
        self.assertIn("batch_0: validating 0/2", run.err)
        first, second = self.api.lines()
        self.assertEqual((first["method"], first["url"]), ("POST", "/v1/images/generations"))
        body = {"model": "gpt-image-2", "prompt": "job 1", "size": "1024x1024"}
        self.assertEqual(first["body"], body)
        self.assertNotEqual(first["custom_id"], second["custom_id"])
        self.assertEqual(self.api.batches["batch_0"]["endpoint"], "/v1/images/generations")
        self.assertEqual(self.batch().out, "")
        self.api.end()
        run = self.batch()
        self.assertEqual([path.name for path in run.saved], ["0001.png", "two.png"])
        self.assertEqual(run.saved[0].read_bytes(), png(17, 16))
        self.assertEqual(len(self.api.batches), 1)
        self.assertEqual(self.batch().out, "")
        self.assertEqual(len(self.api.batches), 1)

    def test_edits_go_as_json_in_a_batch_of_their_own(self) -> None:
        (self.work / "in.png").write_bytes(png(32, 32))
        (self.work / "mask.png").write_bytes(png(32, 32, hole=(1, 1, 4, 4)))
        edit = {"prompt": "job 2", "images": ["in.png"], "mask": "mask.png"}
        self.jobs({"prompt": "job 1"}, edit)
        self.batch()
        (line,) = self.api.lines("batch_1")
        self.assertEqual(line["url"], "/v1/images/edits")
        url = line["body"]["images"][0]["image_url"]
        self.assertTrue(url.startswith("data:image/png;base64,"))
        self.assertEqual(base64.b64decode(url.partition(",")[2]), png(32, 32))
        mask = line["body"]["mask"]["image_url"].partition(",")[2]
        self.assertEqual(base64.b64decode(mask), png(32, 32, hole=(1, 1, 4, 4)))
        self.api.end("batch_0")
        self.assertIn("batch_1: validating", self.batch().err)
        self.api.end("batch_1")
        self.assertEqual([path.name for path in self.batch().saved], ["0002.png"])

    def test_failures_are_told_apart(self) -> None:
        answers = {
            "job 1": made,
            "job 2": lambda line: refused(400, "moderation_blocked"),
            "job 3": lambda line: refused(500, "server_error"),
            "job 4": lambda line: lost("batch_expired", "This request could not be executed."),
            "job 5": lambda line: None,
        }
        self.api.result = lambda line: answers[line["body"]["prompt"]](line)
        self.jobs(*({"prompt": prompt} for prompt in answers))
        self.batch()
        self.api.end(status="expired")
        run = self.batch(code=9)
        self.assertEqual(len(run.saved), 1)
        entries = (self.work / "jobs" / "results.jsonl").read_text().splitlines()
        states = {line["id"]: line["state"] for line in map(json.loads, entries) if "id" in line}
        self.assertEqual(
            [states[f"000{number}"] for number in range(1, 6)],
            ["saved", "refused", "failed", "failed", "failed"],
        )
        self.api.result = made
        self.batch()
        prompts = [line["body"]["prompt"] for line in self.api.lines("batch_1")]
        self.assertEqual(prompts, ["job 3", "job 4", "job 5"])
        self.api.end("batch_1")
        self.batch(code=9)
        self.assertEqual(len(self.api.batches), 2)

    def test_costs_half(self) -> None:
        self.jobs({"prompt": "job 1", "quality": "low", "size": "1024x1024"})
        full = self.check(
            self.run_tool("batch", "jobs.jsonl", "--provider", "openai", "--dry-run"), 0
        )
        half = self.batch("--dry-run")
        amounts = [float(run.out.rpartition("$")[2]) for run in (full, half)]
        self.assertAlmostEqual(amounts[0] / 2, amounts[1], delta=0.0001)
        self.batch()
        self.api.end()
        self.batch()
        run = self.check(self.run_tool("history"), 0)
        self.assertIn("$0.0041 batch", run.out)

    def test_the_state_as_json(self) -> None:
        self.jobs({"prompt": "job 1"})
        told = self.batch("--json").json
        state = {"id": "batch_0", "status": "validating", "total": 1, "completed": 0, "failed": 0}
        self.assertEqual(told["deferred"], [{**state, "endpoint": "/v1/images/generations"}])
        self.assertTrue(told["ok"])

    def test_cancel(self) -> None:
        self.jobs({"prompt": "job 1"})
        self.batch()
        self.assertIn("cancelling", self.batch("--cancel").err)
        self.api.result = lambda line: lost("batch_cancelled", "Cancelled.")
        self.api.end(status="cancelled")
        self.batch(code=1)
        self.assertEqual(len(self.api.batches), 1)


class Refusals(Deferred):
    """What is not even begun."""

    def test_a_server_without_batches(self) -> None:
        self.jobs({"prompt": "job 1"})
        before = self.listing()
        self.api.before = lambda request: refused_page()
        run = self.batch(code=1)
        self.assertIn("has no /batches", run.err)
        self.assertEqual(len(run.err.splitlines()), 1)
        self.assertEqual(self.listing(), before)

    def test_the_sandbox(self) -> None:
        self.jobs({"prompt": "job 1"})
        self.batch("--sandbox", code=2)

    def test_a_stream(self) -> None:
        self.jobs({"prompt": "job 1"})
        self.batch("--stream", code=2)
        self.assertEqual(self.api.posts, [])

    def test_wait_alone(self) -> None:
        self.jobs({"prompt": "job 1"})
        self.check(self.run_tool("batch", "jobs.jsonl", "--wait"), 2)


def refused_page() -> Any:
    """Return a 404."""
    from tests.support import page

    return page(404, "Not Found")
