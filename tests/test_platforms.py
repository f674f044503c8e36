"""Windows and macOS: the choices that the tool makes there, with the facts put in on any system.

Unit tests patch what the tool looks at (os.name, fcntl, os.link, ...). TestBareSystem runs whole
commands in an interpreter that has nothing that only POSIX has, and whose open files can neither be
renamed nor removed, as on Windows. None of it has been run on Windows itself.
"""

from __future__ import annotations

import ast
import ntpath
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from typing import IO, Any, Iterator
from unittest import mock

import gpt_image2
from gpt_image2 import Failure
from tests.pictures import png
from tests.support import SCRIPT, Case, Reply, Run, answer

FOX = png(16, 16, rgb=(200, 90, 20))
HOSTILE_NAMES = (
    r"C:\Users\me\ä b.png",
    r"\\server\share\fox.png",
    "trailing\\",
    '"quoted".png',
    '\\"both\\".png',
    "a;type=text\\html,b.png",
    "#1 {a,b} [1-3] $HOME %TEMP%.png",
    "狐 and 🦊.png",
)


def path_named(*names: str) -> str:
    """Return a Windows path."""
    return ntpath.join("C:\\", *names)


class PlatformCase(unittest.TestCase):
    """A test that changes what this process believes of its system, in a folder of its own."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.tmp = Path(os.path.realpath(folder.name))
        self.change(mock.patch.dict(os.environ))
        before = os.getcwd()
        os.chdir(self.tmp)
        self.addCleanup(os.chdir, before)

    def change(self, patch: Any) -> Any:
        """Start a patch that ends with the test."""
        changed = patch.start()
        self.addCleanup(patch.stop)
        return changed

    def lacks(self, owner: Any, *names: str) -> None:
        """Take names away from a module."""
        for name in names:
            if hasattr(owner, name):
                self.change(mock.patch.object(owner, name))
                delattr(owner, name)

    def on_windows(self) -> None:
        """Let os.name say so; SYSTEMROOT is a folder of the test's."""
        self.change(mock.patch("os.name", "nt"))
        os.environ["SYSTEMROOT"] = str(self.tmp / "Windows")

    def with_windows_paths(self) -> None:
        """Let os.path be that of Windows."""
        self.change(mock.patch.object(os, "path", ntpath))
        self.change(mock.patch("os.sep", "\\"))

    def file(self, *names: str, data: bytes = b"") -> str:
        """Make a file below the test's folder and return its path."""
        path = self.tmp.joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755)
        return str(path)


class TestCurlProgram(PlatformCase):
    def setUp(self) -> None:
        super().setUp()
        self.on_path = self.file("bin", "curl")
        self.exe_on_path = self.file("bin", "curl.exe")
        os.environ["PATH"] = str(self.tmp / "bin")

    def test_windows_takes_its_own(self) -> None:
        self.on_windows()
        own = self.file("Windows", "System32", "curl.exe")
        self.assertEqual(gpt_image2.find_curl(), own)

    def test_an_old_windows_takes_the_one_on_the_path(self) -> None:
        self.on_windows()
        self.assertEqual(gpt_image2.find_curl(), self.exe_on_path)

    def test_others_take_the_one_on_the_path(self) -> None:
        os.environ["SYSTEMROOT"] = str(self.tmp / "Windows")
        self.file("Windows", "System32", "curl.exe")
        with mock.patch("os.name", "posix"):
            self.assertEqual(gpt_image2.find_curl(), self.on_path)

    def test_nothing_of_the_current_folder_without_a_system_root(self) -> None:
        self.on_windows()
        self.file("System32", "curl.exe")
        for root in ("", ".", None):
            with self.subTest(root), mock.patch.dict(os.environ):
                os.environ.pop("SYSTEMROOT")
                os.environ.update({} if root is None else {"SYSTEMROOT": root})
                self.assertEqual(gpt_image2.find_curl(), self.exe_on_path)

    def test_nothing_of_the_current_folder_by_the_path(self) -> None:
        self.on_windows()
        self.file("curl.exe")
        os.environ["PATH"] = os.pathsep.join(["", ".", "bin", "./bin"])
        with self.assertRaises(Failure) as caught:
            gpt_image2.find_curl()
        self.assertEqual(caught.exception.exit_code, gpt_image2.EXIT_CONFIG)

    def test_what_can_not_be_run_is_passed_over(self) -> None:
        os.chmod(self.on_path, 0o600)
        second = self.file("second", "curl")
        os.environ["PATH"] += os.pathsep + str(self.tmp / "second")
        self.assertEqual(gpt_image2.find_curl(), second)

    def test_none_at_all(self) -> None:
        os.environ["PATH"] = str(self.tmp / "empty")
        with self.assertRaises(Failure) as caught:
            gpt_image2.find_curl()
        self.assertEqual(caught.exception.exit_code, gpt_image2.EXIT_CONFIG)

    def test_ctrl_c_in_the_terminal_does_not_reach_it(self) -> None:
        self.on_windows()
        started = self.change(mock.patch("subprocess.Popen"))
        self.change(mock.patch("subprocess.CREATE_NEW_PROCESS_GROUP", 0x200, create=True))
        gpt_image2.start_curl(b"", str(self.tmp / "line"), [])
        keywords = started.call_args[1]
        self.assertTrue(keywords["start_new_session"], "Linux and macOS")
        self.assertTrue(keywords.get("creationflags", 0) & 0x200, "a session is nothing to Windows")


