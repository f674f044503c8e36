"""The same command again: whatever stopped a batch, every job is saved once and paid once."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import threading
from typing import IO
from unittest import mock

import gpt_image2
from tests.batches import (
    BAD_REQUEST,
    LOW,
    NO_CREDIT,
    NOT_THIS,
    ONE,
    SILENT,
    UNAUTHORIZED,
    BatchCase,
    clock,
    drawn,
)
from tests.case import Argument, Child, Run
from tests.images import png
from tests.server import Reply, answer, refusal


class ResumeCase(BatchCase):
    """A case that stops batches and runs them again."""

    def again(self, *argv: Argument, code: int = 0, sends: int = 0, saves: int = 0) -> Run:
        """Run the batch again; assert how many POSTs and images that makes."""
        posts, images = len(self.api.posts), len(self.painted())
        run = self.batch(*argv, code=code)
        grown = (len(self.api.posts) - posts, len(run.saved))
        self.assertEqual(grown, (sends, saves), self.story(run))
        self.assertLessEqual(len(self.painted()) - images, saves)
        return run

    def under_way(
        self, *prompts: str, argv: tuple[str, ...] = ()
    ) -> tuple[Child[bytes], threading.Event]:
        """Return a batch whose jobs are all at the server, and what lets the answers come."""
        posts, release = len(self.api.posts), self.painter.hold(*prompts)
        self.prompts(*prompts)
        tool = self.start_tool("batch", "jobs.jsonl", *argv)
        self.api.wait_for_request(posts + len(prompts))
        return tool, release

    def killed(self, tool: Child[bytes]) -> None:
        """Kill the tool alone; its curls go on."""
        tool.kill()
        self.finish(tool)

    def killed_before_its_answers(self, *prompts: str) -> None:
        """Begin a batch, kill it while its jobs are at the server, and let the answers come."""
        tool, release = self.under_way(*prompts)
        self.killed(tool)
        release.set()
        self.wait_until(lambda: not self.processes())

    def check_done(self, *labels: str) -> None:
        """Assert that the folder has these images under their numbers, and nothing is left."""
        self.check_images(**{f"{at:04}": label for at, label in enumerate(labels, 1)})
        self.assertEqual(set(self.states().values()), {"saved"})
        self.assertEqual((self.jobs(), self.processes()), ([], []))


class Again(ResumeCase):
    def test_what_is_tried_again_what_is_final_and_what_is_never_resent(self) -> None:
        replies = {
            "fine": Reply(),
            "bad size": BAD_REQUEST,
            "bad words": NOT_THIS,
            "key": UNAUTHORIZED,
            "limit": NO_CREDIT,
            "oops": refusal(500, "server_error", "Oops."),
            "silence": SILENT,
            "half": answer(drawn("x"), b"no image"),
        }
        self.write(*({"prompt": prompt, "id": prompt} for prompt in replies))
        for prompt, reply in replies.items():
            self.painter.order(prompt, reply)
        self.batch(code=9)
        table: list[tuple[tuple[str, ...], int, list[str]]] = [
            ((), 9, ["key", "limit"]),
            ((), 9, []),
            (("--redo", "failed"), 9, ["bad size", "bad words"]),
            (("--redo", "unknown"), 0, ["half", "oops", "silence"]),
            ((), 0, []),
        ]
        for argv, code, prompts in table:
            self.painter.seen.clear()
            run = self.again(*argv, code=code, sends=len(prompts), saves=len(prompts))
            self.assertEqual(self.posted(), prompts)
            unknown = list(self.states().values()).count("unknown")
            self.assertIn("--redo unknown" if unknown else "", run.err)
            self.assertEqual(self.summary(run)["unknown"], str(unknown))
        self.assertEqual(set(self.states().values()), {"saved"})

    def test_which_unknown_ones_the_same_command_may_still_save(self) -> None:
        """A truncated response may hold an image; one that is complete holds none."""
        self.write(*({"prompt": name, "id": name} for name in ("cut", "oops")))
        whole = answer(drawn("cut"))
        cut = whole._replace(cut=len(whole.body) - 2, framing="close")
        self.painter.order("cut", cut)
        self.painter.order("oops", refusal(500, "server_error", "Oops."))
        lines = self.batch(code=8).err.splitlines()
        self.assertRegex("\n".join(lines), "cut: .*; the same command looks for its response")
        self.assertRegex("\n".join(lines), "oops: .*; --redo unknown sends it again")
        self.again(code=9, saves=1)

    def test_a_job_is_its_request_and_nothing_else(self) -> None:
        """Another host, key, time-out, order of keys, spelling, id or output is the same job."""
        self.write({"prompt": "a", "size": "1K", "quality": "low"})
        self.batch()
        self.write('{"quality":"low",  "size":"1024x1024", "output": "x.png", "prompt": "a"}')
        self.env["GPT_IMAGE2_API_KEY"] = "sk-another-key-9876543210"
        self.again("--timeout", "99", "--retries", "5", "--concurrency", "9", "--sidecar")
        self.again("--quality", "high")  # the line says its own
        other = self.serve_base()
        self.again()
        self.prompts("a", id="fox")
        self.again("--size", "1024x1024", *LOW)
        self.no_request(other)

    def test_a_image_that_finds_no_place(self) -> None:
        """Its folder is in the way: it stays in the job folder until that is mended."""
        blocked = self.folder / "sub"

        def in_the_way() -> None:
            shutil.rmtree(blocked, ignore_errors=True)
            blocked.write_bytes(b"in the way")

        self.painter.order("a", in_the_way)
        self.write({"prompt": "a", "output": "sub/a.png"})
        self.batch(code=9)
        (job,) = self.jobs()
        self.assertEqual(self.states(), {"0001": "partial"})
        blocked.unlink()
        self.check(self.run_tool("recover", job.name), 0)
        self.assertEqual(self.painted(), {"sub/a.png": "a"})
        self.again()

    def test_an_inserted_line_moves_no_name_and_a_removed_ones_is_not_given_away(self) -> None:
        self.prompts("a", "b", "c")
        self.batch()
        self.prompts("new", "a", "b", "newer", "c")
        self.again(sends=2, saves=2)
        names = {"0001": "a", "0002": "b", "0003": "c", "0004": "newer", "0006": "new"}
        self.check_images(**names)
        self.again()
        self.prompts("c", "last", "a")
        self.again(sends=1, saves=1)
        self.check_images(**names, **{"0005": "last"})

    def test_an_edited_line_is_a_new_job(self) -> None:
        self.write({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "id": "fox"})
        self.painter.order("b", BAD_REQUEST)
        self.batch(code=9)
        self.write({"prompt": "a2"}, {"prompt": "b2"}, {"prompt": "c", "id": "fox", "n": 2})
        self.again(sends=3, saves=4)
        names = {"0001": "a", "0002": "b2", "0004": "a2"}
        foxes = {"fox": "c", "fox-1": "c again", "fox-2": "c again, 2"}
        self.check_images(**names, **foxes)
        self.again()

    def test_one_more_of_the_same(self) -> None:
        for count in (2, 3):
            self.prompts(*["a"] * count)
            self.batch()
            self.assertEqual((len(self.api.posts), len(self.painted())), (count, count))
        before = self.files()
        self.assertEqual(self.summary(self.again())["skipped"], "3")
        self.assertEqual(self.files(), before)

    def differs(self, *argv: str, says: str) -> None:
        """Assert that a changed default is refused: it must not pay for everything again."""
        run = self.refused(*argv)
        self.assertRegex(run.err, says)
        self.assertIn("--redo changed", run.err)

    def test_a_change_of_the_command_line(self) -> None:
        self.prompts("a", "b")
        self.batch(*LOW)
        self.differs("--quality", "high", says=r"of 2 saved jobs changed \(quality low -> high\)")
        self.differs(says=r"of 2 saved jobs changed \(quality low -> unset\)")
        self.differs(*LOW, "--param", "seed=1", says="seed")
        self.differs(*LOW, "-m", "gpt-image-1.5", says="model gpt-image-2 -> gpt-image-1.5")
        self.refused(*LOW, "--n", "2", "--json")
        self.again(*LOW)
        self.again("--quality", "high", "--redo", "changed", sends=2, saves=2)
        self.assertEqual(len(self.painted()), 4)
        self.assertEqual(self.api.posts[-1].json["quality"], "high")
        self.again("--quality", "high")

    def test_a_change_of_the_config_and_of_an_input_image(self) -> None:
        room = self.work / "room.png"
        room.write_bytes(png(16, 16, seed=1))
        self.configure(quality="low")
        self.write({"prompt": "a", "images": ["room.png"]})
        self.batch()
        self.configure(quality="medium")
        self.differs(says=r"of 1 saved job changed \(quality low -> medium\)")
        self.configure(quality="low")
        room.write_bytes(png(16, 16, seed=2))
        self.differs(says="image")
        self.again("--redo", "changed", sends=1, saves=1)

    def test_what_was_not_billed_may_change(self) -> None:
        """What is saved or may be billed needs --redo changed."""
        self.painter.order("a", *[UNAUTHORIZED] * 3)
        self.painter.order("b", *[BAD_REQUEST] * 3)
        self.painter.order("c", SILENT)
        self.prompts("a", "b")
        self.batch("--output-dir", "other", code=1)
        self.assertEqual(len(self.batch("--output-dir", "other", *LOW, code=1).saved), 0)
        self.assertEqual(self.posted(), ["a", "a", "b", "b"])
        self.prompts("a", "b", "c", "d")
        self.batch(code=9)
        self.differs(
            *LOW, says=r"of 2 saved or possibly billed jobs changed \(quality unset -> low\)"
        )
        self.again("--redo", "changed", *LOW, sends=4, saves=4)
        self.again(*LOW)

    def test_all(self) -> None:
        self.prompts("a", "b")
        self.batch()
        self.again("--redo", "all", sends=2, saves=2)
        names = {"0001": "a", "0001-2": "a again", "0002": "b", "0002-2": "b again"}
        self.check_images(**names)
        self.again()
        self.again("--redo", "all", "--force", sends=2, saves=2)
        names.update({"0001": "a again again", "0002": "b again again"})
        self.check_images(**names)

    def test_some_by_their_ids(self) -> None:
        words = ("failed", "unknown", "changed")
        self.write({"prompt": "b"}, *({"prompt": word, "id": word} for word in ("fox", *words)))
        self.batch()
        self.again("--redo", "fox,0001", sends=2, saves=2)
        self.assertEqual(self.posted(), sorted(["b", "b", "fox", "fox", *words]))
        self.assertIn("fo", self.refused("--redo", "fo").err)
        self.write({"prompt": "b"}, {"prompt": "new"})
        self.assertIn("no job has this ID", self.refused("--redo", "failed,unknown").err)
        self.write(*({"prompt": name, "id": name} for name in ("fox", "new", "bad")))
        self.painter.order("bad", BAD_REQUEST)
        run = self.again("--redo", "fox", code=9, sends=1, saves=1)  # it alone
        self.assertEqual((self.summary(run)["left"], self.posted().count("fox")), ("2", 3))
        self.assertRegex(run.err, "; run the same command again, without --redo, to send 2 failed")
        run = self.again(code=9, sends=2, saves=1)
        self.assertRegex(
            run.err, "2 of 3 .*; change the lines of 1 refused job, or pass --redo failed"
        )
        self.write({"prompt": "b"}, *({"prompt": word, "id": word} for word in ("fox", *words)))
        for word in words:  # as an id it would pay again
            self.again("--redo", word)

    def test_one_that_was_cut_short_is_finished_by_the_same_command(self) -> None:
        for which in ("all", "0001,0002,0003"):
            with self.subTest(which):
                self.prompts("a", "b", "c")
                self.batch()
                release = self.painter.hold("b")
                redo, posts = ("--redo", which, *ONE), len(self.api.posts)
                tool = self.start_tool("batch", "jobs.jsonl", *redo)
                self.api.wait_for_request(posts + 2)  # a is redone, b is under way
                self.killed(tool)
                release.set()
                if which == "all":
                    self.again(saves=1)  # it pays for no more without --redo
                self.again(*redo, sends=1, saves=1 if which == "all" else 2)
                self.assertEqual(sorted(self.painter.seen[posts:]), ["a", "b", "c"])
                shutil.rmtree(self.folder)


class Killed(ResumeCase):
    """SIGKILL at the tool; curl goes on."""

    def test_while_curls_run(self) -> None:
        """The next run waits for them, also where --redo would send again what is unknown."""
        for redo in ((), ("--redo", "unknown"), ("--redo", "all")):
            with self.subTest(redo):
                prompts = [f"{name}{redo}" for name in "abcd"]
                self.painter.seen.clear()
                tool, release = self.under_way(*prompts)
                self.killed(tool)
                with clock(release.set):  # the answers come once somebody sleeps
                    self.again(*redo, saves=4)
                self.assertEqual(self.posted(), prompts)
                self.check_done(*prompts)
                shutil.rmtree(self.folder)

    def test_an_answer_that_ends_between_two_looks(self) -> None:
        """Whoever asks whether its curl lives hears that it has just ended, with an answer."""
        real = fcntl.flock

        def flock(file: IO[bytes], how: int) -> None:
            try:
                real(file, how)
            except BlockingIOError:
                if not file.name.endswith("curl.txt"):
                    raise
                release.set()  # the curl has it
                real(file, fcntl.LOCK_EX)

        for redo in ((), ("--redo", "unknown")):
            with self.subTest(redo):
                tool, release = self.under_way(f"a{redo}")
                self.killed(tool)
                with mock.patch("fcntl.flock", flock):
                    self.again(*redo, saves=1)
                self.check_done(f"a{redo}")
                shutil.rmtree(self.folder)

    def test_and_the_answers_come_while_nobody_looks(self) -> None:
        """They are brought in before anything is sent."""
        self.killed_before_its_answers("a", "b")
        self.prompts("c", "a", "b")
        run = self.again(*ONE, sends=1, saves=3)
        self.assertEqual(run.saved[-1].name, "0004.png")
        self.check_images(**{"0001": "a", "0002": "b", "0004": "c"})

    def test_and_its_curls_too(self) -> None:
        tool, _ = self.under_way("a", "b")
        self.killed(tool)
        for curl in self.processes("curl"):
            os.kill(curl, signal.SIGKILL)
        self.wait_until(lambda: not self.processes())
        for _ in range(2):
            self.assertEqual(self.summary(self.again(code=8))["unknown"], "2")
        self.again("--redo", "unknown", sends=2, saves=2)

    def test_before_its_curl_begins(self) -> None:
        """What was on record as sent, and was not, is sent: that is no second time."""
        curl = self.new_folder("bin") / "curl"
        curl.write_text('#!/bin/sh\ncase "$*" in *-K*) kill -9 $PPID ;; esac\n')
        curl.chmod(0o755)
        self.prompts("a")
        path = f"{curl.parent}:{self.env['PATH']}"
        tool = self.start_tool("batch", "jobs.jsonl", env={"PATH": path})
        self.assertEqual(self.finish(tool).code, -signal.SIGKILL)
        self.assertEqual(self.states(), {"0001": "sent"})
        self.again(sends=1, saves=1)
        self.check_done("a")

    def test_a_job_that_a_batch_works_on(self) -> None:
        runs = self.beside("a", "recover --last --no-wait")
        self.prompts("a")
        self.batch()
        self.assertIn("running", self.check(runs[0], 10).err)
        self.check_done("a")

    def test_one_that_recover_finishes_meanwhile(self) -> None:
        self.killed_before_its_answers("a")
        lock_job = gpt_image2.lock_job
        runs: list[Run] = []

        def after_recover(folder: str) -> IO[bytes] | None:
            if not runs:
                runs.append(self.check(self.finish(self.start_tool("recover", "--all")), 0))
            return lock_job(folder)

        with mock.patch.object(gpt_image2, "lock_job", after_recover):
            self.assertEqual(self.summary(self.batch())["skipped"], "1")
        self.check_done("a")

    def test_what_a_killed_batch_left(self) -> None:
        """Also when the batch's folder is gone."""
        for folder_goes in (False, True):
            prompts = [f"{letter} {folder_goes}" for letter in "ab"]
            self.killed_before_its_answers(*prompts)
            if folder_goes:
                shutil.rmtree(self.folder)
            recovered = self.check(self.run_tool("recover", "--all"), 0)
            self.assertEqual({path.parent for path in recovered.saved}, {self.folder})
            self.assertEqual(self.states(), {"0001": "saved", "0002": "saved"})
            self.again()
            self.check_done(*prompts)
            shutil.rmtree(self.folder)

    def test_a_single_request_does_not_take_over_a_batchs_job(self) -> None:
        self.killed_before_its_answers("a")
        self.check(self.run_tool("generate", "a"), 0)
        self.again(saves=1)
        self.assertEqual(self.painter.seen, ["a", "a"])


