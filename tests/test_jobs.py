"""Jobs: the folder that keeps a request and its answer, resuming, recover, and signals.

What each fault and each signal at each moment comes to (exit code, images, what recover brings)
stands in the fault table, tests/faults.py; here is what that can't show.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import gpt_image2
from tests.case import Argument, Case, Child, Run, SystemCase
from tests.images import png
from tests.server import KEY, Api, Reply, answer, b64, json_reply, refusal

FIRST, SECOND, THIRD = (png(40, 30 + i, seed=i) for i in range(3))  # about 4 KB each
NAMES = {FIRST: "first", SECOND: "second", THIRD: "third"}

FOX = ("generate", "a fox")
FOXES = (*FOX, "--n", "3")
THREE = answer(FIRST, SECOND, THIRD)
MIDDLE = THREE.body.index(b64(THIRD).encode()) + 2000  # two images are whole here
CUT = THREE._replace(cut=MIDDLE)
SILENT = Reply(silent=True)


class JobCase(SystemCase):
    """A case with calls that are waited for, killed or kept."""

    def mid_answer(self) -> tuple[Child[bytes], threading.Event]:
        """Start a call; return it once it has two of three images, and what lets it go on.

        Every byte is on disk by then, not in a buffer of curl's, which would go with it.
        """
        release = threading.Event()
        self.serve_base(THREE._replace(chunks=[THREE.body[:MIDDLE], release, THREE.body[MIDDLE:]]))
        tool = self.start_tool(*FOXES)
        self.wait_until(lambda: self.answered() >= MIDDLE)
        return tool, release

    def killed(self, api: Api, *argv: Argument) -> None:
        """Start a call, and kill its script while the server has its request; its curl goes on."""
        posts = len(api.posts)
        tool = self.start_tool(*argv)
        api.wait_for_request(posts + 1)
        self.kill(tool)

    def kill(self, tool: Child[bytes]) -> None:
        """End a script, and not its curl."""
        tool.kill()
        self.finish(tool)

    def under_way(self) -> tuple[Api, Path, threading.Event]:
        """Return a killed call whose curl waits: server, job folder, and what lets it answer."""
        release = threading.Event()
        api = self.serve_base(answer(FIRST)._replace(before=release))
        self.killed(api, *FOX)
        (job,) = self.jobs()
        return api, job, release

    def kept(self, reply: Reply = CUT, code: int = 8, *options: Argument) -> Path:
        """Return the folder of a call that ended and left its job."""
        before = set(self.jobs_anywhere())
        self.serve_base(reply)
        self.check(self.run_tool(*FOXES, "--new", *options), code)
        (job,) = set(self.jobs_anywhere()) - before
        return job

    def recover(self, *argv: Argument, code: int = 0) -> Run:
        """Run recover; assert its exit code, and that it sent no POST."""
        posts = [len(api.posts) for api in self.servers]
        run = self.check(self.run_tool("recover", *argv), code)
        self.assertEqual([len(api.posts) for api in self.servers], posts, self.story(run))
        return run

    def waiting_recover(self, job: Path) -> Child[bytes]:
        """Start recover, and return it once it holds the job."""
        tool = self.start_tool("recover", job.name)
        self.wait_until(lambda: "recovering" in (job / "job.json").read_text())
        return tool

    def images(self, *runs: Run) -> list[str]:
        """Return the names of the images at the `Saved:` lines, sorted."""
        paths = [path for run in runs for path in run.saved]
        return sorted(NAMES.get(path.read_bytes(), str(path)) for path in paths)

    def let_come(self, release: threading.Event) -> None:
        """Let a server answer, and wait until every curl of this test has all of it."""
        release.set()
        self.wait_until(lambda: not self.processes("curl"))


# ---- The folder -------------------------------------------------------------------------------


class TestFolder(JobCase):
    """One folder a request: made before the POST, closed to others, kept without the key."""

    def test_while_the_answer_comes_it_is_the_calls_alone_and_without_the_key(self) -> None:
        """Whatever the umask; neither recover nor its --clean takes it away."""
        self.shell('umask 0; exec "$@"')
        tool, release = self.mid_answer()
        (job,) = self.jobs()
        self.hear(tool, f"Job: {job.name}\n")
        paths = [job, *job.iterdir()]
        self.assertLessEqual({"body.json", "response.json", "headers.txt"}, {p.name for p in paths})
        modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in paths}
        self.assertEqual(modes, {p.name: "0o700" if p == job else "0o600" for p in paths})
        self.assertEqual(self.files_with(KEY), [])
        self.assertRegex(self.recover(job.name, "--no-wait", code=10).err, "running")
        self.recover("--clean", "--older-than", "0s")
        release.set()
        run = self.check(self.finish(tool), 0)
        self.assertEqual(self.images(run), ["first", "second", "third"])

    def test_its_files_are_the_owners_whatever_the_umask(self) -> None:
        path = self.tmp / "new"
        before = os.umask(0o777)
        try:
            gpt_image2.private_file(str(path), b"text")
        finally:
            os.umask(before)
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600)

    def test_two_of_one_name(self) -> None:
        """The same request, second and random number: the earlier answer stays untouched."""
        then = time.gmtime(1_790_000_000)
        draws, real = [b"ab", b"ab", b"cd"], os.urandom

        def drawn(size: int) -> bytes:
            return draws.pop(0) if size == 2 else real(size)

        with mock.patch("time.gmtime", return_value=then), mock.patch("os.urandom", drawn):
            first = self.kept()
            second = self.kept(answer(SECOND, THIRD[:1000]), 9)
        self.assertEqual(draws, [])
        self.assertEqual(first.name[:-4], second.name[:-4])
        self.assertEqual(self.images(self.recover(first.name, code=9)), ["first", "second"])

    def test_the_last_line_runs_as_it_stands(self) -> None:
        """Wherever the script lies, and wherever the line is run."""
        place = self.new_folder("it's a $(bad) place")
        self.script = Path(shutil.copy(self.script, place))
        self.serve_base(CUT)
        run = self.check(self.run_tool(*FOXES, "--quiet", "--json"), 8)
        (job,) = self.jobs()
        self.assertEqual((run.json["job_id"], run.json["recover_id"]), (job.name, job.name))
        last = run.err.splitlines()[-1]
        self.assertRegex(last, f"^Recover: .* recover {job.name}$")
        command = ["sh", "-c", last[len("Recover: ") :]]
        done = subprocess.run(
            command, env=self.env, cwd=self.home, capture_output=True, check=False
        )
        rescued = self.check(Run(command, done.returncode, done.stdout, ""), 9)
        self.assertEqual(self.images(rescued), ["first", "second"])

    def test_an_answer_without_a_byte_is_kept_but_not_offered(self) -> None:
        self.serve_base(SILENT)
        run = self.check(self.run_tool(*FOX, "--json"), 8)
        self.assertEqual(run.json["job_id"], self.jobs()[0].name)
        self.assertIsNone(run.json["recover_id"])
        self.assertNotIn("Recover:", run.err + self.recover("--last", code=10).err)

    def test_an_echo_of_the_key_is_blanked_and_nothing_else(self) -> None:
        """Also one that ends beyond a window of the file, of any power of two."""
        gaps = [(1 << power) - len(KEY) // 2 for power in range(12, 23)]
        body = b"".join(b"{" + b"x" * (gap - 1) + KEY.encode() for gap in gaps) + KEY.encode()
        job = self.kept(Reply(200, body, [("X-Echo", f"Bearer {KEY}")]))
        kept = (job / "response.json").read_bytes()
        self.assertTrue(kept == body.replace(KEY.encode(), b"*" * len(KEY)))
        self.assertEqual(self.files_with(KEY), [])
        self.assertNotIn(KEY, str(self.recover(job.name, code=10)))

    def test_what_is_empty_goes_after_a_week(self) -> None:
        """So does what never had a record: its script was killed while it made the folder."""
        for name, reply, days, has_record, stays in (
            ("empty, old", SILENT, 7.1, True, False),
            ("empty", SILENT, 6.9, True, True),
            ("with an answer, old", CUT, 30, True, True),
            ("without a record, old", SILENT, 7.1, False, False),
            ("without a record", SILENT, 6.9, False, True),
        ):
            with self.subTest(name):
                job = self.aged(self.kept(reply), days)
                if not has_record:
                    (job / "job.json").unlink()
                self.serve_base(answer(FIRST))
                self.check(self.run_tool("generate", "a hen"), 0)
                self.assertEqual(self.jobs(), [job] if stays else [])
                shutil.rmtree(job, ignore_errors=True)


class TestNoTemporaryFolder(Case):
    """A container that can write in its state folder only, and knows no home."""

    def test_batch_and_check_use_the_state_folder(self) -> None:
        self.serve_base(answer(png(64, 48)))
        (self.work / "jobs.txt").write_text("a fox\n")
        fault = FileNotFoundError(2, "No usable temporary directory found")
        with mock.patch("tempfile.gettempdir", side_effect=fault):
            self.check(self.run_tool("batch", "jobs.txt"), 0)
            self.assertIn("state   ok", self.run_tool("config", "--check").out)

    def test_without_a_home_no_folder_is_named_tilde(self) -> None:
        self.serve_base(answer(png(64, 48)))
        for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
            self.env.pop(name)
        with mock.patch("os.path.expanduser", side_effect=str):  # as without HOME and passwd entry
            self.check(self.run_tool("generate", "x", "-o", "x.png"), 0)
            self.assertIn("no home", self.check(self.run_tool("config", "--init"), 2).err)
            run = self.run_tool("generate", "x", "-o", "~/x.png")
        self.assertIn("no home", self.check(run, 2).err)
        self.assertEqual([path.name for path in self.work.iterdir()], ["x.png"])
        self.assertTrue((self.tmp / "tmp" / f"gpt-image-2-{os.getuid()}" / "jobs").is_dir())


class TestPlace(JobCase):
    """Where jobs are kept if the state folder can't take them: below TMPDIR, if that is ours."""

    def test_below_tmpdir_where_that_folder_is_ours_alone(self) -> None:
        """What another user may have put there, or may read, is neither used nor shown."""
        uid = self.tmp.stat().st_uid
        spare = self.tmp / "tmp" / f"gpt-image-2-{uid}"
        elsewhere = self.new_folder("elsewhere") / "state"
        (self.tmp / "file").write_bytes(b"")
        self.env["XDG_STATE_HOME"] = str(self.tmp / "file" / "state")
        job = self.kept()
        self.assertEqual(job.parent, spare / "jobs")
        self.assertEqual([stat.S_IMODE(p.stat().st_mode) for p in (spare, job.parent)], [0o700] * 2)
        self.assertIn(job.name, self.recover().out)
        self.assertEqual(self.images(self.recover("--last", code=9)), ["first", "second"])

        def check_refused(name: str) -> None:
            with self.subTest(name):
                api = self.serve_base()
                self.check(self.run_tool(*FOX), 3)
                self.no_request(api)
                self.assertNotIn(job.name, self.recover().out)

        for mode in (0o740, 0o702):
            spare.chmod(mode)
            check_refused(oct(mode))
        spare.chmod(0o700)
        spare.rename(elsewhere)
        spare.symlink_to(elsewhere)
        check_refused("a link")
        elsewhere.rename(spare.with_name(f"gpt-image-2-{uid + 1}"))
        with mock.patch("os.getuid", return_value=uid + 1):
            check_refused("another user's")

    def test_a_tmpdir_that_is_gone(self) -> None:
        """As in a sandbox of an agent: another temporary folder is found."""
        other = self.new_folder("other")
        (self.tmp / "file").write_bytes(b"")
        unusable = str(self.tmp / "file")
        self.env.update(XDG_STATE_HOME=f"{unusable}/state", TMPDIR=unusable)
        self.serve_base(answer(FIRST))
        with mock.patch("tempfile.tempdir", str(other)):
            self.check(self.run_tool(*FOX, env={"TEMP": str(other)}), 0)
        self.assertEqual(len(list(other.glob("gpt-image-2-*/jobs"))), 1)

    def test_without_a_home_too_it_must_be_ours_alone(self) -> None:
        self.env.pop("XDG_STATE_HOME")
        with mock.patch("os.path.expanduser", side_effect=str):  # as without HOME and passwd entry
            self.serve_base(CUT)
            document = self.check(self.run_tool(*FOXES, "--json"), 8).json
            spare = self.tmp / "tmp" / f"gpt-image-2-{os.getuid()}"
            self.assertIn(document["job_id"], self.recover().out)
            spare.chmod(0o770)
            self.assertNotIn(document["job_id"], self.recover().out)

    def test_where_file_locks_do_not_work_there(self) -> None:
        """They fail, or exclude nobody."""
        import fcntl

        real = fcntl.flock
        for name, error in (("fail", OSError(errno.ENOLCK, "No locks available")), ("pass", None)):

            def flock(file: Any, how: int, error: OSError | None = error) -> None:
                if not file.name.startswith(str(self.state)):
                    real(file, how)
                elif error:
                    raise error

            with self.subTest(name), mock.patch("fcntl.flock", flock):
                job = self.kept()
                self.assertEqual((self.jobs(), job.parent.parent.parent), ([], self.tmp / "tmp"))
                self.serve_base(answer(FIRST))
                run = self.check(self.run_tool(*FOX), 0)
                self.assertRegex(run.err, f"warning: .*lock.* {self.state}/.* stored in {self.tmp}")

    def test_a_state_folder_that_cannot_be_read_is_not_called_empty(self) -> None:
        self.kept()
        jobs = self.state / "gpt-image-2" / "jobs"
        jobs.chmod(0)
        self.heed_permissions()
        for words in ([], ["--last"], ["--all"], ["--clean"]):
            with self.subTest(words):
                self.assertRegex(self.recover(*words, code=3).err, "cannot read /.*permission")


