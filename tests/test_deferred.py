"""batch --deferred: through the Batch API, with one batch for the same jobs whatever happens."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import time
from typing import Any, Callable, Iterator
from unittest import mock

import gpt_image2
from tests.case import HANG, Child, Run, SystemCase
from tests.deferreds import (
    CANCEL,
    CHECK,
    CONTENT,
    CREATE,
    STATE,
    UPLOAD,
    BatchApi,
    Hold,
    image_of,
    lost,
    made,
    refused,
    served,
)
from tests.images import png, png_chunk
from tests.server import KEY, Reply, b64, data_url, json_reply, page, refusal

LOW = ("--quality", "low", "--size", "1024x1024")  # with a price
IMAGE = image_of("job 1")
SILENT = Reply(silent=True)
BEGUN = Reply(200, b'{"id": "batch_0", "obj', cut=10)  # an answer that is cut
GATEWAY = page(502, "Bad Gateway")
OOPS = refusal(500, "server_error", "Oops.")
BUSY = refusal(429, "rate_limit_exceeded", "Too many batches.")
GONE = refusal(404, None, "No batch found.")
UNCLEAR = (SILENT, BEGUN, OOPS, GATEWAY)


def answers(**ends: Any) -> Callable[[Any], Any]:
    """Return what becomes of each job: by its prompt, like job_2=...; else it is made."""
    known = {name.replace("_", " "): end for name, end in ends.items()}
    return lambda line: {line["body"]["prompt"]: made(line), **known}[line["body"]["prompt"]]


@contextlib.contextmanager
def pauses(*then: Callable[[], object]) -> Iterator[list[float]]:
    """Let the tool's pauses pass at once, and yield their seconds; the n-th calls `then[n - 1]`."""
    seen: list[float] = []

    def pause(_: object, seconds: float) -> None:
        seen.append(seconds)
        if len(seen) <= len(then):
            then[len(seen) - 1]()
        time.sleep(0.001)  # lets the others work that are waited for

    with mock.patch.object(gpt_image2.Signals, "pause", pause):
        yield seen


