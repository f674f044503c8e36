"""What comes out: names, files that lose nothing, lines that can be trusted, exit codes."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import threading
from pathlib import Path
from typing import Any, Iterator, Sequence
from unittest import mock

from tests.case import Argument, Run, SystemCase
from tests.images import gif, jpeg, png, svg, webp
from tests.server import Reply, Script, answer, json_reply, refusal

IMAGE = png(40, 30, seed=1)
LARGE = png(400, 300, seed=2)  # larger than any pipe's buffer
HOSTILE = (
    "fox\nSaved: /etc/passwd (1 KB)\r\x1b[2K\x1b]0;t\x07\x85Saved: x\u2028\u202egnp.\u2066\x00end"
)


class OutputCase(SystemCase):
    """A case that asks for a fox, mostly under a name of its own."""

    def ask(self, *argv: Argument, **options: Any) -> Run:
        """Generate with these arguments."""
        return self.run_tool("generate", "a fox", *argv, **options)

    def asked(self, *argv: Argument, code: int = 0, replies: Sequence[Script] = ()) -> Run:
        """Generate from a server that gives these replies (IMAGE); check the exit code."""
        self.serve_base(*(replies or [answer(IMAGE)]))
        return self.check(self.ask(*argv), code)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file in the work folder."""
        return (self.work / name).read_bytes()

    def recover(self, *argv: Argument) -> Run:
        """Recover the one job that is left."""
        (job,) = self.jobs()
        return self.check(self.run_tool("recover", job.name, *argv), 0)


# ---- What is said -----------------------------------------------------------------------------


class TestSavedLines(OutputCase):
    """One line an image on stdout, and the same in the document."""

    def test_the_line_and_its_figure(self) -> None:
        just_above, just_below = (
            IMAGE[:-12] + bytes(size - len(IMAGE)) + IMAGE[-12:]
            for size in (10 * 1024 + 513, 11 * 1024 + 511)
        )
        replies = [answer(png(1, 1), just_above, just_below)]
        run = self.asked("-n", "3", "-o", "./a/../fox.png", replies=replies)
        sizes = enumerate([1, 11, 11], 1)
        lines = [f"Saved: {self.work}/fox-{i}.png ({kilobytes} KB)\n" for i, kilobytes in sizes]
        self.assertEqual(run.out, "".join(lines))

    def test_each_line_comes_as_soon_as_its_image_is_there(self) -> None:
        api, late = self.serve_base(), threading.Event()
        api.script.append(answer(IMAGE, api.put("/late.png", Reply(200, IMAGE, before=late))))
        self.env.pop("PYTHONUNBUFFERED", None)
        tool = self.start_tool("generate", "a fox", "-n", "2", "-o", "fox.png")
        assert tool.stdout
        self.assertIn(f"Saved: {self.work}/fox-1.png (", tool.stdout.readline().decode())
        self.assertEqual(self.read("fox-1.png"), IMAGE)
        late.set()
        self.check(self.finish(tool), 0)

    def test_the_document_describes_each_image(self) -> None:
        sent = {"png": IMAGE, "jpeg": jpeg(16, 9), "webp": webp(8, 5), "gif": gif(3, 2)}
        sizes = [(40, 30), (16, 9), (8, 5), (3, 2)]
        replies = [answer(*sent.values(), revised_prompt="a red fox")]
        images = self.asked("-n", "4", "--json", replies=replies).json["images"]
        self.assertEqual(len(images), 4)
        for image, (kind, data), (width, height) in zip(images, sent.items(), sizes):
            path = Path(image.pop("path"))
            self.assertEqual(path.read_bytes(), data)
            self.assertTrue(path.is_absolute())
            wanted = {"bytes": len(data), "format": kind, "width": width, "height": height}
            wanted["sha256"] = hashlib.sha256(data).hexdigest()
            self.assertEqual(image, {**wanted, "revised_prompt": "a red fox"})

    def test_what_is_not_as_asked_is_told_and_kept(self) -> None:
        wide, tall = png(1024, 1024), png(1024, 1536)
        for name, image, options, facts in (
            ("a.png", tall, ["-s", "1024x1024"], ["1024x1536", "1024x1024"]),
            ("b.png", wide, ["-s", "1024x1024"], []),
            ("c.webp", wide, [], ["png", "webp"]),
            ("d", wide, ["-f", "webp"], ["png", "webp"]),
            ("e.JPEG", jpeg(8, 8), [], []),
        ):
            with self.subTest(name):
                run = self.asked("-o", name, *options, "--json", replies=[answer(image)])
                self.assertEqual(self.read(name), image)
                self.assertEqual(len(run.json["warnings"]), 1 if facts else 0, run)
                for fact in facts:
                    self.assertIn(fact, run.json["warnings"][0])
                    self.assertIn(fact, run.err)


