"""INT, TERM and HUP at every moment: what is said, what is kept, and that no curl goes on.

The exit codes and pictures of each moment are rows of the fault matrix too (tests/faults.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import unittest

import gpt_image2
from tests.faults import (
    FIRST,
    FOX,
    FOXES,
    SECOND,
    THIRD,
    THREE,
    Stage,
    held_mid_answer,
    in_two,
    middle_of,
)
from tests.support import KEY, Api, Argument, Child, Reply, Run, answer, refusal

NUMBERS = {129: signal.SIGHUP, 130: signal.SIGINT, 143: signal.SIGTERM}  # by exit code


class Signalled(Stage):
    """A case that stops calls."""

    def waiting(self, *argv: Argument) -> tuple[Api, Child, threading.Event]:
        """Return a call whose server has the request, and the Event that lets it answer."""
        release = threading.Event()
        api = self.serve_base(answer(FIRST)._replace(before=release))
        tool = self.start_tool(*FOX, *argv)
        api.wait_for_request()
        return api, tool, release

    def ended(self, tool: Child, code: int) -> Run:
        """Return how a stopped call ended, with its world looked over at that very moment."""
        run = self.check(self.finish(tool), code)
        self.look_over(run)
        return run


class TestBeforeAnAnswer(Signalled):
    """The server has the request and has said nothing: curl is stopped at once."""

    def test_says_what_may_be_billed(self) -> None:
        for code, number in NUMBERS.items():
            with self.subTest(number.name):
                _, tool, _ = self.waiting()
                tool.send_signal(number)
                run = self.ended(tool, code)
                self.assertIn(number.name, run.err)
                self.assertIn("may have been billed", run.err)
                self.assertNotIn("Recover:", run.err, "nothing came, nothing will")
                self.assertEqual(run.out, "")

    def test_as_json(self) -> None:
        for code, number in NUMBERS.items():
            with self.subTest(number.name):
                _, tool, _ = self.waiting("--json")
                tool.send_signal(number)
                document = self.ended(tool, code).json
                self.assertIs(document["ok"], False)
                self.assertEqual(document["error"]["exit_code"], code)
                self.assertIs(document["error"]["maybe_billed"], True)
                self.assertEqual((document["images"], document["recover_id"]), ([], None))

    def test_is_told_with_quiet_too(self) -> None:
        _, tool, _ = self.waiting("--quiet")
        tool.send_signal(signal.SIGTERM)
        self.assertIn("may have been billed", self.ended(tool, 143).err)

    def test_does_not_wait_for_a_server_that_is_silent(self) -> None:
        _, tool, _ = self.waiting()
        tool.send_signal(signal.SIGINT)
        self.check(self.finish(tool, timeout=5), 130)

    def test_the_same_command_again_is_warned(self) -> None:
        api, tool, release = self.waiting()
        tool.send_signal(signal.SIGINT)
        self.ended(tool, 130)
        release.set()
        api.script.append(answer(SECOND))
        run = self.check(self.run_tool(*FOX), 0)
        self.assertIn("billed", run.err)


class TestOnTheThreshold(unittest.TestCase):
    """A signal just before a wait begins."""

    def test_ends_the_wait(self) -> None:
        signals = gpt_image2.Signals()
        signals.under_way = True
        signals.handle(signal.SIGINT, None)
        with self.assertRaises(gpt_image2.Interrupted):
            signals.pause(60)


class TestNothingSent(Signalled):
    """Before the POST, and after a refusal: nothing is billed, and the message doesn't say so."""

    def test_while_the_key_is_fetched(self) -> None:
        api = self.serve(strict=False)
        fifo = self.tmp / "fifo"
        os.mkfifo(fifo)
        command = ["sh", "-c", f'echo started > "{fifo}"; exec sleep 20']
        self.configure(base_url=api.base_url, api_key_command=command)
        tool = self.start_tool(*FOX)
        self.assertEqual(fifo.read_text(), "started\n")
        tool.send_signal(signal.SIGINT)
        run = self.check(self.finish(tool), 130)
        for sleeper in self.processes("sleep"):
            os.kill(sleeper, signal.SIGKILL)
        self.assertNotIn("may have been billed", run.err)
        self.assertEqual(self.jobs(), [])
        self.no_request(api)

    def test_while_waiting_to_try_again(self) -> None:
        later = [("Retry-After", "60")]
        for code, number in NUMBERS.items():
            with self.subTest(number.name):
                self.serve_base(refusal(429, "rate_limit_exceeded", "Slow.", headers=later))
                tool = self.start_tool(*FOX)
                self.hear(tool, " 60")
                tool.send_signal(number)
                run = self.ended(tool, code)
                self.assertNotIn("may have been billed", run.err)
                self.assertNotIn("Recover:", run.err)
                self.assertEqual(self.jobs(), [])


