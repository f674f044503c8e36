"""Batches that version 0.1 began are gone on with: nothing lost, nothing paid twice."""

from __future__ import annotations

from typing import Any

from tests import today
from tests.batches import BatchCase, drawn
from tests.deferreds import CREATE, BatchApi, picture_of
from tests.support import Run
from tests.test_deferred import Deferred

OPENAI = ("--provider", "openai")


class Journals(BatchCase):
    """Half-done batches with their job folders."""

    def unpack(self, name: str) -> None:
        """Put a batch of version 0.1 into the work and state folders."""
        today.unpack(self, self.api, name)
        for label in "abcdef":  # what the server of that day painted
            for take in ("", ", 2", " again"):
                self.painter.labels[drawn(label + take)] = label + take

    def test_killed_with_answers_on_the_way(self) -> None:
        self.unpack("killed")
        self.assertEqual(len(self.jobs()), 4)
        run = self.batch(*OPENAI, "--concurrency", "1", code=9)
        self.assertEqual(self.painter.seen, ["e", "f"], "what curl never sent, and what was left")
        self.assertEqual(len(run.saved), 4)
        told = {**dict.fromkeys(["0001", "0002", "0003", "0005", "0006"], "saved")}
        self.assertEqual(self.states(), {**told, "0004": "unknown"})
        self.assertEqual(self.batch(*OPENAI, code=9).saved, [])
        self.batch(*OPENAI, "--redo", "unknown")
        self.assertEqual(self.painter.seen, ["e", "f", "d"])
        self.assertEqual(sorted(self.painted().values()), list("abcdef"))

    def test_recover_tells_the_batch(self) -> None:
        self.unpack("killed")
        run = self.check(self.run_tool("recover", "--all"), 9)
        self.assertEqual({path.parent for path in run.saved}, {self.folder})
        self.assertEqual(len(run.saved), 2)
        states = self.states()
        self.assertEqual([states[f"000{n}"] for n in (1, 2, 3)], ["saved"] * 3)
        self.no_request(self.api)

    def test_each_state_is_taken_over(self) -> None:
        self.unpack("states")
        argv = (*OPENAI, "--quality", "low")
        self.assertEqual(self.states()["0004"], "unknown")
        run = self.batch(*argv, code=9)
        self.assertEqual(self.painter.seen, ["b"], "only what was not billed")
        states = list(self.states().values())
        self.assertEqual(states, ["saved", "saved", "refused", "saved", "partial"])
        names = {path.name: self.painter.labels[path.read_bytes()] for path in run.saved}
        self.assertEqual(names, {"0002.png": "b", "0004.png": "d"}, "d is whole in half an answer")
        self.check(self.run_tool("history"), 0)
        dry = self.batch(*argv, "--dry-run").out.splitlines()
        self.assertEqual([line.split()[1] for line in dry[:5]], ["skip"] * 5)
        self.batch(*argv, "--redo", "failed", code=9)
        self.assertEqual(self.painter.seen, ["b", "c"])

    def test_what_was_spent_counts(self) -> None:
        self.unpack("states")
        argv = (*OPENAI, "--quality", "low", "--max-cost", "0.02")
        self.assertIn("--max-cost 0.02 is reached", self.batch(*argv, code=9).err)
        self.assertEqual(self.painter.seen, [])

    def test_changed_options_are_refused(self) -> None:
        self.unpack("states")
        run = self.batch(*OPENAI, "--quality", "high", code=2)
        self.assertIn("quality low -> high", run.err)
        self.no_request(self.api)

    def test_a_redo_is_finished_and_not_begun_again(self) -> None:
        self.unpack("redo")
        run = self.batch("--redo", "all")
        self.assertEqual(self.painter.seen, ["c"])
        self.assertEqual(len(run.saved), 2)
        self.assertEqual(self.jobs(), [])


class Pending(Deferred):
    """Batches at OpenAI."""

    def unpack(self, name: str) -> None:
        """Put a deferred batch of version 0.1 into the folders, and its like into the server."""
        data: Any = today.unpack(self, self.api, name)
        self.api.batches.update(data["batches"])
        contents = {file: text.encode("ascii") for file, text in data["contents"].items()}
        self.api.contents.update(contents)

    def check_brought(self, run: Run) -> None:
        """Assert that the four pictures are there."""
        self.assertEqual(len(run.saved), 4, run)
        found = self.pictures()
        self.assertEqual(found["0001.png"], picture_of("job 1"))
        self.assertEqual(found["two.png"], picture_of("job 2"))
        self.assertEqual(found["0003-2.png"], picture_of("job 3", 2))
        self.assertEqual(set(self.states().values()), {"saved"})
        self.assertEqual(self.left(), [])
        self.assertEqual(self.jobs(), [])

    def test_one_that_runs_is_followed_and_fetched(self) -> None:
        self.unpack("deferred-created")
        self.assertIn("batch_0: validating 0/3", self.batch().err)
        self.api.end()
        self.check_brought(self.batch())
        self.assertEqual(self.endpoints(), {"generations": 1})

    def test_a_create_that_was_cut_is_found(self) -> None:
        self.unpack("deferred-creating")
        self.assertIn("batch_0: validating 0/3", self.batch().err)
        self.assertEqual(self.api.asked(CREATE), [])
        self.api.end()
        self.check_brought(self.batch())

    def test_one_that_was_never_made_is_made_once(self) -> None:
        self.unpack("deferred-uploading")
        self.assertIn("batch_0: validating 0/3", self.batch().err)
        self.assertEqual(len(self.api.asked(CREATE)), 1)
        self.api.end()
        self.check_brought(self.batch())

    def test_its_server_must_be_the_same(self) -> None:
        self.unpack("deferred-created")
        other = BatchApi()
        self.servers.append(other)
        self.addCleanup(other.close)
        self.env.update(GPT_IMAGE2_BASE_URL=other.base_url)
        self.assertIn("pending at", self.batch(code=2).err)
        self.assertEqual(other.posts, [])

    def test_it_can_be_cancelled(self) -> None:
        self.unpack("deferred-created")
        self.assertIn("cancelling", self.batch("--cancel").err)
        self.assertEqual(self.endpoints(), {"generations": 1})
