"""Tests dealt out to processes: the outcome is that of one process, whatever befalls them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unittest

from tests.support import ROOT, Case

SAMPLE = """
import os, sys, unittest
from tests.side_by_side import SideBySide

class Passes(unittest.TestCase):
    def test_one(self): pass
    def test_two(self): pass
    def test_three(self): pass

class Fails(unittest.TestCase):
    def test_failure(self): self.assertEqual(1, 2)
    def test_error(self): raise LookupError("lost")
    def test_skip(self): self.skipTest("not here")
    def test_subtests(self):
        for number in range(4):
            with self.subTest(number=number):
                self.assertNotEqual(number, 2)

class Expected(unittest.TestCase):
    @unittest.expectedFailure
    def test_unexpected(self): pass

class NeverBegun(unittest.TestCase):
    @classmethod
    def setUpClass(cls): raise OSError("no such world")
    def test_it(self): pass

class Dies(unittest.TestCase):
    def test_now(self): os._exit(0)

load = unittest.defaultTestLoader.loadTestsFromTestCase
suite = SideBySide([load(globals()[name]) for name in sys.argv[1:]])
result = unittest.TextTestRunner(verbosity=2).run(suite)
sys.exit(not result.wasSuccessful())
"""


@unittest.skipUnless(hasattr(os, "fork"), "there is no fork here")
class TestSideBySide(Case):
    """What unittest prints of a suite in several processes."""

    def run_suite(self, *classes: str, at_once: int = 2) -> subprocess.CompletedProcess[str]:
        """Run the sample's classes in so many processes."""
        sample = self.tmp / "sample.py"
        sample.write_text(SAMPLE)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TESTS_AT_ONCE": str(at_once)}
        argv = [sys.executable, str(sample), *classes]
        return subprocess.run(
            argv, env=env, cwd=self.work, stderr=subprocess.PIPE, text=True, check=False
        )

    def test_all_pass(self) -> None:
        done = self.run_suite("Passes", "Passes")
        self.assertEqual(done.returncode, 0, done.stderr)
        done = self.run_suite("Passes", "Expected")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertRegex(done.stderr, r"FAILED \(unexpected successes=1\)")

    def test_what_one_process_says(self) -> None:
        classes = ("Passes", "Fails", "NeverBegun", "Expected")
        alone, together = (self.run_suite(*classes, at_once=number) for number in (1, 3))
        for done in (alone, together):
            self.assertEqual(done.returncode, 1)
            self.assertIn("AssertionError: 1 != 2", done.stderr)
            self.assertIn("LookupError: lost", done.stderr)
            self.assertIn("OSError: no such world", done.stderr)
            self.assertIn("(number=2)", done.stderr)
            self.assertIn("skipped 'not here'", done.stderr)
        totals = re.compile(r"^(?:Ran \d+ tests|FAILED .*)", re.MULTILINE)
        self.assertEqual(totals.findall(together.stderr), totals.findall(alone.stderr))
        heads = re.compile(r"^(?:FAIL|ERROR): .*", re.MULTILINE)
        self.assertEqual(
            sorted(heads.findall(together.stderr)), sorted(heads.findall(alone.stderr))
        )
        self.assertNotIn("in another process", alone.stderr)
        self.assertIn("in another process", together.stderr)

    def test_a_process_that_dies_is_an_error(self) -> None:
        done = self.run_suite("Dies", "Passes", "Fails")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("ERROR: a process of the tests", done.stderr)
        self.assertIn("Ran 7 tests", done.stderr)

    def test_all_processes_die(self) -> None:
        done = self.run_suite("Dies", "Dies", "Passes", at_once=1)
        self.assertEqual(done.returncode, 0, "in this process, there is nobody to tell of it")
        done = self.run_suite("Dies", "NeverBegun", at_once=2)
        self.assertEqual(done.returncode, 1, done.stderr)


if __name__ == "__main__":
    unittest.main()
