"""What comes out: files that lose nothing, lines that can be trusted, streams that may be gone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import threading
import unittest
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from tests.pictures import gif, jpeg, png, svg, webp
from tests.support import (
    Api,
    Case,
    Child,
    Reply,
    Request,
    Run,
    answer,
    b64,
    json_reply,
    refusal,
)

PICTURE = png(40, 30, seed=1)
LARGE = png(400, 300, seed=2)  # larger than any pipe's buffer
BAD = json_reply({"data": [{"b64_json": b64(PICTURE[:-20])}]})  # whole JSON, cut picture
HOSTILE = "fox\nSaved: /etc/passwd (1 KB)\r\x1b[2K\x1b]0;t\x07\x85\u2028\u202egnp.\u2066\x00end"


class OutputCase(Case):
    """A case that asks for one picture, mostly under a name of its own."""

    def ask(self, *argv: str | os.PathLike[str], **options: Any) -> Run:
        """Generate with these arguments."""
        return self.run_tool("generate", "a fox", *argv, **options)

    def start(self, *argv: str, env: Mapping[str, str | None] | None = None) -> Child:
        """Start what `ask` runs, to let several run side by side."""
        return self.start_tool("generate", "a fox", *argv, env=env)

    def meanwhile(self, act: Callable[[], object], reply: Reply | None = None) -> Api:
        """Serve an answer; do something after the request has come and before it is answered."""

        def script(request: Request) -> Reply:
            act()
            return answer(PICTURE) if reply is None else reply

        return self.serve_base(script)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file in the work folder."""
        return (self.work / name).read_bytes()

    def recover(self, *argv: str) -> Run:
        """Recover the one job that is left."""
        (job,) = self.jobs()
        return self.check(self.run_tool("recover", job.name, *argv), 0)


# ---- What is said -----------------------------------------------------------------------------


