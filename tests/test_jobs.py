"""Jobs: the folder that keeps a request and its answer, resuming, recover, and signals.

What each fault and each signal at each moment comes to (exit code, pictures, what recover brings)
stands in the fault table, tests/faults.py; here is what that can't show.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Callable
from unittest import mock

from tests.case import Argument, Child, Run, SystemCase
from tests.pictures import png
from tests.server import (
    KEY,
    Api,
    Reply,
    answer,
    b64,
    completed_event,
    event_stream,
    json_reply,
    page,
    partial_event,
    refusal,
)

FIRST, SECOND, THIRD = (png(40, 30 + i, seed=i) for i in range(3))  # about 4 KB each
NAMES = {FIRST: "first", SECOND: "second", THIRD: "third"}
PREVIEW = png(10, 10, seed=4)

FOX = ("generate", "a fox")
FOXES = (*FOX, "--n", "3")
THREE = answer(FIRST, SECOND, THIRD)
MIDDLE = THREE.body.index(b64(THIRD).encode()) + 2000  # two pictures are whole here
CUT = THREE._replace(cut=MIDDLE)
SILENT = Reply(silent=True)
SIGNALS = {129: signal.SIGHUP, 130: signal.SIGINT, 143: signal.SIGTERM}  # by exit code


class JobCase(SystemCase):
    """A case with calls that are waited for, killed or kept."""

    def waiting(self, *options: Argument) -> tuple[Api, Child[bytes], threading.Event]:
        """Start a call; return it once its server has the request, and what lets that answer."""
        release = threading.Event()
        api = self.serve_base(answer(FIRST)._replace(before=release))
        tool = self.start_tool(*FOX, *options)
        api.wait_for_request()
        return api, tool, release

    def mid_answer(self, reply: Reply = THREE) -> tuple[Child[bytes], threading.Event]:
        """Start a call; return it once it has two of three pictures, and what lets it go on.

        Every byte is on disk by then, not in a buffer of curl's, which would go with it.
        """
        release = threading.Event()
        self.serve_base(reply._replace(chunks=[THREE.body[:MIDDLE], release, THREE.body[MIDDLE:]]))
        tool = self.start_tool(*FOXES)
        self.wait_until(lambda: self.answered() >= MIDDLE)
        return tool, release

    def killed(self, api: Api, *argv: Argument) -> None:
        """Start a call, and kill its script while the server has its request; its curl goes on."""
        posts = len(api.posts)
        tool = self.start_tool(*argv)
        api.wait_for_request(posts + 1)
        tool.kill()
        self.finish(tool)

    def under_way(self) -> tuple[Api, Path, threading.Event]:
        """Return a killed call whose curl waits: server, job folder, and what lets it answer."""
        api, tool, release = self.waiting()
        tool.kill()
        self.finish(tool)
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

    def pictures(self, *runs: Run) -> list[str]:
        """Return the names of the pictures at the `Saved:` lines, sorted."""
        paths = [path for run in runs for path in run.saved]
        return sorted(NAMES.get(path.read_bytes(), str(path)) for path in paths)

    def no_curl_is_left(self) -> None:
        """Wait until every curl of this test has ended."""
        self.wait_until(lambda: not self.processes("curl"))


# ---- The folder -------------------------------------------------------------------------------


class TestFolder(JobCase):
    """One folder a request: made before the POST, closed to others, kept without the key."""

    def test_holds_the_request_but_no_key_before_the_answer(self) -> None:
        api, tool, release = self.waiting("-o", "fox.png")
        (job,) = self.jobs()
        self.hear(tool, f"Job: {job.name}\n")
        record = (job / "job.json").read_text()
        for fact in ("a fox", "127.0.0.1", "fox.png"):
            self.assertIn(fact, record)
        self.assertEqual(json.loads((job / "body.json").read_text()), api.posts[0].json)
        self.assertEqual(self.files_with(KEY), [])
        tool.kill()
        self.finish(tool)
        self.assertEqual(self.files_with(KEY), [], "nor after SIGKILL")
        release.set()
        self.assertEqual(self.pictures(self.recover("--last")), ["first"])

    def test_is_closed_to_others_whatever_the_umask(self) -> None:
        self.shell('umask 0; exec "$@"')
        tool, release = self.mid_answer()
        (job,) = self.jobs()
        paths = [job, *job.iterdir()]
        self.assertLessEqual({"body.json", "response.json", "headers.txt"}, {p.name for p in paths})
        modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in paths}
        self.assertEqual(modes, {p.name: "0o700" if p == job else "0o600" for p in paths})
        release.set()
        self.check(self.finish(tool), 0)

    def test_two_of_one_name(self) -> None:
        """The same request, second and random number: the earlier answer stays untouched."""
        then = time.gmtime(1_790_000_000)
        draws = [b"ab", b"ab", b"cd"]
        real = os.urandom

        def drawn(size: int) -> bytes:
            return draws.pop(0) if size == 2 else real(size)

        with mock.patch("time.gmtime", return_value=then), mock.patch("os.urandom", drawn):
            first = self.kept()
            second = self.kept(answer(SECOND, THIRD[:1000]), 9)
        self.assertEqual(draws, [])
        self.assertEqual(first.name[:-4], second.name[:-4])
        self.assertEqual(self.pictures(self.recover(first.name, code=9)), ["first", "second"])

    def test_the_last_line_runs_as_it_stands(self) -> None:
        """Wherever the script lies, and wherever the line is run."""
        place = self.new_folder("it's a $(bad) place")
        self.script = Path(shutil.copy(self.script, place))
        self.serve_base(CUT)
        run = self.check(self.run_tool(*FOXES, "--quiet", "--json"), 8)
        (job,) = self.jobs()
        error = run.json["error"]
        self.assertEqual((run.json["job_id"], run.json["recover_id"]), (job.name, job.name))
        self.assertEqual((error["exit_code"], error["maybe_billed"]), (8, True))
        last = run.err.splitlines()[-1]
        self.assertRegex(last, f"^Recover: .* recover {job.name}$")
        done = subprocess.run(
            ["sh", "-c", last[len("Recover: ") :]],
            env=self.env,
            cwd=self.home,
            capture_output=True,
            check=False,
        )
        self.assertEqual(done.returncode, 9, done.stderr)
        rescued = Run([], 9, done.stdout, "")
        self.assertEqual(self.pictures(rescued), ["first", "second"])
        self.assertEqual({path.parent for path in rescued.saved}, {self.work})

    def test_an_answer_without_a_byte_is_kept_but_not_offered(self) -> None:
        self.serve_base(SILENT)
        run = self.check(self.run_tool(*FOX, "--json"), 8)
        self.assertEqual(run.json["job_id"], self.jobs()[0].name)
        self.assertIsNone(run.json["recover_id"])
        self.assertNotIn("Recover:", run.err)

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


class TestPlace(JobCase):
    """Where jobs are kept if the state folder can't take them: below TMPDIR, if that is ours."""

    def setUp(self) -> None:
        super().setUp()
        self.spare = self.tmp / "tmp" / f"gpt-image-2-{os.getuid()}"

    def lose_state(self) -> None:
        """Let the state folder lie where none can be made."""
        (self.tmp / "file").write_bytes(b"")
        self.env["XDG_STATE_HOME"] = str(self.tmp / "file" / "state")

    def test_below_tmpdir(self) -> None:
        self.lose_state()
        self.serve_base(CUT)
        run = self.check(self.run_tool(*FOXES), 8)
        self.assertRegex(run.err, f"warning: .*{self.spare}")
        for folder in (self.spare, self.spare / "jobs"):
            self.assertEqual(stat.S_IMODE(folder.stat().st_mode), 0o700)
        (job,) = self.jobs_anywhere()
        self.assertIn(job.name, self.recover().out)
        self.assertEqual(self.pictures(self.recover("--last", code=9)), ["first", "second"])

    def test_not_below_tmpdir_where_it_is_not_ours_alone(self) -> None:
        """What another user may have put there, or may read, is neither used nor shown."""
        self.lose_state()
        job = self.kept()
        elsewhere = self.new_folder("elsewhere") / "state"
        uid = os.getuid()

        def make_it_a_link() -> None:
            self.spare.chmod(0o700)
            self.spare.rename(elsewhere)
            self.spare.symlink_to(elsewhere)

        def make_it_another_users() -> None:
            """Be the next user, and let us have made the folder of that one's name."""
            elsewhere.rename(self.spare.with_name(f"gpt-image-2-{uid + 1}"))
            getuid = mock.patch("os.getuid", return_value=uid + 1)
            getuid.start()
            self.addCleanup(getuid.stop)

        changes: dict[str, Callable[[], object]] = {
            "readable": lambda: self.spare.chmod(0o740),
            "writable": lambda: self.spare.chmod(0o702),
            "a link": make_it_a_link,
            "another user's": make_it_another_users,
        }
        for name, change in changes.items():
            change()
            with self.subTest(name):
                api = self.serve_base()
                self.check(self.run_tool(*FOX), 3)
                self.no_request(api)
                self.assertNotIn(job.name, self.recover().out)

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
        """Serve replies, or one picture each, once self.release is set."""
        whole = (answer(reply) if isinstance(reply, bytes) else reply for reply in replies)
        return self.serve_base(*(reply._replace(before=self.release) for reply in whole))

    def let_answers_come(self) -> None:
        """Let the server answer, and wait until every curl has all of it."""
        self.release.set()
        self.no_curl_is_left()

    def resumed(self, *argv: Argument, code: int = 0, **options: Any) -> Run:
        """Run a command that must finish another's job, and send nothing."""
        posts = len(self.servers[-1].posts)
        run = self.check(self.run_tool(*argv, **options), code)
        self.assertIn("resumed", run.err)
        self.assertEqual(len(self.servers[-1].posts), posts)
        return run

    def test_the_request_under_way_is_finished(self) -> None:
        api = self.held(FIRST)
        self.killed(api, *FOX)
        again = self.start_tool(*FOX, "--json")
        self.hear(again, "resumed")
        self.release.set()
        run = self.check(self.finish(again), 0)
        self.assertIs(run.json["resumed"], True)
        self.assertEqual(Path(run.json["images"][0]["path"]).read_bytes(), FIRST)
        self.assertEqual((len(api.posts), self.jobs()), (1, []))

    def test_an_answer_half_there_is_finished(self) -> None:
        tool, release = self.mid_answer()
        tool.kill()
        self.finish(tool)
        again = self.start_tool(*FOXES)
        self.hear(again, "resumed")
        release.set()
        run = self.check(self.finish(again), 0)
        self.assertEqual(self.pictures(run), ["first", "second", "third"])
        self.assertEqual(len(self.servers[0].posts), 1)

    def test_an_answer_that_came_meanwhile_is_finished(self) -> None:
        """However the same prompt, output and input bytes are given."""
        for name in ("in.png", "copy.png"):
            (self.work / name).write_bytes(png(64, 64))
        self.killed(self.held(FIRST), "edit", "in.png", "a fox", "-o", "out/../fox.png")
        self.let_answers_come()
        run = self.resumed("edit", "copy.png", "--prompt", "a fox", "-o", "fox.png")
        self.assertEqual(run.saved, [self.work / "fox.png"])
        self.assertEqual((self.pictures(run), self.jobs()), (["first"], []))

    def test_another_request_is_sent(self) -> None:
        (self.work / "in.png").write_bytes(png(64, 64))
        edit = ("edit", "in.png", "a fox")
        for name, first, second in (
            ("prompt", FOX, ("generate", "a red fox")),
            ("size", FOX, (*FOX, "--size", "1024x1536")),
            ("any field", FOX, (*FOX, "--param", "seed=1")),
            ("output", FOX, (*FOX, "-o", "other.png")),
            ("folder", FOX, (*FOX, "--output-dir", "other")),
            ("forced by --new", FOX, (*FOX, "--new")),
            ("input bytes", edit, edit),
            ("host", FOX, FOX),
        ):
            with self.subTest(name):
                self.release.clear()
                self.killed(self.held(FIRST), *first)
                self.let_answers_come()
                if first == edit:
                    (self.work / "in.png").write_bytes(png(64, 64, rgb=(1, 2, 3)))
                if name == "host":
                    self.serve_base()
                self.servers[-1].script.append(answer(SECOND))
                run = self.check(self.run_tool(*second), 0)
                self.assertNotIn("resumed", run.err)
                self.assertEqual(self.pictures(run), ["second"])
                self.assertEqual(self.pictures(self.recover("--last")), ["first"])

    def test_the_job_of_a_living_script_is_not_taken(self) -> None:
        api = self.held(FIRST, SECOND)
        first = self.start_tool(*FOX)
        api.wait_for_request()
        second = self.start_tool(*FOX)
        api.wait_for_request(2)
        self.release.set()
        runs = [self.check(self.finish(tool), 0) for tool in (first, second)]
        self.assertEqual(self.pictures(*runs), ["first", "second"])
        self.assertNotIn("resumed", runs[0].err + runs[1].err)

    def test_each_answer_is_finished_once(self) -> None:
        """Two calls are killed; of three that come at once, two finish those, one sends its own."""
        api = self.held(FIRST, SECOND, THIRD)
        tools = [self.start_tool(*FOX) for _ in range(2)]
        api.wait_for_request(2)
        for tool in tools:
            tool.kill()
            self.finish(tool)
        again = [self.start_tool(*FOX) for _ in range(3)]
        api.wait_for_request(3)
        self.release.set()
        runs = [self.check(self.finish(tool), 0) for tool in again]
        self.assertEqual(self.pictures(*runs), ["first", "second", "third"])
        self.assertEqual(sum("resumed" in run.err for run in runs), 2)
        self.assertEqual((len(api.posts), self.jobs()), (3, []))

    def test_a_refusal_that_came_meanwhile_is_told(self) -> None:
        self.killed(self.held(refusal(400, "moderation_blocked", "Blocked.")), *FOX)
        self.let_answers_come()
        self.assertIn("Blocked", self.resumed(*FOX, code=5).err)
        self.assertEqual(self.jobs(), [])

    def test_an_answer_cut_meanwhile_is_not_paid_again(self) -> None:
        self.killed(self.held(CUT), *FOXES)
        self.let_answers_come()
        self.assertIn("--new", self.resumed(*FOXES, code=8).err, "the way to another one")
        self.assertEqual(self.pictures(self.recover("--last", code=9)), ["first", "second"])

    def test_a_request_that_left_nothing_is_sent_again_with_a_warning(self) -> None:
        """Its curl is gone without a byte: nothing is under way that could be finished."""
        api = self.held(SILENT, SECOND)
        self.killed(api, *FOX)
        self.let_answers_come()
        run = self.check(self.run_tool(*FOX), 0)
        self.assertNotIn("resumed", run.err)
        self.assertIn("billed", run.err)
        self.assertEqual(len(api.posts), 2)


