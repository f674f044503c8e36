"""The same command again: whatever stopped a batch, every job is saved once and paid once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Iterator
from unittest import mock

import gpt_image2
from tests.batches import BAD_REQUEST, LOW, POLICY, UNAUTHORIZED, BatchCase, drawn, prompt_of
from tests.pictures import png
from tests.storm import storm
from tests.support import (
    SCRIPT,
    Argument,
    Child,
    Reply,
    Run,
    answer,
    make_writable,
    refusal,
)

OOPS = refusal(500, "server_error", "Oops.")
SILENT = Reply(silent=True)


LATE_ANSWER = """
import shutil, sys

sys.path.insert(0, sys.argv[1])
import gpt_image2

def it_has_just_ended(folder):
    shutil.copy(sys.argv[2], f"{folder}/response.json")
    return False

gpt_image2.curl_lives = it_has_just_ended
sys.exit(gpt_image2.main(sys.argv[3:]))
"""


class ResumeCase(BatchCase):
    """A case that stops batches and runs them again."""

    def again(self, *argv: Argument, code: int = 0, sends: int = 0, saves: int = 0) -> Run:
        """Run the batch again; assert how many POSTs and pictures that makes."""
        posts, pictures = len(self.api.posts), len(self.painted())
        run = self.batch(*argv, code=code)
        grown = (len(self.api.posts) - posts, len(run.saved))
        self.assertEqual(grown, (sends, saves), self.story(run))
        self.assertLessEqual(len(self.painted()) - pictures, saves)
        return run

    def under_way(self, *prompts: str, argv: tuple[str, ...] = ()) -> tuple[Child, threading.Event]:
        """Return a batch whose jobs are all at the server, and what lets the answers come."""
        posts, release = len(self.api.posts), self.painter.hold(*prompts)
        self.prompts(*prompts)
        tool = self.start_tool("batch", "jobs.jsonl", *argv)
        self.api.wait_for_request(posts + len(prompts))
        return tool, release

    def killed(self, tool: Child) -> None:
        """Kill the tool alone; its curls go on."""
        tool.kill()
        self.finish(tool)

    def killed_before_its_answers(self, *prompts: str) -> None:
        """Begin a batch, kill it while its jobs are at the server, and let the answers come."""
        tool, release = self.under_way(*prompts)
        self.killed(tool)
        release.set()
        self.curls_end()

    def curls_end(self) -> None:
        """Wait until no process of this world is left."""
        self.wait_until(lambda: not self.processes())

    def check_done(self, *labels: str) -> None:
        """Assert that the folder has these pictures under their numbers, and nothing is left."""
        self.check_pictures(**{f"{at:04}": label for at, label in enumerate(labels, 1)})
        self.assertEqual(set(self.states().values()), {"saved"})
        self.assertEqual(self.jobs(), [])
        self.assertEqual(self.processes(), [])


class Again(ResumeCase):
    """After an end of its own."""

    def test_a_finished_batch_pays_nothing(self) -> None:
        self.write({"prompt": "a"}, {"prompt": "b", "n": 2}, {"prompt": "c", "output": "x.png"})
        self.batch()
        before = self.files()
        run = self.again()
        self.assertEqual(run.out, "")
        self.assertEqual(self.summary(run)["skipped"], "3")
        self.assertEqual(self.files(), before)

    def test_what_is_tried_again_what_is_final_and_what_is_never_resent(self) -> None:
        replies = {
            "fine": Reply(),
            "bad size": BAD_REQUEST,
            "bad words": refusal(400, POLICY, "Not this."),
            "key": UNAUTHORIZED,
            "limit": refusal(429, "insufficient_quota", "Pay.", type="insufficient_quota"),
            "oops": OOPS,
            "silence": SILENT,
            "half": answer(drawn("x"), b"no picture"),
        }
        self.write(*({"prompt": prompt, "id": prompt} for prompt in replies))
        for prompt, reply in replies.items():
            self.painter.order(prompt, reply)
        self.batch(code=9)
        self.painter.seen.clear()
        self.again(code=9, sends=2, saves=2)
        self.assertEqual(self.posted(), ["key", "limit"])
        self.again(code=9)
        self.painter.seen.clear()
        self.again("--redo", "failed", code=9, sends=2, saves=2)
        self.assertEqual(self.posted(), ["bad size", "bad words"])
        self.painter.seen.clear()
        self.again("--redo", "unknown", sends=3, saves=3)
        self.assertEqual(self.posted(), ["half", "oops", "silence"])
        self.assertEqual(set(self.states().values()), {"saved"})
        self.again()

    def test_what_is_unknown_is_told_with_the_way_out(self) -> None:
        self.prompts("a")
        self.painter.order("a", SILENT)
        self.batch(code=8)
        run = self.again(code=8)
        self.assertIn("--redo unknown", run.err)
        self.assertEqual(self.summary(run)["unknown"], "1")
        document = self.documents(self.again("--json", code=8))[-1]
        self.assertEqual(document["summary"]["unknown"], 1)
        self.assertIs(document["error"]["maybe_billed"], True)

    def test_an_unknown_job_sent_again_counts_once_in_the_end(self) -> None:
        self.prompts("a")
        self.painter.order("a", OOPS, OOPS)
        self.batch(code=8)
        self.again("--redo", "unknown", code=8, sends=1)
        self.again(code=8)
        self.again("--redo", "unknown", sends=1, saves=1)
        self.assertEqual(self.states(), {"0001": "saved"})

    def test_a_job_is_its_request_and_nothing_else(self) -> None:
        """Another host, key, time-out, order of keys, spelling or output is the same job."""
        self.write({"prompt": "a", "size": "1K", "quality": "low"})
        self.batch()
        self.write('{"quality":"low",  "size":"1024x1024", "output": "x.png", "prompt": "a"}')
        self.env["GPT_IMAGE2_API_KEY"] = "sk-another-key-9876543210"
        self.again("--timeout", "99", "--retries", "5", "--concurrency", "9", "--sidecar")
        other = self.serve_base()
        self.again()
        self.no_request(other)
        self.prompts("a")
        self.again("--size", "1024x1024", *LOW)

    def test_recover_in_between_counts(self) -> None:
        cut = answer(drawn("a"), drawn("b"))
        self.painter.order("a", cut._replace(cut=len(cut.body) - 3))
        self.prompts("a", "c")
        self.batch(code=9)
        (job,) = self.jobs()
        recovered = self.check(self.run_tool("recover", job.name), 0)
        self.assertEqual(len(recovered.saved), 2)
        self.assertEqual(recovered.saved[0].parent, self.folder)
        self.assertEqual(self.states(), {"0001": "saved", "0002": "saved"})
        run = self.again()
        self.assertEqual(self.summary(run)["skipped"], "2")

    def test_an_answer_that_was_kept_is_saved_by_the_same_command(self) -> None:
        """The pictures' folder is in the way at first."""
        self.prompts("a")
        self.painter.order("a", Reply(before=threading.Event()))
        blocker = self.folder / "sub"
        self.write({"prompt": "a", "output": "sub/a.png"})
        release = self.painter.orders["a"][0].before
        assert release
        tool = self.start_tool("batch", "jobs.jsonl")
        self.api.wait_for_request()
        shutil.rmtree(blocker, ignore_errors=True)
        blocker.write_bytes(b"in the way")
        release.set()
        run = self.finish(tool)
        self.assertIn(run.code, (9, 10), self.story(run))
        self.assertEqual(len(self.jobs()), 1)
        blocker.unlink()
        job = self.jobs()[0]
        if self.states() == {"0001": "unknown"}:
            self.again(saves=1)
        else:  # saved in the job folder, which stays
            self.assertEqual(self.states(), {"0001": "partial"})
            self.check(self.run_tool("recover", job.name), 0)
        self.assertIn("a", self.painted().values())
        self.assertEqual(self.painter.seen, ["a"])


