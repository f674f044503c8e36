"""The job folder (made before the POST, gone or kept after it), and calls that finish another's."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import threading
from pathlib import Path
from typing import Callable
from unittest import mock

import gpt_image2
from tests.faults import FIRST, FOX, FOXES, SECOND, THIRD, Stage, cut_in, held_mid_answer
from tests.pictures import png
from tests.support import KEY, Api, Argument, Child, Reply, Run, answer, page, refusal

CUT = cut_in(answer(FIRST, SECOND), SECOND)


def mode(path: Path) -> int:
    """Return the permission bits of a path."""
    return stat.S_IMODE(path.stat().st_mode)


class TestJobFolder(Stage):
    """One folder a request, made before anything is sent."""

    def kept(self, reply: Reply = CUT, *options: Argument) -> Path:
        """Return the folder of a call whose outcome is unknown."""
        self.serve_base(reply)
        self.check(self.run_tool(*FOX, *options), 8)
        (job,) = self.jobs()
        return job

    def test_is_there_and_told_before_the_post(self) -> None:
        release = threading.Event()
        api = self.serve_base(answer(FIRST)._replace(before=release))
        tool = self.start_tool(*FOX, "-o", "fox.png")
        api.wait_for_request()  # from here to its answer, the tool only waits for curl
        (job,) = self.jobs()
        self.hear(tool, f"Job: {job.name}\n")
        record = json.loads((job / "job.json").read_text())
        self.assertIn("a fox", json.dumps(record))
        self.assertIn("127.0.0.1", json.dumps(record))
        self.assertIn("fox.png", json.dumps(record))
        self.assertEqual(json.loads((job / "body.json").read_text()), api.posts[0].json)
        self.assertEqual(self.files_with(KEY), [])
        release.set()
        self.check(self.finish(tool), 0)

    def test_tells_whether_curl_came_as_far_as_connecting(self) -> None:
        """curl empties its headers' file first: what is left in it says that nothing was sent."""
        release = threading.Event()
        api = self.serve_base(answer(FIRST)._replace(before=release))
        tool = self.start_tool(*FOX, "-o", "fox.png")
        api.wait_for_request()
        (job,) = self.jobs()
        self.assertEqual((job / "headers.txt").read_bytes(), b"")
        release.set()
        self.check(self.finish(tool), 0)

    def test_one_that_curl_never_began_is_sent_without_a_word(self) -> None:
        api = self.serve_base(Reply(silent=True), answer(FIRST))
        self.check(self.run_tool(*FOX), 8)
        (job,) = self.jobs()
        (job / "headers.txt").write_bytes(b"\n")
        run = self.check(self.run_tool(*FOX), 0)
        self.assertEqual((len(api.posts), self.jobs()), (2, []))
        self.assertNotIn("maybe billed", run.err)

    def test_is_closed_to_others_whatever_the_umask(self) -> None:
        self.shell('umask 0; exec "$@"')
        tool, release = held_mid_answer(self)
        (job,) = self.jobs()
        self.assertEqual(mode(job), 0o700)
        modes = {path.name: oct(mode(path)) for path in job.iterdir()}
        self.assertEqual(set(modes.values()), {"0o600"}, modes)
        self.assertLessEqual({"job.json", "body.json", "response.json", "headers.txt"}, set(modes))
        release.set()
        self.check(self.finish(tool), 0)

    def test_every_byte_is_on_disk_as_it_comes(self) -> None:
        """Not in a buffer of curl's, which would go with it."""
        release = threading.Event()
        reply = answer(FIRST)
        self.serve_base(reply._replace(chunks=[reply.body[:999], release, reply.body[999:]]))
        tool = self.start_tool(*FOX)
        self.wait_until(lambda: self.answered() == 999, timeout=5)
        release.set()
        self.check(self.finish(tool), 0)

    def test_an_edit_keeps_its_prompt_beside_it(self) -> None:
        release = threading.Event()
        api = self.serve_base(answer(FIRST)._replace(before=release))
        (self.work / "in.png").write_bytes(png(64, 64))
        tool = self.start_tool("edit", "in.png", 'a "fox"\nin snow')
        api.wait_for_request()
        (job,) = self.jobs()
        texts = [path.read_bytes() for path in job.iterdir() if path.suffix == ".txt"]
        self.assertIn(b'a "fox"\nin snow', texts)
        release.set()
        self.check(self.finish(tool), 0)

    def test_a_name_that_another_one_has_is_left_to_it(self) -> None:
        draws = [b"ab", b"ab", b"ab", b"cd"]
        with mock.patch("os.urandom", side_effect=draws), mock.patch("time.time", return_value=0):
            first = gpt_image2.new_job_folder(str(self.tmp), "01234567")
            Path(first, "response.json").write_bytes(b"paid for")
            second = gpt_image2.new_job_folder(str(self.tmp), "01234567")
        self.assertEqual(Path(first).name, "19700101T000000Z-012345676162")
        self.assertEqual(Path(second).name, "19700101T000000Z-012345676364")
        self.assertEqual(Path(first, "response.json").read_bytes(), b"paid for")

    def test_is_gone_once_all_is_said(self) -> None:
        for name, code, replies in (
            ("saved", 0, [answer(FIRST)]),
            ("refused", 4, [refusal(401, "invalid_api_key", "No.")]),
            ("not served", 6, [refusal(429, "insufficient_quota", "No.")]),
        ):
            with self.subTest(name):
                self.serve_base(*replies)
                run = self.check(self.run_tool(*FOX), code)
                self.assertEqual(self.jobs(), [])
                self.assertNotIn("Recover:", run.err)

    def test_is_gone_when_nothing_was_sent(self) -> None:
        self.point_at(f"http://127.0.0.1:{self.closed_port()}/v1")
        self.check(self.run_tool(*FOX, "--retries", "0"), 7)
        self.assertEqual(self.jobs(), [])

    def test_is_not_made_for_a_call_that_ends_before(self) -> None:
        self.serve_base()
        (self.work / "fox.png").write_bytes(b"mine")
        self.check(self.run_tool(*FOX, "-o", "fox.png"), 2)
        self.check(self.run_tool(*FOX, "--dry-run"), 0)
        self.assertEqual(self.jobs(), [])

    def test_what_is_kept_tells_how_to_recover_it(self) -> None:
        """The last line on stderr runs as it stands, wherever the script lies."""
        place = self.tmp / "it's a $(bad) place"
        place.mkdir()
        self.script = Path(shutil.copy(self.script, place))
        self.serve_base(CUT)
        run = self.check(self.run_tool(*FOX, "--n", "2", "--quiet"), 8)
        last = run.err.splitlines()[-1]
        self.assertRegex(last, "^Recover: .* recover " + self.jobs()[0].name + "$")
        shell = ["sh", "-c", last[len("Recover: ") :]]
        done = subprocess.run(
            shell,
            env=self.env,
            cwd=self.home,
            capture_output=True,
            check=False,
        )
        self.assertEqual(done.returncode, 9, self.story(run))
        (saved,) = Run([], 9, done.stdout, "").saved
        self.assertEqual(saved.read_bytes(), FIRST)
        self.assertEqual(saved.parent, self.work, "where the call would have put it")

    def test_an_answer_without_a_byte_is_kept_but_not_offered(self) -> None:
        self.serve_base(Reply(silent=True))
        run = self.check(self.run_tool(*FOX), 8)
        self.assertEqual(len(self.jobs()), 1)
        self.assertNotIn("Recover:", run.err)

    def test_an_echo_of_the_key_is_blanked(self) -> None:
        body = answer(FIRST).body[:-9] + f"  {KEY} {KEY}{KEY}".encode()
        job = self.kept(Reply(200, body, [("X-Echo", f"Bearer {KEY}")]))
        kept = (job / "response.json").read_bytes()
        self.assertEqual(len(kept), len(body), "no byte is lost or moved")
        self.assertEqual(kept[: body.index(KEY.encode())], body[: body.index(KEY.encode())])
        self.assertEqual(self.files_with(KEY), [])

    def test_an_echo_of_the_key_is_blanked_where_buffers_meet(self) -> None:
        """Wherever in a large answer it stands, windows of a power of two included."""
        filler = b'{"note": "' + b"x" * 4_300_000
        body = bytearray(filler)
        for power in range(12, 23):
            start = (1 << power) - len(KEY) // 2
            body[start : start + len(KEY)] = KEY.encode()
        job = self.kept(Reply(200, bytes(body)))
        self.assertEqual((job / "response.json").stat().st_size, len(body))
        self.assertEqual(self.files_with(KEY), [])

    def test_empty_ones_are_swept_after_a_week(self) -> None:
        self.aged(self.kept(Reply(silent=True)), 7.1)
        self.serve_base(answer(FIRST))
        self.check(self.run_tool(*FOX), 0)
        self.assertEqual(self.jobs(), [])

    def test_others_are_not_swept(self) -> None:
        for reply, days in ((CUT, 30), (Reply(silent=True), 6.9)):
            with self.subTest(days=days):
                job = self.aged(self.kept(reply), days)
                self.serve_base(answer(FIRST))
                self.check(self.run_tool("generate", "another fox"), 0)
                self.assertEqual(self.jobs(), [job])
                shutil.rmtree(job)

    def test_an_unknown_outcome_says_so(self) -> None:
        self.serve_base(page(502, "Bad Gateway"))
        run = self.check(self.run_tool(*FOX, "--json"), 8)
        self.assertTrue(run.json["error"]["maybe_billed"])
        self.assertEqual(run.json["job_id"], self.jobs()[0].name)
        self.assertEqual(run.json["recover_id"], self.jobs()[0].name)


