"""Every row of the fault table (tests/faults.py), one test each, played on a real curl."""

from __future__ import annotations

import re
import unittest
from typing import Callable

from tests.case import ROOT, Run
from tests.faults import FAULTS, Fault, Outcome, Stage, document, markdown_row


class TestFaults(Stage):
    """What comes of each fault: exit code, POSTs, images on disk, and what recover brings."""

    def check_fault(self, fault: Fault) -> None:
        """Compare a row with what is seen of it."""
        seen = self.play(fault)
        story = f"{fault.name}\n{self.story(seen.run)}\n{seen.recovered or ''}"
        self.assertEqual(seen.outcome, fault.outcome, story)
        self.assertEqual(seen.lost, 0, f"images are lost: {story}")
        self.assertIn(fault.says, seen.run.err, story)
        last_lines = seen.run.err.splitlines()[-1:]
        if fault.outcome.recover and fault.outcome.recover[1] and seen.run.code > 0:
            self.assertRegex("".join(last_lines), "^Recover: .* recover ", story)
        if fault.outcome.recover is None:
            self.assertNotIn("Recover: ", seen.run.err, story)
        if seen.run.out.startswith("{"):
            self.check_document(fault, seen.run)

    def check_document(self, fault: Fault, run: Run) -> None:
        """Compare a row with the document that --json prints."""
        document = run.json
        error, code = document["error"], fault.outcome.exit
        self.assertEqual(document["ok"], code == 0)
        if code == 0:
            self.assertIsNone(error)
            return
        self.assertEqual(error["exit_code"], code)
        self.assertEqual(error["code"], fault.code or error["code"] or "(none)")
        self.assertEqual(error["maybe_billed"], code == 8, error)
        if fault.outcome.recover is None:
            self.assertIsNone(document["recover_id"])
        if code == 8:
            kept = document["recover_id"]
            hint = f"run recover {kept} first" if kept else "no byte came, nothing to recover; "
            self.assertEqual(error["hint"][: len(hint)], hint)
            self.assertIn(error["hint"], run.err)
            self.assertEqual("\nRecover: " in run.err, bool(kept), run)
            self.assertEqual("sends a" in error["hint"], not kept, run)


def test_name(fault: Fault) -> str:
    """Return the name of a row's test method."""
    return "test_" + re.sub("[^0-9a-z]+", "_", fault.name.lower()).strip("_")


def test_of(fault: Fault) -> Callable[[TestFaults], None]:
    """Return the test of a row."""
    return lambda self: self.check_fault(fault)


test_name.__test__ = test_of.__test__ = False  # type: ignore[attr-defined]  # for pytest

for row in FAULTS:
    assert not hasattr(TestFaults, test_name(row)), f"two rows named {row.name}"
    setattr(TestFaults, test_name(row), test_of(row))


class TestTheTable(unittest.TestCase):
    """The table itself."""

    def test_expects_no_second_post_of_what_may_be_billed(self) -> None:
        twice = [row.name for row in FAULTS if row.outcome.unknown and row.outcome.posts > 1]
        self.assertEqual([name for name in twice if not name.startswith("HTTP 429, then")], [])
        self.assertEqual(len(twice), 3)

    def test_the_page_is_up_to_date(self) -> None:
        text = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
        self.assertEqual(text, document(), "run: python3 tests/faults.py --markdown")

    def test_prints_a_row(self) -> None:
        for outcome, cells in (
            (Outcome(8, 1, 0, (9, 2)), "| a cut | 8 | 1 | 0 | yes | 2 images, exit 9 |"),
            (Outcome(-9, recover=(0, 1)), "| a cut | killed | 1 | 0 | yes | 1 image, exit 0 |"),
            (Outcome(4), "| a cut | 4 | 1 | 0 | no |  |"),
        ):
            self.assertEqual(markdown_row("a cut", outcome), cells)