class Lines(ResumeCase):
    """Lines that come, go and change."""

    def test_an_inserted_line_moves_no_name(self) -> None:
        self.prompts("a", "b", "c")
        self.batch()
        self.prompts("new", "a", "b", "newer", "c")
        self.again(sends=2, saves=2)
        self.check_pictures(
            **{"0001": "a", "0002": "b", "0003": "c", "0006": "new", "0004": "newer"}
        )
        self.again()
        self.prompts("c", "b", "a")
        self.again()

    def test_a_removed_lines_name_is_not_given_away(self) -> None:
        self.prompts("a", "b")
        self.batch()
        self.prompts("b", "c")
        self.again(sends=1, saves=1)
        self.assertEqual(
            {label: name for name, label in self.painted().items()},
            {"a": "0001.png", "b": "0002.png", "c": "0003.png"},
        )
        self.prompts("b", "c", "a")
        self.again()

    def test_an_edited_line_is_a_new_job(self) -> None:
        self.write({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "id": "fox"})
        self.painter.order("b", BAD_REQUEST)
        self.batch(code=9)
        self.write({"prompt": "a2"}, {"prompt": "b2"}, {"prompt": "c", "id": "fox", "n": 2})
        self.again(sends=3, saves=4)
        names = {"0001": "a", "0002": "b2", "fox": "c", "fox-1": "c again", "fox-2": "c again, 2"}
        found = self.painted()
        self.assertEqual({**found, **{f"{k}.png": v for k, v in names.items()}}, found)
        self.assertEqual([name for name, label in found.items() if label == "a2"], ["0004.png"])
        self.again()

    def test_one_more_of_the_same(self) -> None:
        self.prompts("a", "a")
        self.batch()
        self.prompts("a", "a", "a")
        self.again(sends=1, saves=1)
        self.assertEqual(len(self.painted()), 3)

    def test_a_jobs_new_id_does_not_pay_again(self) -> None:
        self.prompts("a")
        self.batch()
        self.write({"prompt": "a", "id": "fox"})
        self.again()