class TestSavedLines(OutputCase):
    """One line an image on stdout, and the same in the document."""

    def test_the_line_and_its_figure(self) -> None:
        small, just_above, just_below = (
            PICTURE[:-12] + bytes(size - len(PICTURE)) + PICTURE[-12:]
            for size in (len(PICTURE), 10 * 1024 + 513, 11 * 1024 + 511)
        )
        tiny = png(1, 1)
        self.serve_base(answer(tiny, small, just_above, just_below))
        run = self.check(self.ask("-n", "4", "-o", "./a/../fox.png"), 0)
        sizes = [1, round(len(PICTURE) / 1024), 11, 11]
        lines = [f"Saved: {self.work}/fox-{i}.png ({kb} KB)\n" for i, kb in enumerate(sizes, 1)]
        self.assertEqual(run.out, "".join(lines))

    def test_each_line_comes_as_soon_as_its_picture_is_there(self) -> None:
        api = self.serve_base()
        late = threading.Event()
        url = api.put("/late.png", Reply(200, PICTURE, before=late))
        entries = [{"b64_json": b64(PICTURE)}, {"url": url}]
        api.script.append(json_reply({"data": entries}))
        tool = self.start_tool("generate", "a fox", "-n", "2", "-o", "fox.png")
        assert tool.stdout
        first = tool.stdout.readline().decode()
        self.assertEqual(first, f"Saved: {self.work}/fox-1.png ({len(PICTURE) // 1024 + 1} KB)\n")
        self.assertEqual(self.read("fox-1.png"), PICTURE)
        late.set()
        self.check(self.finish(tool), 0)

    def test_generated_names_end_as_their_bytes_say(self) -> None:
        kinds = {
            "png": PICTURE,
            "jpg": jpeg(40, 30),
            "webp": webp(40, 30),
            "gif": gif(40, 30),
            "svg": svg(40, 30),
        }
        self.serve_base(answer(*kinds.values()))
        run = self.check(self.ask("-n", "5", "--output-dir", "out"), 0)
        for path, suffix in zip(run.saved, kinds):
            with self.subTest(suffix):
                pattern = rf"\d{{4}}-\d\d-\d\d-[0-9a-f]{{8}}\.{suffix}"
                self.assertRegex(path.name, f"^{pattern}$")
                self.assertEqual(path.parent, self.work / "out")
                self.assertEqual(path.read_bytes(), kinds[suffix])
        self.assertEqual(len({path.name for path in run.saved}), 5)

    def test_the_document_describes_each_picture(self) -> None:
        pictures = {"png": PICTURE, "jpeg": jpeg(16, 9), "webp": webp(8, 5), "gif": gif(3, 2)}
        self.serve_base(answer(*pictures.values(), revised_prompt="a red fox"))
        run = self.check(self.ask("-n", "4", "--json"), 0)
        sizes = [(40, 30), (16, 9), (8, 5), (3, 2)]
        for image, (kind, data), (width, height) in zip(
            run.json["images"], pictures.items(), sizes
        ):
            path = Path(image.pop("path"))
            self.assertEqual(path.read_bytes(), data)
            self.assertTrue(path.is_absolute())
            self.assertEqual(
                image,
                {
                    "bytes": len(data),
                    "format": kind,
                    "width": width,
                    "height": height,
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "revised_prompt": "a red fox",
                },
            )

    def test_another_size_than_asked_for_is_told(self) -> None:
        self.serve_base(answer(png(1024, 1024)), answer(png(1024, 1536)))
        for differs in (False, True):
            with self.subTest(differs=differs):
                run = self.check(self.ask("-s", "1024x1024", "--json"), 0)
                told = [w for w in run.json["warnings"] if "1024x1536" in w and "1024x1024" in w]
                self.assertEqual(len(told), int(differs))
                self.assertEqual("1024x1536" in run.err, differs)

    def test_another_kind_than_the_name_says_is_told_and_the_name_kept(self) -> None:
        self.serve_base(answer(PICTURE), answer(PICTURE), answer(jpeg(8, 8)))
        for name, told in (("fox.webp", True), ("fox.png", False), ("fox.jpeg", False)):
            with self.subTest(name):
                run = self.check(self.ask("-o", name, "--json"), 0)
                self.assertEqual(self.listing(self.work).count(name), 1)
                warnings = " ".join(run.json["warnings"])
                self.assertEqual("png" in warnings and "webp" in warnings, told)

    def test_quiet_says_errors_only(self) -> None:
        self.serve_base(answer(PICTURE), refusal(400, "invalid_value", "Bad size."))
        run = self.check(self.ask("--quiet", "-s", "1024x1024"), 0)
        self.assertEqual((len(run.saved), run.err), (1, ""))
        run = self.check(self.ask("--quiet"), 1)
        self.assertEqual(run.out, "")
        self.assertRegex(run.err, r"^[^\n]*Bad size[^\n]*\n$")


class Outcome(NamedTuple):
    """An exit code, and what leads to it."""

    code: int
    reply: Reply | None = None  # None: nothing may be sent
    argv: Sequence[str] = ()
    env: Mapping[str, str | None] | None = None


class TestDocument(OutputCase):
    """With --json exactly one object on stdout, whatever happens."""

    def test_one_object_in_every_outcome(self) -> None:
        (self.work / "taken.png").write_bytes(b"mine")
        no_key = {"GPT_IMAGE2_BASE_URL": "https://relay.example/v1", "GPT_IMAGE2_API_KEY": None}
        outcomes: dict[str, Outcome] = {
            "saved": Outcome(0, answer(PICTURE)),
            "fewer": Outcome(9, answer(PICTURE), ["-n", "2"]),
            "none whole": Outcome(10, BAD),
            "refused": Outcome(1, refusal(400, None, "no")),
            "policy": Outcome(5, refusal(400, "moderation_blocked", "no")),
            "unknown": Outcome(8, Reply(500)),
            "broken line": Outcome(8, Reply(silent=True)),
            "unknown option": Outcome(2, None, ["--colour", "red"]),
            "missing value": Outcome(2, None, ["--size"]),
            "not a number": Outcome(2, None, ["-n", "two"]),
            "illegal size": Outcome(2, None, ["-s", "100x100"]),
            "name taken": Outcome(2, None, ["-o", "taken.png"]),
            "no key": Outcome(3, None, [], no_key),
            "no curl": Outcome(3, None, [], {"PATH": str(self.work)}),
        }
        running = []
        for outcome in outcomes.values():
            self.serve_base(*([outcome.reply] if outcome.reply else []))
            running.append(self.start("--new", "--json", *outcome.argv, env=outcome.env))
        for (name, outcome), tool, api in zip(outcomes.items(), running, self.servers):
            with self.subTest(name):
                run = self.check(self.finish(tool), outcome.code)
                self.assertEqual(len(api.posts), 1 if outcome.reply else 0)
                self.check_document(run)

    def check_document(self, run: Run) -> None:
        """Assert that a document is one line, and says what the exit code says."""
        self.assertEqual(run.raw_out.count(b"\n"), 1, run)
        self.assertEqual((run.json["schema"], run.json["ok"]), (1, run.code == 0))
        self.assertEqual(len(run.json["images"]), 1 if run.code in (0, 9) else 0)
        error = run.json["error"]
        if run.code == 0:
            self.assertIsNone(error)
        else:
            self.assertEqual(error["exit_code"], run.code)
            self.assertTrue(error["code"] and error["message"])
            self.assertIs(error["maybe_billed"], run.code == 8)

    def test_a_document_without_a_known_command(self) -> None:
        for argv in (["--json"], ["genrate", "--json"], ["--json", "generate", "a fox"]):
            with self.subTest(argv):
                run = self.run_tool(*argv)
                self.assertEqual(self.check(run, 2).json["error"]["exit_code"], 2)