class DeferredCase(SystemCase):
    """A case with a Batch API behind the base URL; jobs.jsonl is the batch."""

    def setUp(self) -> None:
        super().setUp()
        self.api = BatchApi()
        self.servers.append(self.api)
        self.addCleanup(self.api.check)
        self.addCleanup(self.api.close)
        self.env.update(GPT_IMAGE2_BASE_URL=self.api.base_url, GPT_IMAGE2_API_KEY=self.api.key)
        self.folder = self.work / "jobs"
        self.kept = self.state / "gpt-image-2" / "deferred"
        (self.work / "in.png").write_bytes(png(32, 32))

    def tearDown(self) -> None:
        self.assertEqual(self.files_with(KEY), [], "the key is in a file")
        self.assertEqual(self.api.doubled(), set(), "paid twice")

    def fresh(self) -> None:
        self.api.forget()
        self.api.result = made
        for folder in (self.folder, self.state / "gpt-image-2"):
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, *jobs: dict[str, Any] | str) -> None:
        """Write jobs.jsonl; a text is a prompt."""
        lines = [{"prompt": job} if isinstance(job, str) else job for job in jobs]
        (self.work / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def numbered(self, count: int) -> None:
        self.write(*(f"job {number}" for number in range(1, count + 1)))

    def both_kinds(self) -> None:
        self.write("job 1", {"prompt": "job 2", "images": ["in.png"]}, "job 3")

    def words(self, *argv: str) -> list[str]:
        return ["batch", "jobs.jsonl", "--provider", "openai", "--deferred", *argv]

    def batch(self, *argv: str, code: int | None = 0) -> Run:
        """Run the batch, deferred (None: the code doesn't matter); stdout has only its lines."""
        run = self.run_tool(*self.words(*argv))
        self.check(run, run.code if code is None else code)
        if "--json" not in argv and "--dry-run" not in argv:
            for line in run.out.splitlines():
                self.assertRegex(line, r"^Saved: /.* \(\d+ KB\)$", self.story(run))
        return run

    def at_once(self, *argv: str, code: int = 0) -> Run:
        words = [word for word in self.words(*argv) if word != "--deferred"]
        return self.check(self.run_tool(*words), code)

    def submitted(self, count: int) -> None:
        self.numbered(count)
        self.batch()

    def settle(self) -> None:
        """Run the same command, and let batches end, until no job is left."""
        for _ in range(8):
            done = self.batch(code=None).code == 0
            if not self.api.end_all() and done and "deferred" not in self.states().values():
                return
        self.fail(f"no end: {self.states()}\n{self.api}")

    def start_until(self, held: Hold, *argv: str) -> Child[bytes]:
        """Start the batch as a child, and wait until a request is held."""
        self.addCleanup(held.release.set)
        tool = self.start_tool(*self.words(*argv))
        self.assertTrue(held.reached.wait(HANG), self.api)
        return tool

    def kill_at(self, held: Hold) -> None:
        """Kill the tool alone while a request is held; its curl goes on waiting."""
        tool = self.start_until(held)
        tool.kill()
        self.finish(tool)

    def lines(self) -> list[Any]:
        text = (self.folder / "results.jsonl").read_text(encoding="ascii")
        found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [line for line in found if "identity" in line]

    def states(self) -> dict[str, str]:
        return {line["id"]: line["state"] for line in self.lines()}

    def check_states(self, *states: str) -> None:
        self.assertEqual(list(self.states().values()), list(states))

    def images(self) -> dict[str, bytes]:
        names = [n for n in self.listing(self.folder) if not re.search(r"\.(jsonl|html|lock)$", n)]
        return {name: (self.folder / name).read_bytes() for name in names}

    def check_images(self, *prompts: str) -> None:
        """Assert that the images of these prompts are saved, each once, and no others."""
        expected = collections.Counter(map(image_of, prompts))
        self.assertEqual(collections.Counter(self.images().values()), expected)

    def check_batches(self, **expected: int) -> None:
        names = [self.api.batches[name]["endpoint"].rpartition("/")[2] for name in self.api.own()]
        self.assertEqual(dict(collections.Counter(names)), expected)

    def check_end(self) -> None:
        """Go on to the end with jobs of both kinds; nothing is lost, doubled or left behind."""
        self.settle()
        self.check_batches(generations=1, edits=1)
        self.check_images("job 1", "job 2", "job 3")
        self.check_states("saved", "saved", "saved")
        self.check_nothing_left()

    def check_nothing_left(self) -> None:
        found = self.listing(self.kept) if self.kept.exists() else []
        self.assertEqual((found, self.jobs()), ([], []))


class Way(DeferredCase):
    """From the jobs file to the images; --wait and --cancel."""

    def test_submits_tells_and_fetches(self) -> None:
        self.write({"prompt": "job 1", "size": "1024x1024"}, {"prompt": "job 2", "id": "two"})
        run = self.batch()
        self.assertEqual(run.out, "")
        self.assertIn("batch_0: validating 0/2", run.err)
        first = self.api.lines()[0]
        self.assertEqual((first["method"], first["url"]), ("POST", "/v1/images/generations"))
        body = {"model": "gpt-image-2", "prompt": "job 1", "size": "1024x1024"}
        self.assertEqual(first["body"], body)
        self.api.end()
        self.assertEqual([path.name for path in self.batch().saved], ["0001.png", "two.png"])
        self.assertEqual(list(self.images().values()), [IMAGE, image_of("job 2")])
        self.assertEqual(self.batch().out, "")
        self.check_batches(generations=1)
        self.check_nothing_left()
        for request in self.api.requests:
            self.assertEqual(request.headers["authorization"], f"Bearer {KEY}", request)

    def test_edits_go_as_json_in_a_batch_of_their_own(self) -> None:
        mask = png(32, 32, hole=(1, 1, 4, 4))
        (self.work / "mask.png").write_bytes(mask)
        self.write("job 1", {"prompt": "job 2", "images": ["in.png", "in.png"], "mask": "mask.png"})
        self.batch()
        self.check_batches(generations=1, edits=1)
        (line,) = self.api.lines("batch_1")
        self.assertEqual(line["url"], "/v1/images/edits")
        found = [entry["image_url"] for entry in [*line["body"]["images"], line["body"]["mask"]]]
        self.assertEqual(found, [data_url(image) for image in (png(32, 32), png(32, 32), mask)])
        self.api.end("batch_0")
        self.assertIn("batch_1: cancelling", self.batch("--cancel").err)

    def test_lines_that_are_gone_or_changed_meanwhile(self) -> None:
        """What is saved, and under which name, is as it was when the jobs were submitted."""
        edit = {"prompt": "job 4", "images": ["in.png"], "id": "four"}
        output = {"prompt": "job 5", "output": "sub/five.png"}
        two = {"prompt": "job 2", "id": "two"}
        self.write({"prompt": "job 1", "n": 2}, two, "job 3", edit, output)
        self.batch()
        self.write({"prompt": "job 3", "output": "x.png"}, {**two, "prompt": "job 22"}, "job 7")
        (self.work / "in.png").unlink()
        self.batch(code=None)
        self.check_batches(generations=1, edits=1)
        self.api.end_all()
        self.batch(code=None)
        expected = {"0001-1": (1, 1), "0001-2": (1, 2), "two": (2, 1), "0003": (3, 1)}
        expected.update({"four": (4, 1), "sub/five": (5, 1)})
        pairs = {f"{name}.png": image_of(f"job {j}", k) for name, (j, k) in expected.items()}
        self.assertEqual(self.images(), pairs)
        self.settle()
        self.assertEqual(self.api.prompts("batch_2"), ["job 22", "job 7"])
        self.assertEqual(len(self.images()), 8)

    def test_waits_longer_and_longer_and_tells_what_changes(self) -> None:
        self.numbered(2)
        begin = lambda: self.api.batches["batch_0"].update(status="in_progress")  # noqa: E731
        with pauses(bool, begin, *[bool] * 9, self.api.end) as waits:
            run = self.batch("--wait")
        self.assertEqual(len(run.saved), 2)
        self.assertEqual(waits, [min(10 * 1.5**number, 300) for number in range(12)])
        told = re.findall(r"batch_0: \w+ \d/2", run.err)
        self.assertEqual(told, ["batch_0: validating 0/2", "batch_0: in_progress 0/2"])

    def test_waits_for_both_and_survives_what_passes(self) -> None:
        self.both_kinds()
        for reply in (OOPS, GATEWAY, SILENT, BEGUN, BUSY):
            self.api.order(STATE, reply, skip=1)
        first, second = (lambda name=name: self.api.end(name) for name in ("batch_1", "batch_0"))
        with pauses(*[bool] * 4, first, *[bool] * 4, second) as waits:
            self.assertEqual(len(self.batch("--wait").saved), 3)
        self.assertEqual(len(waits), 10)

    def test_ctrl_c(self) -> None:
        self.numbered(2)
        tool = self.start_tool(*self.words("--wait"))
        self.hear(tool, "validating")
        tool.send_signal(signal.SIGINT)
        self.assertNotIn("billed", self.check(self.finish(tool), 130).err)
        self.api.end()
        self.assertEqual(len(self.batch("--wait").saved), 2)

    def test_cancel(self) -> None:
        self.numbered(3)
        self.batch("--cancel", code=None)  # there is nothing yet
        self.assertEqual(self.api.posts, [])
        self.batch()
        self.assertIn("cancelling", self.batch("--cancel").err)
        self.api.result = answers(job_2=lost("batch_cancelled", "Cancelled."), job_3=None)
        self.api.end(status="cancelled")
        self.assertNotIn("may have been billed", self.batch("--cancel", code=9).err)
        self.check_states("saved", "failed", "failed")
        self.batch("--cancel", code=None)
        self.check_batches(generations=1)
        self.api.result = made
        self.settle()
        self.assertEqual(self.api.prompts("batch_1"), ["job 2", "job 3"])


class Kills(DeferredCase):
    """Kills, signals, and calls that fail or end nobody knows how; then the same command again."""

    def test_at_each_request(self) -> None:
        """The curl of a create makes the batch, or ends, only while the next run waits for it."""
        points = [(UPLOAD, done, skip) for done in (False, True) for skip in (0, 1)]
        points += [(CREATE, done, skip) for _, done, skip in points]
        points += [(CHECK, False, 0), (STATE, False, 0), (STATE, True, 1)]
        self.both_kinds()
        for what, done, skip in points:
            with self.subTest(what, done=done, skip=skip):
                self.fresh()
                held = self.api.hold(what, done=done, skip=skip)
                self.kill_at(held)
                if what != CREATE:
                    held.release.set()
                with pauses(bool, held.release.set):
                    self.check_end()

    def test_while_results_come(self) -> None:
        """The next run waits for the curl of a killed one: two in one file would spoil it."""
        image = IMAGE[:-12] + png_chunk(b"noIs", os.urandom(150_000)) + IMAGE[-12:]
        held = Hold()
        self.submitted(3)
        self.api.result = lambda line: served({"b64_json": b64(image)})
        self.api.end()
        body = self.api.contents["file_1"]
        chunks = (body[:200_000], held.reached.set, held.release, body[200_000:])
        self.api.order(CONTENT, Reply(chunks=chunks))
        self.kill_at(held)
        with pauses(bool, held.release.set) as waits:
            self.batch()
        self.assertGreater(len(waits), 1)
        self.assertEqual(list(self.images().values()), [image] * 3)

    def test_another_batch_leaves_the_late_curl_of_a_create_alone(self) -> None:
        self.numbered(1)
        held = self.api.hold(CREATE)
        self.kill_at(held)
        self.write("job 7")
        for _ in range(2):  # begins; looks after what is left of killed runs
            self.batch("--output-dir", "other")
        self.numbered(1)
        with pauses(bool, held.release.set):
            self.batch()
        self.assertEqual(sorted(map(self.api.prompts, self.api.own())), [["job 1"], ["job 7"]])

    def test_the_state_folder_is_removed_in_a_create(self) -> None:
        self.numbered(1)
        held = self.api.hold(CREATE)
        tool = self.start_until(held)
        shutil.rmtree(self.state)
        held.release.set()
        self.assertIn("billed", self.check(self.finish(tool), 8).err)
        self.api.end_all()
        self.batch()
        self.check_batches(generations=1)

    def test_signals_in_a_create(self) -> None:
        self.numbered(2)
        for signals in (1, 2):
            with self.subTest(signals=signals):
                self.fresh()
                held = self.api.hold(CREATE)
                tool = self.start_until(held)
                tool.send_signal(signal.SIGINT)
                self.hear(tool, "stopping")
                if signals == 1:
                    held.release.set()  # the answer gets its time
                else:
                    tool.send_signal(signal.SIGINT)
                self.check(self.finish(tool), 130)
                with pauses(bool, held.release.set):
                    self.batch()
                self.check_batches(generations=1)

    def test_a_create_that_was_made_is_found_by_its_metadata_or_file(self) -> None:
        odd = (page(504, "Time-out"), json_reply({}), json_reply({"id": "../batch_0"}))
        self.numbered(2)
        for keeps, reply in itertools.product((True, False), (*UNCLEAR, *odd)):
            with self.subTest(reply.body, status=reply.status, metadata=keeps):
                self.fresh()
                self.api.keeps_metadata = keeps
                self.api.order(CREATE, reply, done=True)
                self.batch(code=8)
                self.api.foreign(5)  # so that ours is on the third page
                self.assertIn("batch_0: validating 0/2", self.batch().err)
                self.check_batches(generations=1)
        self.assertFalse([request for request in self.api.requests if ".." in request.path])

    def test_a_create_that_was_not_made_is_made_once(self) -> None:
        self.numbered(2)
        self.api.foreign(3)
        self.api.order(CREATE, GATEWAY)
        self.batch(code=8)
        self.check_batches()
        self.api.order(CHECK, OOPS, skip=1)  # the look-up fails: then nothing may be made
        self.assertNotEqual(self.batch(code=None).code, 0)
        self.assertEqual(len(self.api.asked(CREATE)), 1)
        self.batch()
        self.check_batches(generations=1)

    def test_calls_that_fail_for_sure_leave_the_jobs_free(self) -> None:
        """An upload costs nothing, whatever comes of it."""
        cases = [(UPLOAD, reply, done) for reply in UNCLEAR for done in (False, True)]
        cases += [(UPLOAD, json_reply({"id": "file:1/2"}), False)]
        cases += [(UPLOAD, refusal(400, "invalid_file", "No."), False), (CREATE, BUSY, False)]
        cases += [(CREATE, refusal(400, "billing_hard_limit_reached", "Limit."), False)]
        self.numbered(2)
        for what, reply, done in cases:
            with self.subTest(what, reply=reply.body, done=done):
                self.fresh()
                self.api.order(what, reply, done=done)
                run = self.batch(code=None)
                self.assertIn(run.code, (1, 7) if what == UPLOAD else (6,))
                self.assertNotIn("may have been billed", run.err)
                self.check_batches()
                if 400 <= reply.status < 500:
                    self.check_states("failed", "failed")
                    self.check_nothing_left()
                self.batch()
                self.check_batches(generations=1)

    def test_a_look_that_fails_changes_nothing(self) -> None:
        self.submitted(2)
        for what in (CHECK, STATE):
            for reply, code in ((OOPS, 1), (SILENT, 7), (GONE, 1)):
                with self.subTest(what, status=reply.status):
                    self.api.order(what, reply)
                    run = self.batch(code=code)
                    self.assertNotIn("billed", run.err)
                    self.check_states("deferred", "deferred")
        self.assertIn("--cancel", run.err)  # which gives up what the server does not know
        self.api.order(CANCEL, GONE)
        self.api.order(STATE, GONE)
        self.batch("--cancel", code=8)
        self.check_states("unknown", "unknown")
        self.check_batches(generations=1)

    def test_servers_without_batches_and_wrong_keys(self) -> None:
        """Relays have none: one line says so, and nothing is changed."""
        self.submitted(1)
        self.api.end()
        self.batch()
        self.numbered(2)
        posts, before = len(self.api.posts), (self.listing(), self.lines())
        rows = [(page(status, "No"), 1, "/batches") for status in (200, 404, 405, 501)]
        rows += [(refusal(404, "not_found", "Invalid URL"), 1, "/batches")]
        rows += [(json_reply({"object": "list"}), 1, "/batches")]
        for reply, code, word in (*rows, (refusal(401, "x", "Wrong key."), 4, "Wrong key")):
            with self.subTest(reply.body):
                self.api.always = reply
                run = self.batch(code=code)
                self.assertIn(word, run.err)
                self.assertEqual(len(run.err.splitlines()), 1)
                self.assertEqual((self.listing(), self.lines()), before)
        self.assertEqual(len(self.api.posts), posts)


class Ends(DeferredCase):
    """What becomes of the jobs, and of results that don't come or have no place."""

    def test_failures_are_told_apart(self) -> None:
        self.api.result = answers(
            job_2=refused(400, "moderation_blocked"),
            job_3=refused(500, "server_error"),
            job_4=lost("batch_expired", "This request could not be executed."),
            job_5=None,
            job_6=refused(429, "rate_limit_exceeded"),
        )
        self.submitted(6)
        self.api.end(status="expired")
        self.assertNotIn("may have been billed", self.batch(code=9).err)
        self.check_states("saved", "refused", "failed", "failed", "failed", "failed")
        self.api.result = made
        self.batch()
        self.assertEqual(self.api.prompts("batch_1"), ["job 3", "job 4", "job 5", "job 6"])
        self.api.end("batch_1")
        self.batch(code=9)
        self.batch(code=9)
        self.check_batches(generations=2)
        self.check_images("job 1", "job 3", "job 4", "job 5", "job 6")

    def test_an_echo_of_the_key_in_any_of_its_answers_is_not_shown(self) -> None:
        self.api.result = answers(job_1=refused(400, "x", f"Wrong: {KEY}."), job_2=None)
        self.submitted(2)
        said = ""
        for what in (CHECK, STATE):
            self.api.order(what, refusal(400, None, f"Wrong: {KEY}."))
            said += self.batch(code=1).err
        errors = {"data": [{"message": f"Wrong: {KEY}."}]}
        self.api.batches["batch_0"].update(errors=errors)
        self.api.end(status="failed")
        said += str(self.batch(code=1))
        noted = str(self.lines())
        self.assertEqual((said.count("Wrong: ****"), noted.count("Wrong: ****")), (4, 2))
        self.assertEqual((self.files_with(KEY), KEY in said), ([], False))

    def test_a_batch_without_any_file(self) -> None:
        errors = {"data": [{"code": "x", "message": "Enqueued token limit.", "line": None}]}
        self.submitted(2)
        self.api.batches["batch_0"].update(status="failed", errors=errors)
        self.api.good["batch_0"] = set()
        run = self.batch(code=1)
        self.assertIn("Enqueued token limit.", run.err)
        self.assertNotIn("may have been billed", run.err)
        self.check_states("failed", "failed")
        self.settle()
        self.check_images("job 1", "job 2")

    def test_a_job_without_a_word_in_a_whole_batch_is_unknown(self) -> None:
        self.api.result = answers(job_2=None)
        self.submitted(2)
        self.api.end()
        for _ in range(2):
            self.batch(code=9)
            self.check_states("saved", "unknown")
        self.check_batches(generations=1)
        self.batch("--redo", "unknown")
        self.assertEqual(self.api.prompts("batch_1"), ["job 2"])

    def test_odd_lines_among_the_results(self) -> None:
        """Foreign ids, rubbish, a duplicate, and a last line that is torn."""
        rubbish = b'\xff\n[]\nnull\n{"custom_id": 7}\n{"custom_id": "a", "response": []}\n'

        def shape(body: bytes) -> bytes:
            first, second, third = body.splitlines()
            strange = first.replace(b'"custom_id": "', b'"custom_id": "x')
            lines = [strange, first, rubbish, first, second, third[:-80]]
            return b"\n".join(lines)

        self.submitted(3)
        self.api.end(shape=shape)
        self.batch(code=9)
        self.check_images("job 1", "job 2")
        self.check_states("saved", "saved", "unknown")

    def test_a_result_that_nobody_can_save_is_kept_and_stops_no_other(self) -> None:
        dead = {"url": self.api.origin + "/gone.png"}
        strange = {"b64_json": 17, "note": "no image came"}
        for data in ({"b64_json": "A" * 200}, dead, strange):
            with self.subTest(data):
                self.fresh()
                self.submitted(2)
                self.api.result = answers(job_1=served(data))
                self.api.end()
                self.assertIn(self.batch(code=None).code, (9, 10))
                self.check_images("job 2")
                text = str(list(data.values())[-1])
                self.assertTrue(self.files_with(text), "it is lost")
                self.numbered(3)
                self.batch(code=None)
                self.batch(code=None)
                self.assertEqual(self.api.prompts("batch_1"), ["job 3"])

    def test_downloads_that_are_cut_go_on(self) -> None:
        self.submitted(4)
        self.api.end()
        self.api.cut = len(self.api.contents["file_1"]) // 6 + 1
        with pauses():
            self.assertIn(self.batch(code=None).code, (1, 7, 10))
            self.assertEqual(self.images(), {})
            self.batch()
        self.check_images("job 1", "job 2", "job 3", "job 4")
        ranges = [request.headers.get("range") for request in self.api.asked(CONTENT)]
        self.assertEqual(ranges, [None, *(f"bytes={self.api.cut * k}-" for k in range(1, 6))])

    def test_a_file_that_expired(self) -> None:
        """Its jobs were billed and nothing will bring them: unknown, and others may be sent."""
        self.submitted(2)
        self.api.end()
        self.api.order(CONTENT, GONE)
        self.assertRegex(self.batch(code=8).err, "404|gone")
        self.check_states("unknown", "unknown")
        self.numbered(3)
        self.batch(code=None)
        self.assertEqual(self.api.prompts("batch_1"), ["job 3"])


class Limits(DeferredCase):
    """What is not even begun, and what stands beside it."""

    def test_more_than_the_api_takes_and_options_that_do_not_go_together(self) -> None:
        self.numbered(5)
        limits = (("MAX_DEFERRED_REQUESTS", 50_000, 4), ("MAX_DEFERRED_BYTES", 200_000_000, 400))
        for name, limit, least in limits:
            self.assertEqual(getattr(gpt_image2, name), limit)
            with self.subTest(name), mock.patch.object(gpt_image2, name, least):
                self.assertIn("--shard", self.batch(code=2).err)
                self.check_nothing_left()
        for option in ("--stream", "--sandbox"):
            self.batch(option, code=2)
        for option in ("--wait", "--cancel"):
            self.at_once(option, code=2)
        self.assertEqual((self.api.posts, self.folder.exists()), ([], False))

    def test_a_deferred_job_is_not_paid_for_beside_its_batch(self) -> None:
        self.submitted(2)
        posts = len(self.api.posts)
        self.assertIn("--deferred", self.at_once(code=1).err)
        for redo, code in (("failed", 1), ("unknown", 1), ("0001", 2), ("all", 2)):
            self.at_once("--redo", redo, code=code)
        self.at_once("--quality", "low", code=2)
        self.batch("--quality", "low", code=2)
        self.batch("--redo", "all")
        self.assertEqual(len(self.api.posts), posts)
        self.api.end()
        self.assertEqual(len(self.batch().saved), 2)
        self.at_once()
        self.assertEqual(len(self.api.posts), posts)

    def test_it_costs_half_wherever_it_is_told(self) -> None:
        self.numbered(2)
        dry = (self.at_once(*LOW, "--dry-run"), self.batch(*LOW, "--dry-run"))
        full, half = (float(run.out.rpartition("$")[2]) for run in dry)
        self.assertAlmostEqual(full / 2, half, delta=0.0001)
        self.assertEqual(self.api.requests, [])
        self.batch(*LOW, "--max-cost", f"{half - 0.0011:.4f}", code=2)
        self.assertEqual((self.api.posts, self.folder.exists()), ([], False))
        self.batch(*LOW, "--max-cost", f"{half + 0.0011:.4f}")
        self.assertAlmostEqual(sum(line["estimate"] for line in self.lines()), half, delta=0.0001)
        self.api.end()
        run = self.batch(*LOW, "--json", "--max-cost", "0.0001")  # it is paid already
        *jobs, told = [json.loads(line) for line in run.out.splitlines()]
        names = [os.path.basename(job["images"][0]["path"]) for job in jobs]
        self.assertEqual(names, ["0001.png", "0002.png"])
        self.assertEqual((told["summary"]["jobs"], told["summary"]["saved"]), (2, 2))
        self.assertRegex(told["warnings"][0], r"^the jobs cost \$0\.0083, ")  # not the estimate too
        self.assertAlmostEqual(told["summary"]["cost"]["amount"], 0.00828, delta=0.00001)
        costs = [line["cost"]["amount"] for line in self.lines() if line["state"] == "saved"]
        self.assertEqual([round(cost, 5) for cost in costs], [0.00414, 0.00414])
        history = self.check(self.run_tool("history"), 0).out
        self.assertEqual(history.count("$0.0041 batch"), 2)

    def test_what_goes_over_the_cap_in_one_run(self) -> None:
        self.numbered(2)
        with pauses(self.api.end):
            run = self.batch(*LOW, "--max-cost", "0.007", "--wait")
        self.assertIn("the jobs cost $0.0083, which is $0.0013 over --max-cost 0.007", run.err)

    def test_a_journal_from_elsewhere_removes_nothing(self) -> None:
        """The key of a batch names a folder; a journal that came with an output folder may lie."""
        victim = self.tmp / "victim"
        folders = (victim, self.kept, self.folder)
        keys = dict.fromkeys((str(victim), "../../../victim", "", "."), "batch_1")
        keys["0123456789abcdef"] = "../models"
        for step in ("uploading", "created"):
            self.fresh()
            self.submitted(1)
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "precious").write_text("mine")
            self.api.batches["batch_1"] = {"id": "batch_1", "status": "expired"}
            with (self.folder / "results.jsonl").open("a") as file:
                for key, name in keys.items():
                    job = {"identity": f"{key}-1", "id": key, "state": "deferred", "job_id": key}
                    batch = {"state": "batch", "key": key, "step": step, "batch_id": name}
                    for row in (job, batch):
                        file.write(json.dumps({"schema": 1, **row}) + "\n")
            self.batch(code=None)
            self.assertTrue(all((folder / "precious").exists() for folder in folders))
        self.assertEqual(self.api.asked("GET /v1/models"), [])