class Changes(ResumeCase):
    """A changed default must not pay for everything again."""

    def differs(self, *argv: str, says: str) -> None:
        """Assert that the change is refused, with these words."""
        run = self.refused(*argv)
        self.assertRegex(run.err, says)
        self.assertIn("--redo changed", run.err)

    def test_of_the_command_line(self) -> None:
        self.prompts("a", "b")
        self.batch(*LOW)
        self.differs("--quality", "high", says=r"2 saved jobs differ \(quality low -> high\)")
        self.differs(says=r"2 saved jobs differ \(quality low -> unset\)")
        self.differs(*LOW, "--size", "2K", says=r"size unset -> 2048x2048")
        self.differs(*LOW, "--param", "seed=1", says="seed")
        self.differs(*LOW, "-m", "gpt-image-1.5", says="model gpt-image-2 -> gpt-image-1.5")
        self.refused(*LOW, "--n", "2", "--json")
        self.again(*LOW)
        self.again("--quality", "high", "--redo", "changed", sends=2, saves=2)
        self.assertEqual(
            sorted(self.painted()), ["0001-2.png", "0001.png", "0002-2.png", "0002.png"]
        )
        self.assertEqual(self.api.posts[-1].json["quality"], "high")
        self.again("--quality", "high")

    def test_of_the_config(self) -> None:
        self.prompts("a")
        self.configure(quality="low")
        self.batch()
        self.configure(quality="medium")
        self.differs(says=r"1 saved job differs \(quality low -> medium\)")

    def test_of_an_input_picture(self) -> None:
        (self.work / "room.png").write_bytes(png(16, 16, seed=1))
        self.write({"prompt": "a", "images": ["room.png"]})
        self.batch()
        (self.work / "room.png").write_bytes(png(16, 16, seed=2))
        self.differs(says="picture")
        self.again("--redo", "changed", sends=1, saves=1)

    def test_only_some_are_saved(self) -> None:
        """What was not billed may change; what is or may be needs --redo changed."""
        self.write(*({"prompt": prompt, "id": prompt} for prompt in "abcd"))
        self.painter.order("a", UNAUTHORIZED)
        self.painter.order("b", SILENT)
        self.painter.order("c", BAD_REQUEST)
        self.batch(code=9)
        self.differs(*LOW, says=r"2 saved or maybe billed jobs differ \(quality unset -> low\)")
        self.again("--redo", "changed", *LOW, sends=4, saves=4)
        self.again(*LOW)

    def test_nothing_was_billed(self) -> None:
        self.prompts("a", "b")
        self.painter.order("a", UNAUTHORIZED)
        self.painter.order("b", BAD_REQUEST)
        self.batch(code=1)
        self.again(*LOW, sends=2, saves=2)
        self.check_done("a again", "b again")

    def test_a_line_that_says_it_itself_does_not_differ(self) -> None:
        self.prompts("a", quality="low")
        self.batch()
        self.again("--quality", "high")