class TestForging(OutputCase):
    """No server can put a line of its own among ours, or steer a terminal."""

    def check_clean(self, run: Run, saved: int) -> None:
        """Assert that the output holds our lines only."""
        text = run.out + run.err
        self.assertEqual(len(re.findall("^Saved:", text, re.MULTILINE)), saved, run)
        for character in sorted(set(text) - {"\n"}):
            self.assertTrue(character.isprintable(), f"{character!r} in {run}")

    def test_in_every_text_of_an_error(self) -> None:
        replies = {
            "message": refusal(400, None, HOSTILE),
            "code": refusal(400, HOSTILE, "no", type=HOSTILE),
            "string": json_reply({"error": HOSTILE}, 400),
            "detail": json_reply({"detail": [HOSTILE, {HOSTILE: 1}]}, 400),
            "body": Reply(400, HOSTILE.encode()),
            "inside a 200": refusal(200, "server_error", HOSTILE),
            "a body that is no JSON": Reply(200, HOSTILE.encode()),
            "location": Reply(
                302, headers=[("Location", "https://a.example/\x1b[2K\u202e\x9b\x85")]
            ),
            "server error": refusal(500, HOSTILE, HOSTILE),
            "link": answer(f"ftp://a.example/{HOSTILE}"),
        }
        running = []
        for reply in replies.values():
            self.serve_base(reply)
            running.append(self.start("--new", "--json", "--verbose"))
        for name, tool in zip(replies, running):
            with self.subTest(name):
                self.check_clean(self.finish(tool), 0)

    def test_beside_a_picture(self) -> None:
        reply = answer(
            PICTURE,
            revised_prompt=HOSTILE,
            usage={HOSTILE: HOSTILE, "total_tokens": HOSTILE},
            output_format=HOSTILE,
            size=HOSTILE,
        )
        headers = [("X-Request-Id", "r\x1b[1m\u202e\x9b"), ("Content-Type", "\x1b[2K")]
        for flags, saved in (["--verbose"], 1), (["--verbose", "--json"], 0):
            with self.subTest(flags):
                self.serve_base(reply._replace(headers=headers))
                self.check_clean(self.check(self.ask(*flags), 0), saved)

    def test_a_revised_prompt_stays_what_it_is_in_the_document(self) -> None:
        self.serve_base(answer(PICTURE, revised_prompt=HOSTILE))
        run = self.check(self.ask("--json"), 0)
        self.assertIn("fox", run.json["images"][0]["revised_prompt"])
        self.assertNotIn("Saved", self.listing()[0])


# ---- Where it goes ----------------------------------------------------------------------------