class TestLastMoment(JobCase):
    """An answer ends, and its curl with it, just as somebody looks whether that curl lives.

    Who had looked for the answer before would take the job for one that left nothing.
    """

    def at_the_look(self, release: threading.Event) -> Any:
        """Return a patch that lets the answer come when the lock of its curl is tried."""
        import fcntl

        real = fcntl.flock

        def flock(file: Any, how: int) -> None:
            if str(getattr(file, "name", file)).endswith("curl.txt"):
                release.set()
                self.no_curl_is_left()
            real(file, how)

        return mock.patch("fcntl.flock", flock)

    def test_the_same_command_finishes_it(self) -> None:
        api, _, release = self.under_way()
        api.otherwise = answer(SECOND)
        with self.at_the_look(release):
            run = self.check(self.run_tool(*FOX), 0)
        self.assertEqual((self.pictures(run), len(api.posts)), (["first"], 1))

    def test_the_list_shows_it(self) -> None:
        _, _, release = self.under_way()
        with self.at_the_look(release):
            self.assertNotIn("no answer", self.recover().out)

    def test_a_sweep_leaves_it(self) -> None:
        api, job, release = self.under_way()
        api.otherwise = answer(SECOND)
        real = time.time
        next_week = mock.patch("time.time", lambda: real() + 8 * 86400)
        with next_week, self.at_the_look(release):
            self.check(self.run_tool("generate", "a hen"), 0)
        self.assertEqual(self.pictures(self.recover(job.name)), ["first"])