class Redo(ResumeCase):
    """--redo pays again where it is told to, and leaves what was there."""

    def test_all(self) -> None:
        self.prompts("a", "b")
        self.batch()
        self.again("--redo", "all", sends=2, saves=2)
        names = {"0001": "a", "0001-2": "a again", "0002": "b", "0002-2": "b again"}
        self.check_pictures(**names)
        self.again()
        self.again("--redo", "all", "--force", sends=2, saves=2)
        names.update({"0001": "a again again", "0002": "b again again"})
        self.check_pictures(**names)

    def test_some_by_their_ids(self) -> None:
        self.write({"prompt": "a", "id": "fox"}, {"prompt": "b"}, {"prompt": "c"})
        self.batch()
        self.again("--redo", "fox,0003", sends=2, saves=2)
        self.assertEqual(self.posted(), ["a", "a", "b", "c", "c"])
        self.assertIn("fo", self.refused("--redo", "fo").err)

    def test_a_word_is_not_an_id(self) -> None:
        self.write(*({"prompt": word, "id": word} for word in ("failed", "unknown", "changed")))
        self.batch()
        for word in ("failed", "unknown", "changed"):
            self.again("--redo", word)

    def test_one_that_was_cut_short_is_finished_by_the_same_command(self) -> None:
        for which in ("all", "0001,0002,0003"):
            with self.subTest(which):
                self.prompts("a", "b", "c")
                self.batch()
                release = self.painter.hold("b")
                redo = ("--redo", which, "--concurrency", "1")
                posts = len(self.api.posts)
                tool = self.start_tool("batch", "jobs.jsonl", *redo)
                self.api.wait_for_request(posts + 2)  # a is redone, b is under way
                self.killed(tool)
                release.set()
                self.again(*redo, sends=1, saves=2)
                self.assertEqual(sorted(self.painter.seen[posts:]), ["a", "b", "c"])
                shutil.rmtree(self.folder)

    def test_one_that_was_cut_short_pays_for_no_more_without_redo(self) -> None:
        self.prompts("a", "b", "c")
        self.batch()
        release = self.painter.hold("b")
        tool = self.start_tool("batch", "jobs.jsonl", "--redo", "all", "--concurrency", "1")
        self.api.wait_for_request(5)
        self.killed(tool)
        release.set()
        self.again(saves=1)  # the one that was under way
        self.assertEqual(self.posted(), ["a", "a", "b", "b", "c"])
        self.again("--redo", "all", sends=1, saves=1)
        self.assertEqual(self.posted(), ["a", "a", "b", "b", "c", "c"])

    def test_a_redo_that_fails_can_be_tried_again(self) -> None:
        self.prompts("a")
        self.batch()
        self.painter.order("a", UNAUTHORIZED)
        self.again("--redo", "all", code=4, sends=1)
        self.again(sends=1, saves=1)
        self.check_pictures(**{"0001": "a", "0001-2": "a again again"})