# ---- Resuming ---------------------------------------------------------------------------------


class TestResumed(JobCase):
    """A call whose script was killed is finished by the same command, and by no other."""

    def setUp(self) -> None:
        super().setUp()
        self.release = threading.Event()

    def held(self, *replies: Reply | bytes) -> Api:
        """Serve replies, or one image each, once self.release is set."""
        whole = (answer(reply) if isinstance(reply, bytes) else reply for reply in replies)
        return self.serve_base(*(reply._replace(before=self.release) for reply in whole))

    def resumed(self, *argv: Argument, code: int = 0) -> Run:
        """Run a command that must finish another's job, and send nothing."""
        posts = len(self.servers[-1].posts)
        run = self.check(self.run_tool(*argv), code)
        self.assertIn("resumed", run.err)
        self.assertEqual(len(self.servers[-1].posts), posts)
        return run

    def test_an_answer_that_came_meanwhile_is_finished(self) -> None:
        """However the same prompt, output and input bytes are given."""
        for name in ("in.png", "copy.png"):
            (self.work / name).write_bytes(png(64, 64))
        self.killed(self.held(FIRST), "edit", "in.png", "a fox", "-o", "out/../fox.png")
        self.let_come(self.release)
        run = self.resumed("edit", "copy.png", "--prompt", "a fox", "-o", "fox.png")
        self.assertEqual(run.saved, [self.work / "fox.png"])
        self.assertEqual((self.images(run), self.jobs()), (["first"], []))

    def test_another_request_is_sent(self) -> None:
        (self.work / "in.png").write_bytes(png(64, 64))
        edit = ("edit", "in.png", "a fox")
        for name, first, second in (
            ("prompt", FOX, ("generate", "a red fox")),
            ("output", FOX, (*FOX, "-o", "other.png")),
            ("folder", FOX, (*FOX, "--output-dir", "other")),
            ("forced by --new", FOX, (*FOX, "--new")),
            ("input bytes", edit, edit),
            ("host", FOX, FOX),
        ):
            with self.subTest(name):
                self.release.clear()
                self.killed(self.held(FIRST), *first)
                self.let_come(self.release)
                if first == edit:
                    (self.work / "in.png").write_bytes(png(64, 64, rgb=(1, 2, 3)))
                if name == "host":
                    self.serve_base()
                self.servers[-1].script.append(answer(SECOND))
                run = self.check(self.run_tool(*second), 0)
                self.assertNotIn("resumed", run.err)
                self.assertEqual(self.images(run), ["second"])
                self.assertEqual(self.images(self.recover("--last")), ["first"])

    def test_each_answer_is_finished_once(self) -> None:
        """Three calls at once, of which two are killed; then three more, of which one sends."""
        api = self.held(FIRST, SECOND, THIRD, FIRST)
        living, *others = (self.start_tool(*FOX) for _ in range(3))
        api.wait_for_request(3)
        for tool in others:
            self.kill(tool)
        again = [self.start_tool(*FOX) for _ in range(3)]
        api.wait_for_request(4)
        self.release.set()
        runs = [self.check(self.finish(tool), 0) for tool in (living, *again)]
        self.assertEqual(self.images(*runs), ["first", "first", "second", "third"])
        self.assertEqual(sum("resumed" in run.err for run in runs[1:]), 2)
        self.assertEqual((len(api.posts), self.jobs()), (4, []))

    def test_what_came_meanwhile_is_told_and_not_paid_again(self) -> None:
        self.killed(self.held(CUT), *FOXES)
        self.let_come(self.release)
        self.assertIn("--new", self.resumed(*FOXES, code=8).err)
        self.assertEqual(len(self.jobs()), 1)
        self.assertEqual(self.images(self.recover("--all", code=9)), ["first", "second"])

    def test_a_refusal_that_came_meanwhile_is_no_answer(self) -> None:
        """Its job goes, and a new request is sent: the key may be mended by now."""
        for name, reply in (
            ("key", refusal(401, "invalid_api_key", "No.")),
            ("key, cut", refusal(401, "invalid_api_key", "No.")._replace(cut=20)),
            ("policy", refusal(400, "moderation_blocked", "Blocked.")),
            ("an error in a 200", json_reply({"error": {"code": "insufficient_quota"}})),
            ("busy", refusal(429, "rate_limit_exceeded", "Slow.")),
        ):
            with self.subTest(name):
                self.release.clear()
                api = self.held(reply, FIRST)
                self.killed(api, *FOX, "-o", f"{name}.png")
                self.let_come(self.release)
                run = self.check(self.run_tool(*FOX, "-o", f"{name}.png"), 0)
                self.assertNotIn("resumed", run.err)
                self.assertEqual((self.images(run), self.jobs()), (["first"], []))
                self.assertEqual(len(api.posts), 2)

    def test_a_request_that_left_nothing(self) -> None:
        """Sent again with a warning, but not where it goes to the same explicit name."""
        for name, output, code, posts in (
            ("a generated name", (), 0, 2),
            ("a name, and paid again knowingly", ("-o", "a.png", "--retry-unsafe"), 0, 2),
            ("a name", ("-o", "fox.png"), 8, 1),
        ):
            with self.subTest(name):
                self.release.clear()
                api = self.held(SILENT)
                api.otherwise = answer(SECOND)
                self.killed(api, *FOX, *output)
                self.let_come(self.release)
                run = self.check(self.run_tool(*FOX, *output), code)
                self.assertNotIn("resumed", run.err)
                self.assertIn("billed", run.err)
                self.assertEqual(len(api.posts), posts)
        self.assertIn("--new", run.err)

    def test_a_call_that_lives_is_waited_for_where_both_name_one_file(self) -> None:
        """Its image is reported by both; what it leaves unfinished is finished by the other."""
        for name, reply, code, images in (
            ("whole", answer(FIRST), 0, ["first"]),
            ("cut", CUT, 8, []),
            ("refused", refusal(401, "invalid_api_key", "No."), 4, []),
        ):
            with self.subTest(name):
                self.release.clear()
                api = self.held(reply)
                api.otherwise = reply
                command = (*(FOXES if name == "cut" else FOX), "-o", f"{name}.png")
                first = self.start_tool(*command)
                api.wait_for_request(1)
                second = self.start_tool(*command, "--json")
                self.hear(second, f"is already under way (process {first.pid}); waiting for it")
                self.release.set()
                runs = [self.check(self.finish(tool), code) for tool in (first, second)]
                told = runs[1].json
                self.assertEqual(self.images(runs[0]), images)
                self.assertEqual(told["resumed"], name != "refused")
                found = [Path(image["path"]) for image in told["images"]]
                self.assertEqual(found, runs[0].saved)
                self.assertEqual(len(api.posts), 2 if name == "refused" else 1)

    def test_several_at_once_after_a_kill(self) -> None:
        """One finishes what the killed call left, or sends; the others report the same image."""
        command = (*FOX, "-o", "fox.png")
        for name, killed in (("a killed call", True), ("none", False)):
            with self.subTest(name):
                self.release.clear()
                api = self.held(FIRST)
                if killed:
                    self.killed(api, *command)
                tools = [self.start_tool(*command) for _ in range(3)]
                for tool in tools if killed else ():
                    self.hear(tool, "job ")
                api.wait_for_request(1)
                self.release.set()
                runs = [self.finish(tool) for tool in tools]
                self.assertEqual(len(api.posts), 1)
                for run in runs:  # a late one finds the name taken
                    self.check(run, 0 if run.saved else 2)
                self.assertEqual(set(self.images(*runs)), {"first"})
                self.assertEqual(self.listing(), ["fox.png"])
                (self.work / "fox.png").unlink()

    def test_one_call_at_a_time_looks_for_a_job_and_makes_one(self) -> None:
        lock, real, held = str(self.state / "gpt-image-2" / "lock"), gpt_image2.write_record, []

        def write_record(*parts: Any) -> None:
            held.append(gpt_image2.is_locked(lock))
            real(*parts)

        self.serve_base(answer(FIRST))
        with mock.patch("gpt_image2.write_record", write_record):
            self.check(self.run_tool(*FOX, "-o", "fox.png"), 0)
        self.assertEqual(held, [True])

    def test_a_list_hides_no_job(self) -> None:
        """Whoever looks whether a job is under way keeps nobody from taking it over."""
        import fcntl

        api, job, release = self.under_way()
        self.let_come(release)
        real, looks = fcntl.flock, [job / "lock"]

        def flock(file: Any, how: int) -> None:
            if how & fcntl.LOCK_EX and Path(file.name) in looks:
                looks.remove(Path(file.name))
                with open(file.name, "rb") as looking:
                    real(looking, fcntl.LOCK_SH)
                    real(file, how)
            real(file, how)

        with mock.patch("fcntl.flock", flock):
            run = self.check(self.run_tool(*FOX), 0)
        self.assertEqual(self.images(run), ["first"])
        self.assertEqual((len(api.posts), looks), (1, []))