class TestLocks(PlatformCase):
    """Without fcntl, what is open elsewhere can't be renamed."""

    def setUp(self) -> None:
        super().setUp()
        self.change(mock.patch.dict(sys.modules, {"fcntl": None}))
        self.held: set[str] = set()
        rename = os.replace

        def replace(source: str, target: str) -> None:
            if {str(source), str(target)} & self.held:
                raise PermissionError(13, "it is being used by another process", source)
            rename(source, target)

        self.change(mock.patch("os.replace", replace))

    def job(self) -> tuple[str, IO[bytes]]:
        """Return a job folder with its record, and its lock, which this process has."""
        folder = self.tmp / "20261121T000000Z-0123456789ab"
        folder.mkdir()
        for name in (gpt_image2.LOCK, gpt_image2.RECORD, gpt_image2.CURL_LINE):
            (folder / name).write_text("{}")
        lock = gpt_image2.try_lock(str(folder / gpt_image2.LOCK))
        assert lock
        self.addCleanup(lock.close)
        return str(folder), lock

    def test_a_free_file(self) -> None:
        path = self.file("lock", data=b"1234")
        lock = gpt_image2.try_lock(path)
        assert lock
        lock.close()
        self.assertEqual(os.listdir(self.tmp), ["lock"])
        self.assertEqual(Path(path).read_bytes(), b"1234")

    def test_a_file_that_is_not_there_yet(self) -> None:
        lock = gpt_image2.try_lock(str(self.tmp / "lock"))
        assert lock, "it is free"
        lock.close()
        self.assertEqual(os.listdir(self.tmp), ["lock"])

    def test_a_file_that_is_open_elsewhere(self) -> None:
        path = self.file("lock")
        self.held.add(path)
        self.assertIsNone(gpt_image2.try_lock(path))
        self.assertEqual(os.listdir(self.tmp), ["lock"])

    def test_a_job(self) -> None:
        folder, _ = self.job()
        self.held.add(os.path.join(folder, gpt_image2.LOCK))
        self.assertIsNone(gpt_image2.lock_job(folder))
        self.held.clear()
        taken = gpt_image2.lock_job(folder)
        assert taken
        taken.close()

    def test_a_curl_that_lives(self) -> None:
        folder, _ = self.job()
        self.assertFalse(gpt_image2.curl_lives(folder))
        self.held.add(os.path.join(folder, gpt_image2.CURL_LINE))
        self.assertTrue(gpt_image2.curl_lives(folder))

    def test_a_job_is_removed_whole(self) -> None:
        gpt_image2.remove_job(*self.job())
        self.assertEqual(os.listdir(self.tmp), [])