class Killed(ResumeCase):
    """SIGKILL at the tool; curl goes on."""

    def test_while_curls_run(self) -> None:
        tool, release = self.under_way("a", "b", "c", "d")
        self.killed(tool)
        second = self.start_tool("batch", "jobs.jsonl")
        self.wait_until(lambda: self.holds_lock(second))
        release.set()
        run = self.check(self.finish(second), 0)
        self.assertEqual(len(run.saved), 4)
        self.assertEqual(self.posted(), ["a", "b", "c", "d"])
        self.check_done("a", "b", "c", "d")
        self.again()

    def test_and_the_answers_come_while_nobody_looks(self) -> None:
        self.killed_before_its_answers("a", "b")
        self.prompts("a", "b", "c")
        self.again(sends=1, saves=3)
        self.check_done("a", "b", "c")

    def test_a_redo_looks_for_the_answer_before_it_pays_again(self) -> None:
        for which in ("unknown", "all"):
            with self.subTest(which):
                self.painter.seen.clear()
                tool, release = self.under_way(f"{which} a", f"{which} b")
                self.killed(tool)
                second = self.start_tool("batch", "jobs.jsonl", "--redo", which)
                self.wait_until(lambda: self.holds_lock(second))  # noqa: B023  called at once
                release.set()
                self.check(self.finish(second), 0)
                self.assertEqual(len(self.painter.seen), 2)
                shutil.rmtree(self.folder)

    def test_an_answer_that_ends_while_it_is_looked_for(self) -> None:
        """First the curl is asked for, then the answer: one that ends in between has come."""
        tool, release = self.under_way("a")
        self.killed(tool)
        for curl in self.processes("curl"):
            os.kill(curl, signal.SIGKILL)
        self.curls_end()
        release.set()
        (self.tmp / "answer").write_bytes(answer(drawn("a")).body)
        self.painter.labels[drawn("a")] = "a"
        (self.tmp / "late.py").write_text(LATE_ANSWER)
        words = ["batch", "jobs.jsonl", "--redo", "unknown"]
        argv = [sys.executable, self.tmp / "late.py", SCRIPT.parent, self.tmp / "answer", *words]
        run = subprocess.run(argv, cwd=self.work, env=self.env, capture_output=True, check=False)
        self.assertEqual((run.returncode, self.posted()), (0, ["a"]), run.stderr.decode())
        self.check_done("a")

    def test_again_and_again(self) -> None:
        tool, release = self.under_way("a", "b")
        for _ in range(3):
            self.killed(tool)
            tool = self.start_tool("batch", "jobs.jsonl")
            self.wait_until(lambda: self.holds_lock(tool))  # noqa: B023  called at once
        release.set()
        self.check(self.finish(tool), 0)
        self.assertEqual(self.posted(), ["a", "b"])
        self.check_done("a", "b")

    def test_and_its_curls_too(self) -> None:
        tool, _ = self.under_way("a", "b")
        self.killed(tool)
        for curl in self.processes("curl"):
            os.kill(curl, signal.SIGKILL)
        self.curls_end()
        run = self.again(code=8)
        self.assertEqual(self.summary(run)["unknown"], "2")
        self.again(code=8)
        self.again("--redo", "unknown", sends=2, saves=2)
        self.check_pictures(**{"0001": "a again", "0002": "b again"})

    def test_between_the_picture_and_its_line_in_the_journal(self) -> None:
        """The job folder is put back, and the line taken away: just as a kill there leaves it."""
        tool, release = self.under_way("a")
        curl = self.the_curl()
        tool.send_signal(signal.SIGSTOP)
        release.set()
        self.wait_until(lambda: curl not in self.processes())
        (job,) = self.jobs()
        shutil.copytree(job, self.tmp / "copy")
        tool.send_signal(signal.SIGCONT)
        self.check(self.finish(tool), 0)
        shutil.copytree(self.tmp / "copy", job)
        journal = self.folder / "results.jsonl"
        journal.write_text(journal.read_text().splitlines(keepends=True)[0])
        self.again(saves=1)
        self.check_done("a")

    def test_between_the_journals_line_and_the_job_folders_end(self) -> None:
        tool, release = self.under_way("a")
        (job,) = self.jobs()
        shutil.copytree(job, self.tmp / "copy")
        release.set()
        self.check(self.finish(tool), 0)
        shutil.copytree(self.tmp / "copy", job)
        self.again()
        self.check_done("a")

    def test_between_the_job_folder_and_the_post(self) -> None:
        """A job whose curl never began is sent: that is no second time."""
        self.hurry(10)
        tool, release = self.under_way("a")
        (job,) = self.jobs()
        self.killed(tool)
        for curl in self.processes("curl"):
            os.kill(curl, signal.SIGKILL)
        self.curls_end()
        release.set()
        (job / "headers.txt").write_bytes(b"\n")
        (job / "response.json").write_bytes(b"")
        self.again(sends=1, saves=1)
        self.check_done("a again")

    def test_while_it_waits_for_a_429s_end(self) -> None:
        """What the server refused to serve is sent by the next run."""
        slow = refusal(429, "rate_limit_exceeded", "Slow.", headers=[("Retry-After", "5")])
        self.hurry(25)
        self.painter.order("a", slow)
        self.prompts("a", "b")
        tool = self.start_tool("batch", "jobs.jsonl", "--concurrency", "1")
        self.hear(tool, "all wait 5 s")
        self.killed(tool)
        self.again(sends=2, saves=2)
        self.check_done("a again", "b")

    def test_recover_while_a_batch_works_on_it(self) -> None:
        tool, release = self.under_way("a")
        (job,) = self.jobs()
        run = self.check(self.run_tool("recover", job.name), 10)
        self.assertIn("under way", run.err)
        release.set()
        self.check(self.finish(tool), 0)
        self.check_done("a")

    def test_recover_takes_over_what_a_killed_batch_left(self) -> None:
        tool, release = self.under_way("a", "b")
        self.killed(tool)
        release.set()
        recovered = self.check(self.run_tool("recover", "--all"), 0)
        self.assertEqual({path.parent for path in recovered.saved}, {self.folder})
        self.assertEqual(self.states(), {"0001": "saved", "0002": "saved"})
        self.again()
        self.check_done("a", "b")

    def test_recover_after_the_folder_is_gone_tells_the_batch(self) -> None:
        self.killed_before_its_answers("a", "b")
        shutil.rmtree(self.folder)
        self.check(self.run_tool("recover", "--all"), 0)
        self.assertEqual(self.states(), {"0001": "saved", "0002": "saved"})
        self.again()
        self.check_done("a", "b")

    def test_recover_goes_on_after_a_journal_that_takes_no_line(self) -> None:
        self.killed_before_its_answers("a", "b")
        journal = self.folder / "results.jsonl"
        kept = journal.read_bytes()
        journal.unlink()
        journal.mkdir()
        run = self.check(self.run_tool("recover", "--all"), 10)
        self.assertEqual(len(run.saved), 2)
        self.assertIn("mend that and recover it again", run.err)
        journal.rmdir()
        journal.write_bytes(kept)
        run = self.check(self.run_tool("recover", "--all"), 0)
        self.assertEqual(len(run.saved), 2, "under the same names")
        self.again()
        self.check_done("a", "b")

    def test_a_single_request_does_not_take_over_a_batchs_job(self) -> None:
        self.killed_before_its_answers("a")
        self.check(self.run_tool("generate", "a", "-o", "own.png", "--new"), 0)
        self.again(saves=1)
        self.assertEqual(self.painter.seen, ["a", "a"])

    def test_a_torn_last_line(self) -> None:
        self.prompts("a", "b")
        self.painter.order("b", UNAUTHORIZED)
        self.batch("--concurrency", "1", code=9)
        journal = self.folder / "results.jsonl"
        text = journal.read_text()
        for torn in (text[:-1], text[:-9], text + '{"schema": 1, "sta', text + "\0\0\0"):
            with self.subTest(end=torn[-20:]):
                journal.write_text(torn)
                (self.folder / "0002.png").unlink(missing_ok=True)
                # a torn "failed" leaves the "sent" before it, and no job folder: unknown
                run = self.run_tool("batch", "jobs.jsonl")
                self.assertIn(run.code, (0, 9), self.story(run))
                self.assertEqual(self.painter.seen.count("a"), 1)
                lines = journal.read_text().splitlines()
                self.assertEqual(json.loads(lines[-1])["schema"], 1)

    def test_a_torn_saved_line_loses_no_money(self) -> None:
        """Without the line and without the job folder nobody can tell; so it is not sent again."""
        self.prompts("a")
        self.batch()
        journal = self.folder / "results.jsonl"
        journal.write_text(journal.read_text()[:-9])
        self.again(code=8)
        self.assertEqual(self.painted(), {"0001.png": "a"})

    def test_foreign_lines_in_the_journal(self) -> None:
        self.prompts("a")
        self.batch()
        journal = self.folder / "results.jsonl"
        foreign = ["[1, 2]", '"text"', "null", "{}", '{"identity": 7}', "nonsense \xff", "[" * 9000]
        foreign += ['{"identity": "x-1", "state": 5, "number": "y", "cost": 7, "error": []}']
        with journal.open("a", encoding="latin-1") as file:
            file.write("\n".join(foreign) + "\n")
        self.again()

    def test_a_storm(self) -> None:
        """25 jobs, 8 SIGKILLs, and a server with all its moods."""
        root = Path(tempfile.mkdtemp(dir=self.tmp))
        with contextlib.redirect_stdout(io.StringIO()):
            result = storm(25, 8, 4, 3, root)
        told = (root / "stderr.txt").read_text()
        self.assertEqual((result.wrong, result.resent), (0, 0), told)
        self.assertEqual(result.saved + result.unknown, 25, told)
        self.assertGreater(result.killed, 3)
        self.assertNotIn("Traceback", told)


