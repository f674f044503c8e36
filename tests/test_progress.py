"""A long wait shows that it is alive, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import re
import select
import threading
import time
import unittest
from typing import Iterator
from unittest import mock

from gpt_image2 import Console, wait_for
from tests.pictures import png
from tests.support import (
    Api,
    Case,
    Reply,
    answer,
    completed_event,
    event_stream,
    partial_event,
    start,
    stop,
)

try:
    import pty
except ImportError:  # Windows
    pty = None  # type: ignore[assignment]

PICTURE = png(64, 64)
FRAME = r"\r\x1b\[K[-|/\\] "


def screen(output: str) -> list[str]:
    """Return the lines that a terminal shows in the end."""
    lines, column = [""], 0
    for token in re.findall(r"\x1b\[2?K|\x1b\[[0-9;?]*[a-zA-Z]|.|\n", output, re.DOTALL):
        if token == "\n":
            lines.append("")
            column = 0
        elif token == "\r":
            column = 0
        elif token in ("\x1b[K", "\x1b[2K"):
            lines[-1] = lines[-1][:column] if token == "\x1b[K" else ""
        elif not token.startswith("\x1b"):
            lines[-1] = lines[-1][:column].ljust(column) + token + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


class Terminal:
    """A running tool whose stderr is a terminal."""

    def __init__(self, case: Case, *argv: str, **env: str) -> None:
        master, slave = pty.openpty()
        self.case, self.master = case, master
        case.addCleanup(os.close, master)
        self.shown = ""
        self.process = start(
            case.script,
            ["generate", "a fox", "-o", "fox.png", *argv],
            stderr=slave,
            env={**case.env, "TERM": "xterm", **env},
            cwd=case.work,
        )
        os.close(slave)
        case.addCleanup(stop, self.process)

    def read(self, timeout: float) -> bool:
        """Take in what has been shown; False at the end."""
        if not select.select([self.master], [], [], timeout)[0]:
            return True
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # Linux: no one has the terminal open any more
            return False
        self.shown += piece.decode().replace("\r\n", "\n")
        return bool(piece)

    def until(self, pattern: str) -> None:
        """Wait until something matches what has been shown."""
        end = time.monotonic() + 20
        while not re.search(pattern, self.shown):
            if time.monotonic() > end or not self.read(0.1):
                self.case.fail(f"no {pattern!r} in {self.shown!r}")

    def watch(self, seconds: float) -> None:
        """Take in all that is shown for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.read(0.05)

    def finish(self) -> list[str]:
        """Wait for the end, which must be a good one, and return what the screen then shows."""
        end = time.monotonic() + 20
        while self.read(0.1) and time.monotonic() < end:
            pass
        out, _ = self.process.communicate(timeout=20)
        self.case.assertEqual((self.process.returncode, out[:6]), (0, b"Saved:"), self.shown)
        return screen(self.shown)


@unittest.skipUnless(pty, "needs pseudo-terminals")
class OnATerminal(Case):
    """A spinner."""

    def setUp(self) -> None:
        super().setUp()
        self.go_on = threading.Event()

    def held(self) -> Api:
        """Serve an answer that waits for the test."""
        return self.serve_base(answer(PICTURE)._replace(before=self.go_on))

    def test_time_then_bytes_then_nothing(self) -> None:
        arrived = threading.Event()
        half = b" " * 300 * 1024
        chunks = (self.go_on, half, arrived, answer(PICTURE).body)
        self.serve_base(Reply(chunks=chunks, framing="chunked"))
        self.hurry(4)
        terminal = Terminal(self, "--quality", "low")
        terminal.until(rf"{FRAME}\d+ s \(usually [^)]* s\)")
        self.go_on.set()
        terminal.until(rf"{FRAME}\d+ s, 30\d KB received")
        terminal.until(rf"{FRAME}1 s, ")
        arrived.set()
        lines = terminal.finish()
        kinds = [line.split()[0] for line in lines]
        self.assertEqual(kinds, ["POST", "Job:", "HTTP", "281"], lines)

    def test_it_turns_and_no_color_means_no_colour(self) -> None:
        self.held()
        self.hurry(4)
        terminal = Terminal(self, NO_COLOR="1")
        for mark in r"-\|/":
            terminal.until(rf"\r\x1b\[K{re.escape(mark)} \d+ s")
        self.go_on.set()
        terminal.finish()
        self.assertNotRegex(terminal.shown, r"\x1b\[[0-9;]*m")

    def test_the_usual_time_is_of_the_model_and_the_quality(self) -> None:
        table = {
            ("--quality", "high"): "2 to 5 min",
            ("--quality", "high", "-m", "gpt-image-2.6-flare"): "8 to 12 s",
        }
        for argv, usual in table.items():
            with self.subTest(argv):
                self.go_on.clear()
                self.held()
                terminal = Terminal(self, *argv, "--force")
                terminal.until(rf"{FRAME}\d+ s")
                self.go_on.set()
                terminal.finish()
                self.assertIn(f"(usually {usual})", terminal.shown)

    def test_previews_have_lines_of_their_own(self) -> None:
        events = (partial_event(PICTURE), self.go_on, completed_event(PICTURE))
        self.serve_base(event_stream(*events))
        terminal = Terminal(self, "--partial-images", "1")
        terminal.until(rf"(?s)Partial: .*{FRAME}")
        self.go_on.set()
        lines = terminal.finish()
        self.assertIn(f"Partial: {self.work / 'fox.partial-1.png'}", lines)
        self.assertEqual([line for line in lines if " s, " in line], [])

    def test_quiet_shows_nothing(self) -> None:
        api = self.held()
        self.hurry(4)
        terminal = Terminal(self, "--quiet")
        api.wait_for_request()
        terminal.watch(0.2)
        self.go_on.set()
        terminal.finish()
        self.assertEqual(terminal.shown, "")

    def test_a_dumb_terminal_gets_plain_lines(self) -> None:
        api = self.held()
        self.hurry(4)
        terminal = Terminal(self, TERM="dumb")
        api.wait_for_request()
        terminal.watch(0.2)
        self.go_on.set()
        terminal.finish()
        self.assertNotRegex(terminal.shown, "[\x1b\r]")


