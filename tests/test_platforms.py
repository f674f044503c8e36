"""Other systems: what Windows, macOS, an odd file system or an odd locale do not have.

Where it can be, one fact is changed and a whole command is run. TestBareSystem runs commands in an
interpreter that has nothing that only POSIX has, and whose open files can neither be renamed nor
removed, as on Windows. None of it has been run on Windows itself.
"""

from __future__ import annotations

import errno
import itertools
import ntpath
import os
import stat
import subprocess
import threading
import unittest
from typing import Any
from unittest import mock

import gpt_image2
from tests.case import Case, Run, SystemCase
from tests.images import png
from tests.server import Reply, answer

FOX = png(16, 16, rgb=(200, 90, 20))


class TestCurlProgram(Case):
    """Which curl is run."""

    def test_the_first_on_the_path_and_none_of_the_current_folder(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.work)
        places = ("unusable", "bin", "later", "win/System32", "work", "work/bin", "work/System32")
        for path in (self.tmp / place / name for place in places for name in ("curl", "curl.exe")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600 if path.parent.name == "unusable" else 0o755)
        away = [str(self.tmp / name) for name in ("empty", "unusable", "bin", "later")]
        here = ["", ".", "bin", "./bin"]
        windows = str(self.tmp / "win")
        for system, folders, root, wanted in (
            ("posix", away, windows, "bin/curl"),
            ("nt", away, ".", "bin/curl.exe"),
            ("nt", away, windows, "win/System32/curl.exe"),
            ("posix", here, "", None),
            ("nt", here, ".", None),
        ):
            env = mock.patch.dict(os.environ, PATH=os.pathsep.join(folders), SYSTEMROOT=root)
            with self.subTest(system, folders=folders), env, mock.patch("os.name", system):
                if wanted:
                    self.assertEqual(gpt_image2.find_curl(), f"{self.tmp}/{wanted}")
                else:
                    self.assertRaises(gpt_image2.Failure, gpt_image2.find_curl)


class TestOddFileSystem(SystemCase):
    """One without hard links, modes or lasting folders, as exFAT and most network drives."""

    def test_images_are_saved_and_a_name_that_is_taken_meanwhile_is_passed_over(self) -> None:
        real, folders = os.fsync, []

        def fsync(file: Any) -> None:
            if stat.S_ISDIR(os.fstat(file).st_mode):
                folders.append(file)
                raise OSError(errno.EINVAL, "a folder")
            real(file)

        def others() -> None:
            (self.work / "fox.png").write_bytes(b"mine")
            (self.work / "fox-2.png").mkdir()
            (self.work / "fox-3.png").symlink_to("nowhere")

        refused, unknown = (OSError(code, "no") for code in (errno.EPERM, errno.ENOTSUP))
        faults = itertools.cycle((refused, unknown, NotImplementedError(), AttributeError()))
        self.serve_base(Reply(chunks=[others, answer(FOX).body]))
        chmod = mock.patch("os.chmod", side_effect=unknown)
        with mock.patch("os.link", side_effect=faults), chmod, mock.patch("os.fsync", fsync):
            run = self.check(self.run_tool("generate", "a fox", "-o", "fox.png"), 0)
        self.assertEqual((run.saved, self.jobs()), ([self.work / "fox-4.png"], []))
        self.assertEqual(run.saved[0].read_bytes(), FOX)
        self.assertEqual((self.work / "fox.png").read_bytes(), b"mine")
        self.assertFalse((self.work / "nowhere").exists())
        self.assertTrue(folders)


class TestWindowsWords(Case):
    """Command lines and paths as Windows writes them."""

    def test_a_key_command_keeps_its_backslashes(self) -> None:
        with mock.patch("os.name", "nt"):
            words = gpt_image2.read_command(r'"C:\my tools\key.exe" C:\tools "a b"')
        self.assertEqual(words, [r"C:\my tools\key.exe", r"C:\tools", "a b"])

    def test_outputs_with_a_drive(self) -> None:
        words = ("generate", "a fox", "--sandbox", "--dry-run", "--json")
        for drive in ("C:\\", "D:\\", r"\\server\share", "\\\\server\\share\\"):
            (self.work / drive).mkdir()
        for options, wanted in (
            (["-o", r"C:\out\fox.png"], r"C:\out\fox.png"),
            (["-o", r"\\server\share\x\fox.png"], r"\\server\share\x\fox.png"),
            (["-o", r"C:\a.png", "--output-dir", "D:\\pics"], r"C:\a.png"),
            (["-o", "C:/out/"], "C:\\out\\"),
            (["--output-dir", "D:\\pics"], "D:\\pics\\"),
        ):
            with self.subTest(options), mock.patch("os.path", ntpath), mock.patch("os.sep", "\\"):
                (path,) = self.check(self.run_tool(*words, *options), 0).json["dry_run"]["paths"]
                self.assertEqual(path[: len(wanted)], wanted)
                self.assertTrue(wanted.endswith("\\") or path == wanted, path)

    def test_ctrl_c_in_the_terminal_does_not_reach_curl(self) -> None:
        """A session of its own (see test_jobs) is nothing to Windows."""
        real, flags = subprocess.Popen, []

        def start(*argv: Any, creationflags: int = 0, **options: Any) -> Any:
            flags.append(creationflags)
            return real(*argv, **options)

        self.serve_base(answer(FOX))
        group = mock.patch("subprocess.CREATE_NEW_PROCESS_GROUP", 0x200, create=True)
        with group, mock.patch("subprocess.Popen", start):
            self.check(self.run_tool("generate", "a fox"), 0)
        self.assertTrue(flags[-1] & 0x200)


