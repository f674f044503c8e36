"""The tests of gpt_image2: `python3 -m unittest` in the folder above runs them all."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import unittest

from tests.side_by_side import SideBySide

MEMORY = "/dev/shm"  # files that are gone in a moment need no disk, where Linux has this


def load_tests(loader: unittest.TestLoader, _: object, pattern: str | None) -> unittest.TestSuite:
    """Return the tests of this folder as a suite that uses all CPUs."""
    # A container's has 64 MB, and some tests take 400.
    roomy = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**31
    if roomy and not os.environ.get("TMPDIR"):
        tempfile.tempdir = MEMORY
    # A shell's `&` may have us ignore Ctrl-C, and so would each tool that a test starts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    here = os.path.dirname(__file__)
    return SideBySide([loader.discover(here, pattern or "test*.py", os.path.dirname(here))])
