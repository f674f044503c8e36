"""On a terminal: the real shells complete, a long wait shows that it is alive, --preview paints."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import unittest
from pathlib import Path
from select import select
from typing import Any, Callable, Iterator, Mapping
from unittest import mock

import gpt_image2
from tests.case import HANG, Case, decoded, tool_process
from tests.images import jpeg, png
from tests.server import Reply, answer

IMAGE = png(96, 64, seed=1)
OPENPTY: Any = getattr(os, "openpty", None)  # Windows has none


BASH_DRIVER = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_gpt_image2
printf '%s\\n' "${COMPREPLY[@]}"
"""
# What is typed, and what the shell must offer or fill in.
COMPLETED = (
    ("gpt-image2 gene", "generate"),
    ("gpt-image2 generate --qual", "--quality"),
    ("gpt-image2 generate --quality med", "medium"),
    ("gpt-image2 generate -s wides", "widescreen"),
    ("gpt-image2 edit a.png --mask ima", "image.png"),
    ('gpt-image2 generate "a fox" --qual', "--quality"),
    ('gpt-image2 generate "a fox" --quality med', "medium"),
    ("gpt-image2 sizes story --js", "--json"),
    ("gpt-image2 generate --quality=med", "--quality=medium"),
    ("gpt-image2 sizes widesc", "widescreen"),
    ("gpt-image2 sizes 16:", "16:9"),
    ("gpt-image2 generate -s story@4", "story@4K"),
    ("gpt-image2 generate x --size=story@4", "--size=story@4K"),
    ("gpt-image2 generate --size=sto", "--size=story"),
    ("gpt-image2 edit a.png --mask=ima", "--mask=image.png"),
)


class TestCompletion(Case):
    """The script of each shell, in that shell."""

    def written(self, shell: str) -> Path:
        """Return a file that holds the script for a shell; skip where there is no such shell."""
        (self.work / "image.png").touch()
        path = self.tmp / f"completion.{shell}"
        path.write_text(self.check(self.run_tool("completion", shell), 0).out)
        if not shutil.which(shell):
            self.skipTest(f"there is no {shell} here")
        return path

    def offered(self, *argv: str) -> list[str]:
        done = subprocess.run(argv, cwd=self.work, env=self.env, capture_output=True, check=True)
        self.assertEqual(done.stderr, b"")
        return done.stdout.decode().splitlines()

    def test_bash(self) -> None:
        script = self.written("bash")
        bash = ["bash", "-c", BASH_DRIVER, "bash", str(script)]
        for command in self.offered(*bash, "gpt-image2", ""):
            text = self.run_tool(command, "--help").out.partition("\nexamples:\n")[0]
            lefts = " ".join(re.findall(r"(?m)^  (-.*?)(?:  |$)", text))
            found = set(self.offered(*bash, "gpt-image2", command, "--"))
            self.assertEqual(found, set(re.findall(r"--[a-z][\w-]*", lefts)), command)

    def test_fish(self) -> None:
        script = self.written("fish")
        for typed, due in COMPLETED:
            with self.subTest(typed):
                lines = self.offered("fish", "-c", f"source {script}; complete -C '{typed}'")
                self.assertEqual([line.partition("\t")[0] for line in lines], [due])

    @unittest.skipUnless(OPENPTY, "needs pseudo-terminals")
    def test_as_typed(self) -> None:
        for shell, start in (
            ("zsh", "zsh -f -i"),
            ("bash", "bash --norc --noprofile -i"),
        ):
            with self.subTest(shell):
                self.check_typed(start, self.written(shell))

    def check_typed(self, start: str, script: Path) -> None:
        """Type each line in a shell at a terminal, with a tab, and look what it becomes."""
        terminal, slave = OPENPTY()
        self.addCleanup(os.close, terminal)
        streams: dict[str, Any] = {"stdin": slave, "stdout": slave, "stderr": slave}
        env = {**self.env, "TERM": "dumb"}
        shell = subprocess.Popen(start.split(), env=env, cwd=self.work, **streams)
        os.close(slave)
        self.addCleanup(shell.wait)
        self.addCleanup(shell.kill)

        def heard(line: str, pattern: str) -> str:
            os.write(terminal, line.encode())
            text = ""
            while not re.search(pattern, text):
                self.assertTrue(select([terminal], [], [], HANG)[0], f"no {pattern!r} in {text!r}")
                text += os.read(terminal, 65536).decode("utf-8", "replace")
            return text

        ready = "autoload -U compinit; compinit -u -D; " if start.startswith("zsh") else ""
        heard(f"{ready}source {script}; echo re''ady\n", "ready")
        for typed, due in COMPLETED:
            with self.subTest(typed):
                # Ctrl-A and Ctrl-E: print the line as it is now.
                said = heard(f"{typed}\t\x01echo 'L:\x05:L'\n", r"\nL:.*:L")
                line = said.rpartition("\nL:")[2].rpartition(":L")[0]
                self.assertEqual(line.split()[-1], due)