class TestLastMoment(JobCase):
    """An answer ends, and its curl with it, just as somebody looks whether that curl lives.

    Who had looked for the answer before would take the job for one that left nothing.
    """

    def test_what_comes_then_is_not_lost(self) -> None:
        import fcntl

        real, now = fcntl.flock, time.time

        def flock(file: Any, how: int) -> None:
            if str(getattr(file, "name", file)).endswith("curl.txt"):
                self.let_come(release)
            real(file, how)

        for name, command in (
            ("the same command", FOX),
            ("the list", ("recover",)),
            ("a sweep", ("generate", "a hen")),
        ):
            api, job, release = self.under_way()
            api.otherwise = answer(SECOND)
            week = 8 * 86400 if name == "a sweep" else 0
            later = mock.patch("time.time", lambda week=week: now() + week)
            with self.subTest(name), later, mock.patch("fcntl.flock", flock):
                run = self.check(self.run_tool(*command), 0)
                self.assertNotIn("no response", run.out)
                if command != FOX:
                    run = self.recover(job.name)
                self.assertEqual(self.images(run), ["first"])
                self.assertEqual(len(api.posts), 2 if name == "a sweep" else 1)


# ---- recover ----------------------------------------------------------------------------------


class TestList(JobCase):
    """What is there to recover."""

    def test_neither_key_nor_config_is_needed(self) -> None:
        """One line a job, in which no prompt can forge anything, and any one by its id."""
        self.serve_base(CUT)
        prompt = "a\x1b[31m fox\nSaved: /etc/passwd (1 KB)\u202e"
        self.check(self.run_tool("generate", "-", "--n", "3", stdin=prompt), 8)
        jobs = [*self.jobs(), self.kept(), self.kept(SILENT)]
        del self.env["GPT_IMAGE2_API_KEY"], self.env["GPT_IMAGE2_BASE_URL"]
        for argv in ((), ("--list",)):
            lines = self.recover(*argv).out.splitlines()
            self.assertEqual(len(lines), 3)
            for job, line, state in zip(jobs, lines, ("response", "response", "no response")):
                self.assertRegex(line, rf"^{job.name} +{state}\b.*a.* fox\b[^\x1b\u202e]*$")
        document = self.recover("--json").json
        self.assertEqual((document["schema"], document["ok"]), (1, True))
        found = [(row["id"], row["prompt"]) for row in document["jobs"]]
        names = [job.name for job in jobs]
        self.assertEqual(found, list(zip(names, (prompt, "a fox", "a fox"))))
        document = self.recover(names[1], "--json", code=9).json
        self.assertEqual((document["job_id"], document["recover_id"]), (names[1], names[1]))
        saved = [Path(image["path"]).read_bytes() for image in document["images"]]
        self.assertEqual(saved, [FIRST, SECOND])


