"""Other systems: what Windows, macOS, an odd file system or an odd locale do not have.

Where it can be, one fact is changed and a whole command is run. TestBareSystem runs commands in an
interpreter that has nothing that only POSIX has, and whose open files can neither be renamed nor
removed, as on Windows. None of it has been run on Windows itself.
"""

from __future__ import annotations

import errno
import ntpath
import os
import stat
import subprocess
import threading
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import gpt_image2
from tests.case import Case, Run, SystemCase
from tests.pictures import png
from tests.server import Reply, answer

FOX = png(16, 16, rgb=(200, 90, 20))
CURL_OF = {"posix": "curl", "nt": "curl.exe"}


class TestCurlProgram(Case):
    """Which curl is run: the first on the PATH, never one that lies in the current folder."""

    def found(self, name: str) -> str:
        """Return the curl that is found on a system of this name, "" for none."""
        with mock.patch("os.name", name), mock.patch.dict(os.environ, self.env, clear=True):
            try:
                return gpt_image2.find_curl()
            except gpt_image2.Failure as failure:
                self.assertEqual(failure.exit_code, 3)
                return ""

    def put(self, *names: str, mode: int = 0o755) -> str:
        """Make an executable file below the test's folder and return its path."""
        path = self.tmp.joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.chmod(mode)
        return str(path)

    def test_the_first_that_can_be_run(self) -> None:
        for system, name in CURL_OF.items():
            with self.subTest(system):
                self.put("unusable", name, mode=0o600)
                wanted = self.put("bin", name)
                self.put("later", name)
                places = (str(self.tmp / place) for place in ("empty", "unusable", "bin", "later"))
                self.env["PATH"] = os.pathsep.join(places)
                self.assertEqual(self.found(system), wanted)

    def test_none_of_the_current_folder(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.work)
        self.env["PATH"] = os.pathsep.join(["", ".", "bin", "./bin"])
        for system, name in CURL_OF.items():
            for place in ((), ("bin",), ("System32",)):
                self.put("work", *place, name)
            for root in ({}, {"SYSTEMROOT": ""}, {"SYSTEMROOT": "."}):
                with self.subTest(system, root=root):
                    self.env.update(root)
                    self.assertEqual(self.found(system), "")

    def test_windows_takes_its_own(self) -> None:
        self.put("bin", "curl.exe")
        own = self.put("Windows", "System32", "curl.exe")
        self.env.update(PATH=str(self.tmp / "bin"), SYSTEMROOT=str(self.tmp / "Windows"))
        self.assertEqual(self.found("nt"), own)


class TestOddFileSystems(SystemCase):
    """Pictures are saved without hard links, modes or lasting folders."""

    def saved(self, *argv: str, reply: Reply = answer(FOX)) -> Path:  # noqa: B008
        """Return the path of the picture that is saved."""
        self.serve_base(reply)
        run = self.check(self.run_tool("generate", "a fox", *argv), 0)
        self.assertEqual([path.read_bytes() for path in run.saved], [FOX])
        self.assertEqual(self.jobs(), [])
        return run.saved[0]

    def test_no_hard_links(self) -> None:
        """As on exFAT and most network drives; a name that is taken meanwhile is passed over."""
        faults: list[Any] = [PermissionError(errno.EPERM, "no"), OSError(errno.ENOTSUP, "no")]
        for number, fault in enumerate([*faults, NotImplementedError(), AttributeError()]):
            folder = self.work / str(number)
            folder.mkdir()

            def others(folder: Path = folder) -> None:
                (folder / "fox.png").write_bytes(b"mine")
                (folder / "fox-2.png").mkdir()
                (folder / "fox-3.png").symlink_to(folder / "nowhere")

            with self.subTest(repr(fault)), mock.patch("os.link", side_effect=fault) as link:
                reply = Reply(chunks=[others, answer(FOX).body])
                path = self.saved("-o", f"{number}/fox.png", reply=reply)
                self.assertEqual(path, folder / "fox-4.png")
                self.assertEqual((folder / "fox.png").read_bytes(), b"mine")
                self.assertFalse((folder / "nowhere").exists())
                path = self.saved("-o", f"{number}/fox.png", "--force")
                self.assertEqual(path, folder / "fox.png")
                self.assertTrue(link.called)

    def test_no_modes(self) -> None:
        with mock.patch("os.chmod", side_effect=OSError(errno.ENOTSUP, "no modes")):
            self.saved()

    def test_folders_that_cannot_be_synced(self) -> None:
        real, folders = os.fsync, []

        def fsync(file: Any) -> None:
            if stat.S_ISDIR(os.fstat(file).st_mode):
                folders.append(file)
                raise OSError(errno.EINVAL, "a folder")
            real(file)

        with mock.patch("os.fsync", fsync):
            self.saved()
        self.assertTrue(folders)