Until = Callable[[str, float], object]
Then = Callable[[], object]


@contextlib.contextmanager
def hasty_clock(until: Callable[[float], object], then: Then) -> Iterator[None]:
    """Let time run only while the tool waits for curl, and then at once.

    `until` is called with the time after each such wait. Once it is true `then` is called, and the
    clock stands still, so that nothing hangs on how fast the rest of the answer comes.
    """
    kind: Any = getattr(subprocess, "_PopenSelector")  # noqa: B009  it is private
    now, stands = 0.0, False

    def select(selector: Any, timeout: float | None = None) -> Any:
        nonlocal now, stands
        if stands or not timeout:
            return kind.select(selector, timeout and HANG)
        ready = kind.select(selector, 0.001)
        if not ready:
            now += timeout + 1e-6  # a time-out is over when it is past
            stands = bool(until(now))
            if stands:
                then()
        assert now < 1e5, "what the answer waits for never came"
        return ready

    hasty = mock.patch("subprocess._PopenSelector", type("Hasty", (kind,), {"select": select}))
    clocks = [mock.patch(name, lambda: now) for name in ("time.monotonic", "subprocess._time")]
    with hasty, clocks[0], clocks[1]:
        yield


@unittest.skipUnless(hasattr(subprocess, "_PopenSelector"), "its waits can't be made short here")
class ScreenCase(Case):
    """A case that looks at stderr, which may be a terminal, while the tool waits."""

    def shown(self, *argv: str, until: Until | None = None, then: Then = str, **where: Any) -> str:
        """Make an image and return stderr; `then` is called once `until` likes what is said.

        With tty=False that is no terminal; env=... adds to the environment.
        """
        world = {**self.env, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        world.update(where.get("env", {}))
        with tool_process(b"", world, self.work) as (out, err):
            screen = mock.patch.object(sys.stderr, "isatty", lambda: where.get("tty", True))
            clock = hasty_clock(lambda now: not until or until(decoded(err.getvalue()), now), then)
            with screen, clock:
                code = gpt_image2.main(["generate", "a fox", *argv])
        said = err.getvalue().decode()
        self.assertEqual((code, out.getvalue()[:6]), (0, b"Saved:"), said)
        return said

    def held(self) -> Then:
        """Serve an answer that waits until what is returned is called."""
        go_on = threading.Event()
        self.serve_base(answer(IMAGE)._replace(before=go_on))
        return go_on.set


def frames(said: str, _: float = 0) -> list[tuple[str, int, str]]:
    """Return the mark, the seconds and the rest of each frame of a spinner."""
    found = re.findall(r"([-|/\\]) (\d+) s([^\r\n]*)\r", said)
    return [(mark, int(seconds), rest) for mark, seconds, rest in found]


class TestProgress(ScreenCase):
    """A spinner on a terminal, a line every half minute elsewhere."""

    def test_a_spinner_tells_the_time_and_then_the_bytes_and_goes(self) -> None:
        go_on, arrived = threading.Event(), threading.Event()
        chunks = (go_on, b" " * 300 * 1024, arrived, answer(IMAGE).body)
        self.serve_base(Reply(chunks=chunks, framing="chunked"))

        def until(said: str, _: float) -> bool:
            if len({mark for mark, _, _ in frames(said)}) == 4:
                go_on.set()
            return "300 KB received" in said

        said = self.shown("--quality", "low", until=until, then=arrived.set, env={"NO_COLOR": "1"})
        found = frames(said)
        self.assertEqual([row[1] for row in found], sorted(row[1] for row in found))
        self.assertRegex(found[0][2], "usually 10 to 70 s")
        self.assertRegex(found[-1][2], r"^, 3\d\d KB received")  # the rest may be there too
        stays = re.sub(r"[^\n]*\r\x1b\[K", "", said).splitlines()
        self.assertEqual([line.split()[0] for line in stays], ["POST", "Job:", "HTTP", "281"])
        self.assertNotRegex(said, r"\x1b\[[0-9;]*m")

    def test_a_line_every_half_minute_elsewhere(self) -> None:
        def until(said: str, _: float) -> bool:
            return said.count("\nwaiting: ") >= 3

        argv = ["--quality", "low"]
        for tty, term in ((False, "xterm"), (True, "dumb")):
            with self.subTest(tty=tty, term=term):
                said = self.shown(*argv, until=until, then=self.held(), tty=tty, env={"TERM": term})
                lines = re.findall(r"(?m)^waiting: (\d+) s\b.*usually 10 to 70 s", said)
                seconds = [int(line) for line in lines]
                steps = [after - before for before, after in zip([0, *seconds], seconds)]
                self.assertTrue(len(steps) >= 3 and all(27 <= step <= 33 for step in steps), said)
                self.assertNotRegex(said, "[\x1b\r]")


KITTY = {"TERM": "xterm-kitty"}
NOTHING = "gpt-image2: warning: --preview needs a kitty"


class TestPreview(ScreenCase):
    """--preview: the image in the terminal, byte for byte, and a line where there can be none."""

    def preview(self, env: Mapping[str, str], image: bytes = IMAGE, tty: bool = True) -> str:
        self.serve_base(answer(image))
        return self.shown("--preview", tty=tty, env=env)

    def painted(self, shown: str) -> tuple[str, bytes]:
        """Return the settings and the bytes of the image in kitty's or iTerm2's sequences."""
        iterm = re.search(r"\x1b\]1337;File=(.*?):(.*?)\x07", shown)
        if iterm:
            return iterm[1], base64.b64decode(iterm[2])
        chunks = re.findall(r"\x1b_G(.*?)m=([01]);(.*?)\x1b\\", shown)
        self.assertEqual("".join(more for _, more, _ in chunks), "1" * (len(chunks) - 1) + "0")
        return chunks[0][0], base64.b64decode("".join(text for _, _, text in chunks))

    def test_each_terminal_gets_the_file_its_way(self) -> None:
        kitty, iterm = r"^a=T,f=100,q=2,c=\d+,r=\d+,$", rf"inline=1;size={len(IMAGE)};"
        for settings, variables in (
            (kitty, "TERM=xterm-kitty TERM=xterm-ghostty TERM_PROGRAM=ghostty"),
            (kitty, "KITTY_WINDOW_ID=1 GHOSTTY_RESOURCES_DIR=/g KONSOLE_VERSION=220401"),
            (iterm, "TERM_PROGRAM=iTerm.app TERM_PROGRAM=WezTerm TERM_PROGRAM=vscode"),
            (iterm, "LC_TERMINAL=iTerm2 KITTY_WINDOW_ID=1,TERM_PROGRAM=iTerm.app"),  # within kitty
        ):
            for words in variables.split():
                with self.subTest(words):
                    env = dict(word.split("=") for word in words.split(","))
                    told, data = self.painted(self.preview(env))
                    self.assertEqual(data, IMAGE)
                    self.assertRegex(told, settings)
        told, _ = self.painted(self.preview(KITTY, png(300, 100)))
        columns, rows = map(int, re.findall(r"[cr]=(\d+)", told))
        self.assertAlmostEqual(columns / rows / 2, 3, delta=0.4)  # it keeps its shape

    def test_tmux_passes_it_on(self) -> None:
        tmux = {"TMUX": "/tmp/tmux-0/default,1,0", "TERM": "tmux"}
        kitty, iterm, wezterm = (
            "".join(re.findall(r"\x1bPtmux;((?:[^\x1b]|\x1b\x1b)*)\x1b\\", self.preview(env)))
            for env in (
                {**tmux, "KITTY_WINDOW_ID": "1"},
                {**tmux, "LC_TERMINAL": "iTerm2"},
                {**tmux, "TERM_PROGRAM": "tmux", "WEZTERM_PANE": "0"},
            )
        )
        self.assertEqual(wezterm, iterm)
        told, data = self.painted(kitty.replace("\x1b\x1b", "\x1b"))
        self.assertIn(",C=1,", told)
        self.assertEqual(data, IMAGE)
        begin, *parts, end = re.findall(r"\x1b\x1b\]1337;(.*?)\x07", iterm)
        self.assertRegex(begin, "^MultipartFile=inline=1;")
        self.assertEqual((end, {part[:9] for part in parts}), ("FileEnd", {"FilePart="}))
        self.assertLess(max(map(len, parts)), 1_000_000)
        self.assertEqual(base64.b64decode("".join(part[9:] for part in parts)), IMAGE)

    def test_where_there_can_be_none(self) -> None:
        for name, env, image, tty, line in (
            ("kitty shows png only", KITTY, jpeg(64, 64), True, "this terminal shows png only"),
            ("a plain terminal", {}, IMAGE, True, NOTHING),
            ("a pipe", KITTY, IMAGE, False, NOTHING),
            ("VS Code in tmux", {"TMUX": "1", "TERM_PROGRAM": "vscode"}, IMAGE, True, NOTHING),
        ):
            with self.subTest(name):
                shown = self.preview(env, image, tty)
                self.assertIn(line, shown)
                self.assertNotRegex(shown, "\x1b[_\\]]")