class Journals(ResumeCase):
    def test_a_torn_last_line(self) -> None:
        """Torn is the line of a job that was not billed."""
        self.prompts("a", "b")
        self.painter.order("b", UNAUTHORIZED)
        self.batch(*ONE, code=9)
        text = self.journal.read_text()
        for torn, code in ((text[:-9], 9), (text[:-1], 0), (text + '{"sche', 0)):
            with self.subTest(end=torn[-20:]):
                self.journal.write_text(torn)
                (self.folder / "0002.png").unlink(missing_ok=True)
                self.batch(code=code)
                self.assertEqual(self.painter.seen.count("a"), 1)

    def test_a_torn_saved_line_loses_no_money(self) -> None:
        """Without the line and without the job folder nobody can tell; so it is not sent again."""
        self.prompts("a")
        self.batch()
        self.journal.write_text(self.journal.read_text()[:-9])
        self.again(code=8)
        self.assertEqual(self.painted(), {"0001.png": "a"})

    def test_foreign_lines(self) -> None:
        self.prompts("a")
        self.batch()
        foreign = ["[1, 2]", '"text"', "null", "{}", '{"identity": 7}', "nonsense \xff", "[" * 9000]
        foreign += ['{"identity": "x-1", "state": 5, "number": "y", "cost": 7, "error": []}']
        with self.journal.open("a", encoding="latin-1") as file:
            file.write("\n".join(foreign) + "\n")
        self.again()

    def test_one_that_is_not_ours(self) -> None:
        self.prompts("a", "b")
        self.folder.mkdir()
        self.journal.write_text("nonsense\n")
        self.assertIn("results.jsonl", self.run_tool("batch", "jobs.jsonl").err)
        self.journal.unlink()
        self.journal.mkdir()
        self.assertIn("results.jsonl", self.run_tool("batch", "jobs.jsonl").err)
        self.no_request(self.api)
        self.journal.rmdir()
        for begun in ("", '{"identi'):  # another shard writes its first line just now
            (self.folder / "results-1-of-2.jsonl").write_text(begun)
            self.batch("--shard", "2/2")
        self.assertEqual(self.posted(), ["b"])

    def test_one_that_takes_half_a_line(self) -> None:
        """Nothing more is begun; where an answer had come, the next run finds the image."""
        self.prompts("a", "b")
        self.batch(*ONE, "--output-dir", "probe")
        sent = (self.work / "probe" / "results.jsonl").read_bytes().index(b"\n") + 1
        start, end, full = '{"state": "x", "filler": "', '"}\n', 1 << 20
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, before)
        for room, posted in ((sent + 30, ["a"]), (50, [])):
            with self.subTest(room=room):
                self.painter.seen.clear()
                self.folder.mkdir()
                filler = "x" * (full - room - len(start + end))
                self.journal.write_text(start + filler + end)
                resource.setrlimit(resource.RLIMIT_FSIZE, (full, before[1]))
                run = self.batch(*ONE, code=1)
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
                self.assertEqual(self.journal.stat().st_size, full)
                self.assertIn("results.jsonl", run.err)
                self.assertEqual(self.posted(), posted)
                self.again(sends=2 - len(posted), saves=2)
                self.assertEqual(sorted(self.painted()), ["0001.png", "0002.png"])
                self.assertEqual(self.posted(), ["a", "b"])
                self.assertEqual(self.jobs() if posted else [], [])
                shutil.rmtree(self.folder)

    def test_one_that_is_removed_meanwhile(self) -> None:
        self.prompts("a", "b")
        self.painter.order("a", self.journal.unlink)
        self.assertIn("results.jsonl", self.run_tool("batch", "jobs.jsonl", *ONE).err)
        self.assertEqual(len(self.jobs()), 1)
        self.check(self.run_tool("recover", "--all"), 0)
        self.batch()
        self.assertEqual(self.posted(), ["a", "b"])
        self.check_done("a", "b")