# ---- recover ----------------------------------------------------------------------------------


class TestList(JobCase):
    """What is there to recover."""

    def test_nothing(self) -> None:
        for argv in ((), ("--list",)):
            run = self.recover(*argv)
            self.assertEqual((run.out, "no unfinished" in run.err), ("", True))
        self.assertEqual(self.recover("--json").json["jobs"], [])

    def test_one_a_line_without_key_or_config(self) -> None:
        jobs = [self.kept(), self.kept(SILENT)]
        del self.env["GPT_IMAGE2_API_KEY"], self.env["GPT_IMAGE2_BASE_URL"]
        for argv in ((), ("--list",)):
            lines = self.recover(*argv).out.splitlines()
            for job, line in zip(jobs, lines):
                self.assertRegex(line, rf"^{job.name}\b.*a fox$")
            self.assertEqual(len(lines), 2)
        self.assertEqual(self.listing(), [], "listing saves nothing")
        document = self.recover("--json").json
        self.assertEqual((document["schema"], document["ok"]), (1, True))
        found = [(row["id"], row["prompt"]) for row in document["jobs"]]
        self.assertEqual(found, [(job.name, "a fox") for job in jobs])

    def test_what_is_under_way(self) -> None:
        _, job, release = self.under_way()
        self.assertRegex(self.recover().out, f"{job.name} +under way")
        release.set()
        self.no_curl_is_left()
        self.assertRegex(self.recover().out, f"{job.name} +answer")

    def test_a_prompt_can_forge_nothing(self) -> None:
        self.serve_base(CUT)
        prompt = "a\x1b[31m fox\nSaved: /etc/passwd (1 KB)\u202e"
        self.check(self.run_tool("generate", "-", "--n", "3", stdin=prompt), 8)
        run = self.recover()
        self.assertEqual(len(run.out.splitlines()), 1)
        self.assertNotRegex(run.out, "[\x1b\u202e]")