class TestDocument(OutputCase):
    """With --json exactly one object on stdout, whatever happens."""

    def test_one_object_in_every_outcome(self) -> None:
        """Beside the fault table; where there is no reply, nothing may be sent."""
        (self.work / "taken.png").write_bytes(b"mine")
        outcomes: list[tuple[str, int, Reply | None, list[str]]] = [
            ("saved", 0, answer(IMAGE), []),
            ("one is bad", 9, answer(IMAGE, IMAGE[:-20]), ["-n", "2"]),
            ("unknown option", 2, None, ["--colour", "red"]),
            ("missing value", 2, None, ["--size"]),
            ("name taken", 2, None, ["-o", "taken.png"]),
            ("no such config", 3, None, ["--config", "nowhere.json"]),
        ]
        for name, code, reply, options in outcomes:
            with self.subTest(name):
                api = self.serve_base(*([reply] if reply else []))
                run = self.check(self.ask("--new", "--json", *options), code)
                document, error = run.json, run.json["error"]
                self.assertEqual((run.raw_out.count(b"\n"), run.raw_out.isascii()), (1, True), run)
                self.assertEqual((document["schema"], document["command"]), (1, "generate"))
                self.assertEqual((document["ok"], document["resumed"]), (code == 0, False))
                self.assertEqual(len(document["images"]), 1 if reply else 0)
                self.assertEqual(error and error["exit_code"], code or None)
                self.assertTrue(not error or (error["code"] and error["message"]))
                self.assertEqual(len(api.posts), 1 if reply else 0)

    def test_a_document_without_a_known_command(self) -> None:
        for argv in (["--json"], ["genrate", "--json"], ["--json", "generate", "a fox"]):
            with self.subTest(argv):
                run = self.check(self.run_tool(*argv), 2)
                self.assertEqual(run.json["error"]["exit_code"], 2)


class TestWarnings(OutputCase):
    """Those on stderr are in the document too; what else the document says is not on stderr."""

    def test_both_say_the_same(self) -> None:
        for options, words in (
            (("-s", "3840x2160"), "experimental"),
            (("-s", "1920x1080", "--nearest-size"), "using 1920x1088"),
            (("-m", "gpt-image-9"), "gpt-image-9"),
        ):
            with self.subTest(options):
                run = self.asked("--json", *options)
                lines = run.err.splitlines()
                warnings = [f"gpt-image2: warning: {text}" for text in run.json["warnings"]]
                self.assertEqual(lines, warnings)
                self.assertIn(words, run.err)


class TestForging(OutputCase):
    """No server can put a line of its own among ours, or steer a terminal."""

    def check_clean(self, run: Run, saved: int) -> None:
        """Assert that the output holds our lines only."""
        text = run.out + run.err
        self.assertEqual(len(re.findall("^Saved:", text, re.MULTILINE)), saved, run)
        for character in sorted(set(text) - {"\n"}):
            self.assertTrue(character.isprintable(), f"{character!r} in {run}")

    def test_in_every_text_of_an_answer(self) -> None:
        words = dict.fromkeys(["revised_prompt", "output_format", "size"], HOSTILE)
        image = answer(IMAGE, usage={HOSTILE: HOSTILE, "total_tokens": HOSTILE}, **words)
        headers = [("X-Request-Id", "r\x1b[1m\u202e\x9b"), ("Content-Type", "\x1b[2K")]
        for name, reply in {
            "message": refusal(400, None, HOSTILE),
            "code": refusal(500, HOSTILE, "no", type=HOSTILE),
            "detail": json_reply({"detail": [HOSTILE, {HOSTILE: 1}]}, 400),
            "inside a 200": refusal(200, "server_error", HOSTILE),
            "a body that is no JSON": Reply(200, HOSTILE.encode()),
            "location": Reply(302, headers=[("Location", "https://a.example/\x1b[2K\u202e\x9b")]),
            "link": answer(f"ftp://a.example/{HOSTILE}"),
            "image": image._replace(headers=headers),
        }.items():
            for flags in (["--verbose"], ["--verbose", "--json"]):
                with self.subTest(name, flags=flags):
                    self.serve_base(reply)
                    run = self.ask("--new", *flags)
                    self.check_clean(run, 1 if name == "image" and "--json" not in flags else 0)
                    self.assertEqual(run.code == 0, name == "image")

    def test_in_what_is_only_shown(self) -> None:
        """Prompts, and folders with odd names, in lines of any command."""
        name = HOSTILE.replace("/", ":").replace("\0", "")
        folder = self.new_folder(name)
        (folder / "jobs.txt").write_text("a fox\n")
        prompt = ["generate", name, "--dry-run", "--verbose", f"--output-dir={self.work}"]
        for argv in (
            *(["config", "--init"], ["config", "--show"], prompt, [*prompt, "--json"]),
            *(["batch", "jobs.txt"], ["batch", "jobs.txt", "--output-dir", "out", "--dry-run"]),
        ):
            with self.subTest(argv):
                self.serve_base(otherwise=answer(IMAGE))
                env = {"GPT_IMAGE2_CONFIG": str(folder / "config.json")}
                run = self.check(self.run_tool(*argv, env=env, cwd=folder), 0)
                self.check_clean(run, int(argv == ["batch", "jobs.txt"]))
                self.assertIn("fox", run.out + run.err)
                if "--json" in argv:
                    self.assertEqual(run.json["dry_run"]["fields"]["prompt"], name)

    def test_in_what_a_caller_passes_on(self) -> None:
        name = HOSTILE.replace("\0", "")
        for argv in (["--prompt-file", name], ["--size", name], [f"--{name}"], ["-o", name]):
            with self.subTest(argv):
                api = self.serve_base()
                self.check_clean(self.check(self.run_tool("generate", *argv, name), 2), 0)
                self.no_request(api)