class TestMidAnswer(Signalled):
    """An answer that has begun is paid for: it gets up to 10 s to finish."""

    def test_all_saved_is_a_success(self) -> None:
        for number in NUMBERS.values():
            with self.subTest(number.name):
                tool, release = held_mid_answer(self)
                tool.send_signal(number)
                release.set()
                run = self.ended(tool, 0)
                self.assertEqual(self.pictures_at(run.saved), {FIRST, SECOND, THIRD})
                self.assertEqual(self.jobs(), [])
                self.assertNotIn("Recover:", run.err)

    def test_all_saved_is_a_success_as_json(self) -> None:
        tool, release = held_mid_answer(self, "--json")
        tool.send_signal(signal.SIGTERM)
        release.set()
        document = self.ended(tool, 0).json
        self.assertEqual((document["ok"], len(document["images"])), (True, 3))

    def test_an_answer_cut_after_the_signal_is_kept(self) -> None:
        release, middle = threading.Event(), middle_of(THREE, THIRD)
        self.serve_base(in_two(THREE, middle, release)._replace(cut=middle + 1))
        tool = self.start_tool(*FOXES)
        self.wait_until(self.answered)
        tool.send_signal(signal.SIGINT)
        release.set()
        self.check_kept(self.ended(tool, 130))

    def test_a_second_signal_leaves_now(self) -> None:
        for code, number in NUMBERS.items():
            with self.subTest(number.name):
                tool, _ = held_mid_answer(self)
                tool.send_signal(number)
                self.hear(tool, "10 s")
                tool.send_signal(number)
                self.check_kept(self.check(self.finish(tool, timeout=5), code))
                self.check(self.run_tool("recover", "--clean", "--older-than", "0s"), 0)

    def check_kept(self, run: Run) -> None:
        """Assert that a stopped call says how to recover two pictures, and that this works."""
        self.look_over(run)
        self.assertIn("may have been billed", run.err)
        last = run.err.splitlines()[-1]
        self.assertRegex(last, "^Recover: ")
        shell = ["sh", "-c", last[len("Recover: ") :]]
        done = subprocess.run(shell, env=self.env, cwd=self.work, capture_output=True, check=False)
        saved = Run([], done.returncode, done.stdout, "").saved
        self.assertEqual((done.returncode, self.pictures_at(saved)), (9, {FIRST, SECOND}))

    def test_the_terminal_sends_it_to_all(self) -> None:
        """Ctrl-C goes to the foreground's whole process group; curl is not in it."""
        self.through("setsid")
        tool, release = held_mid_answer(self)
        curl = self.the_curl()
        self.assertEqual(os.getsid(curl), curl)
        os.killpg(tool.pid, signal.SIGINT)
        release.set()
        self.assertEqual(self.pictures(self.ended(tool, 0)), {FIRST, SECOND, THIRD})


class TestAfterTheAnswer(Signalled):
    """While a picture is fetched from its link."""

    def test_during_a_download(self) -> None:
        for code, number in NUMBERS.items():
            with self.subTest(number.name):
                api = self.serve_base()
                link = api.put("/b.png", Reply(before=threading.Event()))
                api.script.append(answer(api.put("/a.png", FIRST), link))
                tool = self.start_tool(*FOX, "--n", "2")
                api.wait_for_request(3)
                tool.send_signal(number)
                run = self.ended(tool, code)
                self.assertEqual(self.pictures_at(run.saved), {FIRST})
                self.assertRegex(run.err.splitlines()[-1], "^Recover: ")
                api.put("/b.png", SECOND)
                found = self.pictures(self.check(self.run_tool("recover", "--last"), 0))
                self.assertEqual(found, {FIRST, SECOND})
                self.assertEqual(self.jobs(), [])

    def test_during_a_download_that_has_begun(self) -> None:
        release = threading.Event()
        api = self.serve_base()
        picture = Reply(body=FIRST)
        api.script.append(answer(api.put("/a.png", in_two(picture, 999, release))))
        tool = self.start_tool(*FOX)
        api.wait_for_request(2)
        tool.send_signal(signal.SIGTERM)
        release.set()
        run = self.finish(tool)
        self.check(run, 0 if run.saved else 143)
        self.look_over(run)
        if not run.saved:
            api.put("/a.png", FIRST)
            self.assertEqual(
                self.pictures(self.check(self.run_tool("recover", "--last"), 0)), {FIRST}
            )


class TestIgnored(Signalled):
    """Signals that the parent told us to ignore stay ignored."""

    def test_stay_ignored(self) -> None:
        for name, number in (("HUP", signal.SIGHUP), ("INT", signal.SIGINT)):
            with self.subTest(name):
                plain = self.script
                self.shell(f'trap "" {name}; exec "$@"')
                _, tool, release = self.waiting()
                tool.send_signal(number)
                release.set()
                self.assertEqual(self.pictures_at(self.ended(tool, 0).saved), {FIRST})
                self.script = plain

    def test_others_are_heeded_all_the_same(self) -> None:
        self.shell('trap "" HUP; exec "$@"')
        _, tool, _ = self.waiting()
        tool.send_signal(signal.SIGTERM)
        self.ended(tool, 143)


class TestKilled(Signalled):
    """SIGKILL of the script: nothing can be said, but nothing is given away either."""

    def test_the_key_is_in_no_file(self) -> None:
        _, tool, release = self.waiting()
        tool.kill()
        self.finish(tool)
        self.assertEqual(len(self.processes("curl") or [0]), 1)
        self.assertEqual(self.files_with(KEY), [])
        release.set()
        self.check(self.run_tool("recover", "--last"), 0)


class TestRecover(Signalled):
    """recover that is stopped while it waits leaves everything as it was."""

    def test_a_curl_that_is_waited_for_goes_on(self) -> None:
        _, tool, release = self.waiting()
        tool.kill()
        self.finish(tool)
        curl = self.the_curl()
        recover = self.start_tool("recover", "--last")
        self.wait_until(lambda: self.holds_lock(recover))
        recover.send_signal(signal.SIGTERM)
        run = self.check(self.finish(recover), 143)
        self.assertEqual(self.processes(), [curl])
        release.set()
        found = self.check(self.run_tool("recover", "--last"), 0)
        self.assertEqual(self.pictures_at(found.saved), {FIRST})
        self.assertRegex(run.err.splitlines()[-1], "^Recover: ")