class TestChoosing(JobCase):
    """Which answers are saved, and where to."""

    def test_by_id_without_the_key(self) -> None:
        job, other = self.kept(), self.kept()
        del self.env["GPT_IMAGE2_API_KEY"], self.env["GPT_IMAGE2_BASE_URL"]
        document = self.recover(job.name, "--json", code=9).json
        self.assertEqual((document["command"], document["ok"]), ("recover", False))
        self.assertEqual((document["job_id"], document["recover_id"]), (job.name, job.name))
        self.assertEqual(document["error"]["exit_code"], 9)
        saved = [Path(image["path"]).read_bytes() for image in document["images"]]
        self.assertEqual(saved, [FIRST, SECOND])
        self.assertIn(other.name, self.recover().out)

    def test_the_last(self) -> None:
        self.assertIn("no unfinished", self.recover("--last", code=10).err)
        for first, second in ((FIRST, THIRD), (SECOND, THIRD), (THIRD, FIRST)):
            reply = answer(first, second)
            self.kept(reply._replace(cut=reply.body.index(b64(second).encode()) + 99))
            self.assertEqual(self.pictures(self.recover("--last", code=9)), [NAMES[first]])

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
        for name, picture, code in (("a", FIRST, 9), ("b", SECOND, 0)):
            api.put(f"/{name}.png", picture)
            self.assertEqual(self.pictures(self.recover("--all", code=code)), [NAMES[picture]])
        self.assertEqual(self.jobs(), [])

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
                self.assertEqual(self.pictures(run), ["first", "second"])
                self.assertEqual([path.name for path in run.saved], wanted or mock.ANY)
                self.assertEqual({path.parent for path in run.saved}, {taken.parent})
                self.assertEqual(taken.read_bytes() == b"mine", name != "replaced")
                taken.unlink()

    def test_an_existing_file_of_ones_own_is_refused(self) -> None:
        job = self.kept()
        for name in ("mine-1.png", "mine.png"):  # whichever it would take
            (self.work / name).write_bytes(b"mine")
        self.assertIn("exists", self.recover(job.name, "-o", "mine.png", code=2).err)
        self.assertIn(job.name, self.recover().out)