class TestPublish(PlatformCase):
    """A picture gets its name without hard links, as on exFAT and most network drives."""

    def setUp(self) -> None:
        super().setUp()
        self.temporary = self.file(".new.part", data=b"new")
        self.wanted = str(self.tmp / "fox.png")

    def lose_links(self, how: object) -> None:
        """Let os.link be missing, or raise."""
        if how is None:
            self.lacks(os, "link")
        else:
            self.change(mock.patch("os.link", side_effect=how, create=True))

    def test_a_free_name_is_taken(self) -> None:
        faults = (None, PermissionError(1, "no links"), OSError(95, "no"), NotImplementedError())
        for number, fault in enumerate(faults):
            with self.subTest(repr(fault)):
                self.lose_links(fault)
                temporary = self.file("x.part", data=b"new")
                wanted = str(self.tmp / f"{number}.png")
                self.assertEqual(gpt_image2.publish(temporary, wanted, False), wanted)
                self.assertEqual(Path(wanted).read_bytes(), b"new")
                self.assertFalse(os.path.exists(temporary))

    def test_taken_names_are_passed_over(self) -> None:
        self.lose_links(None)
        self.file("fox.png", data=b"old")
        self.file("fox-2.png", data=b"older")
        path = gpt_image2.publish(self.temporary, self.wanted, False)
        self.assertEqual(path, str(self.tmp / "fox-3.png"))
        found = {name: (self.tmp / name).read_bytes() for name in os.listdir(self.tmp)}
        wanted = {"fox.png": b"old", "fox-2.png": b"older", "fox-3.png": b"new"}
        self.assertEqual(found, wanted)

    def test_a_folder_and_a_dead_link_are_taken_too(self) -> None:
        self.lose_links(None)
        (self.tmp / "fox.png").mkdir()
        (self.tmp / "fox-2.png").symlink_to("nowhere")
        path = gpt_image2.publish(self.temporary, self.wanted, False)
        self.assertEqual(path, str(self.tmp / "fox-3.png"))
        self.assertFalse((self.tmp / "nowhere").exists())

    def test_the_same_bytes_are_not_saved_twice(self) -> None:
        self.lose_links(None)
        self.file("fox.png", data=b"new")
        self.assertEqual(gpt_image2.publish(self.temporary, self.wanted, False), self.wanted)

    def test_many_at_once_lose_nothing(self) -> None:
        self.lose_links(None)
        temporaries = [self.file(f"{n}.part", data=b"%d" % n) for n in range(24)]
        threads = [
            threading.Thread(target=gpt_image2.publish, args=(path, self.wanted, False))
            for path in temporaries
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = sorted(int(path.read_bytes()) for path in self.tmp.glob("fox*.png"))
        self.assertEqual(found, list(range(24)))

    def test_force_replaces(self) -> None:
        self.lose_links(None)
        self.file("fox.png", data=b"old")
        self.assertEqual(gpt_image2.publish(self.temporary, self.wanted, True), self.wanted)
        self.assertEqual(Path(self.wanted).read_bytes(), b"new")


class TestFiles(PlatformCase):
    """Private files, folders that can't be opened, modes that are not there."""

    @unittest.skipUnless(os.name == "posix", "modes mean nothing here")
    def test_private_files(self) -> None:
        self.lacks(os, "O_NOFOLLOW")
        before = os.umask(0)
        self.addCleanup(os.umask, before)
        path = str(self.tmp / "key")
        gpt_image2.private_file(path, b"x")
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)

    def test_private_files_replace_nothing(self) -> None:
        self.lacks(os, "O_NOFOLLOW")
        path = self.file("there", data=b"mine")
        with self.assertRaises(FileExistsError):
            gpt_image2.private_file(path, b"x")
        self.assertEqual(Path(path).read_bytes(), b"mine")

    def test_a_folder_that_cannot_be_opened(self) -> None:
        with mock.patch("os.open", side_effect=PermissionError(13, "it is a folder")) as opened:
            gpt_image2.sync_folder(str(self.tmp))
        opened.assert_called_once()

    def test_a_folder_that_cannot_be_synced(self) -> None:
        with mock.patch("os.fsync", side_effect=OSError(22, "no")), mock.patch("os.close") as close:
            gpt_image2.sync_folder(str(self.tmp))
        os.close(close.call_args[0][0])

    def test_only_posix_is_warned_that_others_can_read_its_config(self) -> None:
        path = self.file("config.json", data=b"{}")
        for name, warned in (("nt", 0), ("posix", 1)):
            console = gpt_image2.Console(quiet=True)
            with self.subTest(name), mock.patch("os.name", name):
                gpt_image2.check_config(path, [], console)
                self.assertEqual(len(console.warnings), warned)


class TestStateFolder(PlatformCase):
    def test_nobody_has_a_uid(self) -> None:
        self.lacks(os, "getuid", "geteuid")
        self.assertEqual(os.path.basename(gpt_image2.spare_root()), "gpt-image-2-user")
        self.assertTrue(gpt_image2.is_ours(str(self.tmp)))
        self.change(mock.patch.dict(os.environ, XDG_STATE_HOME=str(self.tmp / "state")))
        folder = gpt_image2.jobs_folder(gpt_image2.Console(quiet=True))
        self.assertEqual(folder, str(self.tmp / "state" / "gpt-image-2" / "jobs"))

    @unittest.skipUnless(hasattr(os, "getuid"), "nobody has a uid here")
    def test_somebody_elses_is_not_used(self) -> None:
        info = os.lstat(self.tmp)
        self.assertTrue(gpt_image2.is_ours(str(self.tmp)))
        with mock.patch("os.getuid", return_value=info.st_uid + 1):
            self.assertFalse(gpt_image2.is_ours(str(self.tmp)))

    def test_below_a_profile_of_windows(self) -> None:
        self.with_windows_paths()
        os.environ.pop("XDG_STATE_HOME", None)
        os.environ.pop("XDG_CONFIG_HOME", None)
        os.environ["USERPROFILE"] = path_named("Users", "ä b")
        state = path_named("Users", "ä b", ".local", "state", "gpt-image-2")
        self.assertEqual(gpt_image2.state_root(), state)
        config = path_named("Users", "ä b", ".config", "gpt-image-2", "config.json")
        self.assertEqual(gpt_image2.config_places()[0], config)


class TestSignals(PlatformCase):
    def installed(self) -> set[str]:
        """Return the names of the signals that are taken over."""
        with mock.patch("signal.signal") as taken, mock.patch("signal.getsignal"):
            gpt_image2.Signals().install()
        return {signal.Signals(call[0][0]).name for call in taken.call_args_list}

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "there is no SIGHUP here")
    def test_all_three(self) -> None:
        self.assertEqual(self.installed(), {"SIGINT", "SIGTERM", "SIGHUP"})

    def test_without_a_hang_up(self) -> None:
        self.lacks(signal, "SIGHUP")
        self.assertEqual(self.installed(), {"SIGINT", "SIGTERM"})