class Stopped(ResumeCase):
    def test_once_lets_those_under_way_finish_and_begins_no_more(self) -> None:
        """It tells how many that are: four, unless told otherwise."""
        for argv, count in (((), 4), (("--concurrency", "7"), 7)):
            with self.subTest(argv):
                posts, names = len(self.api.posts), [f"{count} {at}" for at in range(8)]
                release = self.painter.hold(*names)
                self.prompts(*names)
                tool = self.start_tool("batch", "jobs.jsonl", *argv)
                self.api.wait_for_request(posts + count)
                tool.send_signal(signal.SIGINT)
                self.hear(tool, f"stopping; waiting up to 10 s for {count} jobs in progress")
                release.set()
                run = self.check(self.finish(tool), 130)
                left = self.summary(run)["left"]
                self.assertEqual((len(run.saved), left), (count, f"{8 - count}"))
                self.again(sends=8 - count, saves=8 - count)
                self.check_done(*names)
                shutil.rmtree(self.folder)

    def test_once_and_the_answers_take_longer(self) -> None:
        self.hurry(40)
        tool, release = self.under_way("a", "b", argv=("--json",))
        tool.send_signal(signal.SIGTERM)
        *jobs, total = self.documents(self.check(self.finish(tool), 143))
        self.assertEqual([job["state"] for job in jobs], ["unknown", "unknown"])
        self.assertEqual({job["error"]["maybe_billed"] for job in jobs}, {True})
        self.assertEqual(total["error"]["exit_code"], 143)
        del self.env["PYTHONPATH"]
        self.hurried = False
        with clock(release.set):
            self.again(saves=2)
        self.check_done("a", "b")

    def test_twice_leaves_at_once(self) -> None:
        tool, release = self.under_way("a", "b")
        tool.send_signal(signal.SIGINT)
        self.hear(tool, "waiting up to 10 s")
        tool.send_signal(signal.SIGINT)
        self.assertEqual(self.check(self.finish(tool), 130).out, "")
        release.set()
        self.again(saves=2)
        self.check_done("a", "b")

    def test_while_it_waits(self) -> None:
        """For its pace, or for what a 429 asked; what was refused then is sent by the next run."""
        slow = refusal(429, "rate_limit_exceeded", "Slow.", headers=[("Retry-After", "3600")])
        for reply, stop in (
            (Reply(), signal.SIGINT),
            (slow, signal.SIGINT),
            (slow, signal.SIGKILL),
        ):
            with self.subTest(status=reply.status, stop=stop):
                posts, paced = len(self.api.posts), reply is not slow
                self.painter.order("a", reply)
                self.prompts("a", "b")
                rpm = "1" if paced else "99"
                tool = self.start_tool("batch", "jobs.jsonl", *ONE, "--rpm", rpm)
                if not paced:
                    self.hear(tool, "3600 s")
                self.api.wait_for_request(posts + 1)
                tool.send_signal(stop)
                self.assertEqual(self.finish(tool).code, 130 if stop == signal.SIGINT else -stop)
                with clock():
                    self.batch()
                sent = sorted(self.painter.seen[posts:])
                self.assertEqual(sent, ["a", "b"] if paced else ["a", "a", "b"])
                self.assertEqual(set(self.states().values()), {"saved"})
                shutil.rmtree(self.folder)