class Stopped(ResumeCase):
    """INT and TERM."""

    def test_once_lets_those_under_way_finish_and_begins_no_more(self) -> None:
        release = self.painter.hold("a", "b")
        self.prompts("a", "b", "c", "d")
        tool = self.start_tool("batch", "jobs.jsonl", "--concurrency", "2")
        self.api.wait_for_request(2)
        tool.send_signal(signal.SIGINT)
        self.hear(tool, "stopping; 2 requests under way: 10 s more")
        release.set()
        run = self.check(self.finish(tool), 130)
        self.assertEqual(len(run.saved), 2)
        self.assertEqual(self.summary(run)["left"], "2")
        self.assertIn(f"Gallery: {self.folder}", run.err)
        self.assertEqual(self.posted(), ["a", "b"])
        self.again(sends=2, saves=2)
        self.check_done("a", "b", "c", "d")

    def test_once_and_the_answers_take_longer(self) -> None:
        self.hurry(40)
        tool, release = self.under_way("a", "b", argv=("--json",))
        tool.send_signal(signal.SIGTERM)
        run = self.check(self.finish(tool), 143)
        *jobs, total = self.documents(run)
        self.assertEqual([job["state"] for job in jobs], ["unknown", "unknown"])
        self.assertEqual({job["error"]["maybe_billed"] for job in jobs}, {True})
        self.assertEqual(total["error"]["exit_code"], 143)
        self.assertEqual(self.states(), {"0001": "unknown", "0002": "unknown"})
        self.assertEqual(len(self.processes("curl")), 2, "they run on")
        second = self.start_tool("batch", "jobs.jsonl")
        self.wait_until(lambda: self.holds_lock(second))
        release.set()
        self.assertEqual(len(self.check(self.finish(second), 0).saved), 2)
        self.assertEqual(self.posted(), ["a", "b"])
        self.check_done("a", "b")

    def test_twice_leaves_at_once(self) -> None:
        tool, release = self.under_way("a", "b")
        tool.send_signal(signal.SIGINT)
        self.hear(tool, "10 s more")
        tool.send_signal(signal.SIGINT)
        run = self.finish(tool, 5)
        self.assertEqual((run.code, run.out), (130, ""), self.story(run))
        self.assertNotIn("Traceback", run.err)
        release.set()
        self.again(saves=2)
        self.assertEqual(self.posted(), ["a", "b"])
        self.check_done("a", "b")

    def test_while_paced(self) -> None:
        self.hurry(5)
        self.prompts("a", "b", "c")
        tool = self.start_tool("batch", "jobs.jsonl", "--rpm", "1")
        self.api.wait_for_request()
        tool.send_signal(signal.SIGINT)
        run = self.finish(tool, 15)
        self.assertEqual(run.code, 130, self.story(run))
        self.assertEqual(len(self.api.posts), 1)
        self.assertEqual(self.summary(run)["unknown"], "0")
        self.again(sends=2, saves=2)
        self.assertEqual(self.posted(), ["a", "b", "c"])