class TestCommands(PlatformCase):
    """Command lines that are shown or read, and waits that Ctrl-C can't interrupt, on Windows."""

    def test_the_way_to_recover_runs_as_it_stands(self) -> None:
        python = path_named("Program Files", "Python", "python.exe")
        self.change(mock.patch("sys.executable", python))
        for name, start in (("nt", f'"{python}" '), ("posix", f"'{python}' ")):
            with self.subTest(name), mock.patch("os.name", name):
                shown = gpt_image2.own_command("recover", "20261121T000000Z-0123456789ab")
                self.assertEqual(shown[: len(start)], start)
                self.assertTrue(shown.endswith(" recover 20261121T000000Z-0123456789ab"))

    def test_a_key_command_keeps_its_backslashes(self) -> None:
        self.on_windows()
        for text, words in (
            (r"C:\tools\key.exe get", [r"C:\tools\key.exe", "get"]),
            (r'"C:\my tools\key.exe" "a b"', [r"C:\my tools\key.exe", "a b"]),
        ):
            self.assertEqual(gpt_image2.read_command(text), words)
            self.assertEqual(gpt_image2.read_command(words), words)

    def test_a_quiet_wait_looks_for_ctrl_c_every_second(self) -> None:
        """Waiting for a thread, as communicate() does there, goes on through a signal."""
        process = mock.Mock(returncode=0)
        process.communicate.return_value = (b"", b"")
        console, line = gpt_image2.Console(quiet=True), str(self.tmp / "line")
        with mock.patch("gpt_image2.start_curl", return_value=process):
            gpt_image2.run_curl([], line, console, lambda: 0)
        self.assertLessEqual(process.communicate.call_args[1]["timeout"], 1.0)


def unquoted(config: bytes) -> str:
    """Return the value of one line of config as curl reads it (../shared/CURL.md, 1.1)."""
    match = re.fullmatch(rb'[a-z-]+ = "((?:[^"\\]|\\.)*)"\n', config, re.DOTALL)
    assert match, config
    known = {b"t": b"\t", b"n": b"\n", b"r": b"\r", b"v": b"\v"}
    value = re.sub(rb"\\(.)", lambda pair: known.get(pair[1], pair[1]), match[1], flags=re.DOTALL)
    return value.decode("utf-8", "surrogateescape")


def form_path(value: str) -> tuple[str, str]:
    """Return (path, rest) of a quoted path in a form value as curl reads it (CURL.md, 1.1, fq)."""
    match = re.match(r'"((?:[^"\\]|\\.)*)"', value)
    assert match, value
    return re.sub(r'\\(["\\])', r"\1", match[1]), value[match.end() :]


class TestQuoting(Case):
    """Drive letters, backslashes and quotes in curl's config."""

    def names(self) -> Iterator[str]:
        """Yield paths, made ones and random ones."""
        yield from HOSTILE_NAMES
        chance = random.Random(7)
        for _ in range(300):
            yield "".join(chance.choices('\\"C: ;,=#ä狐tnrvx0', k=chance.randrange(1, 12)))

    def test_a_path(self) -> None:
        for name in self.names():
            with self.subTest(name):
                self.assertEqual(unquoted(gpt_image2.curl_config([("output", name)])), name)

    def test_a_path_in_a_form(self) -> None:
        for name in self.names():
            with self.subTest(name):
                info = gpt_image2.PictureInfo("png", 1, 1, False, True)
                file = gpt_image2.Attachment("image", name, info, 1, "")
                request = gpt_image2.Request("edit", {}, (file,))
                settings = mock.Mock(image_field="auto")
                line = gpt_image2.curl_config(gpt_image2.file_pairs(request, settings, ""))
                lead, _, value = unquoted(line).partition("@")
                path, rest = form_path(value)
                told = (lead, path, rest)
                self.assertEqual(told, ("image=", name, ";filename=image.png;type=image/png"))

    def test_the_bytes(self) -> None:
        line = gpt_image2.curl_config([("output", r"C:\Users\me\ä b.png")])
        self.assertEqual(line, 'output = "C:\\\\Users\\\\me\\\\ä b.png"\n'.encode())
        self.assertEqual(gpt_image2.form_path(r"C:\a b.png"), r'"C:\\a b.png"')

    @unittest.skipIf(os.name == "nt", "Windows has no such names")
    def test_curl_reads_the_same_path_back(self) -> None:
        """curl copies one file to each name, so that the folder shows what it understood."""
        source = self.tmp / "source"
        source.write_bytes(FOX)
        config = b"silent\nshow-error\ngloboff\n"
        for name in HOSTILE_NAMES:
            pairs = [("url", source.as_uri()), ("output", str(self.work / name))]
            config += gpt_image2.curl_config(pairs)
        command = [gpt_image2.find_curl(), "-q", "-K", "-"]
        done = subprocess.run(command, input=config, capture_output=True, timeout=60, check=False)
        if done.returncode == 1:
            self.skipTest("this curl knows no file://")
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertEqual(self.listing(), sorted(HOSTILE_NAMES))

    @unittest.skipIf(os.name == "nt", "Windows has no such names")
    def test_curl_sends_the_file_that_is_meant(self) -> None:
        pictures = [png(16, 16, rgb=(0, 0, shade)) for shade in range(len(HOSTILE_NAMES))]
        for name, picture in zip(HOSTILE_NAMES, pictures):
            (self.work / name).write_bytes(picture)
        api = self.serve_base(answer(FOX))
        run = self.run_tool("edit", *HOSTILE_NAMES, "one of all", "-o", r"C:\out\fox.png")
        self.check(run, 0)
        self.assertEqual([part.body for part in api.posts[0].uploads], pictures)
        self.assertEqual(run.saved, [self.work / r"C:\out\fox.png"])