# ---- Where it goes ----------------------------------------------------------------------------


class TestNames(OutputCase):
    """Where images go: generated names, names given, folders."""

    def test_generated_names_end_as_their_bytes_say(self) -> None:
        kinds = {"png": IMAGE, "jpg": jpeg(4, 3), "webp": webp(4, 3), "gif": gif(4, 3)}
        kinds["svg"] = svg(4, 3)
        for options in (["--output-dir", "out"], ["-o", "out/"], ["-o", "out"]):
            with self.subTest(options):
                run = self.asked("-n", "5", *options, replies=[answer(*kinds.values())])
                self.assertEqual(len({path.name for path in run.saved}), 5)
                for path, (suffix, data) in zip(run.saved, kinds.items()):
                    name = rf"^\d{{4}}-\d\d-\d\d-[0-9a-f]{{8}}\.{suffix}$"
                    self.assertRegex(path.name, name)
                    self.assertEqual((path.parent, path.read_bytes()), (self.work / "out", data))

    def test_given_names(self) -> None:
        for options, names in (
            (["-o", "fox.png"], ["fox.png"]),
            (["-o", "fox"], ["fox"]),
            (["-o", "b/a.png", "-n", "2"], ["b/a-1.png", "b/a-2.png"]),
            (["-o", "a.b.png", "-n", "2"], ["a.b-1.png", "a.b-2.png"]),
            (["-o", "c.png", "--output-dir", "d"], ["d/c.png"]),
            (["-o", "more.png"], ["more.png", "more-2.png"]),  # than were asked for
        ):
            with self.subTest(options):
                images = [IMAGE, LARGE][: len(names)]
                run = self.asked(*options, replies=[answer(*images)])
                self.assertEqual(run.saved, [self.work / name for name in names])
                self.assertEqual([path.read_bytes() for path in run.saved], images)

    def test_what_cannot_be_a_name_is_refused_before_anything_is_sent(self) -> None:
        (self.work / "taken.png").write_bytes(b"mine")
        (self.work / "dangling.png").symlink_to("nowhere.png")
        (self.work / "folder.png").mkdir()
        wrong = ("taken.png", "dangling.png", "taken.png/fox.png", "a\nb.png", "a\u202eb.png", "")
        for options in (
            *(["-o", name] for name in (*wrong, "x" * 300 + ".png")),
            ["-o", "-", "-n", "2"],
            ["--output-dir", "taken.png"],
        ):
            with self.subTest(options):
                api = self.serve_base()
                self.check(self.ask(*options), 2)
                self.no_request(api)
        self.assertEqual(self.jobs(), [])


