"""Every row of the fault matrix (tests/faults.py), one test each, played on a real curl."""

from __future__ import annotations

import re
import unittest
from typing import Callable

from tests.faults import FAULTS, Company, Fault, Outcome, markdown_row, posts_too_many


class TestFaults(unittest.TestCase):
    """What comes of each fault: exit code, POSTs, pictures on disk, and what recover brings."""

    company: Company

    @classmethod
    def setUpClass(cls) -> None:
        cls.company = Company(sorted(FAULTS, key=test_name))  # in unittest's order
        cls.addClassCleanup(cls.company.close)

    def check(self, fault: Fault) -> None:
        """Compare a row with what is seen of it."""
        seen = self.company.seen(fault)
        story = f"{fault.name}\n{seen.run}\n{seen.recovered or ''}"
        self.assertEqual(seen.outcome, fault.outcome, story)
        self.assertEqual(seen.lost, 0, f"pictures are lost: {story}")
        self.assertEqual(posts_too_many(fault, seen), 0, f"paid twice: {story}")
        last_lines = seen.run.err.splitlines()[-1:]
        if fault.outcome.recover and fault.outcome.recover[1] and seen.run.code > 0:
            self.assertRegex("".join(last_lines), "^Recover: .* recover ", story)
        if fault.outcome.recover is None:
            self.assertNotIn("Recover: ", seen.run.err, story)


def test_name(fault: Fault) -> str:
    """Return the name of a row's test method."""
    return "test_" + re.sub("[^0-9a-z]+", "_", fault.name.lower()).strip("_")


def test_of(fault: Fault) -> Callable[[TestFaults], None]:
    """Return the test of a row."""
    return lambda self: self.check(fault)


test_name.__test__ = test_of.__test__ = False  # type: ignore[attr-defined]  # for pytest

for row in FAULTS:
    assert not hasattr(TestFaults, test_name(row)), f"two rows named {row.name}"
    setattr(TestFaults, test_name(row), test_of(row))


class TestTheTable(unittest.TestCase):
    """The table itself."""

    def test_has_at_least_60_rows(self) -> None:
        self.assertGreaterEqual(len(FAULTS), 60)

    def test_expects_no_second_post_of_what_may_be_billed(self) -> None:
        twice = [fault.name for fault in FAULTS if fault.unknown and fault.outcome.posts > 1]
        self.assertEqual(twice, ["HTTP 429, then 500"])

    def test_expects_no_picture_to_be_lost(self) -> None:
        for fault in FAULTS:
            brought = fault.outcome.recover[1] if fault.outcome.recover else 0
            self.assertGreaterEqual(fault.outcome.saved + brought, fault.came, fault.name)

    def test_prints_a_row(self) -> None:
        kept = Outcome(8, 1, 0, (9, 2))
        self.assertEqual(
            markdown_row("a cut", kept), "| a cut | 8 | 1 | 0 | yes | 2 pictures, exit 9 |"
        )
        self.assertEqual(
            markdown_row("a kill", Outcome(-9, recover=(0, 1))),
            "| a kill | killed | 1 | 0 | yes | 1 picture, exit 0 |",
        )
        self.assertEqual(markdown_row("a refusal", Outcome(4)), "| a refusal | 4 | 1 | 0 | no |  |")


if __name__ == "__main__":
    unittest.main()