class TestPaths(PlatformCase):
    """Drive letters, on the command line and in a jobs file."""

    def planned(self, output: str | None, output_dir: str | None = None) -> gpt_image2.Target:
        """Return where the pictures of a request for one picture go."""
        request = gpt_image2.Request("generate", {})
        settings = mock.Mock(output_dir=output_dir or ".", sandbox=False)
        args = gpt_image2.Args()
        args.__dict__.update(output=output, output_dir=output_dir)
        return gpt_image2.plan_target(args, request, settings)

    def test_outputs_with_a_drive(self) -> None:
        self.with_windows_paths()
        for output, folder, name in (
            (r"C:\out\fox.png", "C:\\out", "fox.png"),
            ("C:/out/fox.png", "C:\\out", "fox.png"),
            (r"\\server\share\x\fox.png", r"\\server\share\x", "fox.png"),
            ("C:\\out\\", "C:\\out", ""),
            ("C:/out/", "C:\\out", ""),
            ("C:\\", "C:\\", ""),
        ):
            with self.subTest(output):
                target = self.planned(output)
                self.assertEqual((target.folder, target.name), (folder, name))
                self.assertFalse(target.stdout)
        self.assertEqual(self.planned("fox.png", r"D:\pics").path(0, "png"), r"D:\pics\fox.png")
        self.assertEqual(self.planned(r"C:\a.png", r"D:\pics").path(0, "png"), r"C:\a.png")
        self.assertEqual(self.planned(None, r"D:\pics").folder, r"D:\pics")

    def test_a_path_is_no_base_url(self) -> None:
        for text in (r"C:\out\fox.png", "C:/out/fox.png", r"\\server\share", "C:fox.png", "C:"):
            with self.subTest(text), self.assertRaises(ValueError):
                gpt_image2.parse_base_url(text)

    def test_a_base_url_of_one_letter_and_a_port(self) -> None:
        self.assertEqual(gpt_image2.parse_base_url("c:8080").url, "https://c:8080/v1")

    def test_the_folder_of_a_batch(self) -> None:
        self.with_windows_paths()
        settings = mock.Mock(sandbox=False, table={"output_dir": mock.Mock(source="default")})
        args = gpt_image2.Args()
        args.words = [r"D:\work\jobs.jsonl"]
        self.assertEqual(gpt_image2.batch_folder(args, settings), r"D:\work\jobs")

    def test_links_of_a_gallery(self) -> None:
        self.with_windows_paths()
        for path, folder, link in (
            (r"C:\out\ä 1.png", r"C:\out", "%C3%A4%201.png"),
            (r"C:\pics\a.png", r"C:\out", "../pics/a.png"),
        ):
            with self.subTest(path):
                self.assertEqual(gpt_image2.relative_link(path, folder), link)

    def test_a_picture_on_another_drive(self) -> None:
        self.with_windows_paths()
        link = gpt_image2.relative_link(r"D:\pics\a.png", r"C:\out")
        self.assertRegex(link, r"^file:///D(:|%3A)/pics/a\.png$")

    def test_ids_that_windows_cannot_hold(self) -> None:
        marked = [f"a{mark}b" for mark in '<>:"/\\|?*\0\n\x1f']
        at_the_ends = ["a.", "a ", ".a", " a", ".", ".."]
        devices = ["con", "CON", "nul", "Aux", "prn", "com1", "lpt9", "con.v2"]
        for name in (*marked, *at_the_ends, *devices):
            with self.subTest(name), self.assertRaises(Failure):
                gpt_image2.line_id(name)

    def test_ids_that_it_can(self) -> None:
        for name in ("a b", "ä", "v1.2", "console", "com", "lpt", "nulls", "a'b&c", "狐"):
            with self.subTest(name):
                self.assertEqual(gpt_image2.line_id(name), name)