class TestNeverOverwritten(OutputCase):
    """A name that is taken meanwhile stays whoever's it is."""

    def test_a_target_that_appears_meanwhile(self) -> None:
        """A file, a folder or a link, and the next names too."""
        nowhere = self.work / "nowhere.png"

        def others() -> None:
            (self.work / "fox-2.png").write_bytes(b"mine")
            (self.work / "fox-2-2.png").mkdir()
            (self.work / "fox-2-3.png").symlink_to(nowhere)

        self.serve_base(Reply(chunks=[others, answer(LARGE, IMAGE).body]))
        run = self.check(self.ask("-n", "2", "-o", "fox.png"), 0)
        self.assertEqual([path.name for path in run.saved], ["fox-1.png", "fox-2-4.png"])
        self.assertEqual([path.read_bytes() for path in run.saved], [LARGE, IMAGE])
        self.assertIn("fox-2-4.png", run.err)
        self.assertEqual((self.read("fox-2.png"), nowhere.exists()), (b"mine", False))
        self.assertEqual(self.jobs(), [])

    def test_force_replaces_a_name_only_by_a_whole_image(self) -> None:
        """And a link, not what it points to."""
        fox, old, seen = self.work / "fox.png", self.work / "old.png", []
        old.write_bytes(b"old")
        fox.symlink_to(old)
        cut, error = answer(IMAGE[:-20]), refusal(500, None, "no")
        for reply, code in ((cut, 10), (error, 8), (answer(IMAGE), 0), (answer(LARGE), 0)):
            self.serve_base(
                reply._replace(chunks=[lambda: seen.append(fox.read_bytes()), reply.body])
            )
            self.check(self.ask("-o", "fox.png", "--force", "--new"), code)
        self.assertEqual(seen, [b"old", b"old", b"old", IMAGE])
        self.assertEqual((fox.read_bytes(), old.read_bytes()), (LARGE, b"old"))
        self.assertEqual(self.listing(), ["fox.png", "old.png"])


class TestDurable(OutputCase):
    """What is said to be saved is on the disk, and nobody else has a hand in it."""

    def test_file_and_folder_are_synced_before_it_is_said_and_the_job_goes(self) -> None:
        """So that a power cut takes either the job or the image, never both."""
        synced: list[tuple[os.stat_result, bool, bytes, int]] = []
        real = os.fsync

        def fsync(file: Any) -> None:
            real(file)
            out: Any = sys.stdout.buffer  # of run_tool
            named = (self.work / "fox.png").exists()
            synced.append((os.fstat(file), named, out.getvalue(), len(self.jobs())))

        for options in ([], ["--force"]):
            with self.subTest(options), mock.patch("os.fsync", fsync):
                synced.clear()
                (path,) = self.asked("-o", "fox.png", *options).saved
                place = self.work.stat()
                files = [row for row in synced if os.path.samestat(row[0], path.stat())]
                folders = [row for row in synced if os.path.samestat(row[0], place) and row[1]]
                self.assertTrue(files and folders, synced)
                self.assertEqual(files[0][0].st_size, len(IMAGE), "all of it")
                for row in (files[0], folders[0]):
                    self.assertEqual(row[2:], (b"", 1), "said, or let go, too early")
                path.rename(self.work / "old")

    def test_an_unfinished_image_is_a_new_file(self) -> None:
        """Whoever guesses its name gains nothing by putting a link or a file there."""
        real, victim = os.open, self.new_folder("others") / "victim"

        def opened(path: str, flags: int, *rest: Any, **options: Any) -> int:
            if flags & os.O_CREAT and Path(path).parent == folder:
                plant(victim, path)
            return real(path, flags, *rest, **options)

        for plant in (os.symlink, os.link):
            with self.subTest(plant.__name__):
                victim.write_bytes(b"theirs")
                victim.chmod(0o666)
                folder = self.work / plant.__name__
                with mock.patch("os.open", opened):
                    self.asked("--new", "--output-dir", folder, code=9)
                self.assertEqual(victim.read_bytes(), b"theirs")
                self.assertEqual(stat.S_IMODE(victim.stat().st_mode), 0o666)
                self.assertEqual(self.recover().saved[0].read_bytes(), IMAGE)

    def test_force_replaces_the_old_image_by_the_whole_new_one(self) -> None:
        (self.work / "fox.png").write_bytes(b"old")
        there: list[bytes] = []

        def replace(old: str, new: str, real: Any = os.replace) -> None:
            there.extend([self.read("fox.png")] if new.endswith("fox.png") else [])
            real(old, new)

        with mock.patch("os.replace", replace):
            self.asked("-o", "fox.png", "--force")
        self.assertEqual((there, self.read("fox.png")), ([b"old"], IMAGE))

    def test_modes_follow_the_umask(self) -> None:
        before = os.umask(0o022)
        self.addCleanup(os.umask, before)
        for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
            with self.subTest(oct(umask)):
                os.umask(umask)
                (path,) = self.asked().saved
                self.assertEqual(stat.S_IMODE(path.stat().st_mode), mode)


