"""The tests of gpt_image2: `python3 -m unittest` in the folder above runs them all."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import unittest
from typing import IO

MEMORY = "/dev/shm"  # files that are gone in a moment need no disk, where Linux has this


class TwoProcesses(unittest.TestSuite):
    """The test modules, run by this process and a fork of it; each takes the next one left."""

    left: int  # a pipe with the number of each module that nobody has taken

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        """Run all modules; what the fork says counts as one error if a test fails there."""
        if sys.platform == "win32":  # it has no fork
            return super().run(result, debug)
        self.left, writer = os.pipe()
        os.write(writer, bytes(range(len(list(self)))))
        os.close(writer)
        sys.stderr.flush()
        with tempfile.TemporaryFile("w+") as told:
            fork = os.fork()
            if not fork:
                self._be_the_fork(told, result.failfast)
            self._run_modules(result)
            status = os.waitpid(fork, 0)[1]
            told.seek(0)
            text, _, counts = told.read().rpartition("\n")
        tests, skipped = map(int, counts.split()) if not os.WIFSIGNALED(status) else (0, 0)
        result.testsRun += tests
        result.skipped += [(unittest.FunctionTestCase(str), "in the other process")] * skipped
        if status:
            result.errors.append((unittest.FunctionTestCase(str, description="fork"), text))
        os.close(self.left)
        return result

    def _run_modules(self, result: unittest.TestResult) -> None:
        modules = sorted(self, key=lambda module: -module.countTestCases())  # the longest first
        for taken in iter(lambda: os.read(self.left, 1), b""):
            modules[taken[0]].run(result)

    def _be_the_fork(self, told: IO[str], failfast: bool) -> None:
        """Run modules with a runner that writes to a file, and end the process."""
        code = 2
        try:
            runner = unittest.TextTestRunner(told, failfast=failfast)
            result = runner.run(self._run_modules)  # type: ignore[arg-type]  # any callable serves
            told.write(f"\n{result.testsRun} {len(result.skipped)}")
            code = not result.wasSuccessful()
        finally:
            told.flush()
            os._exit(code)


def load_tests(loader: unittest.TestLoader, _: object, pattern: str | None) -> unittest.TestSuite:
    """Return the tests of this folder as a suite for two processes."""
    # A container's has 64 MB, and some tests take 400.
    roomy = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**31
    if roomy and not os.environ.get("TMPDIR"):
        tempfile.tempdir = MEMORY
    here = os.path.dirname(__file__)
    return TwoProcesses(loader.discover(here, pattern or "test*.py", os.path.dirname(here)))