class Shards(ResumeCase):
    """One file over many machines."""

    def shard(self, which: str, *argv: Argument, code: int = 0) -> list[str]:
        """Run one shard, and return the prompts that it sends."""
        before = len(self.api.posts)  # the painter hears of a request a moment after it has come
        self.batch("--shard", which, *argv, code=code)
        return sorted(prompt_of(post) for post in self.api.posts[before:])

    def test_every_nth(self) -> None:
        self.prompts(*"abcdefg")
        self.assertEqual(self.shard("2/3"), ["b", "e"])
        self.assertEqual(self.shard("1/3"), ["a", "d", "g"])
        self.assertEqual(self.shard("3/3"), ["c", "f"])
        expected = {f"000{number}.png": prompt for number, prompt in enumerate("abcdefg", 1)}
        self.assertEqual(self.painted(), expected)
        names = {f"results-{number}-of-3.jsonl" for number in (1, 2, 3)}
        self.assertLess(names, set(self.listing(self.folder)))
        self.assertNotIn("results.jsonl", self.listing(self.folder))
        self.assertEqual(self.shard("2/3"), [])
        self.again()
        self.assertEqual(self.shard("1/2"), [])

    def test_more_shards_than_jobs(self) -> None:
        self.prompts("a")
        self.assertEqual(self.shard("1/3"), ["a"])
        self.assertEqual(self.shard("3/3"), [])

    def test_at_once_in_one_folder(self) -> None:
        self.prompts(*"abcdef")
        shards = [self.start_tool("batch", "jobs.jsonl", "--shard", f"{i}/3") for i in (1, 2, 3)]
        for tool in shards:
            self.check(self.finish(tool), 0)
        self.assertEqual(self.posted(), list("abcdef"))
        self.assertEqual(sorted(self.painted().values()), list("abcdef"))

    def test_another_shard_writes_its_first_line_just_now(self) -> None:
        path, read_lines = self.tmp / "results-1-of-2.jsonl", gpt_image2.read_lines
        path.touch()

        def read_too_early(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
            yield from read_lines(name)
            path.write_text('{"identity": "0-1", "state": "sent"}\n')

        with mock.patch("gpt_image2.read_lines", read_too_early):
            self.assertEqual(gpt_image2.read_journals([str(path)], False), {})
        self.assertEqual(list(gpt_image2.read_journals([str(path)], False)), ["0-1"])

    def test_a_change_from_unsharded_to_sharded(self) -> None:
        self.prompts(*"abcd")
        self.painter.order("a", UNAUTHORIZED)
        self.batch(code=9)
        self.assertEqual(self.shard("2/2"), [])
        self.assertEqual(self.shard("1/2"), ["a"])
        self.again()

    def test_lines_that_are_the_same(self) -> None:
        self.prompts("a", "a", "a")
        self.assertEqual(self.shard("1/2"), ["a", "a"])
        self.assertEqual(self.shard("2/2"), ["a"])
        self.assertEqual(len(self.painted()), 3)

    def test_the_same_shard_twice_at_once(self) -> None:
        release = self.painter.hold("a")
        self.prompts("a", "b")
        tool = self.start_tool("batch", "jobs.jsonl", "--shard", "1/2")
        self.api.wait_for_request()
        run = self.check(self.run_tool("batch", "jobs.jsonl", "--shard", "1/2"), 2)
        self.assertIn(str(tool.pid), run.err)
        self.assertEqual(self.shard("2/2"), ["b"])
        release.set()
        self.check(self.finish(tool), 0)

    def test_two_ways_of_splitting_at_once(self) -> None:
        release = self.painter.hold("a")
        self.prompts("a", "b")
        tool = self.start_tool("batch", "jobs.jsonl", "--shard", "1/2")
        self.api.wait_for_request()
        for argv in ((), ("--shard", "1/3")):
            run = self.check(self.run_tool("batch", "jobs.jsonl", *argv), 2)
            self.assertIn("results-1-of-2", run.err)
        release.set()
        self.check(self.finish(tool), 0)
        self.assertEqual(self.posted(), ["a"])

    def test_a_killed_shard(self) -> None:
        release = self.painter.hold("a", "c")
        self.prompts(*"abcd")
        tool = self.start_tool("batch", "jobs.jsonl", "--shard", "1/2")
        self.api.wait_for_request(2)
        self.killed(tool)
        release.set()
        self.assertEqual(self.shard("2/2"), ["b", "d"])
        self.assertEqual(self.shard("1/2"), [])
        self.assertEqual(sorted(self.painted().values()), list("abcd"))


class BadDisks(ResumeCase):
    """A journal or a folder that can't be written."""

    def test_a_journal_that_is_no_file(self) -> None:
        self.prompts("a")
        (self.folder / "results.jsonl").mkdir(parents=True)
        run = self.run_tool("batch", "jobs.jsonl")
        self.assertIn(run.code, (1, 2), self.story(run))
        self.assertIn("results.jsonl", run.err)
        self.assertNotIn("Traceback", run.err)
        self.no_request(self.api)

    def test_a_folder_that_is_read_only(self) -> None:
        self.heed_permissions()
        self.prompts("a", "b")
        self.painter.order("b", UNAUTHORIZED)
        self.batch(code=9)
        self.folder.chmod(0o500)
        (self.folder / "results.jsonl").chmod(0o400)
        self.addCleanup(make_writable, self.folder)
        run = self.run_tool("batch", "jobs.jsonl")
        self.assertIn(run.code, (1, 2), self.story(run))
        self.assertIn(str(self.folder), run.err)
        self.assertEqual(len(self.api.posts), 2)

    def test_a_disk_that_fills_up_loses_nothing(self) -> None:
        disk = self.small_disk("disk")
        release = self.painter.hold("a", "b")
        self.prompts("a", "b", "c")
        argv = ("--output-dir", f"{disk}/out", "--concurrency", "2")
        tool = self.start_tool("batch", "jobs.jsonl", *argv)
        self.api.wait_for_request(2)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)
        journal = disk / "out" / "results.jsonl"
        with contextlib.suppress(OSError), journal.open("ab", buffering=0) as file:
            while True:  # what is left of its last page
                file.write(b" ")
        release.set()
        run = self.finish(tool)
        self.assertNotIn(run.code, (0, 2, -9), self.story(run))
        self.assertIn("no space left", run.err)
        self.assertNotIn("Traceback", run.err)
        self.assertEqual(self.posted(), ["a", "b"], "nothing more is begun")
        filler.unlink()
        again = self.run_tool("batch", "jobs.jsonl", *argv)
        self.assertEqual(self.posted(), ["a", "b", "c"], self.story(again))
        if again.code:  # what is in a job folder is for recover
            self.run_tool("recover", "--all")
        found = set(self.painted(disk / "out").values())
        self.assertLessEqual({"a", "b", "c"}, found, self.story(again))