class TestUtf8(Case):
    """stdout, stderr and the request are UTF-8, whatever the locale or the code page."""

    def test_lines_messages_and_prompts(self) -> None:
        name = "ä-狐-🦊.png"
        for place in (
            {"PYTHONIOENCODING": "cp437:strict"},
            {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"},
            {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        ):
            with self.subTest(place):
                api = self.serve_base(answer(FOX))
                words = ("generate", "ein Fuchs: 狐", "-o", name, "--size", "1024x1024", "--force")
                run = self.check(self.run_tool(*words, env=place), 0)
                self.assertIn(f"Saved: {self.work / name} (".encode(), run.raw_out)
                self.assertIn(name, run.err, "it is no 1024x1024")
                self.assertEqual(self.listing(), [name])
                self.assertEqual(api.posts[0].json["prompt"], "ein Fuchs: 狐")


# What stands in for Windows: put before the tool starts, as sitecustomize.py.
BARE_SYSTEM = """
import contextlib, glob, os, shutil, signal, sys

sys.modules["fcntl"] = None
for name in ("link getuid geteuid getgid getegid O_NOFOLLOW O_DIRECTORY O_NONBLOCK fork kill "
             "killpg setsid getpgid fchmod chown sync pread pwrite mkfifo uname").split():
    vars(os).pop(name, None)
for name in "SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGWINCH SIGTSTP SIGCONT SIGQUIT setitimer".split():
    vars(signal).pop(name, None)

def in_use(path):
    for handle in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(handle) == os.path.realpath(path):
                return True
    return False

def unless_in_use(change):
    def changed(*paths, **options):
        caller = sys._getframe(1).f_globals["__name__"]
        if caller != "tempfile" and any(in_use(path) for path in paths):
            raise PermissionError(13, "it is being used by another process", paths[0])
        return change(*paths, **options)
    return changed

for name in ("replace", "rename", "unlink", "remove"):
    setattr(os, name, unless_in_use(getattr(os, name)))
shutil._use_fd_functions = False

def open_file(path, *rest, real=os.open, **options):
    if isinstance(path, (str, bytes)) and os.path.isdir(path):
        raise PermissionError(13, "it is a folder", path)
    return real(path, *rest, **options)

os.open = open_file
"""


@unittest.skipUnless(os.path.isdir("/proc/self/fd"), "there is no /proc to see open files by")
class TestBareSystem(Case):
    """Whole commands where nothing is that only POSIX has, and open files are held fast."""

    def setUp(self) -> None:
        super().setUp()
        folder = self.new_folder("bare")
        (folder / "sitecustomize.py").write_text(BARE_SYSTEM)
        self.env["PYTHONPATH"] = str(folder)  # so that every run is a child

    def well(self, *words: str) -> Run:
        """Run a command that must go well and leave no job behind."""
        run = self.check(self.run_tool(*words), 0)
        self.assertEqual(self.jobs(), [], self.story(run))
        return run

    def test_commands(self) -> None:
        (self.work / "a.png").write_bytes(png(1024, 768))
        self.serve_base(answer(FOX))
        for words in (
            "generate fox --sandbox -o fox.png --n 2",
            "generate fox --sandbox -o fox-1.png --force --sidecar",
            "edit a.png winter --sandbox -o w.png",
            "generate fox -o mine.png",
            "history --clear",
            "config --init",
            "config --init --profile nodekey",
        ):
            self.well(*words.split())
        names = ["a.png", "fox-1.png", "fox-1.png.json", "fox-2.png", "mine.png", "w.png"]
        self.assertEqual(self.listing(), names)

    def test_one_batch_at_a_time_and_twice_in_a_row(self) -> None:
        (self.work / "jobs.txt").write_text("a fox\na hen\n")
        gate = threading.Event()
        api = self.serve_base(answer(FOX)._replace(before=gate), answer(FOX))
        first = self.start_tool("batch", "jobs.txt", "--concurrency", "1")
        api.wait_for_request()
        self.assertIn("already running", self.check(self.run_tool("batch", "jobs.txt"), 2).err)
        gate.set()
        self.check(self.finish(first), 0)
        self.well("batch", "jobs.txt")
        self.assertEqual(len(api.posts), 2)

    def test_what_was_killed_is_waited_for_and_recovered(self) -> None:
        gate = threading.Event()
        api = self.serve_base(answer(FOX)._replace(before=gate))
        tool = self.start_tool("generate", "a fox")
        api.wait_for_request()
        tool.kill()
        self.finish(tool)
        (job,) = self.jobs()
        self.assertEqual(self.check(self.run_tool("recover", job.name, "--no-wait"), 10).saved, [])
        gate.set()
        (path,) = self.well("recover", job.name, "-o", "fox.png").saved
        self.assertEqual((path, path.read_bytes()), (self.work / "fox.png", FOX))