class TestChoosing(JobCase):
    """Which answers are saved, and where to."""

    def test_the_last(self) -> None:
        self.assertEqual(self.recover("--json").json["jobs"], [])
        self.assertIn("no kept", self.recover().err)
        self.assertIn("no kept", self.recover("--last").err)
        for first, second in ((FIRST, THIRD), (SECOND, THIRD), (THIRD, FIRST)):
            reply = answer(first, second)
            self.kept(reply._replace(cut=reply.body.index(b64(second).encode()) + 99))
            self.assertEqual(self.images(self.recover("--last", code=9)), [NAMES[first]])

    def test_all(self) -> None:
        """Exit 10 where nothing could be saved, 9 where something could, 0 where all is there."""
        api = self.serve_base()
        for name in "ab":
            api.script.append(answer(api.put(f"/{name}.png", Reply(404))))
            self.check(self.run_tool("generate", name), 10)
        jobs = {job.name for job in self.jobs()}
        document = self.recover("--all", "--json", code=10).json
        self.assertEqual((document["ok"], document["error"]["exit_code"]), (False, 10))
        self.assertEqual({job["job_id"] for job in document["jobs"]}, jobs)
        for name, image, code in (("a", FIRST, 9), ("b", SECOND, 0)):
            api.put(f"/{name}.png", image)
            self.assertEqual(self.images(self.recover("--all", code=code)), [NAMES[image]])
        self.assertEqual(self.jobs(), [])

    def test_each_image_once(self) -> None:
        """A job of which no more can come is named, left alone by --all, and removed by its id."""
        rescued = self.work / "rescued"
        for where in (("-o", "rescued/"), ("--output-dir", "rescued")):
            job, other = self.kept(), self.kept(SILENT)
            (other / "response.json").write_bytes(b"{}")
            run = self.recover(job.name, *where, code=9)
            self.assertIn(
                f"nothing more can be recovered; recover --clean {job.name} removes it", run.err
            )
            again = self.recover(job.name, *where, code=9)
            self.assertEqual((again.saved, len(self.listing(rescued))), (run.saved, 2))
            self.assertRegex(self.recover().out, f"{job.name}  recovered ")
            told = self.recover("--all", code=10).err
            self.assertIn(f"recover --clean {other.name} removes it", told)
            self.assertNotIn(job.name, told)
            self.recover("--clean", "nonsense", code=10)
            self.assertEqual(
                self.recover("--clean", other.name, "--json").json["removed"], [other.name]
            )
            self.assertIn("nothing more can be recovered from 1 job", self.recover("--all").err)
            self.recover("--clean", "--older-than", "0s")
            self.assertEqual(self.jobs(), [])
            shutil.rmtree(rescued)

    def test_one_shape_of_every_document(self) -> None:
        jobs = [
            self.kept().name,
            self.kept(CUT._replace(cut=CUT.body.index(b64(SECOND).encode()))).name,
        ]
        for argv, code, counts in (
            ((), 0, [0, 0]),
            (("--all",), 9, [2, 1]),
            (jobs, 9, [2, 1]),
            ((jobs[0],), 9, [2]),
            (("--last",), 0, []),
            (("--clean",), 0, []),
        ):
            with self.subTest(argv):
                document = self.recover(*argv, "--json", code=code).json
                self.assertEqual([len(job["images"]) for job in document["jobs"]], counts)
                self.assertEqual(
                    document["images"], [one for job in document["jobs"] for one in job["images"]]
                )
                self.assertEqual([job["id"] for job in document["jobs"]], jobs[: len(counts)])
                for job in document["jobs"]:
                    self.assertEqual((job["command"], job["prompt"]), FOX)
                    self.assertEqual(job["error"] and job["error"]["exit_code"], code or None)

    def test_an_unknown_id(self) -> None:
        self.kept()
        for name in ("20200101T000000Z-0123456789ab", "nonsense", "..", "../jobs", "/etc"):
            with self.subTest(name):
                self.assertIn(name, self.recover(name, code=10).err)
        self.assertEqual(len(self.jobs()), 1)

    def test_places(self) -> None:
        """Without options where the call would have put it; never over another file, unasked."""
        there = self.work / "there"
        taken = there / "b-1.png"
        for name, of_the_call, options, wanted in (
            ("as planned", ("-o", "there/a.png"), (), ["a-1.png", "a-2.png"]),
            ("a name is taken", ("-o", "there/b.png"), (), ["b-1-2.png", "b-2.png"]),
            ("a file", (), ("-o", there / "c.png"), ["c-1.png", "c-2.png"]),
            ("replaced", (), ("-o", there / "b.png", "--force"), ["b-1.png", "b-2.png"]),
            ("a folder", (), ("--output-dir", there), None),
        ):
            with self.subTest(name):
                job = self.kept(CUT, 8, *of_the_call)
                taken.parent.mkdir(exist_ok=True)
                taken.write_bytes(b"mine")
                run = self.check(self.run_tool("recover", job.name, *options, cwd=self.home), 9)
                self.assertEqual(self.images(run), ["first", "second"])
                self.assertEqual([path.name for path in run.saved], wanted or mock.ANY)
                self.assertEqual({path.parent for path in run.saved}, {taken.parent})
                self.assertEqual(taken.read_bytes() == b"mine", name != "replaced")
                taken.unlink()
        job = self.kept()
        self.assertIn("exists", self.recover(job.name, "-o", there / "c.png", code=2).err)
        self.assertIn(job.name, self.recover().out)