class TestResumed(Stage):
    """A call whose script was killed is finished by the same command, and by no other."""

    def setUp(self) -> None:
        super().setUp()
        self.release = threading.Event()

    def held(self, *pictures: bytes) -> Api:
        """Serve one picture a POST, each once self.release is set."""
        return self.serve_base(*(answer(p)._replace(before=self.release) for p in pictures))

    def killed(self, api: Api, *argv: Argument) -> None:
        """Start a call, and kill its script while the server has its request."""
        posts = len(api.posts)
        tool = self.start_tool(*argv)
        api.wait_for_request(posts + 1)
        tool.kill()
        self.finish(tool)

    def all_curls_ended(self) -> None:
        """Let the answers come, and wait until every curl has them."""
        self.release.set()
        self.wait_until(lambda: not self.processes("curl"))

    def test_finishes_the_request_under_way(self) -> None:
        api = self.held(FIRST)
        self.killed(api, *FOX)
        again = self.start_tool(*FOX, "--json")
        self.hear(again, "resumed")
        self.release.set()
        run = self.check(self.finish(again), 0)
        self.assertIs(run.json["resumed"], True)
        self.assertEqual(Path(run.json["images"][0]["path"]).read_bytes(), FIRST)
        self.assertEqual(len(api.posts), 1)
        self.assertEqual(self.jobs(), [])

    def test_finishes_an_answer_that_came_meanwhile(self) -> None:
        api = self.held(FIRST)
        self.killed(api, *FOX, "-o", "fox.png")
        self.all_curls_ended()
        run = self.check(self.run_tool(*FOX, "-o", "fox.png"), 0)
        self.assertIn("resumed", run.err)
        self.assertEqual(run.saved, [self.work / "fox.png"])
        self.assertEqual(run.saved[0].read_bytes(), FIRST)
        self.assertEqual(len(api.posts), 1)
        self.assertEqual(self.jobs(), [])

    def test_a_call_of_its_own_is_not_resumed(self) -> None:
        self.serve_base(answer(FIRST))
        run = self.check(self.run_tool(*FOX, "--json"), 0)
        self.assertIs(run.json["resumed"], False)
        self.assertNotIn("resumed", run.err)

    def test_the_way_in_which_a_prompt_comes_does_not_matter(self) -> None:
        api = self.held(FIRST)
        self.killed(api, *FOX)
        self.release.set()
        self.assertIn("resumed", self.check(self.run_tool("generate", "-", stdin="a fox\n"), 0).err)
        self.assertEqual(len(api.posts), 1)

    def test_another_request_is_sent(self) -> None:
        for name, argv in {
            "prompt": ("generate", "a red fox"),
            "size": (*FOX, "--size", "1024x1536"),
            "quality": (*FOX, "--quality", "low"),
            "number": (*FOX, "--n", "2"),
            "output": (*FOX, "-o", "other.png"),
            "folder": (*FOX, "--output-dir", "other"),
            "any field": (*FOX, "--param", "seed=1"),
        }.items():
            with self.subTest(name):
                api = self.held(FIRST, SECOND)
                self.killed(api, *FOX)
                self.all_curls_ended()
                run = self.run_tool(*argv)
                self.assertNotIn("resumed", self.check(run, 9 if name == "number" else 0).err)
                self.assertEqual(run.saved[0].read_bytes(), SECOND)
                self.assertEqual(len(api.posts), 2)
                self.assertIn("resumed", self.check(self.run_tool(*FOX), 0).err)
                self.assertEqual(len(api.posts), 2)
                self.release.clear()

    def test_another_host_is_asked(self) -> None:
        api = self.held(FIRST)
        self.killed(api, *FOX)
        self.release.set()
        other = self.serve_base(answer(SECOND))
        run = self.check(self.run_tool(*FOX), 0)
        self.assertEqual(run.saved[0].read_bytes(), SECOND)
        self.assertEqual(len(other.posts), 1)

    def test_new_sends_another(self) -> None:
        api = self.held(FIRST, SECOND)
        self.killed(api, *FOX)
        self.release.set()
        run = self.check(self.run_tool(*FOX, "--new"), 0)
        self.assertNotIn("resumed", run.err)
        self.assertEqual(run.saved[0].read_bytes(), SECOND)
        self.assertEqual(len(api.posts), 2)
        self.assertEqual(
            self.pictures(self.check(self.run_tool("recover", "--all"), 0)), {FIRST, SECOND}
        )

    def test_the_job_of_a_living_script_is_not_taken(self) -> None:
        api = self.held(FIRST, SECOND)
        first = self.start_tool(*FOX)
        api.wait_for_request()
        second = self.start_tool(*FOX)
        api.wait_for_request(2)
        self.release.set()
        for tool in (first, second):
            self.assertNotIn("resumed", self.check(self.finish(tool), 0).err)
        self.assertEqual(len(self.listing()), 2)

    def test_calls_side_by_side_finish_one_each(self) -> None:
        """Three variants of one prompt, all killed: the same three again are no new requests."""
        api = self.held(FIRST, SECOND, THIRD)
        for tool in self.side_by_side(3, lambda: api.wait_for_request(3)):
            tool.kill()
            self.finish(tool)
        again = self.side_by_side(3, lambda: None)
        for tool in again:
            self.hear(tool, "resumed")
        self.release.set()
        runs = [self.check(self.finish(tool), 0) for tool in again]
        self.assertEqual({run.saved[0].read_bytes() for run in runs}, {FIRST, SECOND, THIRD})
        self.assertEqual(len(api.posts), 3)
        self.assertEqual(self.jobs(), [])

    def side_by_side(self, count: int, under_way: Callable[[], object]) -> list[Child]:
        """Return so many identical calls that run at once, after waiting for them."""
        tools = [self.start_tool(*FOX) for _ in range(count)]
        under_way()
        return tools

    def test_a_call_more_than_were_killed_sends_its_own(self) -> None:
        api = self.held(FIRST, SECOND)
        self.killed(api, *FOX)
        tools = self.side_by_side(2, lambda: api.wait_for_request(2))
        self.release.set()
        runs = [self.check(self.finish(tool), 0) for tool in tools]
        self.assertEqual({run.saved[0].read_bytes() for run in runs}, {FIRST, SECOND})
        self.assertEqual(len(api.posts), 2)

    def test_an_edit_of_the_same_bytes_is_resumed(self) -> None:
        api = self.held(FIRST)
        self.killed_edit(api, png(64, 64))
        self.release.set()
        run = self.check(self.run_tool("edit", "in.png", "make it blue"), 0)
        self.assertIn("resumed", run.err)
        self.assertEqual(run.saved[0].read_bytes(), FIRST)
        self.assertEqual(len(api.posts), 1)

    def test_an_edit_of_other_bytes_is_sent(self) -> None:
        api = self.held(FIRST, SECOND)
        self.killed_edit(api, png(64, 64))
        self.release.set()
        (self.work / "in.png").write_bytes(png(64, 64, rgb=(1, 2, 3)))
        run = self.check(self.run_tool("edit", "in.png", "make it blue"), 0)
        self.assertNotIn("resumed", run.err)
        self.assertEqual(run.saved[0].read_bytes(), SECOND)
        self.assertEqual(len(api.posts), 2)

    def killed_edit(self, api: Api, picture: bytes) -> None:
        """Start an edit of a picture, and kill its script."""
        (self.work / "in.png").write_bytes(picture)
        self.killed(api, "edit", "in.png", "make it blue")

    def test_a_refusal_that_came_meanwhile_is_told(self) -> None:
        reply = refusal(400, "moderation_blocked", "Blocked.")._replace(before=self.release)
        api = self.serve_base(reply)
        self.killed(api, *FOX)
        self.all_curls_ended()
        run = self.check(self.run_tool(*FOX), 5)
        self.assertIn("resumed", run.err)
        self.assertIn("Blocked", run.err)
        self.assertEqual(len(api.posts), 1)
        self.assertEqual(self.jobs(), [])

    def test_an_answer_cut_meanwhile_is_not_paid_again(self) -> None:
        reply = CUT._replace(before=self.release)
        api = self.serve_base(reply)
        self.killed(api, *FOX, "--n", "2")
        self.all_curls_ended()
        run = self.check(self.run_tool(*FOX, "--n", "2"), 8)
        self.assertIn("resumed", run.err)
        self.assertIn("--new", run.err, "the way to another one")
        self.assertEqual(len(api.posts), 1)
        self.assertEqual(self.pictures(self.check(self.run_tool("recover", "--last"), 9)), {FIRST})

    def test_a_request_that_left_nothing_is_sent_again_with_a_warning(self) -> None:
        """Its curl is gone without a byte: nothing is under way that could be finished."""
        api = self.serve_base(Reply(silent=True, before=self.release), answer(SECOND))
        self.killed(api, *FOX)
        self.all_curls_ended()
        run = self.check(self.run_tool(*FOX), 0)
        self.assertNotIn("resumed", run.err)
        self.assertIn("billed", run.err)
        self.assertEqual(len(api.posts), 2)

    def test_the_answer_is_finished_only_once(self) -> None:
        api = self.held(FIRST, SECOND)
        self.killed(api, *FOX)
        self.all_curls_ended()
        tools = self.side_by_side(2, lambda: None)
        runs = [self.check(self.finish(tool), 0) for tool in tools]
        self.assertEqual({run.saved[0].read_bytes() for run in runs}, {FIRST, SECOND})
        self.assertEqual(["resumed" in run.err for run in runs].count(True), 1)
        self.assertEqual(len(api.posts), 2)

    def test_an_answer_half_there_is_resumed(self) -> None:
        """The second call comes in the middle of the body."""
        tool, release = held_mid_answer(self)
        tool.kill()
        self.finish(tool)
        again = self.start_tool(*FOXES)
        self.hear(again, "resumed")
        release.set()
        run = self.check(self.finish(again), 0)
        self.assertEqual(self.pictures(run), {FIRST, SECOND, THIRD})
        self.assertEqual(len(self.servers[0].posts), 1)