class TestSalvage(JobCase):
    """Whole pictures out of what is no whole answer, and why not where there are none."""

    def test_whatever_the_json_looks_like(self) -> None:
        data = [{"b64_json": b64(FIRST)}, {"b64_json": b64(SECOND)}]
        data_urls = [{"url": "data:image/png;base64," + b64(p)} for p in (FIRST, SECOND)]
        for name, text in {
            "pretty": json.dumps({"created": 1, "data": data}, indent=4),
            "slashes escaped": json.dumps({"data": data}).replace("/", r"\/"),
            "data: URLs": json.dumps({"data": data_urls}),
            "usage first": json.dumps({"usage": {"total_tokens": 1}, "data": data}),
            "blank lines first": "\n\n\n" + json.dumps({"data": data}),
        }.items():
            with self.subTest(name):
                job = self.kept(Reply(200, text.encode(), cut=len(text) - 1000))
                self.assertEqual(self.pictures(self.recover(job.name, code=9)), ["first"])

    def test_a_stream_whose_script_was_killed(self) -> None:
        """Its pictures are brought, each once, and its previews are none."""
        torn = b'event: x\ndata: {"type": "image_generation.completed", "b64_json": "iVBORw0K'
        preview, picture = partial_event(PREVIEW), completed_event(FIRST)
        for events, code, pictures in (
            ([preview, picture, preview], 9, ["first"]),
            ([preview], 10, []),
        ):
            with self.subTest(code=code):
                release = threading.Event()
                reply = event_stream(events[0], release, *events[1:], torn)
                api = self.serve_base(reply._replace(framing="length", content_length=999_999))
                self.killed(api, *FOXES)
                release.set()
                self.assertEqual(self.pictures(self.recover("--last", code=code)), pictures)
                self.assertEqual(len(self.listing()), 1)
                self.recover("--clean", "--older-than", "0s")

    def test_what_could_not_be_saved_and_why(self) -> None:
        self.kept(answer(FIRST, SECOND[:2000], THIRD), 9)
        run = self.recover("--last", code=9)
        self.assertEqual(self.pictures(run), ["first", "third"])
        self.assertRegex(run.err, "picture 2: .*(cut|end)")

    def test_nothing_could_be_saved_and_why(self) -> None:
        for reply, code, why in (
            (page(200, "Log in"), 8, "(?i)html"),
            (json_reply({"data": [{"b64_json": "!!!!"}]}), 10, "base64"),
            (page(524, "A time-out occurred"), 8, "524"),
            (SILENT, 8, "empty|without|no answer|nothing"),
        ):
            with self.subTest(why):
                job = self.kept(reply, code)
                run = self.recover(job.name, code=10)
                self.assertRegex(run.err, why)
                self.assertNotIn("Recover:", run.err)
                self.assertEqual(run.saved, [])

    def test_links_are_fetched_again_without_another_hosts_key(self) -> None:
        api = self.serve_base()
        api.script.append(answer(api.put("/fox.png", page(403, "Expired"))))
        self.check(self.run_tool(*FOX), 10)
        before = len(api.gets)
        self.serve_base()
        for _ in range(2):
            self.assertIn("403", self.recover("--last", code=10).err)
        api.put("/fox.png", FIRST)
        self.assertEqual(self.pictures(self.recover("--last")), ["first"])
        self.assertEqual(len(api.gets), before + 3)
        self.assertNotIn(KEY, "".join(map(str, api.gets[before:])))