class TestSalvage(JobCase):
    """Whole images out of what is no whole answer."""

    def test_whatever_the_json_looks_like(self) -> None:
        whole = {"usage": {}, "data": [{"b64_json": b64(FIRST)}, {"b64_json": b64(SECOND)}]}
        links = [{"url": "data:image/png;base64," + b64(image)} for image in (FIRST, SECOND)]
        for name, text in {
            "pretty": "\n\n\n" + json.dumps(whole, indent=4),
            "slashes escaped": json.dumps(whole).replace("/", r"\/"),
            "data: URLs": json.dumps({"data": links}),
        }.items():
            with self.subTest(name):
                job = self.kept(Reply(200, text.encode(), cut=len(text) - 1000))
                self.assertEqual(self.images(self.recover(job.name, code=9)), ["first"])

    def test_links_are_fetched_again_without_another_hosts_key(self) -> None:
        api = self.serve_base()
        api.script.append(answer(api.put("/fox.png", Reply(403))))
        self.check(self.run_tool(*FOX), 10)
        before = len(api.gets)
        self.serve_base()
        self.assertIn("403", self.recover("--last", code=10).err)
        api.put("/fox.png", FIRST)
        self.assertEqual(self.images(self.recover("--last")), ["first"])
        self.assertEqual(len(api.gets), before + 2)
        self.assertNotIn(KEY, "".join(map(str, api.gets[before:])))