class TestWindowsWords(Case):
    """Command lines and paths as Windows writes them."""

    def test_the_way_to_recover_runs_as_it_stands(self) -> None:
        python = ntpath.join("C:\\", "Program Files", "Python", "python.exe")
        job = "20261121T000000Z-0123456789ab"
        for name, start in (("nt", f'"{python}" '), ("posix", f"'{python}' ")):
            with self.subTest(name), mock.patch("os.name", name):
                with mock.patch("sys.executable", python):
                    shown = gpt_image2.recover_command(job)
                self.assertEqual(shown[: len(start)], start)
                self.assertTrue(shown.endswith(f" recover {job}"))

    def test_a_key_command_keeps_its_backslashes(self) -> None:
        for text, words in (
            (r"C:\tools\key.exe get", [r"C:\tools\key.exe", "get"]),
            (r'"C:\my tools\key.exe" "a b"', [r"C:\my tools\key.exe", "a b"]),
        ):
            with self.subTest(text), mock.patch("os.name", "nt"):
                self.assertEqual(gpt_image2.read_command(text), words)

    def test_outputs_with_a_drive(self) -> None:
        """Planned by a dry run, in a folder that has the drives in it."""
        words = ("generate", "a fox", "--sandbox", "--dry-run", "--json")
        for drive in ("C:\\", "D:\\", r"\\server\share", "\\\\server\\share\\"):
            (self.work / drive).mkdir()
        for options, wanted in (
            (["-o", r"C:\out\fox.png"], r"C:\out\fox.png"),
            (["-o", "C:/out/fox.png"], r"C:\out\fox.png"),
            (["-o", r"\\server\share\x\fox.png"], r"\\server\share\x\fox.png"),
            (["-o", "fox.png", "--output-dir", "D:\\pics"], r"D:\pics\fox.png"),
            (["-o", r"C:\a.png", "--output-dir", "D:\\pics"], r"C:\a.png"),
            (["-o", "C:\\out\\"], "C:\\out\\"),
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

    NAME = "ä-狐-🦊.png"
    PLACES = (
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "cp437:strict"},
        {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "POSIX", "PYTHONIOENCODING": "utf-16"},
    )

    def test_lines_messages_and_prompts(self) -> None:
        words = ("generate", "ein Fuchs: 狐", "-o", self.NAME)
        for place in self.PLACES:
            with self.subTest(place):
                api = self.serve_base(answer(FOX))
                run = self.check(self.run_tool(*words, env=place), 0)
                self.assertIn(f"Saved: {self.work / self.NAME} (".encode(), run.raw_out)
                self.assertEqual(self.listing(), [self.NAME])
                self.assertEqual(api.posts[0].json["prompt"], "ein Fuchs: 狐")
                run = self.check(self.run_tool(*words, env=place), 2)
                self.assertIn(f"{self.NAME} exists", run.err)
                (self.work / self.NAME).unlink()

    def test_a_name_that_is_not_utf_8(self) -> None:
        name = os.fsdecode(b"f\xff\xe9x.png")
        self.serve_base(answer(FOX), answer(FOX))
        run = self.check(self.run_tool("generate", "a fox", "-o", name), 0)
        self.assertIn(b"/f\xff\xe9x.png (", run.raw_out)
        self.assertEqual(run.saved[0].read_bytes(), FOX)
        run = self.run_tool("generate", "a fox", "-o", name, "--force", "--json")
        self.assertEqual(Path(run.json["images"][0]["path"]).read_bytes(), FOX)


# What stands in for Windows: put before the tool starts, as sitecustomize.py.
BARE_SYSTEM = """
import os, shutil, signal, sys

sys.modules["fcntl"] = None
for owner, names in (
    (os, "link getuid geteuid getgid getegid O_NOFOLLOW O_DIRECTORY O_NONBLOCK fork kill killpg "
         "setsid getpgid fchmod chown sync pread pwrite mkfifo uname"),
    (signal, "SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGWINCH SIGTSTP SIGCONT SIGQUIT setitimer alarm"),
):
    for name in names.split():
        if hasattr(owner, name):
            delattr(owner, name)

def in_use(path):
    path = os.path.realpath(path)
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            for handle in os.listdir(f"/proc/{process}/fd"):
                if os.readlink(f"/proc/{process}/fd/{handle}") == path:
                    return True
        except OSError:
            pass
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
        (self.work / "a b.png").write_bytes(png(1024, 768))
        self.well("generate", "a fox", "--sandbox", "-o", "fox.png", "--n", "2")
        self.well("generate", "a fox", "--sandbox", "-o", "fox-1.png", "--force", "--sidecar")
        edit = ("edit", "a b.png", "winter", "--mask-box", "1,1,50,50")
        self.well(*edit, "--sandbox", "-o", "w.png")
        names = ["a b.png", "fox-1.png", "fox-1.png.json", "fox-2.png", "w.png"]
        self.assertEqual(self.listing(), names)
        self.serve_base(answer(FOX))
        self.well("generate", "a fox")
        self.assertIn("1", self.well("history").out)
        for words in ("history --clear", "config --init", "config --init --profile nodekey"):
            self.well(*words.split())
        self.assertIn("nodekey", self.well("config", "--show").out)

    def test_one_batch_at_a_time_and_twice_in_a_row(self) -> None:
        (self.work / "jobs.txt").write_text("a fox\na hen\n")
        gate = threading.Event()
        api = self.serve_base(answer(FOX)._replace(before=gate), answer(FOX))
        first = self.start_tool("batch", "jobs.txt", "--concurrency", "1")
        api.wait_for_request()
        self.assertIn("under way", self.check(self.run_tool("batch", "jobs.txt"), 2).err)
        gate.set()
        self.check(self.finish(first), 0)
        self.well("batch", "jobs.txt")
        self.assertEqual(len(api.posts), 2)

    def test_what_was_killed_is_waited_for_and_recovered(self) -> None:
        gate, reply = threading.Event(), answer(FOX)
        api = self.serve_base(Reply(chunks=(reply.body[:50], gate, reply.body[50:])))
        tool = self.start_tool("generate", "a fox")
        api.wait_for_request()
        self.wait_until(lambda: [f for f in self.jobs() if (f / "response.json").stat().st_size])
        tool.kill()
        self.finish(tool)
        self.assertEqual(self.check(self.run_tool("recover", "--last", "--no-wait"), 10).saved, [])
        gate.set()
        (path,) = self.well("recover", "--last", "-o", "fox.png").saved
        self.assertEqual((path, path.read_bytes()), (self.work / "fox.png", FOX))