class TestFolders(OutputCase):
    """Folders that vanish, fill up or refuse."""

    def test_missing_folders_are_made_and_only_for_a_image(self) -> None:
        self.asked("-o", "a/b/fox.png", code=1, replies=[refusal(400, None, "no")])
        self.assertEqual(list(self.work.iterdir()), [])
        self.asked("-o", "a/b/fox.png")
        self.assertEqual(self.read("a/b/fox.png"), IMAGE)

    def test_a_full_disk_keeps_what_fits(self) -> None:
        disk = self.small_disk("disk")
        replies = [answer(IMAGE, LARGE, IMAGE)]
        run = self.asked("-n", "3", "-o", disk / "fox.png", code=9, replies=replies)
        self.assertEqual([path.read_bytes() for path in run.saved], [IMAGE, LARGE, IMAGE])
        self.assertEqual([path.parent for path in run.saved], [disk, *self.jobs(), disk])
        self.assertEqual(self.listing(disk), ["fox-1.png", "fox-3.png"], "nothing half-written")
        recovered = self.recover("--output-dir", "recovered").saved
        self.assertEqual([path.read_bytes() for path in recovered], [IMAGE, LARGE, IMAGE])
        self.assertEqual(self.jobs(), [])


# ---- Streams ----------------------------------------------------------------------------------

NO_READER = """
import os, sys
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
os.execv(sys.argv[1], sys.argv[1:])
"""

REDIRECTIONS = {
    "stdout closed": ">&-",
    "stdout full": ">/dev/full",
    "stderr closed": "2>&-",
    "stderr full": "2>/dev/full",
    "all closed": "<&- >&- 2>&-",
}
BENDS = {name: ["sh", "-c", f'exec "$@" {bend}', "sh"] for name, bend in REDIRECTIONS.items()}
BENDS["stdout without reader"] = [sys.executable, "-IS", "-c", NO_READER]


class TestStreams(OutputCase):
    """The images are saved whatever became of stdout and stderr."""

    def bends(self, lead: str = "") -> Iterator[str]:
        """Let the following runs have bent streams, in each way that can be had here."""
        for name, launcher in BENDS.items():
            if name.startswith(lead) and ("full" not in name or os.path.exists("/dev/full")):
                self.launcher = launcher
                yield name
        self.launcher = ()

    def test_images_are_saved_without_streams(self) -> None:
        for name in self.bends():
            for flags in ([], ["--json"]):
                with self.subTest(name, flags=flags):
                    folder = self.work / " ".join([name, *flags])
                    replies = [answer(IMAGE, LARGE)]
                    run = self.asked("-n", "2", "--output-dir", folder, *flags, replies=replies)
                    found = {path.read_bytes() for path in folder.iterdir()}
                    self.assertEqual((found, self.jobs()), ({IMAGE, LARGE}, []))
                    if name.startswith("stderr"):
                        self.assertEqual(len(run.out.splitlines()), 1 if flags else 2)

    def test_what_nobody_reads_is_no_fault(self) -> None:
        """As in `| head`; a full disk is one."""
        for name in self.bends("stdout"):
            with self.subTest(name):
                run = self.check(self.run_tool("sizes"), 0)
                self.assertEqual("closed or full" in run.err, "reader" not in name, run)

    def test_an_error_keeps_its_exit_code_without_streams(self) -> None:
        for name in self.bends():
            with self.subTest(name):
                self.asked(code=4, replies=[refusal(401, "invalid_api_key", "no")])

    def test_an_image_on_stdout_is_alone_there_and_quiet_is_quiet(self) -> None:
        for options, told in (((), r"\nSaved: - \(\d+ KB\)\n"), (("--quiet",), r"\A\Z")):
            run = self.asked("-o", "-", *options, replies=[answer(IMAGE)])
            self.assertEqual(run.raw_out, IMAGE)
            self.assertRegex(run.err, told)

    def test_a_image_that_stdout_did_not_take_is_kept(self) -> None:
        for name in self.bends("stdout"):
            with self.subTest(name):
                run = self.asked("-o", "-", code=10, replies=[answer(LARGE)])
                self.assertRegex(run.err, r"Recover: .* recover \S+\n$")
                self.launcher = ()
                self.recover("-o", f"{name}.png")
                self.assertEqual((self.read(f"{name}.png"), self.jobs()), (LARGE, []))