class TestWaiting(JobCase):
    """Beside a curl, a call or another recover that still runs."""

    def test_a_curl_that_runs_is_waited_for_or_not(self) -> None:
        """Meanwhile the same command pays for no other; nor is a curl stopped with recover."""
        api, job, release = self.under_way()
        curl = self.the_curl()
        self.assertEqual(os.getsid(curl), curl, "the terminal's Ctrl-C would reach it")
        run = self.recover(job.name, "--no-wait", code=10)
        self.assertRegex(run.err, "still runs|under way|running")
        self.assertRegex(self.recover().out, f"{job.name} +under way")
        self.recover("--clean", "--older-than", "0s")
        record = (job / "job.json").read_text()
        tool = self.waiting_recover(job)
        self.assertRegex(self.recover(job.name, "--no-wait", code=10).err, "running")
        tool.send_signal(signal.SIGTERM)
        run = self.check(self.finish(tool), 143)
        self.assertEqual(self.processes(), [curl])
        self.assertRegex(run.err.splitlines()[-1], "^Recover: ")
        (job / "job.json").write_text(record)  # so that one sees when the next recover has it
        tools = [self.waiting_recover(job)]
        told = f"job {job.name} is already under way (process {tools[0].pid}); waiting"
        for argv in (FOX, ("recover", job.name)):
            tools.append(self.start_tool(*argv))
            self.hear(tools[-1], told)
        release.set()
        for tool in tools:
            self.assertEqual(self.images(self.check(self.finish(tool), 0)), ["first"])
        self.assertEqual((len(api.posts), self.jobs()), (1, []))

    def test_again_and_side_by_side(self) -> None:
        """Every image is there, and none is spoilt, whoever comes first."""
        job = self.kept(CUT, 8, "-o", "fox.png")
        tools = [self.start_tool("recover", job.name) for _ in range(2)]
        runs = [self.finish(tool) for tool in tools] + [self.recover(job.name, code=9)]
        for run in runs:
            self.check(run, 9 if run.saved else 10)
        self.assertEqual(set(self.images(*runs)), {"first", "second"})
        self.assertEqual(self.listing(), ["fox-1.png", "fox-2.png"])