class Links(ResumeCase):
    """Somebody has put links where a batch keeps its lock and its unfinished files."""

    def test_none_is_followed(self) -> None:
        self.prompts("a")
        mine = self.work / "mine"
        mine.write_bytes(b"mine")
        self.folder.mkdir()
        page = self.folder / "results.jsonl.index.html.part"
        lock = self.folder / "results.lock"
        for link in (page, lock):
            link.symlink_to(mine)
        self.assertIn(str(lock), self.batch(code=2).err)
        lock.unlink()
        self.batch()
        self.assertEqual(mine.read_bytes(), b"mine")
        self.assertFalse(page.is_symlink())
        self.assertTrue((self.folder / "index.html").read_bytes())


class Unlocked(ResumeCase):
    """Where file locks don't work in the batch's folder."""

    def test_a_second_run_on_the_same_machine_is_refused_all_the_same(self) -> None:
        real = fcntl.flock

        def flock(file: IO[bytes], how: int) -> None:
            if not file.name.startswith(str(self.folder)):
                real(file, how)

        self.prompts("a", "b")
        with mock.patch("fcntl.flock", flock):
            for argv in (("--shard", "1/2"), ("--shard", "2/2"), ()):
                run = self.batch(*argv)
                self.assertRegex(run.err, "warning: .*locks do not work .*second run on another")
            held = [path.open("rb") for path in (self.state / "gpt-image-2").glob("*.lock")]
            self.assertEqual(len(held), 3)
            for file in held:
                self.addCleanup(file.close)
                real(file, fcntl.LOCK_EX)
            self.assertIn("already running in process", self.batch(code=2).err)