class ElsewhereByTheClock(Case):
    """A line every 30 s, seen in a child whose clock runs sixty times as fast."""

    def test_a_line_every_thirty_seconds(self) -> None:
        self.hurry(60)
        go_on = threading.Event()
        reply = event_stream(b": hold the line\n\n", go_on, completed_event(PICTURE))
        api = self.serve_base(reply)
        tool = self.start_tool("generate", "a fox", "--stream")
        api.wait_for_request()
        time.sleep(1.4)
        go_on.set()
        run = self.check(self.finish(tool), 0)
        seconds = [int(word) for word in re.findall(r"(?m)^waiting: (\d+) s\b", run.err)]
        self.assertIn(len(seconds), (1, 2, 3), run.err)  # a machine under load is late
        steps = [after - before for before, after in zip([0, *seconds], seconds)]
        self.assertGreaterEqual(min(steps), 25, run.err)


class ElsewhereTickByTick(unittest.TestCase):
    """The same, with the seconds of a long wait counted out by the test."""

    def said(
        self, seconds: Iterator[float], *, quiet: bool = False, received: int = 0
    ) -> list[str]:
        """Return the lines of a wait that is looked at after each of these seconds."""
        raw = io.BytesIO()
        stderr = io.TextIOWrapper(raw)
        with mock.patch("sys.stderr", stderr), mock.patch("time.monotonic") as clock:
            clock.return_value = 1000.0

            def ended() -> bool:
                second = next(seconds, None)
                clock.return_value = 1000.0 + (second or 0)
                return second is None

            wait_for(ended, lambda: received, Console(quiet=quiet), "10 to 70 s")
        return raw.getvalue().decode().split("\n")[:-1]

    def test_nothing_in_the_first_half_minute(self) -> None:
        self.assertEqual(self.said(iter([0.5, 1, 10, 20, 25])), [])

    def test_one_line_each_half_minute_however_often_it_looks(self) -> None:
        for step, lines in ((30.0, [10]), (0.5, [10, 11]), (0.2, [10, 11])):
            with self.subTest(step):
                looks = (number * step for number in range(1, int(300 / step) + 1))
                self.assertIn(len(self.said(looks)), lines)

    def test_the_line_tells_the_time_and_the_usual_time_then_the_bytes(self) -> None:
        (line,) = self.said(iter([30.0]))
        self.assertRegex(line, r"^\S.*\b30 s\b.*usually 10 to 70 s")
        (line,) = self.said(iter([30.0]), received=300 * 1024)
        self.assertRegex(line, r"\b30 s\b.*\b300 KB\b")

    def test_lines_have_no_control_characters(self) -> None:
        self.assertNotRegex("".join(self.said(iter([30.0, 60.0]))), "[\x00-\x1f]")

    def test_quiet_says_nothing(self) -> None:
        self.assertEqual(self.said(iter([30.0, 60.0, 90.0]), quiet=True), [])