class TestNeverOverwritten(OutputCase):
    """A name that is taken meanwhile stays whoever's it is."""

    def test_a_target_that_appears_meanwhile(self) -> None:
        def file() -> None:
            (self.work / "file.png").write_bytes(b"mine")

        def folder() -> None:
            (self.work / "folder.png").mkdir()

        def link() -> None:
            (self.work / "link.png").symlink_to(self.work / "nowhere.png")

        for act in (file, folder, link):
            name = act.__name__
            with self.subTest(name):
                self.meanwhile(act)
                run = self.check(self.ask("-o", f"{name}.png"), 0)
                self.assertEqual([path.name for path in run.saved], [f"{name}-2.png"])
                self.assertEqual(self.read(f"{name}-2.png"), PICTURE)
                self.assertIn(f"{name}-2.png", run.err)
        self.assertEqual(self.read("file.png"), b"mine")
        self.assertFalse((self.work / "nowhere.png").exists())
        self.assertEqual(self.jobs(), [])

    def test_names_in_a_row_that_appear_meanwhile(self) -> None:
        def others() -> None:
            for name in ("fox-2.png", "fox-1-2.png"):
                (self.work / name).write_bytes(b"mine")

        self.meanwhile(others, answer(PICTURE, LARGE))
        run = self.check(self.ask("-n", "2", "-o", "fox.png"), 0)
        self.assertEqual([path.read_bytes() for path in run.saved], [PICTURE, LARGE])
        self.assertEqual(self.read("fox-2.png") + self.read("fox-1-2.png"), b"minemine")

    def test_force_replaces_a_file_only_by_a_whole_picture(self) -> None:
        fox = self.work / "fox.png"
        fox.write_bytes(b"old")
        seen = []
        self.meanwhile(lambda: seen.append(fox.read_bytes()), BAD)
        self.check(self.ask("-o", "fox.png", "--force"), 10)
        self.assertEqual((seen, fox.read_bytes()), ([b"old"], b"old"))
        self.serve_base(Reply(500))
        self.check(self.ask("-o", "fox.png", "--force", "--new"), 8)
        self.assertEqual(fox.read_bytes(), b"old")
        self.serve_base(answer(PICTURE))
        self.check(self.ask("-o", "fox.png", "--force", "--new"), 0)
        self.assertEqual((fox.read_bytes(), self.listing()), (PICTURE, ["fox.png"]))

    def test_force_replaces_a_link_not_what_it_points_to(self) -> None:
        (self.work / "old.png").write_bytes(b"old")
        (self.work / "fox.png").symlink_to("old.png")
        self.serve_base(answer(PICTURE))
        self.check(self.ask("-o", "fox.png", "--force"), 0)
        self.assertEqual((self.read("fox.png"), self.read("old.png")), (PICTURE, b"old"))

    def test_thirty_at_once_under_one_name_lose_nothing(self) -> None:
        count, all_asked = 30, threading.Event()

        def own_picture(request: Request) -> Reply:
            return answer(png(8, 8, seed=int(request.json["prompt"])))._replace(before=all_asked)

        api = self.serve_base(otherwise=own_picture)
        tools = [
            self.start_tool("generate", str(number), "-o", "fox.png") for number in range(count)
        ]
        api.wait_for_request(count, timeout=60)
        all_asked.set()
        for number, tool in enumerate(tools):
            (path,) = self.check(self.finish(tool), 0).saved
            self.assertEqual(path.read_bytes(), png(8, 8, seed=number))
        self.assertEqual(len(self.listing()), count)
        self.assertIn("fox.png", self.listing())
        self.assertEqual(self.jobs(), [])


