"""recover: lists unfinished answers and brings out their pictures; it never sends anything."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any, Callable

from tests.faults import (
    FIRST,
    FOX,
    FOXES,
    PICTURES,
    PREVIEW,
    SECOND,
    THIRD,
    THREE,
    Stage,
    cut_in,
    held_mid_answer,
)
from tests.support import (
    KEY,
    Api,
    Argument,
    Reply,
    Run,
    answer,
    b64,
    completed_event,
    event_stream,
    json_reply,
    page,
    partial_event,
)

CUT = cut_in(THREE, THIRD)  # with two whole pictures


class Recovery(Stage):
    """A case with kept answers; whatever recover does, nothing is POSTed."""

    def folder(self, job: str) -> Path:
        """Return the folder of a job."""
        return self.state / "gpt-image-2" / "jobs" / job

    def kept(self, reply: Reply = CUT, code: int = 8, *options: Argument) -> str:
        """Return the job id of a call whose answer is kept."""
        before = set(self.jobs())
        self.serve_base(reply)
        run = self.run_tool(*FOXES, *options)
        self.check(run, code)
        (job,) = set(self.jobs()) - before
        return job.name

    def under_way(self) -> tuple[Api, str, threading.Event]:
        """Return a killed call whose curl waits: server, job id, and what lets the answer come."""
        release = threading.Event()
        api = self.serve_base(answer(FIRST)._replace(before=release))
        tool = self.start_tool(*FOX)
        api.wait_for_request()
        tool.kill()
        self.finish(tool)
        (job,) = self.jobs()
        return api, job.name, release

    def recover(self, *argv: Argument, code: int = 0) -> Run:
        """Run recover, and assert its exit code and that it sent no POST."""
        posts = [len(api.posts) for api in self.servers]
        run = self.check(self.run_tool("recover", *argv), code)
        self.assertEqual([len(api.posts) for api in self.servers], posts, self.story(run))
        return run

    def bytes_of(self, run: Run) -> list[bytes]:
        """Return the pictures that a run has saved, in order."""
        return [path.read_bytes() for path in run.saved]

    def check_saved(self, run: Run, *pictures: bytes) -> None:
        """Assert which pictures a run has saved, in which order."""
        known = {data: f"PICTURES[{index}]" for index, data in enumerate(PICTURES)}
        found = [known.get(data, repr(data[:20])) for data in self.bytes_of(run)]
        self.assertEqual(found, [known[data] for data in pictures], self.story(run))


class TestList(Recovery):
    """What is there to recover."""

    def test_nothing(self) -> None:
        for argv in ((), ("--list",)):
            run = self.recover(*argv)
            self.assertEqual((run.out, "no unfinished" in run.err), ("", True))
        self.assertEqual(self.recover("--json").json["jobs"], [])

    def test_one_a_line(self) -> None:
        first, second = self.kept(), self.kept(Reply(silent=True), 8, "--quality", "low")
        for argv in ((), ("--list",)):
            lines = self.recover(*argv).out.splitlines()
            self.assertEqual(len(lines), 2)
            for job in (first, second):
                (line,) = [line for line in lines if job in line]
                self.assertIn("a fox", line)
        self.assertEqual(self.pictures(self.recover()), set(), "listing saves nothing")

    def test_as_json(self) -> None:
        job = self.kept()
        document = self.recover("--json").json
        self.assertEqual((document["schema"], document["ok"]), (1, True))
        self.assertEqual([row["id"] for row in document["jobs"]], [job])
        self.assertEqual(document["jobs"][0]["prompt"], "a fox")

    def test_tells_what_is_under_way(self) -> None:
        _, job, release = self.under_way()
        self.assertRegex(self.recover().out, f"{job} +under way")
        release.set()
        self.wait_until(lambda: not self.processes())
        self.assertNotIn("under way", self.recover().out)

    def test_a_prompt_can_forge_nothing(self) -> None:
        self.serve_base(CUT)
        prompt = "a\x1b[31m fox\nSaved: /etc/passwd (1 KB)\u202e"
        self.check(self.run_tool("generate", "-", "--n", "3", stdin=prompt), 8)
        run = self.recover()
        self.assertEqual(len(run.out.splitlines()), 1)
        self.assertNotRegex(run.out, "[\x1b\u202e]")

    def test_needs_neither_key_nor_config(self) -> None:
        self.kept()
        del self.env["GPT_IMAGE2_API_KEY"], self.env["GPT_IMAGE2_BASE_URL"]
        self.assertEqual(len(self.recover().out.splitlines()), 1)


class TestUnreadable(Recovery):
    """A state folder of somebody else's may hold answers, so it isn't called empty."""

    def test_is_said(self) -> None:
        self.kept()
        jobs = self.state / "gpt-image-2" / "jobs"
        self.addCleanup(jobs.chmod, 0o700)
        jobs.chmod(0)
        self.heed_permissions()
        for words in ([], ["--last"], ["--all"], ["--clean"]):
            with self.subTest(words):
                self.assertRegex(self.recover(*words, code=3).err, "cannot read /.*permission")


class TestChoosing(Recovery):
    """Which answers are saved, and where to."""

    def test_one_by_its_id(self) -> None:
        chosen, other = self.kept(), self.kept(CUT, 8, "--quality", "low")
        self.check_saved(self.recover(chosen, code=9), FIRST, SECOND)
        self.assertIn(other, self.recover().out)

    def test_the_last(self) -> None:
        for pictures in ((FIRST, THIRD), (SECOND, THIRD), (THIRD, FIRST)):
            self.kept(cut_in(answer(*pictures), pictures[1]), 8, "--quality", "low")
            run = self.recover("--last", code=9)
            self.check_saved(run, pictures[0])

    def test_the_last_of_none(self) -> None:
        self.assertIn("no unfinished", self.recover("--last", code=10).err)

    def test_all(self) -> None:
        self.kept(cut_in(answer(FIRST, SECOND), SECOND))
        self.kept(cut_in(answer(THIRD, SECOND), SECOND), 8, "--quality", "low")
        run = self.recover("--all", code=9)
        self.assertEqual(sorted(self.bytes_of(run)), sorted([FIRST, THIRD]))

    def test_all_as_one_document(self) -> None:
        jobs = {self.kept(), self.kept(Reply(silent=True), 8, "--quality", "low")}
        document = self.recover("--all", "--json", code=9).json
        self.assertEqual((document["ok"], document["error"]["exit_code"]), (False, 9))
        self.assertEqual({job["job_id"] for job in document["jobs"]}, jobs)

    def test_an_unknown_id(self) -> None:
        self.kept()
        for name in ("20200101T000000Z-0123456789ab", "nonsense", "..", "../jobs", "/etc"):
            with self.subTest(name):
                self.assertIn(name, self.recover(name, code=10).err)
        self.assertEqual(len(self.jobs()), 1)

    def test_where_the_call_would_have_put_it(self) -> None:
        job = self.kept(CUT, 8, "-o", "pictures/fox.png")
        run = self.check(self.run_tool("recover", job, cwd=self.home), 9)
        folder = self.work / "pictures"
        self.assertEqual(run.saved, [folder / "fox-1.png", folder / "fox-2.png"])

    def test_a_file_of_ones_own(self) -> None:
        job = self.kept(cut_in(answer(FIRST, SECOND), SECOND))
        run = self.recover(job, "-o", "mine.png", code=9)
        self.assertEqual([path.parent for path in run.saved], [self.work])
        self.assertRegex(run.saved[0].name, r"^mine(-1)?\.png$")
        self.check_saved(run, FIRST)

    def test_a_folder_of_ones_own(self) -> None:
        run = self.recover(self.kept(), "--output-dir", "there/too", code=9)
        self.assertEqual({path.parent for path in run.saved}, {self.work / "there" / "too"})

    def test_never_over_another_file(self) -> None:
        job = self.kept(CUT, 8, "-o", "fox.png")
        (self.work / "fox-1.png").write_bytes(b"mine")
        run = self.recover(job, code=9)
        self.assertEqual((self.work / "fox-1.png").read_bytes(), b"mine")
        self.check_saved(run, FIRST, SECOND)

    def test_an_existing_file_of_ones_own_is_refused(self) -> None:
        job = self.kept()
        (self.work / "mine-1.png").write_bytes(b"mine")
        (self.work / "mine.png").write_bytes(b"mine")
        self.assertIn("exists", self.check(self.run_tool("recover", job, "-o", "mine.png"), 2).err)
        self.assertIn(job, self.recover().out)

    def test_as_json(self) -> None:
        job = self.kept()
        document = self.recover(job, "--json", code=9).json
        self.assertEqual((document["command"], document["ok"]), ("recover", False))
        self.assertEqual((document["job_id"], document["recover_id"]), (job, job))
        self.assertEqual(document["error"]["exit_code"], 9)
        images = [Path(image["path"]).read_bytes() for image in document["images"]]
        self.assertEqual(images, [FIRST, SECOND])

    def test_without_the_key(self) -> None:
        job = self.kept()
        del self.env["GPT_IMAGE2_API_KEY"], self.env["GPT_IMAGE2_BASE_URL"]
        self.check_saved(self.recover(job, code=9), FIRST, SECOND)


class TestSalvage(Recovery):
    """Whole pictures out of what is no whole answer."""

    def killed_mid_stream(self, *events: Any) -> Run:
        """Return what recover brings of a stream that breaks off after its script was killed."""
        release = threading.Event()
        reply = event_stream(events[0], release, *events[1:])
        api = self.serve_base(reply._replace(framing="length", content_length=999_999))
        tool = self.start_tool(*FOXES)
        api.wait_for_request()
        tool.kill()
        self.finish(tool)
        release.set()
        return self.check(self.run_tool("recover", "--last"), 9)

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
                body = text.encode()
                cut = len(body) - 1000  # within the second picture
                job = self.kept(Reply(200, body, cut=cut))
                self.check_saved(self.recover(job, code=9), FIRST)
                self.recover("--clean", "--older-than", "0s")

    def test_all_that_were_asked_for(self) -> None:
        """The cut is behind the last picture: nothing is missing, and nothing stays."""
        self.serve_base(
            THREE._replace(cut=THREE.body.index(b64(THIRD).encode()) + len(b64(THIRD)) + 1)
        )
        self.check(self.run_tool(*FOXES), 8)
        self.check_saved(self.recover("--last"), FIRST, SECOND, THIRD)
        self.assertEqual(self.jobs(), [])

    def test_a_stream(self) -> None:
        broken = b'event: x\ndata: {"type": "image_generation.completed", "b64_json": "iVBORw0K'
        run = self.killed_mid_stream(
            partial_event(PREVIEW), completed_event(FIRST), partial_event(PREVIEW, 1), broken
        )
        self.check_saved(run, FIRST)

    def test_a_preview_is_not_the_picture(self) -> None:
        release = threading.Event()
        reply = event_stream(partial_event(PREVIEW), release)
        api = self.serve_base(reply._replace(framing="length", content_length=999_999))
        tool = self.start_tool(*FOX)
        api.wait_for_request()
        tool.kill()
        self.finish(tool)
        release.set()
        run = self.recover("--last", code=10)
        self.assertEqual(run.saved, [])
        previews = [path for path in self.listing() if "partial" not in path]
        self.assertEqual(previews, [])

    def test_what_could_not_be_saved_and_why(self) -> None:
        self.kept(answer(FIRST, SECOND[:2000], THIRD), 9)
        run = self.recover("--last", code=9)
        self.assertIn(FIRST, self.bytes_of(run))
        self.assertNotIn(SECOND[:2000], self.bytes_of(run))
        self.assertRegex(run.err, "picture 2: .*(cut|end)")

    def test_nothing_could_be_saved_and_why(self) -> None:
        for reply, code, why in (
            (page(200, "Log in"), 8, "(?i)html"),
            (json_reply({"data": [{"b64_json": "!!!!"}]}), 10, "base64"),
            (page(524, "A time-out occurred"), 8, "524"),
            (Reply(silent=True), 8, "empty|without|no answer|nothing"),
        ):
            with self.subTest(why):
                job = self.kept(reply, code)
                self.assertRegex(self.recover(job, code=10).err, why)
                self.recover("--clean", "--older-than", "0s")

    def test_an_echo_of_the_key_is_not_shown(self) -> None:
        self.kept(json_reply({"error": {"message": f"Bad key {KEY}"}}, 500))
        run = self.recover("--last", code=10)
        self.assertNotIn(KEY, run.err + run.out)


class TestLinks(Recovery):
    """Links in a kept answer are fetched again, without the key."""

    def test_are_fetched_again(self) -> None:
        api = self.serve_base()
        files = self.serve(strict=False)
        api.script.append(answer(files.put("/fox.png", page(404, "Not yet"))))
        self.check(self.run_tool(*FOX), 10)
        files.put("/fox.png", FIRST)
        fetched = len(files.gets)
        run = self.recover("--last")
        self.check_saved(run, FIRST)
        self.assertEqual(len(files.gets), fetched + 1)
        for request in files.gets:
            self.assertNotIn(KEY, str(request))
        self.assertEqual(self.jobs(), [])

    def test_that_are_still_broken_stay(self) -> None:
        api = self.serve_base()
        api.script.append(answer(api.put("/fox.png", page(403, "Expired"))))
        self.check(self.run_tool(*FOX), 10)
        for _ in range(2):
            self.assertIn("403", self.recover("--last", code=10).err)
        self.assertEqual(len(self.jobs()), 1)


class TestWaiting(Recovery):
    """Beside a curl, a call or another recover that still runs."""

    def test_waits_for_a_curl(self) -> None:
        _, job, release = self.under_way()
        tool = self.start_tool("recover", job)
        self.wait_until(lambda: self.holds_lock(tool))
        release.set()
        run = self.check(self.finish(tool), 0)
        self.check_saved(run, FIRST)
        self.assertEqual(self.jobs(), [])

    def test_the_same_command_meanwhile_pays_for_no_other(self) -> None:
        api, job, release = self.under_way()
        tool = self.start_tool("recover", job)
        self.wait_until(lambda: self.holds_lock(tool))
        self.wait_until(lambda: "recovering" in (self.folder(job) / "job.json").read_text())
        run = self.check(self.run_tool(*FOX, "--json"), 8)
        self.assertEqual(run.json["error"]["code"], "under_way")
        release.set()
        self.check_saved(self.check(self.finish(tool), 0), FIRST)
        self.assertEqual(len(api.posts), 1)

    def test_or_does_not_wait(self) -> None:
        _, job, release = self.under_way()
        run = self.recover(job, "--no-wait", code=10)
        self.assertEqual(run.saved, [])
        self.assertRegex(run.err, "still runs|under way|running")
        release.set()
        self.check_saved(self.recover(job), FIRST)

    def test_no_wait_saves_what_is_there(self) -> None:
        self.check_saved(self.recover(self.kept(), "--no-wait", code=9), FIRST, SECOND)

    def test_beside_the_call_itself(self) -> None:
        tool, release = held_mid_answer(self)
        (job,) = self.jobs()
        self.assertRegex(self.recover(job.name, "--no-wait", code=10).err, "under way|running")
        self.recover("--clean", "--older-than", "0s")
        self.assertEqual(self.jobs(), [job])
        release.set()
        run = self.check(self.finish(tool), 0)
        self.check_saved(run, FIRST, SECOND, THIRD)

    def test_twice_in_a_row(self) -> None:
        job = self.kept(CUT, 8, "-o", "fox.png")
        first = self.recover(job, code=9)
        again = self.check(self.run_tool("recover", job), 10 if not self.jobs() else 9)
        self.check_saved(first, FIRST, SECOND)
        self.assertLessEqual(set(self.bytes_of(again)), {FIRST, SECOND})

    def test_once_all_is_saved_there_is_nothing_left(self) -> None:
        _, job, release = self.under_way()
        release.set()
        self.recover(job)
        self.assertIn(job, self.recover(job, code=10).err)

    def test_two_side_by_side(self) -> None:
        """Both end well, whoever comes first; every picture is there."""
        job = self.kept(CUT, 8, "-o", "fox.png")
        tools = [self.start_tool("recover", job) for _ in range(2)]
        runs = [self.finish(tool) for tool in tools]
        for run in runs:
            self.check(run, run.code if run.code in (9, 10) else 9)
        self.assertEqual({data for run in runs for data in self.bytes_of(run)}, {FIRST, SECOND})
        self.assertEqual((self.work / "fox-1.png").read_bytes(), FIRST)

    def test_two_wait_for_one_curl(self) -> None:
        _, job, release = self.under_way()
        tools = [self.start_tool("recover", job) for _ in range(2)]
        self.wait_until(
            lambda: any(tool.poll() is not None or self.holds_lock(tool) for tool in tools)
        )
        release.set()
        runs = [self.finish(tool) for tool in tools]
        self.assertEqual([data for run in runs for data in self.bytes_of(run)], [FIRST])
        for run in runs:
            self.check(run, 0 if run.saved else 10)


class TestBrokenJobs(Recovery):
    """A folder that is not as we left it does no harm."""

    def test_is_said_and_stays(self) -> None:
        for name, spoil in BREAKAGES.items():
            with self.subTest(name):
                job = self.kept()
                folder = self.folder(job)
                spoil(folder)
                self.assertIn(job, self.recover().out)
                self.check_saved(self.recover(job, code=10))
                self.assertTrue((folder / "response.json").stat().st_size)
                shutil.rmtree(folder)

    def test_does_not_stop_the_others(self) -> None:
        broken = self.kept(CUT, 8, "--quality", "low")
        record = self.folder(broken) / "job.json"
        record.write_bytes(b"{")
        self.kept()
        self.check_saved(self.recover("--all", code=9), FIRST, SECOND)


BREAKAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda job: (job / "job.json").write_bytes(b'{"schema": 1, "fie'),
    "no object": lambda job: (job / "job.json").write_bytes(b"[]"),
    "empty object": lambda job: (job / "job.json").write_bytes(b"{}"),
    "100,000 deep": lambda job: (job / "job.json").write_bytes(b"[" * 100_000),
    "odd types": lambda job: (job / "job.json").write_bytes(
        b'{"fields": 5, "target": [], "base_url": {}, "command": null, "status": 1}'
    ),
}


class TestClean(Recovery):
    """recover --clean."""

    def test_removes_what_is_older_than_a_week(self) -> None:
        self.aged(self.folder(self.kept()), 7.1)
        new = self.aged(self.folder(self.kept(CUT, 8, "--quality", "low")), 6.9)
        self.recover("--clean")
        self.assertEqual(self.jobs(), [new])

    def test_or_older_than_said(self) -> None:
        self.aged(self.folder(self.kept()), 2.1)
        new = self.aged(self.folder(self.kept(CUT, 8, "--quality", "low")), 1.9)
        self.recover("--clean", "--older-than", "2d")
        self.assertEqual(self.jobs(), [new])

    def test_leaves_what_is_under_way(self) -> None:
        _, job, release = self.under_way()
        self.recover("--clean", "--older-than", "0s")
        release.set()
        self.check_saved(self.recover(job), FIRST)

    def test_refuses_an_age_that_is_none(self) -> None:
        self.kept()
        for age in ("", "x", "-1d", "7 days", "１d", "nan"):
            with self.subTest(age):
                self.check(self.run_tool("recover", "--clean", f"--older-than={age}"), 2)
        self.assertEqual(len(self.jobs()), 1)