class TestWaiting(JobCase):
    """Beside a curl, a call or another recover that still runs."""

    def test_a_curl_that_runs_is_waited_for_or_not(self) -> None:
        _, job, release = self.under_way()
        run = self.recover(job.name, "--no-wait", code=10)
        self.assertRegex(run.err, "still runs|under way|running")
        self.recover("--clean", "--older-than", "0s")
        tool = self.waiting_recover(job)
        release.set()
        self.assertEqual(self.pictures(self.check(self.finish(tool), 0)), ["first"])
        self.assertEqual(self.jobs(), [])
        self.assertIn(job.name, self.recover(job.name, code=10).err)
        run = self.recover(self.kept().name, "--no-wait", code=9)
        self.assertEqual(self.pictures(run), ["first", "second"], "no curl runs there")

    def test_the_same_command_meanwhile_pays_for_no_other(self) -> None:
        api, job, release = self.under_way()
        tool = self.waiting_recover(job)
        run = self.check(self.run_tool(*FOX, "--json"), 8)
        self.assertEqual(run.json["error"]["code"], "under_way")
        self.assertRegex(self.recover(job.name, code=10).err, "under way|running")
        release.set()
        self.assertEqual(self.pictures(self.check(self.finish(tool), 0)), ["first"])
        self.assertEqual(len(api.posts), 1)

    def test_beside_the_call_itself(self) -> None:
        tool, release = self.mid_answer()
        (job,) = self.jobs()
        self.assertRegex(self.recover(job.name, code=10).err, "under way|running")
        self.recover("--clean", "--older-than", "0s")
        self.assertEqual(self.jobs(), [job])
        release.set()
        run = self.check(self.finish(tool), 0)
        self.assertEqual(self.pictures(run), ["first", "second", "third"])

    def test_again_and_side_by_side(self) -> None:
        """Every picture is there, and none is spoilt, whoever comes first."""
        job = self.kept(CUT, 8, "-o", "fox.png")
        tools = [self.start_tool("recover", job.name) for _ in range(2)]
        runs = [self.finish(tool) for tool in tools] + [self.recover(job.name, code=9)]
        for run in runs:
            self.check(run, 9 if run.saved else 10)
        self.assertEqual(set(self.pictures(*runs)), {"first", "second"})
        self.assertEqual(self.listing(), ["fox-1.png", "fox-2.png"])