class TestFolders(OutputCase):
    """Folders that vanish, fill up or refuse."""

    def test_modes_follow_the_umask(self) -> None:
        self.plain = True
        self.serve_base(*[answer(PICTURE)] * 3)
        for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
            with self.subTest(oct(umask)):
                before = os.umask(umask)
                try:
                    run = self.check(self.ask(), 0)
                finally:
                    os.umask(before)
                self.assertEqual(run.saved[0].stat().st_mode & 0o777, mode)

    def test_missing_folders_are_made_and_only_for_a_picture(self) -> None:
        self.serve_base(refusal(400, None, "no"), answer(PICTURE))
        self.check(self.ask("-o", "a/b/fox.png"), 1)
        self.assertEqual(list(self.work.iterdir()), [])
        self.check(self.ask("-o", "a/b/fox.png"), 0)
        self.assertEqual(self.read("a/b/fox.png"), PICTURE)

    def test_a_folder_removed_meanwhile_is_made_again(self) -> None:
        out = self.work / "out"
        out.mkdir()
        self.meanwhile(out.rmdir)
        run = self.check(self.ask("-o", "out/fox.png"), 0)
        self.assertEqual((run.saved, self.read("out/fox.png")), ([out / "fox.png"], PICTURE))

    def test_a_working_folder_removed_meanwhile(self) -> None:
        here = self.work / "here"
        here.mkdir()
        self.meanwhile(here.rmdir)
        run = self.check(self.ask(cwd=here), 0)
        self.assertEqual(run.saved[0].read_bytes(), PICTURE)

    def check_fallback(self, run: Run, *pictures: bytes) -> None:
        """Assert that the pictures are in the job folder, that it is said, and can be recovered."""
        self.check(run, 9)
        (job,) = self.jobs()
        self.assertEqual([path.parent for path in run.saved], [job] * len(pictures))
        self.assertEqual([path.read_bytes() for path in run.saved], list(pictures))
        self.assertIn(str(job), run.err)
        self.assertRegex(run.err, rf"Recover: .* recover {job.name}\n$")
        recovered = self.recover("--output-dir", str(self.work / "recovered"))
        self.assertEqual([path.read_bytes() for path in recovered.saved], list(pictures))
        self.assertEqual(self.jobs(), [])

    def test_a_folder_that_became_a_file_meanwhile(self) -> None:
        out = self.work / "out"
        out.mkdir()

        def swap() -> None:
            out.rmdir()
            out.write_bytes(b"mine")

        self.meanwhile(swap, answer(PICTURE, LARGE))
        self.check_fallback(self.ask("-n", "2", "-o", "out/fox.png"), PICTURE, LARGE)
        self.assertEqual(out.read_bytes(), b"mine")

    @unittest.skipIf(os.geteuid() == 0, "root may write in read-only folders")
    def test_a_folder_that_became_read_only_meanwhile(self) -> None:
        out = self.work / "out"
        out.mkdir()
        self.meanwhile(lambda: out.chmod(0o500))
        self.check_fallback(self.ask("-o", "out/fox.png"), PICTURE)

    def test_a_disk_that_turned_read_only_meanwhile(self) -> None:
        with self.small_disk() as disk:
            self.meanwhile(lambda: mount("-o", "remount,ro", str(disk)))
            self.check_fallback(self.ask("-o", str(disk / "fox.png")), PICTURE)

    def test_a_full_disk(self) -> None:
        with self.small_disk() as disk:
            self.serve_base(answer(LARGE))
            self.check_fallback(self.ask("-o", str(disk / "fox.png")), LARGE)
            self.assertEqual(list(disk.iterdir()), [], "nothing half-written stays")

    def test_a_full_disk_keeps_what_fits(self) -> None:
        with self.small_disk() as disk:
            self.serve_base(answer(PICTURE, LARGE, PICTURE))
            run = self.check(self.ask("-n", "3", "-o", str(disk / "fox.png")), 9)
            self.assertEqual([p.read_bytes() for p in run.saved], [PICTURE, LARGE, PICTURE])
            self.assertEqual([p.parent == disk for p in run.saved], [True, False, True])

    @contextlib.contextmanager
    def small_disk(self) -> Iterator[Path]:
        """Mount a file system of 64 KB; skips the test where that isn't permitted."""
        disk = self.tmp / "disk"
        disk.mkdir()
        if not mount("-t", "tmpfs", "-o", "size=64k", "none", str(disk)):
            self.skipTest("mounting a small tmpfs isn't permitted here")
        try:
            yield disk
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def mount(*argv: str) -> bool:
    """Run mount and return whether it could."""
    try:
        return subprocess.run(["mount", *argv], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


# ---- Streams ----------------------------------------------------------------------------------

NO_READER = """
import os, sys
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
os.execv(sys.argv[1], sys.argv[1:])
"""


def shell(line: str) -> list[str]:
    """Return the command that starts what follows it by a line of sh."""
    return ["sh", "-c", line, "sh"]


BENDS = {  # standard streams bent out of shape, and what does it
    "stdout closed": shell('exec "$@" >&-'),
    "stdout full": shell('exec "$@" >/dev/full'),
    "stdout without reader": [sys.executable, "-IS", "-c", NO_READER],
    "stderr closed": shell('exec "$@" 2>&-'),
    "stderr full": shell('exec "$@" 2>/dev/full'),
    "all closed": shell('exec "$@" <&- >&- 2>&-'),
}


@unittest.skipUnless(os.path.exists("/dev/full"), "this system has no /dev/full")
class TestStreams(OutputCase):
    """The pictures are saved whatever became of stdout and stderr."""

    def test_pictures_are_saved_without_streams(self) -> None:
        calls = [(name, flags) for name in BENDS for flags in ([], ["--json"])]
        running = []
        for name, flags in calls:
            self.launcher = BENDS[name]
            self.serve_base(answer(PICTURE, LARGE))
            folder = " ".join([name, *flags])
            running.append(self.start("-n", "2", "--output-dir", folder, *flags))
        for (name, flags), tool in zip(calls, running):
            with self.subTest(name, flags=flags):
                run = self.check(self.finish(tool), 0)
                found = (self.work / " ".join([name, *flags])).iterdir()
                self.assertEqual({path.read_bytes() for path in found}, {PICTURE, LARGE})
                if name.startswith("stderr"):
                    self.assertEqual(len(run.out.splitlines()), 1 if flags else 2)
        self.assertEqual(self.jobs(), [])

    def test_an_error_keeps_its_exit_code_without_streams(self) -> None:
        for name in ("stdout without reader", "stderr full", "all closed"):
            with self.subTest(name):
                self.launcher = BENDS[name]
                self.serve_base(refusal(401, "invalid_api_key", "no"))
                self.check(self.ask(), 4)

    def test_an_ascii_locale(self) -> None:
        plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        for number, env in enumerate((plain, {**plain, "PYTHONIOENCODING": "ascii:strict"})):
            with self.subTest(number):
                self.serve_base(answer(PICTURE))
                run = self.check(self.ask("-o", f"图-{number}.png", env=env), 0)
                self.assertIn(f"Saved: {self.work}/图-{number}.png (".encode(), run.raw_out)
                self.assertEqual(self.read(f"图-{number}.png"), PICTURE)

    def test_a_name_that_is_not_utf_8(self) -> None:
        name = os.fsdecode(b"f\xff\xe9x.png")
        self.serve_base(answer(PICTURE), answer(PICTURE))
        run = self.check(self.ask("-o", name), 0)
        self.assertIn(b"/f\xff\xe9x.png (", run.raw_out)
        self.assertEqual(run.saved[0].read_bytes(), PICTURE)
        document = self.check(self.ask("-o", name, "--force", "--json"), 0).json
        self.assertEqual(Path(document["images"][0]["path"]).read_bytes(), PICTURE)

    def test_the_picture_itself_on_stdout(self) -> None:
        self.serve_base(answer(LARGE))
        run = self.check(self.ask("-o", "-"), 0)
        self.assertEqual(run.raw_out, LARGE)
        self.assertIn("Saved: ", run.err)
        self.assertEqual((self.listing(), self.jobs()), ([], []))

    def test_a_picture_that_stdout_did_not_take_is_kept(self) -> None:
        for name in ("stdout closed", "stdout full", "stdout without reader"):
            with self.subTest(name):
                self.launcher = BENDS[name]
                self.serve_base(answer(LARGE))
                run = self.check(self.ask("-o", "-"), 10)
                self.assertRegex(run.err, r"Recover: .* recover \S+\n$")
                self.launcher = ()
                self.recover("-o", f"{name}.png")
                self.assertEqual(self.read(f"{name}.png"), LARGE)
                self.assertEqual(self.jobs(), [])

    def test_a_reader_that_leaves_halfway(self) -> None:
        self.serve_base(answer(LARGE))
        tool = self.start_tool("generate", "a fox", "-o", "-")
        assert tool.stdout and tool.stderr
        self.assertEqual(tool.stdout.read(8), LARGE[:8])
        tool.stdout.close()
        self.assertIn(b"Recover: ", tool.stderr.read())
        self.assertEqual(tool.wait(20), 10)
        self.recover("-o", "fox.png")
        self.assertEqual(self.read("fox.png"), LARGE)
