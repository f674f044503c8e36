"""Runs test classes side by side, in forked processes: one more than there are CPUs.

    suite = SideBySide(tests)  # what load_tests() in tests/__init__.py returns
    suite.run(result)          # the result hears of each test as if it had run here

TESTS_AT_ONCE=1 runs them one after another in this process; so does a system that can't fork, and
so do `python3 -m unittest tests.test_sizes` and other calls that name less than the whole folder.
"""

from __future__ import annotations

import os
import unittest
from multiprocessing import connection, get_context
from typing import Any, Iterator, List, Tuple

Told = List[Tuple[str, Tuple[Any, ...]]]  # methods of a TestResult to be called, with arguments


def at_once() -> int:
    """Return how many processes to use; one of them mostly waits."""
    if not hasattr(os, "fork"):
        return 1
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    cpus = len(own) or os.cpu_count() or 1
    return int(os.environ.get("TESTS_AT_ONCE") or cpus + 1)


class Name:
    """Stands for a test of another process, a subtest, or a class that can't be set up."""

    failureException = AssertionError

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def id(self) -> str:
        """Return its name, as a test would."""
        return self.text

    def shortDescription(self) -> None:
        """Return nothing: the name says it all."""


class Elsewhere(Exception):
    """What a test raised in another process, as the text that was printed there."""

    def __str__(self) -> str:
        return f"in another process\n{self.args[0]}"


class Teller(unittest.TestResult):
    """A result that passes what it hears to the process that waits for it."""

    def __init__(self, line: Any) -> None:
        super().__init__()
        self.line = line
        self.told: Told = []

    def tell(self) -> None:
        """Send what has been noted: all of one test at once, so that none cuts in on another."""
        self.line.send(self.told)
        self.told = []

    def note(self, method: str, test: Any, *more: Any) -> None:
        """Keep a call for the other side."""
        self.told.append((method, (Name(str(test)), *more)))

    def startTest(self, test: Any) -> None:
        self.note("startTest", test)

    def stopTest(self, test: Any) -> None:
        self.note("stopTest", test)
        self.tell()

    def addSuccess(self, test: Any) -> None:
        self.note("addSuccess", test)

    def addSkip(self, test: Any, reason: str) -> None:
        self.note("addSkip", test, reason)

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        self.note("addFailure", test, self.failures.pop()[1])

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        self.note("addError", test, self.errors.pop()[1])

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        """Tell of the subtests that failed alone, as failures of their own."""
        if err is not None:
            failed = issubclass(err[0], test.failureException)
            (self.addFailure if failed else self.addError)(subtest, err)

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self.note("addSuccess", test)

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.note("addUnexpectedSuccess", test)

    def addDuration(self, test: Any, elapsed: float) -> None:
        """Note the seconds that a test took, which unittest counts since Python 3.12."""
        self.note("addDuration", test, elapsed)


def replay(told: Told, result: unittest.TestResult) -> None:
    """Call a result's methods as they were called in the other process."""
    for method, (test, *more) in told:
        if method in ("addFailure", "addError"):
            more = [(Elsewhere, Elsewhere(*more), None)]
        if hasattr(result, method):
            getattr(result, method)(test, *more)


class SideBySide(unittest.TestSuite):
    """A suite whose classes are dealt out to forked processes, each when it has done its last."""

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        """Run all tests; `debug`, which lets exceptions pass, is for one process."""
        hands = [] if debug or at_once() == 1 else self.deal()
        if len(hands) < 2:
            return super().run(result, debug)
        context, lines, workers = get_context("fork"), [], []
        for _ in range(min(at_once(), len(hands))):
            line, theirs = context.Pipe()
            worker = context.Process(target=work, args=(hands, theirs), daemon=True)
            worker.start()
            theirs.close()
            lines.append(line)
            workers.append(worker)
        try:
            attend(lines, len(hands), result)
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()
        return result

    def deal(self) -> list[list[unittest.TestCase]]:
        """Return the tests by class, those of the most tests first, so that none is left over."""
        classes: dict[type, list[unittest.TestCase]] = {}
        for test in flat(self):
            classes.setdefault(type(test), []).append(test)
        return sorted(classes.values(), key=len, reverse=True)


def flat(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    """Return the tests of a suite of suites."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flat(test)
        else:
            yield test


def work(hands: list[list[unittest.TestCase]], line: Any) -> None:
    """Run the classes whose numbers come down the line; tell of each test, and of each end."""
    teller = Teller(line)
    for number in iter(line.recv, None):
        unittest.TestSuite(hands[number]).run(teller)
        if teller.told:  # what befell the class itself
            teller.tell()
        line.send(None)


def attend(lines: list[Any], hands: int, result: unittest.TestResult) -> None:
    """Give each worker a class whenever it has done one, and pass on what it tells."""
    numbers, idle = iter(range(hands)), lines
    busy: list[Any] = []
    while True:
        for line, number in zip(idle, [] if result.shouldStop else numbers):
            line.send(number)
            busy.append(line)
        if not busy:
            return
        idle = []
        for line in list(connection.wait(busy)):
            told = heard(line, result)
            if told:
                replay(told, result)
                continue
            busy.remove(line)
            if told is None:
                idle.append(line)


def heard(line: Any, result: unittest.TestResult) -> Told | None:
    """Return what a worker tells: of a test, None after a class, an empty list when it is gone."""
    try:
        told: Told | None = line.recv()
    except (EOFError, OSError):
        error = AssertionError("it ended in the midst of a class, and the rest of that did not run")
        result.addError(Name("a process of the tests"), (AssertionError, error, None))  # type: ignore[arg-type]
        return []
    return told