class TestUpkeep(JobCase):
    """Old jobs, and those that are not as we left them."""

    def test_a_broken_record_is_said_and_its_answer_stays(self) -> None:
        for name, text in {
            "cut": b'{"schema": 1, "fie',
            "no object": b"[]",
            "empty object": b"{}",
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
        self.assertEqual(self.pictures(self.recover("--all", code=9)), ["first", "second"])

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

    def test_clean_refuses_an_age_that_is_none(self) -> None:
        self.kept()
        for age in ("", "x", "-1d", "7 days", "１d", "nan"):
            with self.subTest(age):
                self.recover("--clean", f"--older-than={age}", code=2)
        self.assertEqual(len(self.jobs()), 1)


# ---- Signals ----------------------------------------------------------------------------------


class TestStopped(JobCase):
    """INT, TERM and HUP: what is said, what is kept, and that no curl goes on."""

    def ended(self, tool: Child[bytes], code: int) -> Run:
        """Return how a stopped call ended; no process may be left by then."""
        run = self.check(self.finish(tool), code)
        self.assertEqual(self.processes(), [], self.story(run))
        return run

    def test_quiet_or_not_it_is_said_that_it_may_be_billed(self) -> None:
        for code, number in SIGNALS.items():
            with self.subTest(number.name):
                _, tool, _ = self.waiting("--new", "--quiet")
                tool.send_signal(number)
                run = self.ended(tool, code)
                self.assertEqual((run.out, len(run.err.splitlines())), ("", 1))
                self.assertRegex(run.err, f"{number.name}.*may have been billed")

    def test_just_as_curl_starts(self) -> None:
        """A signal before the wait begins is not slept through."""
        real = subprocess.Popen

        def start(*argv: Any, **options: Any) -> Any:
            process = real(*argv, **options)
            os.kill(os.getpid(), signal.SIGINT)
            return process

        self.serve_base(answer(FIRST)._replace(before=threading.Event()), strict=False)
        with mock.patch("subprocess.Popen", start):
            run = self.check(self.run_tool(*FOX, "--timeout", "9"), 130)
        self.assertIn("may have been billed", run.err)
        self.assertEqual(self.processes(), [])

    def test_while_the_key_is_fetched(self) -> None:
        api = self.serve()
        fifo = self.tmp / "fifo"
        os.mkfifo(fifo)
        command = ["sh", "-c", f'echo started > "{fifo}"; exec sleep 600']
        self.configure(base_url=api.base_url, api_key_command=command)
        tool = self.start_tool(*FOX)
        self.assertEqual(fifo.read_text(), "started\n")
        sleepers = self.processes("sleep")
        tool.send_signal(signal.SIGINT)
        run = self.check(self.finish(tool), 130)
        for sleeper in set(sleepers) & set(self.processes("sleep")):
            os.kill(sleeper, signal.SIGKILL)
        self.assertNotIn("may have been billed", run.err)
        self.assertEqual(self.jobs(), [])
        self.no_request(api)

    def test_an_answer_that_breaks_after_the_signal_is_kept(self) -> None:
        tool, release = self.mid_answer(THREE._replace(cut=MIDDLE + 1))
        tool.send_signal(signal.SIGINT)
        self.hear(tool, "10 s")
        release.set()
        run = self.ended(tool, 130)
        self.assertIn("may have been billed", run.err)
        self.assertRegex(run.err.splitlines()[-1], "^Recover: ")
        self.assertEqual(self.pictures(self.recover("--last", code=9)), ["first", "second"])

    def test_the_terminal_sends_it_to_all(self) -> None:
        """Ctrl-C goes to the foreground's whole process group; curl is not in it."""
        self.launcher = ("setsid",)
        tool, release = self.mid_answer()
        curl = self.the_curl()
        self.assertEqual(os.getsid(curl), curl)
        os.killpg(tool.pid, signal.SIGINT)
        self.hear(tool, "10 s")
        release.set()
        self.assertEqual(self.pictures(self.ended(tool, 0)), ["first", "second", "third"])

    def test_what_was_saved_before_stays(self) -> None:
        """During the download of the second picture."""
        api = self.serve_base()
        link = api.put("/b.png", Reply(before=threading.Event()))
        api.script.append(answer(api.put("/a.png", FIRST), link))
        tool = self.start_tool(*FOX, "--n", "2")
        api.wait_for_request(3)
        tool.send_signal(signal.SIGTERM)
        run = self.ended(tool, 143)
        self.assertEqual(self.pictures(run), ["first"])
        self.assertRegex(run.err.splitlines()[-1], "^Recover: ")
        api.put("/b.png", SECOND)
        self.assertEqual(self.pictures(self.recover("--last")), ["first", "second"])
        self.assertEqual(self.jobs(), [])

    def test_recover_that_waits(self) -> None:
        """The curl goes on, and the answer can be recovered later."""
        _, job, release = self.under_way()
        curl = self.the_curl()
        tool = self.waiting_recover(job)
        tool.send_signal(signal.SIGTERM)
        run = self.check(self.finish(tool), 143)
        self.assertEqual(self.processes(), [curl])
        self.assertRegex(run.err.splitlines()[-1], "^Recover: ")
        release.set()
        self.assertEqual(self.pictures(self.recover("--last")), ["first"])

    def test_what_the_parent_ignores_stays_ignored(self) -> None:
        """As under nohup, or in the background of a script; other signals are heeded."""
        for name in ("HUP", "INT"):
            with self.subTest(name):
                self.shell(f'trap "" {name}; exec "$@"')
                _, tool, release = self.waiting("--new")
                tool.send_signal(getattr(signal, f"SIG{name}"))
                release.set()
                self.assertEqual(self.pictures(self.ended(tool, 0)), ["first"])
                _, tool, _ = self.waiting("--new")
                tool.send_signal(signal.SIGTERM)
                self.ended(tool, 143)
