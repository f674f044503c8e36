"""--preview: the picture in the terminal, byte for byte, and a line where there can be none."""

from __future__ import annotations

import base64
import re
import unittest

from tests.pictures import jpeg, png
from tests.support import Case, answer
from tests.test_progress import Terminal

try:
    import pty
except ImportError:  # Windows
    pty = None  # type: ignore[assignment]

PICTURE = png(96, 64, seed=1)
KITTY = {"TERM": "xterm-kitty"}
ITERM = {"TERM_PROGRAM": "iTerm.app"}
TMUX = {"TMUX": "/tmp/tmux-0/default,1,0", "TERM": "tmux"}
NOTHING = "gpt-image2: warning: --preview needs a kitty"


def kitty_picture(shown: str) -> tuple[str, bytes]:
    """Return the settings and the bytes of the picture in kitty's sequences."""
    chunks = re.findall(r"\x1b_G(.*?);(.*?)\x1b\\", shown)
    assert chunks, repr(shown)
    assert all("m=1" in told for told, _ in chunks[:-1])
    assert "m=0" in chunks[-1][0]
    return chunks[0][0], base64.b64decode("".join(text for _, text in chunks))


def iterm_picture(shown: str) -> tuple[str, bytes]:
    """Return the settings and the bytes of the picture in iTerm2's sequence."""
    match = re.search(r"\x1b\]1337;File=(.*?):(.*?)\x07", shown)
    assert match, repr(shown)
    return match[1], base64.b64decode(match[2])


def from_tmux(shown: str) -> str:
    """Return what tmux passes on to the terminal outside."""
    found = re.findall(r"\x1bPtmux;((?:[^\x1b]|\x1b\x1b)*)\x1b\\", shown)
    return "".join(found).replace("\x1b\x1b", "\x1b")


@unittest.skipUnless(pty, "needs pseudo-terminals")
class OnATerminal(Case):
    """stderr is a terminal that says by its variables who it is."""

    def shown(self, env: dict[str, str], *argv: str, picture: bytes = PICTURE) -> str:
        """Return what a call with --preview shows."""
        self.serve_base(answer(picture))
        terminal = Terminal(self, "--preview", *argv, "--force", **env)
        terminal.finish()
        return terminal.shown

    def test_kitty_gets_the_file_in_chunks(self) -> None:
        for env in (
            KITTY,
            {"TERM": "xterm-ghostty"},
            {"TERM_PROGRAM": "ghostty"},
            {"KITTY_WINDOW_ID": "1"},
            {"KONSOLE_VERSION": "220401"},
        ):
            with self.subTest(env):
                told, data = kitty_picture(self.shown(env))
                self.assertEqual(data, PICTURE)
                self.assertRegex(told, r"^a=T,f=100,q=2,c=\d+,r=\d+,m=1$")

    def test_iterm_gets_the_file_whole(self) -> None:
        for env in (
            ITERM,
            {"TERM_PROGRAM": "WezTerm"},
            {"TERM_PROGRAM": "vscode"},
            {"LC_TERMINAL": "iTerm2"},
        ):
            with self.subTest(env):
                told, data = iterm_picture(self.shown(env))
                self.assertEqual(data, PICTURE)
                self.assertIn(f"inline=1;size={len(PICTURE)};", told)

    def test_the_terminal_within_another_counts(self) -> None:
        self.assertEqual(iterm_picture(self.shown({"KITTY_WINDOW_ID": "1", **ITERM}))[1], PICTURE)

    def test_tmux_passes_it_on(self) -> None:
        shown = self.shown({"KITTY_WINDOW_ID": "1", **TMUX})
        told, data = kitty_picture(from_tmux(shown))
        self.assertEqual(data, PICTURE)
        self.assertIn(",C=1,", told)

    def test_tmux_passes_it_on_to_iterm_in_parts(self) -> None:
        shown = from_tmux(self.shown({"LC_TERMINAL": "iTerm2", **TMUX}))
        self.assertRegex(shown, r"^\x1b\]1337;MultipartFile=inline=1;")
        self.assertTrue(shown.endswith("\x1b]1337;FileEnd\x07"))
        parts = re.findall(r"\x1b\]1337;FilePart=(.*?)\x07", shown)
        self.assertEqual(base64.b64decode("".join(parts)), PICTURE)
        self.assertLess(max(map(len, parts)), 1_000_000)

    def test_a_flat_picture_keeps_its_shape(self) -> None:
        told, _ = kitty_picture(self.shown(KITTY, picture=png(300, 100)))
        columns, rows = map(int, re.findall(r"[cr]=(\d+)", told))
        self.assertAlmostEqual(columns / rows / 2, 3, delta=0.4)

    def test_kitty_shows_png_only(self) -> None:
        shown = self.shown(KITTY, picture=jpeg(64, 64))
        self.assertNotIn("\x1b_G", shown)
        self.assertIn("this terminal shows png only", shown)

    def test_a_plain_terminal_gets_a_line(self) -> None:
        shown = self.shown({})
        self.assertIn(NOTHING, shown)
        self.assertNotRegex(shown, "\x1b[_\\]]")

    def test_quiet_shows_nothing(self) -> None:
        self.assertEqual(self.shown(KITTY, "--quiet"), "")


class Elsewhere(Case):
    """Where stderr is no terminal."""

    def test_a_pipe_never_gets_a_picture(self) -> None:
        self.serve_base(answer(PICTURE))
        run = self.check(self.run_tool("generate", "a fox", "--preview", env=KITTY), 0)
        self.assertIn(NOTHING, run.err)
        self.assertNotIn("\x1b", run.err + run.out)
        self.assertEqual(len(run.saved), 1)

    def test_json_tells_it_as_a_warning(self) -> None:
        self.serve_base(answer(PICTURE))
        run = self.check(self.run_tool("generate", "a fox", "--preview", "--json", env=KITTY), 0)
        self.assertIn("--preview needs", run.json["warnings"][0])