class TestUpkeep(JobCase):
    """Old jobs, and those that are not as we left them."""

    def test_a_broken_record_is_said_and_its_answer_stays(self) -> None:
        for name, text in {
            "cut": b'{"schema": 1, "fie',
            "no object": b"[]",
            "100,000 deep": b"[" * 100_000,
            "odd types": b'{"fields": 5, "target": [], "base_url": {}, "command": null}',
        }.items():
            with self.subTest(name):
                job = self.kept()
                (job / "job.json").write_bytes(text)
                self.assertIn(job.name, self.recover().out)
                self.assertEqual(self.recover(job.name, code=10).saved, [])
                self.assertTrue((job / "response.json").stat().st_size)
        self.kept()
        self.assertEqual(self.images(self.recover("--all", code=9)), ["first", "second"])

    def test_clean_removes_what_is_old(self) -> None:
        for name, options, gone, stays in (
            ("a week", [], 7.1, 6.9),
            ("as said", ["--older-than", "2d"], 2.1, 1.9),
        ):
            with self.subTest(name):
                self.aged(self.kept(), gone)
                new = self.aged(self.kept(), stays)
                self.recover("--clean", *options)
                self.assertEqual(self.jobs(), [new])
                shutil.rmtree(new)
        self.kept()
        for age in ("", "x", "-1d", "7 days", "１d", "nan"):
            self.recover("--clean", f"--older-than={age}", code=2)
        self.assertEqual(len(self.jobs()), 1)


