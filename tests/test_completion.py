"""completion: the real shells complete commands, options, values and files from its scripts."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import time
import unittest
from pathlib import Path

from gpt_image2 import COMMANDS, options_of
from tests.support import Case

try:
    import pty
except ImportError:  # Windows
    pty = None  # type: ignore[assignment]

BASH_DRIVER = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_gpt_image2
printf '%s\\n' "${COMPREPLY[@]}"
"""
# What is typed, and what the shell must offer or fill in.
COMPLETED = (
    ("gpt-image2 gene", "generate"),
    ("gpt-image2 generate --qual", "--quality"),
    ("gpt-image2 generate --quality med", "medium"),
    ("gpt-image2 edit pic", "picture.png"),
    ("gpt-image2 edit a.png --mask pic", "picture.png"),
    ("gpt-image2 generate -s wides", "widescreen"),
    ("gpt-image2 batch --redo unk", "unknown"),
    ("gpt-image2 completion fi", "fish"),
)


class Completion(Case):
    """The script of each shell, in that shell."""

    def setUp(self) -> None:
        super().setUp()
        (self.work / "picture.png").touch()

    def written(self, shell: str) -> Path:
        """Return a file that holds the script for a shell."""
        run = self.check(self.run_tool("completion", shell), 0)
        path = self.tmp / f"completion.{shell}"
        path.write_text(run.out)
        return path

    def offered(self, argv: list[str]) -> list[str]:
        """Return the lines that a shell prints."""
        done = subprocess.run(
            argv, cwd=self.work, env=self.env, capture_output=True, timeout=30, check=True
        )
        self.assertEqual(done.stderr, b"")
        return done.stdout.decode().splitlines()

    @unittest.skipUnless(shutil.which("bash"), "there is no bash here")
    def test_bash(self) -> None:
        script = str(self.written("bash"))
        for typed, due in COMPLETED:
            with self.subTest(typed):
                found = self.offered(["bash", "-c", BASH_DRIVER, "bash", script, *typed.split()])
                self.assertEqual(found, [due])

    @unittest.skipUnless(shutil.which("bash"), "there is no bash here")
    def test_bash_with_a_space_in_a_name(self) -> None:
        (self.work / "two words.png").touch()
        script = str(self.written("bash"))
        words = ["gpt-image2", "edit", "two"]
        found = self.offered(["bash", "-c", BASH_DRIVER, "bash", script, *words])
        self.assertEqual(found, ["two words.png"])

    @unittest.skipUnless(shutil.which("bash"), "there is no bash here")
    def test_bash_knows_every_option(self) -> None:
        script = str(self.written("bash"))
        for command in COMMANDS:
            with self.subTest(command):
                words = ["gpt-image2", command, "--"]
                found = self.offered(["bash", "-c", BASH_DRIVER, "bash", script, *words])
                due = {
                    name for row in options_of(command) for name in row.names if name[:2] == "--"
                }
                self.assertEqual(set(found), due)

    @unittest.skipUnless(shutil.which("fish"), "there is no fish here")
    def test_fish(self) -> None:
        script = self.written("fish")
        for typed, due in COMPLETED:
            with self.subTest(typed):
                lines = self.offered(["fish", "-c", f"source {script}; complete -C '{typed}'"])
                self.assertEqual([line.partition("\t")[0] for line in lines], [due])

    @unittest.skipUnless(shutil.which("zsh") and pty, "there is no zsh here")
    def test_zsh(self) -> None:
        script = self.written("zsh")
        for typed, due in COMPLETED:
            with self.subTest(typed):
                self.assertIn(due, self.zsh(script, typed))

    def zsh(self, script: Path, typed: str) -> str:
        """Return the line as zsh fills it in when Tab is pressed."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        env = {**self.env, "TERM": "dumb", "PS1": "ready> ", "HOME": str(self.home)}
        argv = ["zsh", "-f", "-i"]
        shell = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, env=env, cwd=self.work
        )
        os.close(slave)
        self.addCleanup(shell.wait)
        self.addCleanup(shell.kill)
        start = f"PS1='ready> '; autoload -U compinit; compinit -u -D; source {script}; echo set\n"
        os.write(master, start.encode())
        self.heard(master, r"\nset\r?\n.*ready> ")
        os.write(master, f"{typed}\t".encode())
        self.heard(master, re.escape(typed) + r"\S")
        os.write(master, b"\x01echo 'L:\x05:L'\n")  # Ctrl-A and Ctrl-E: print the line as it is now
        return self.heard(master, r"\nL:.*:L").rpartition("\nL:")[2]

    def heard(self, master: int, pattern: str) -> str:
        """Read from a terminal until something matches, and return all of it."""
        text, end = "", time.monotonic() + 20
        while not re.search(pattern, text, re.DOTALL):
            if time.monotonic() > end:
                self.fail(f"no {pattern!r} in {text!r}")
            if select.select([master], [], [], 0.2)[0]:
                text += os.read(master, 65536).decode("utf-8", "replace")
        return text


class Refusals(Case):
    """What is no shell."""

    def test_another_shell(self) -> None:
        run = self.check(self.run_tool("completion", "zhs"), 2)
        self.assertEqual(run.out, "")
        self.assertIn("did you mean zsh?", run.err)

    def test_none(self) -> None:
        self.check(self.run_tool("completion"), 2)