class TestUtf8(Case):
    """stdout and stderr are UTF-8, whatever the locale or the code page."""

    NAME = "ä-狐-🦊.png"
    PLACES = (
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "cp437:strict"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "POSIX", "PYTHONIOENCODING": "utf-16"},
    )

    def test_saved_lines(self) -> None:
        for number, place in enumerate(self.PLACES):
            folder = self.work / str(number)
            folder.mkdir()
            with self.subTest(place):
                words = ("generate", "ein Fuchs: 狐", "--sandbox", "-o", self.NAME)
                run = self.check(self.run_tool(*words, env=place, cwd=folder), 0)
                self.assertIn(f"Saved: {folder / self.NAME} (".encode(), run.raw_out)
                self.assertEqual(self.listing(folder), [self.NAME])

    def test_messages(self) -> None:
        (self.work / self.NAME).touch()
        for place in self.PLACES:
            with self.subTest(place):
                words = ("generate", "a fox", "--sandbox", "-o", self.NAME)
                run = self.check(self.run_tool(*words, env=place), 2)
                self.assertIn(f"{self.NAME} exists", run.err)

    def test_the_prompt_is_sent_as_utf8(self) -> None:
        prompt = "ein Fuchs: 狐"
        for place in self.PLACES:
            with self.subTest(place):
                api = self.serve_base(answer(FOX))
                self.check(self.run_tool("generate", prompt, env=place), 0)
                self.assertEqual(api.posts[0].json["prompt"], prompt)

    def test_documents_are_ascii(self) -> None:
        words = ("generate", "狐", "--sandbox", "-o", self.NAME, "--json")
        run = self.check(self.run_tool(*words, env=self.PLACES[0]), 0)
        self.assertTrue(run.raw_out.isascii())
        self.assertEqual(run.json["images"][0]["path"], str(self.work / self.NAME))


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
        folder = self._folder("bare")
        (folder / "sitecustomize.py").write_text(BARE_SYSTEM)
        self.env["PYTHONPATH"] = str(folder)
        # O_TMPFILE needs a folder to be opened, which the stand-in refuses; Windows has none.

    def well(self, *words: str) -> Run:
        """Run a command that must go well and leave no job behind."""
        run = self.check(self.run_tool(*words), 0)
        self.assertEqual(self.jobs(), [], self.story(run))
        return run

    def test_the_stand_in_bites(self) -> None:
        probe = "import os, sys; open('x', 'w'); held = open('x'); os.replace('x', 'y')"
        done = subprocess.run(
            [sys.executable, "-c", probe],
            env=self.env,
            cwd=self.work,
            capture_output=True,
            timeout=60,
            check=False,
        )
        self.assertIn("it is being used by another process", done.stderr.decode())

    def test_generate(self) -> None:
        first = self.well("generate", "a fox", "--sandbox", "-o", "fox.png", "--n", "2")
        self.assertEqual(self.listing(), ["fox-1.png", "fox-2.png"])
        self.assertEqual(len(first.saved), 2)
        self.well("generate", "a fox", "--sandbox", "-o", "fox-1.png", "--force", "--sidecar")

    def test_edit(self) -> None:
        (self.work / "a b.png").write_bytes(png(1024, 768))
        self.well("edit", "a b.png", "winter", "--mask-box", "1,1,50,50", "--sandbox", "-o", "w/")

    def test_history_config_and_sizes(self) -> None:
        self.serve_base(answer(FOX))
        self.well("generate", "a fox")
        self.assertIn("1", self.well("history").out)
        self.well("history", "--clear")
        self.well("config", "--init")
        self.well("config", "--init", "--profile", "nodekey")
        self.well("config", "--show")
        self.well("sizes")

    def test_batch_twice(self) -> None:
        (self.work / "jobs.txt").write_text("a fox\na hen\na cow\n")
        self.well("batch", "jobs.txt", "--sandbox")
        made = [name for name in self.listing() if name.endswith(".png")]
        self.assertEqual(len(made), 3)
        self.well("batch", "jobs.txt", "--sandbox")
        self.assertEqual([name for name in self.listing() if name.endswith(".png")], made)

    def test_one_batch_at_a_time(self) -> None:
        (self.work / "jobs.txt").write_text("a fox\n")
        gate = threading.Event()
        api = self.serve_base(answer(FOX)._replace(before=gate))
        first = self.start_tool("batch", "jobs.txt")
        api.wait_for_request()
        second = self.check(self.run_tool("batch", "jobs.txt"), 2)
        self.assertIn("under way", second.err)
        gate.set()
        self.check(self.finish(first), 0)
        self.check(self.run_tool("batch", "jobs.txt"), 0)
        self.assertEqual(len(api.posts), 1)

    def test_recover_what_was_killed(self) -> None:
        gate = threading.Event()
        api = self.serve_base(Reply(chunks=(answer(FOX).body[:50], gate, answer(FOX).body[50:])))
        tool = self.start_tool("generate", "a fox")
        api.wait_for_request()
        self.wait_until(lambda: [f for f in self.jobs() if (f / gpt_image2.ANSWER).stat().st_size])
        tool.kill()
        tool.wait()
        waiting = self.check(self.run_tool("recover", "--last", "--no-wait"), 10)
        self.assertEqual(waiting.saved, [])
        gate.set()
        found = self.well("recover", "--last", "-o", "fox.png")
        self.assertEqual(found.saved, [self.work / "fox.png"])
        self.assertEqual((self.work / "fox.png").read_bytes(), FOX)