class Shards(ResumeCase):
    def shard(self, which: str, *argv: Argument, code: int = 0) -> list[str]:
        """Run one shard, and return the prompts that it sends."""
        before = len(self.painter.seen)
        self.batch("--shard", which, *argv, code=code)
        return sorted(self.painter.seen[before:])

    def test_every_nth(self) -> None:
        self.prompts(*"abcdea")
        self.assertEqual(self.shard("2/4"), ["a", "b"])
        self.assertEqual(self.shard("1/4"), ["a", "e"])
        self.assertEqual(self.shard("3/4") + self.shard("4/4"), ["c", "d"])
        self.assertEqual(sorted(self.painted()), [f"000{number}.png" for number in range(1, 7)])
        journals = [name for name in self.listing(self.folder) if name.endswith(".jsonl")]
        self.assertEqual(journals, [f"results-{number}-of-4.jsonl" for number in (1, 2, 3, 4)])
        self.assertEqual(self.shard("2/4"), [])
        self.again()
        self.assertEqual(self.shard("1/2"), [])
        self.prompts("a")
        self.assertEqual(self.shard("3/3"), [], "more shards than jobs")

    def test_a_change_from_unsharded_to_sharded(self) -> None:
        self.prompts(*"abcd")
        self.painter.order("a", UNAUTHORIZED)
        self.batch(code=9)
        self.assertEqual(self.shard("2/2"), [])
        self.assertEqual(self.shard("1/2"), ["a"])
        self.again()
        self.prompts("x", "y", *"abcd")
        self.assertEqual(self.shard("2/2"), ["y"])
        self.assertEqual(self.painted()["0008.png"], "y", "as 7 is for x, by another machine")

    def test_beside_a_shard_that_runs(self) -> None:
        """The same one, and another way of splitting, are refused; the other shard is not."""
        self.prompts("a", "b")
        options = ("--shard=1/2", "--shard=2/2", "--shard=1/3", "--rpm=99")
        runs = self.beside("a", *(f"batch jobs.jsonl {option}" for option in options))
        self.shard("1/2")
        same, second, *others = runs
        self.assertIn(str(os.getpid()), self.check(same, 2).err)
        for run in others:
            self.assertIn("results-1-of-2", self.check(run, 2).err)
        self.check(second, 0)
        self.check_images(**{"0001": "a", "0002": "b"})
