"""--retry-unsafe: whole pictures of the earlier answer are saved before the next try."""

from __future__ import annotations

from tests.pictures import png
from tests.support import Case, Reply, answer, b64

FIRST, SECOND, THIRD = (png(8, 8, seed=seed) for seed in (1, 2, 3))
FOX = ("generate", "a fox", "-o", "fox.png", "--retry-unsafe", "--retries", "1")


def cut(reply: Reply, *, keep: int) -> Reply:
    """Return an answer whose connection breaks after `keep` bytes of its body."""
    return reply._replace(cut=keep)


class TestRetryUnsafe(Case):
    def saved_bytes(self) -> list[bytes]:
        """Return what the pictures in the working folder hold, by name."""
        return [(self.work / name).read_bytes() for name in self.listing()]

    def test_all_pictures_of_a_cut_answer_are_enough(self) -> None:
        whole = answer(FIRST)
        api = self.serve_base(
            cut(whole, keep=whole.body.index(b64(FIRST).encode()) + len(b64(FIRST)) + 1)
        )
        run = self.check(self.run_tool(*FOX), 0)
        self.assertEqual((len(api.posts), self.saved_bytes(), self.jobs()), (1, [FIRST], []))
        self.assertNotIn("Recover:", run.err)

    def test_some_are_saved_before_the_next_try(self) -> None:
        whole = answer(FIRST, SECOND)
        api = self.serve_base(
            cut(whole, keep=whole.body.index(b64(SECOND).encode()) + 40), answer(SECOND, THIRD)
        )
        self.check(self.run_tool(*FOX, "--n", "2"), 0)
        self.assertEqual(len(api.posts), 2)
        self.assertEqual(self.listing(), ["fox-1.png", "fox-2.png", "fox-3.png"])
        self.assertEqual(self.saved_bytes(), [FIRST, SECOND, THIRD])
        self.assertEqual(self.jobs(), [])

    def test_none_is_written_over_with_force(self) -> None:
        whole = answer(FIRST, SECOND)
        self.serve_base(
            cut(whole, keep=whole.body.index(b64(SECOND).encode()) + 40), answer(SECOND, THIRD)
        )
        self.check(self.run_tool(*FOX, "--n", "2", "--force"), 0)
        self.assertEqual(self.saved_bytes(), [FIRST, SECOND, THIRD])

    def test_one_that_cannot_be_fetched_ends_the_tries(self) -> None:
        body = b'{"data": [{"url": "http://127.0.0.1:1/a.png"}, '
        reply = Reply(200, body, [("Content-Type", "application/json")])
        api = self.serve_base(cut(reply._replace(body=body + b" " * 99), keep=len(body)))
        run = self.check(self.run_tool(*FOX, "--n", "2"), 10)
        self.assertEqual(len(api.posts), 1)
        self.assertEqual(len(self.jobs()), 1, "the answer is kept")
        self.assertIn("Recover:", run.err)

    def test_an_unknown_outcome_after_some_pictures_is_a_partial_one(self) -> None:
        whole = answer(FIRST, SECOND)
        self.serve_base(
            cut(whole, keep=whole.body.index(b64(SECOND).encode()) + 40), Reply(500, b"Error")
        )
        run = self.check(self.run_tool(*FOX, "--n", "2", "--json"), 9)
        self.assertEqual(len(run.json["images"]), 1)
        self.assertEqual(self.saved_bytes(), [FIRST])