# What is not on every system, by module. Windows has its own os.kill and os.link; the first does
# something else there, the second is for NTFS only.
NOT_EVERYWHERE = {
    "os": """
        O_BINARY O_CLOEXEC O_DIRECTORY O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE
        WIFEXITED WIFSIGNALED WNOHANG chflags chown chroot confstr ctermid eventfd fchdir fchmod
        fchown fdatasync fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp
        getrandom getresuid getsid getuid getxattr initgroups kill killpg lchown link lockf
        login_tty major memfd_create minor mkfifo mknod nice openpty pathconf pidfd_open pipe2
        posix_fadvise posix_fallocate posix_spawn pread preadv pwrite readv register_at_fork
        sched_getaffinity sched_setaffinity sched_yield sendfile set_blocking setegid seteuid
        setgid setpgid setpriority setsid setuid splice startfile statvfs sync sysconf tcgetpgrp
        ttyname uname wait wait3 wait4 waitid writev
    """,
    "signal": """
        CTRL_BREAK_EVENT CTRL_C_EVENT SIGALRM SIGBREAK SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE
        SIGQUIT SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGUSR1 SIGUSR2 SIGWINCH alarm getitimer pause
        pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigtimedwait sigwait
    """,
    "socket": "AF_UNIX SO_REUSEPORT socketpair sendmsg",
    "subprocess": "CREATE_NEW_PROCESS_GROUP CREATE_NO_WINDOW DETACHED_PROCESS STARTUPINFO",
    "sys": "getwindowsversion winver",
    "time": "clock_gettime clock_settime tzset",
    "select": "epoll kqueue poll",
}
NOT_EVERYWHERE_MODULES = """
    _scproxy _winapi crypt curses fcntl grp msvcrt nis nt posix pty pwd readline resource spwd
    syslog termios tty winreg winsound
"""
NOT_EVERYWHERE_NAMES = {owner: frozenset(names.split()) for owner, names in NOT_EVERYWHERE.items()}
NOT_EVERYWHERE_PATHS = re.compile(r"/(proc|sys|dev|etc|tmp|usr|var|run|bin|home)(/|$)")
NOT_EVERYWHERE_OPTIONS = {"preexec_fn", "pass_fds", "process_group", "dir_fd", "umask"}  # of calls


class Guards(ast.NodeVisitor):
    """Finds what only some systems have, where nothing asks first whether it is there.

    A guard is a try that catches its absence, hasattr() in an if before it, or os.name.
    """

    def __init__(self) -> None:
        self.bare: list[str] = []
        self.caught: list[set[str]] = [set()]
        self.asked: list[set[str]] = [set()]

    def note(self, node: Any, name: str, *absence: str) -> None:
        """Note a use, unless one of these exceptions is caught or the name was asked for."""
        handled = set().union(*self.caught) & {*absence, "Exception"}
        asked = set().union(*self.asked) & {name, name.partition(".")[0], "os.name"}
        if not handled and not asked:
            self.bare.append(f"line {node.lineno}: {name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        if node.attr in NOT_EVERYWHERE_NAMES.get(owner, ()):
            self.note(node, f"{owner}.{node.attr}", "AttributeError")
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] in NOT_EVERYWHERE_MODULES.split():
                self.note(node, alias.name, "ImportError", "ModuleNotFoundError")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        names = NOT_EVERYWHERE_NAMES.get(module, frozenset())
        absent = [alias.name for alias in node.names if alias.name in names]
        if absent or module.partition(".")[0] in NOT_EVERYWHERE_MODULES.split():
            self.note(node, ".".join([module, *absent]), "ImportError", "ModuleNotFoundError")

    def visit_Call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            if keyword.arg in NOT_EVERYWHERE_OPTIONS:
                self.note(node, f"{keyword.arg}=", "ValueError")
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 2:
            owner, name = (getattr(arg, "id", getattr(arg, "value", "")) for arg in node.args)
            if name in NOT_EVERYWHERE_NAMES.get(str(owner), ()):
                self.note(node, f"{owner}.{name}", "AttributeError")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
        if isinstance(text, str) and NOT_EVERYWHERE_PATHS.match(text):
            self.note(node, text, "OSError", "FileNotFoundError")

    def visit_Try(self, node: ast.Try) -> None:
        caught: set[str] = set()
        for handler in node.handlers:
            named = ast.walk(handler.type) if handler.type else [ast.Name("Exception")]
            caught |= {child.id for child in named if isinstance(child, ast.Name)}
        self.caught.append(caught)
        for child in node.body:
            self.visit(child)
        self.caught.pop()
        for other in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(other)

    def visit_If(self, node: ast.If) -> None:
        present, absent = asked_for(node.test)
        self.visit(node.test)
        self.branch(node.body, present)
        self.branch(node.orelse, absent)
        leaves = (ast.Return, ast.Raise, ast.Continue, ast.Break)
        if isinstance(node.body[-1], leaves):
            self.asked[-1] |= absent  # for the rest of this function

    def visit_IfExp(self, node: ast.IfExp) -> None:
        present, absent = asked_for(node.test)
        self.visit(node.test)
        self.branch([node.body], present)
        self.branch([node.orelse], absent)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        before: set[str] = set()
        for value in node.values:
            self.branch([value], before)
            present, absent = asked_for(value)
            before |= present if isinstance(node.op, ast.And) else absent

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.asked.append(set())
        self.generic_visit(node)
        self.asked.pop()

    def branch(self, nodes: list[Any], asked: set[str]) -> None:
        """Visit what is reached only if these names are there."""
        self.asked.append(set(asked))
        for node in nodes:
            self.visit(node)
        self.asked.pop()