# ---- Signals ----------------------------------------------------------------------------------


class TestStopped(JobCase):
    """INT, TERM and HUP: what is said, what is kept, and that no curl goes on."""

    def test_just_as_curl_starts(self) -> None:
        """A signal before the wait begins is not slept through; what it costs is said in a line."""
        real = subprocess.Popen

        def start(*argv: Any, **options: Any) -> Any:
            process = real(*argv, **options)
            os.kill(os.getpid(), signal.SIGINT)
            return process

        self.serve_base(answer(FIRST)._replace(before=threading.Event()), strict=False)
        with mock.patch("subprocess.Popen", start):
            run = self.check(self.run_tool(*FOX, "--timeout", "9", "--quiet"), 130)
        self.assertRegex(run.err, r"^.*SIGINT.*may have been billed.*\n$")
        self.assertEqual(self.processes(), [])

    def test_what_the_parent_ignores_stays_ignored(self) -> None:
        """As under nohup, or in the background of a script."""
        self.shell('trap "" HUP INT; exec "$@"')
        release = threading.Event()
        api = self.serve_base(answer(FIRST)._replace(before=release))
        tool = self.start_tool(*FOX)
        api.wait_for_request()
        for number in (signal.SIGHUP, signal.SIGINT):
            tool.send_signal(number)
        release.set()
        self.assertEqual(self.images(self.check(self.finish(tool), 0)), ["first"])