def asked_for(test: ast.expr) -> tuple[set[str], set[str]]:
    """Return the names that are surely there where a test is true, and where it is false."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        present, absent = asked_for(test.operand)
        return absent, present
    if isinstance(test, ast.BoolOp):
        pairs = [asked_for(value) for value in test.values]
        if isinstance(test.op, ast.And):
            return set().union(*(present for present, _ in pairs)), set()
        return set(), set().union(*(absent for _, absent in pairs))
    if isinstance(test, ast.Compare) and ast.dump(test.left) == ast.dump(OS_NAME):
        return {"os.name"}, {"os.name"}
    if isinstance(test, ast.Call) and getattr(test.func, "id", "") == "hasattr":
        owner, name = test.args
        return {f"{getattr(owner, 'id', '')}.{getattr(name, 'value', '')}"}, set()
    return set(), set()


OS_NAME = ast.Attribute(ast.Name("os", ast.Load()), "name", ast.Load())


def unguarded(source: str) -> list[str]:
    """Return what in a program is used without asking whether this system has it."""
    guards = Guards()
    guards.visit(ast.parse(source))
    return guards.bare


class TestGuards(unittest.TestCase):
    def test_the_tool_takes_nothing_for_granted(self) -> None:
        self.assertEqual(unguarded(SCRIPT.read_text(encoding="utf-8")), [])

    def test_it_does_use_some(self) -> None:
        text = SCRIPT.read_text(encoding="utf-8")
        for name in ("os.getuid", "os.link", "import fcntl", '"SIGHUP"'):
            self.assertIn(name, text)

    def test_what_is_found(self) -> None:
        for source in (
            "os.getuid()",
            "os.link(a, b)",
            "import fcntl",
            "from fcntl import flock",
            "from os import fork",
            "signal.signal(signal.SIGHUP, f)",
            "flags = os.O_CREAT | os.O_NOFOLLOW",
            "getattr(os, 'O_NOFOLLOW')",
            "os.kill(pid, 0)",
            "open('/proc/self/status')",
            "open(b'/dev/null')",
            "Popen(words, preexec_fn=f)",
            "try:\n    os.link(a, b)\nexcept OSError:\n    pass",
            "try:\n    pass\nexcept AttributeError:\n    os.link(a, b)",
            "if hasattr(os, 'getuid'):\n    pass\nelse:\n    os.getuid()",
            "if not hasattr(os, 'getuid'):\n    pass\nos.getuid()",
            "if hasattr(os, 'geteuid'):\n    os.getuid()",
            "def f():\n    if not hasattr(os, 'fork'):\n        return\ndef g():\n    os.fork()",
            "os.getuid() if not hasattr(os, 'getuid') else 0",
        ):
            with self.subTest(source):
                self.assertEqual(len(unguarded(source)), 1)

    def test_what_is_a_guard(self) -> None:
        for source in (
            "getattr(os, 'O_NOFOLLOW', 0)",
            "getattr(signal, name, None)",
            "try:\n    import fcntl\nexcept ImportError:\n    fcntl = None",
            "try:\n    os.link(a, b)\nexcept (OSError, AttributeError):\n    pass",
            "if hasattr(os, 'getuid'):\n    os.getuid()",
            "if not hasattr(os, 'getuid'):\n    f()\nelse:\n    os.getuid()",
            "def f():\n    if not hasattr(os, 'getuid'):\n        return 0\n    return os.getuid()",
            "os.getuid() if hasattr(os, 'getuid') else 0",
            "hasattr(os, 'getuid') and os.getuid()",
            "not hasattr(os, 'getuid') or os.getuid()",
            "if os.name == 'nt':\n    import msvcrt",
            "try:\n    open('/proc/self/fd')\nexcept OSError:\n    pass",
            "os.devnull, os.replace, signal.SIGTERM",
        ):
            with self.subTest(source):
                self.assertEqual(unguarded(source), [])


if __name__ == "__main__":
    unittest.main()
