"""batch --deferred: through the Batch API, with one batch for the same jobs whatever happens."""

from __future__ import annotations

import base64
import collections
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Callable, Iterator
from unittest import mock

import gpt_image2
from tests.case import Child, Run, SystemCase
from tests.deferreds import (
    CANCEL,
    CHECK,
    CONTENT,
    CREATE,
    STATE,
    UPLOAD,
    BatchApi,
    Hold,
    lost,
    made,
    picture_of,
    refused,
    served,
)
from tests.pictures import png, png_chunk
from tests.server import KEY, Reply, answer, b64, data_url, json_reply, page, refusal

LOW = ("--quality", "low", "--size", "1024x1024")  # with a price
PICTURE = picture_of("job 1")
SILENT = Reply(silent=True)
BEGUN = Reply(200, b'{"id": "batch_0", "obj', cut=10)  # an answer that is cut
GATEWAY = page(502, "Bad Gateway")
OOPS = refusal(500, "server_error", "Oops.")
BUSY = refusal(429, "rate_limit_exceeded", "Too many batches.")
GONE = refusal(404, None, "No batch found.")
UNCLEAR = {"silent": SILENT, "cut": BEGUN, "500": OOPS, "502": GATEWAY}
CANCELLED = lost("batch_cancelled", "Cancelled.")


def answers(**ends: Any) -> Callable[[Any], Any]:
    """Return what becomes of each job: by its prompt, like job_2=...; else it is made."""
    known = {name.replace("_", " "): end for name, end in ends.items()}

    def result(line: Any) -> Any:
        prompt = line["body"]["prompt"]
        return known[prompt] if prompt in known else made(line)

    return result


def large(picture: bytes, size: int) -> bytes:
    """Return a picture with so many bytes more."""
    noise = random.Random(1).getrandbits(8 * size).to_bytes(size, "big")
    return picture[:-12] + png_chunk(b"noIs", noise) + picture[-12:]


@contextlib.contextmanager
def pauses(*then: Callable[[], object]) -> Iterator[list[float]]:
    """Let the tool's pauses pass at once in this process; the n-th one calls `then[n - 1]`.

    Yields their seconds.
    """
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
        """Forget all that was done."""
        self.api.forget()
        self.api.result = made
        for folder in (self.folder, self.state / "gpt-image-2"):
            shutil.rmtree(folder, ignore_errors=True)

    # Jobs

    def write(self, *jobs: dict[str, Any] | str) -> None:
        """Write jobs.jsonl; a text is a prompt."""
        lines = [{"prompt": job} if isinstance(job, str) else job for job in jobs]
        (self.work / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def numbered(self, count: int) -> None:
        """Write jobs.jsonl with the prompts "job 1" to "job COUNT"."""
        self.write(*(f"job {number}" for number in range(1, count + 1)))

    def both_kinds(self) -> None:
        """Write two generations and an edit."""
        self.write("job 1", {"prompt": "job 2", "images": ["in.png"]}, "job 3")

    # Runs

    def words(self, *argv: str) -> list[str]:
        """Return the command line of the batch, deferred."""
        return ["batch", "jobs.jsonl", "--provider", "openai", "--deferred", *argv]

    def begin(self, *argv: str) -> Child[bytes]:
        """Start the batch, deferred, as a child."""
        return self.start_tool(*self.words(*argv))

    def batch(self, *argv: str, code: int | None = 0) -> Run:
        """Run the batch, deferred (None: the code doesn't matter); stdout has only its lines."""
        run = self.run_tool(*self.words(*argv))
        self.check(run, run.code if code is None else code)
        if "--json" not in argv and "--dry-run" not in argv:
            for line in run.out.splitlines():
                self.assertRegex(line, r"^Saved: /.* \(\d+ KB\)$", self.story(run))
        return run

    def at_once(self, *argv: str, code: int = 0) -> Run:
        """Run the same batch without --deferred."""
        words = [word for word in self.words(*argv) if word != "--deferred"]
        return self.check(self.run_tool(*words), code)

    def submitted(self, count: int) -> None:
        """Submit so many jobs."""
        self.numbered(count)
        self.batch()

    def settle(self) -> None:
        """Run the same command, and let batches end, until no job is left."""
        for _ in range(8):
            done = self.batch(code=None).code == 0
            if not self.api.end_all() and done and "deferred" not in self.states().values():
                return
        self.fail(f"no end: {self.states()}\n{self.api}")

    def hold(self, what: str, **options: Any) -> Hold:
        """Hold the next request of a kind (see order()), at most to the end of the test."""
        held = self.api.order(what, hold=True, **options)
        self.addCleanup(held.release.set)
        return held

    def reached(self, held: Hold) -> None:
        """Wait until a request has come that is to be held."""
        if not held.reached.wait(20):
            self.fail(f"no such request came\n{self.api}")

    def kill_at(self, what: str, **options: Any) -> Hold:
        """Kill the tool alone while a request of a kind waits; its curl goes on waiting."""
        held = self.hold(what, **options)
        tool = self.begin()
        self.reached(held)
        tool.kill()
        self.finish(tool)
        return held

    # What came of it

    def lines(self) -> list[Any]:
        """Return the journal's lines on jobs."""
        text = (self.folder / "results.jsonl").read_text(encoding="ascii")
        found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [line for line in found if "identity" in line]

    def states(self) -> dict[str, str]:
        """Return the journal's last word on each job, by id."""
        return {line["id"]: line["state"] for line in self.lines()}

    def check_states(self, *states: str) -> None:
        """Assert the journal's last word on each job."""
        self.assertEqual(list(self.states().values()), list(states))

    def pictures(self) -> dict[str, bytes]:
        """Return the pictures in the output folder, by name."""
        names = [n for n in self.listing(self.folder) if not re.search(r"\.(jsonl|html|lock)$", n)]
        return {name: (self.folder / name).read_bytes() for name in names}

    def check_pictures(self, *prompts: str) -> None:
        """Assert that the pictures of these prompts are saved, each once, and no others."""
        expected = collections.Counter(map(picture_of, prompts))
        self.assertEqual(collections.Counter(self.pictures().values()), expected)

    def check_batches(self, **expected: int) -> None:
        """Assert how many batches were made, by endpoint."""
        names = [self.api.batches[name]["endpoint"].rpartition("/")[2] for name in self.api.own()]
        self.assertEqual(dict(collections.Counter(names)), expected)

    def check_end(self) -> None:
        """Go on to the end with jobs of both kinds; nothing is lost, doubled or left behind."""
        self.settle()
        self.check_batches(generations=1, edits=1)
        self.check_pictures("job 1", "job 2", "job 3")
        self.check_states("saved", "saved", "saved")
        self.check_nothing_left()

    def check_nothing_left(self) -> None:
        """Assert that the state folder has nothing of any batch."""
        found = self.listing(self.kept) if self.kept.exists() else []
        self.assertEqual((found, self.jobs()), ([], []))


class Way(DeferredCase):
    """From the jobs file to the pictures."""

    def test_submits_tells_and_fetches(self) -> None:
        self.write({"prompt": "job 1", "size": "1024x1024"}, {"prompt": "job 2", "id": "two"})
        run = self.batch()
        self.assertEqual(run.out, "")
        self.assertIn("batch_0: validating 0/2", run.err)
        first, second = self.api.lines()
        self.assertEqual((first["method"], first["url"]), ("POST", "/v1/images/generations"))
        body = {"model": "gpt-image-2", "prompt": "job 1", "size": "1024x1024"}
        self.assertEqual(first["body"], body)
        self.assertNotEqual(first["custom_id"], second["custom_id"])
        self.assertEqual(self.api.batches["batch_0"]["endpoint"], "/v1/images/generations")
        self.assertEqual(self.batch().out, "")
        self.api.end()
        run = self.batch()
        self.assertEqual([path.name for path in run.saved], ["0001.png", "two.png"])
        self.assertEqual([path.read_bytes() for path in run.saved], [PICTURE, picture_of("job 2")])
        self.assertEqual(self.batch().out, "")
        self.check_batches(generations=1)
        self.check_nothing_left()
        for request in self.api.requests:
            self.assertEqual(request.headers["authorization"], f"Bearer {KEY}", request)

    def test_edits_go_as_json_in_a_batch_of_their_own(self) -> None:
        mask = png(32, 32, hole=(1, 1, 4, 4))
        (self.work / "mask.png").write_bytes(mask)
        edit = {"prompt": "job 2", "images": ["in.png", "in.png"], "mask": "mask.png"}
        self.write("job 1", edit)
        self.batch()
        (line,) = self.api.lines("batch_1")
        self.assertEqual(line["url"], "/v1/images/edits")
        self.assertEqual(self.api.batches["batch_1"]["endpoint"], "/v1/images/edits")
        found = [entry["image_url"] for entry in [*line["body"]["images"], line["body"]["mask"]]]
        pictures = [base64.b64decode(url.replace("data:image/png;base64,", "")) for url in found]
        self.assertEqual(pictures, [png(32, 32), png(32, 32), mask])
        self.api.end("batch_0")
        self.assertIn("batch_1: validating", self.batch().err)
        self.api.end("batch_1")
        self.assertEqual([path.name for path in self.batch().saved], ["0002.png"])

    def test_how_far_it_is(self) -> None:
        self.submitted(4)
        batch = self.api.batches["batch_0"]
        for status, completed, failed in (
            ("validating", 0, 0),
            ("in_progress", 2, 1),
            ("finalizing", 3, 1),
            ("something_new", 3, 1),
        ):
            with self.subTest(status):
                counts = {"total": 4, "completed": completed, "failed": failed}
                batch.update(status=status, request_counts=counts)
                run = self.batch()
                self.assertEqual(run.out, "")
                self.assertIn(f"batch_0: {status} {completed}/4", run.err)
                told = self.batch("--json").json
                self.assertTrue(told["ok"])
                state = {"id": "batch_0", "status": status, **counts}
                endpoint = "/v1/images/generations"
                self.assertEqual(told["deferred"], [{**state, "endpoint": endpoint}])

    def test_the_end_as_json(self) -> None:
        self.submitted(2)
        self.api.end()
        *jobs, told = [json.loads(line) for line in self.batch("--json").out.splitlines()]
        self.assertEqual([job["state"] for job in jobs], ["saved", "saved"])
        paths = [image["path"] for job in jobs for image in job["images"]]
        self.assertEqual(paths, [str(self.folder / f"000{number}.png") for number in (1, 2)])
        self.assertEqual((told["summary"]["jobs"], told["summary"]["saved"]), (2, 2))

    def test_new_lines_go_into_a_batch_once_the_first_has_ended(self) -> None:
        self.submitted(1)
        self.submitted(2)
        self.check_batches(generations=1)
        self.settle()
        self.assertEqual(self.api.prompts("batch_1"), ["job 2"])
        self.check_pictures("job 1", "job 2")

    def test_id_n_and_output_of_lines(self) -> None:
        self.write(
            {"prompt": "job 1", "n": 2},
            {"prompt": "job 2", "id": "two", "n": 2},
            {"prompt": "job 3", "output": "sub/three.png"},
        )
        self.batch()
        self.assertEqual([line["body"].get("n") for line in self.api.lines()], [2, 2, None])
        self.api.end()
        self.batch()
        pairs = {"0001-1": (1, 1), "0001-2": (1, 2), "two-1": (2, 1), "two-2": (2, 2)}
        pairs["sub/three"] = (3, 1)
        expected = {f"{name}.png": picture_of(f"job {j}", k) for name, (j, k) in pairs.items()}
        self.assertEqual(self.pictures(), expected)

    def test_lines_that_are_gone_or_changed_meanwhile(self) -> None:
        edit = {"prompt": "job 4", "images": ["in.png"], "id": "four"}
        output = {"prompt": "job 5", "output": "five.png"}
        self.write("job 1", {"prompt": "job 2", "id": "two"}, "job 3", edit, output)
        self.batch()
        self.write("job 3", {"prompt": "job 22", "id": "two"}, "job 7")
        (self.work / "in.png").unlink()
        self.api.end("batch_0")
        self.api.end("batch_1")
        run = self.batch(code=None)
        names = {"0001": 1, "two": 2, "0003": 3, "five": 5, "four": 4}
        self.assertEqual([path.stem for path in run.saved], list(names))
        pictures = [path.read_bytes() for path in run.saved]
        self.assertEqual(pictures, [picture_of(f"job {number}") for number in names.values()])
        self.settle()
        self.assertEqual(self.api.prompts("batch_2"), ["job 22", "job 7"])
        self.assertIn(picture_of("job 22"), self.pictures().values())


class Kills(DeferredCase):
    """SIGKILL and signals anywhere, then the same command until it is done."""

    def test_at_each_request(self) -> None:
        points: list[tuple[str, bool, int]] = [
            (CHECK, False, 0),
            (UPLOAD, False, 0),
            (UPLOAD, True, 0),
            (UPLOAD, True, 1),
            (CREATE, False, 0),
            (CREATE, True, 0),
            (CREATE, False, 1),
            (CREATE, True, 1),
            (STATE, False, 0),
            (STATE, True, 1),
        ]
        self.both_kinds()
        for what, done, skip in points:
            with self.subTest(what, done=done, skip=skip):
                self.fresh()
                held = self.kill_at(what, done=done, skip=skip)
                held.release.set()
                if what == CREATE:  # by the curl that lives on
                    self.wait_until(lambda n=skip + 1: len(self.api.own()) == n)
                self.check_end()

    def download_in_parts(self, at: int, skip: int = 0) -> Hold:
        """Let the next download stop at a place until it is released."""
        name = "error_file_id" if skip else "output_file_id"
        body, held = self.api.contents[self.api.batches["batch_0"][name]], Hold()
        self.addCleanup(held.release.set)
        chunks = (body[:at], held.reached.set, held.release, body[at:])
        self.api.order(CONTENT, Reply(chunks=chunks), skip=skip)
        return held

    def kill_in_download(self, held: Hold) -> None:
        """Kill the tool once the first part of a result file has come."""
        tool = self.begin()
        self.reached(held)
        self.wait_until(lambda: sum(map(size_of, self.kept.rglob("*"))) > 100_000)
        tool.kill()
        self.finish(tool)

    def test_while_results_come(self) -> None:
        padding = b'{"custom_id": "x", "padding": "' + b"A" * 300_000 + b'"}\n'
        for skip in (0, 1):
            with self.subTest(file=skip):
                self.fresh()
                self.submitted(3)
                self.api.result = answers(job_3=refused(500, "server_error"))
                self.api.end(shape=lambda body: padding + body)
                error_file = self.api.batches["batch_0"]["error_file_id"]
                self.api.contents[error_file] = padding + self.api.contents[error_file]
                held = self.download_in_parts(200_000, skip)
                self.kill_in_download(held)
                held.release.set()
                self.api.result = made
                self.settle()
                self.check_batches(generations=2)
                self.check_pictures("job 1", "job 2", "job 3")

    def test_a_late_curl_of_the_results_is_waited_for(self) -> None:
        """Two that write into one file would spoil it."""
        self.submitted(3)
        self.api.result = lambda line: served({"b64_json": b64(large(PICTURE, 100_000))})
        self.api.end()
        held = self.download_in_parts(250_000)
        self.kill_in_download(held)
        with pauses(bool, held.release.set) as waits:
            self.batch()
        self.assertGreater(len(waits), 1)
        self.assertEqual(set(self.pictures().values()), {large(PICTURE, 100_000)})
        self.check_states("saved", "saved", "saved")

    def test_a_late_curl_of_a_create_is_waited_for_before_the_look(self) -> None:
        """It makes the batch only after the next call has looked for it a first time."""
        self.numbered(2)
        held = self.kill_at(CREATE)
        with pauses(bool, held.release.set):
            self.batch()
        self.check_batches(generations=1)

    def test_signals_in_a_create(self) -> None:
        self.numbered(2)
        for signals in ((signal.SIGINT,), (signal.SIGTERM, signal.SIGINT)):
            with self.subTest(signals=len(signals)):
                self.fresh()
                held = self.hold(CREATE)
                tool = self.begin()
                self.reached(held)
                for number in signals:
                    tool.send_signal(number)
                if len(signals) == 1:
                    held.release.set()  # the answer gets its time
                code = self.finish(tool).code
                self.assertIn(code - 128, signals)
                with pauses(bool, held.release.set):
                    self.batch()
                self.check_batches(generations=1)
                self.settle()
                self.check_pictures("job 1", "job 2")

    def test_within_the_journal(self) -> None:
        """A kill leaves any number of lines; cut where nothing was sent yet, it's such a kill."""
        self.both_kinds()
        self.kill_at(UPLOAD).release.set()
        journal, world = self.folder / "results.jsonl", self.tmp / "world"
        lines = journal.read_bytes().splitlines(keepends=True)
        self.assertGreater(len(lines), 1)
        for folder in (self.work, self.state):
            shutil.copytree(str(folder), str(world / folder.name))
        for number in range(len(lines) + 1):
            with self.subTest(lines=number):
                self.api.forget()
                for folder in (self.work, self.state):
                    shutil.rmtree(folder)
                    shutil.copytree(str(world / folder.name), str(folder))
                journal.write_bytes(b"".join(lines[:number]))
                self.check_end()

    def test_while_a_link_is_fetched(self) -> None:
        for numbers in ((signal.SIGKILL,), (signal.SIGINT, signal.SIGTERM)):
            with self.subTest(signal=numbers[0].name):
                self.fresh()
                held = Hold()
                self.addCleanup(held.release.set)
                chunks = (PICTURE[:20], held.reached.set, held.release, PICTURE[20:])
                link = self.api.put("/pictures/1.png", Reply(chunks=chunks))
                self.api.result = answers(job_2=served({"url": link}), job_3=served({"url": link}))
                self.submitted(4)
                self.api.end()
                tool = self.begin()
                self.reached(held)
                for number in numbers:
                    tool.send_signal(number)
                self.finish(tool)
                self.api.put("/pictures/1.png", PICTURE)
                held.release.set()
                self.batch()
                expected = {f"000{number}.png": PICTURE for number in (1, 2, 3)}
                self.assertEqual(self.pictures(), {**expected, "0004.png": picture_of("job 4")})


class Uncertain(DeferredCase):
    """Calls that fail, and those whose outcome nobody knows."""

    def test_a_create_that_was_made_is_found_by_its_metadata(self) -> None:
        odd = {"no id": json_reply({}), "an odd id": json_reply({"id": "../batch_0"})}
        timeout = {"504": page(504, "Gateway Time-out")}
        self.numbered(2)
        for name, reply in {**UNCLEAR, **timeout, **odd}.items():
            with self.subTest(name):
                self.fresh()
                self.api.order(CREATE, reply, done=True)
                self.assertIn("billed", self.batch(code=8).err)
                self.api.foreign(5)  # so that ours is on the third page
                looks = len(self.api.asked(CHECK))
                self.assertIn("batch_0: validating 0/2", self.batch().err)
                self.assertGreaterEqual(len(self.api.asked(CHECK)) - looks, 3)
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

    def test_a_list_that_never_ends(self) -> None:
        self.numbered(1)
        self.api.order(CREATE, GATEWAY)
        self.batch(code=8)
        self.api.foreign(1)
        endless = {"object": "list", "data": [self.api.batches["batch_0"]], "has_more": True}
        self.api.order(CHECK, json_reply(endless), times=30)
        self.batch(code=None)
        self.assertLess(len(self.api.asked(CHECK)), 30)

    def test_an_upload_that_fails_costs_nothing(self) -> None:
        odd = json_reply({"id": "file:1/2"})
        cases = {f"{name}, {done}": (r, done) for name, r in UNCLEAR.items() for done in (0, 1)}
        cases.update({"an odd id": (odd, 0), "refused": (refusal(400, "invalid_file", "No."), 0)})
        self.numbered(2)
        for name, (reply, done) in cases.items():
            with self.subTest(name):
                self.fresh()
                self.api.order(UPLOAD, reply, done=bool(done))
                run = self.batch(code=None)
                self.assertIn(run.code, (1, 7))
                self.assertNotIn("billed", run.err.replace("not billed", ""))
                self.check_batches()
                self.batch()
                self.check_batches(generations=1)
                self.assertEqual(self.api.prompts(), ["job 1", "job 2"])

    def test_a_refused_create_leaves_the_jobs_free(self) -> None:
        self.numbered(2)
        for reply in (refusal(400, "billing_hard_limit_reached", "Limit."), BUSY):
            with self.subTest(reply.status):
                self.fresh()
                self.api.order(CREATE, reply)
                self.batch(code=6)
                self.check_states("failed", "failed")
                self.check_nothing_left()
                self.batch()
                self.assertEqual(self.api.prompts(), ["job 1", "job 2"])

    def test_a_refused_create_of_one_of_two(self) -> None:
        self.both_kinds()
        self.api.order(CREATE, BUSY)
        self.batch(code=6)
        self.check_end()

    def test_a_wrong_key_changes_nothing(self) -> None:
        self.numbered(1)
        before = self.listing()
        self.api.always = refusal(401, "invalid_api_key", "Wrong key.")
        self.batch(code=4)
        self.assertEqual(self.listing(), before)
        self.assertEqual(self.api.posts, [])

    def test_a_look_that_fails_changes_nothing(self) -> None:
        self.submitted(1)
        for what in (CHECK, STATE):
            for reply, code in ((OOPS, 1), (SILENT, 7), (GONE, 1)):
                with self.subTest(what, status=reply.status):
                    self.api.order(what, reply)
                    self.assertNotIn("billed", self.batch(code=code).err)
                    self.check_states("deferred")
        self.settle()
        self.check_batches(generations=1)

    def test_servers_without_batches(self) -> None:
        """Relays have none: one line says so, and nothing is changed."""
        self.submitted(1)
        self.api.end()
        self.batch()
        self.numbered(2)
        posts, before = len(self.api.posts), self.files()
        for reply in (
            page(404, "Not Found"),
            refusal(404, "not_found", "Invalid URL (GET /v1/batches)"),
            page(405, "Method Not Allowed"),
            page(501, "Not Implemented"),
            page(200, "Welcome"),
            json_reply({"object": "list"}),
        ):
            with self.subTest(reply.body):
                self.api.always = reply
                run = self.batch(code=1)
                self.assertIn("/batches", run.err)
                self.assertEqual(len(run.err.splitlines()), 1)
                self.assertEqual(self.files(), before)
        self.assertEqual(len(self.api.posts), posts)

    def files(self) -> dict[str, bytes]:
        """Return all files in the work folder but locks."""
        names = [name for name in self.listing() if not name.endswith(".lock")]
        return {name: (self.work / name).read_bytes() for name in names}


class Waiting(DeferredCase):
    """--wait and --cancel."""

    def test_waits_longer_and_longer_and_tells_what_changes(self) -> None:
        self.numbered(2)

        def progress() -> None:
            self.api.batches["batch_0"]["status"] = "in_progress"

        with pauses(bool, progress, *[bool] * 9, self.api.end) as waits:
            run = self.batch("--wait")
        self.assertEqual(len(run.saved), 2)
        growth = [10 * 1.5**number for number in range(20)]
        self.assertEqual(waits, [min(seconds, 300) for seconds in growth][: len(waits)])
        self.assertEqual(len(waits), 12)
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
        tool = self.begin("--wait")
        self.hear(tool, "validating")
        tool.send_signal(signal.SIGINT)
        run = self.check(self.finish(tool), 130)
        self.assertEqual(run.out, "")
        self.assertNotIn("billed", run.err)
        self.api.end()
        self.assertEqual(len(self.batch("--wait").saved), 2)
        self.check_batches(generations=1)

    def test_cancel(self) -> None:
        self.submitted(3)
        self.assertIn("cancelling", self.batch("--cancel").err)
        self.api.result = answers(job_2=CANCELLED, job_3=None)
        self.api.end(status="cancelled")
        self.assertNotIn("may have been billed", self.batch(code=9).err)
        self.check_states("saved", "failed", "failed")
        self.check_batches(generations=1)
        self.api.result = made
        self.settle()
        self.assertEqual(self.api.prompts("batch_1"), ["job 2", "job 3"])
        self.check_pictures("job 1", "job 2", "job 3")

    def test_cancel_sends_nothing(self) -> None:
        self.numbered(1)
        self.batch("--cancel", code=None)
        self.assertEqual(self.api.posts, [])
        self.batch()
        self.api.result = answers(job_1=CANCELLED)
        self.api.end(status="cancelled")
        self.batch("--cancel", code=1)
        self.batch("--cancel", code=None)
        self.check_batches(generations=1)

    def test_cancel_of_what_was_never_made(self) -> None:
        self.numbered(1)
        for what in (UPLOAD, CREATE):
            with self.subTest(what):
                self.fresh()
                self.api.order(what, GATEWAY)
                self.batch(code=None)
                self.batch("--cancel", code=None)
                self.check_batches()
                self.check_states("failed")

    def test_cancel_of_one_that_has_ended_beside_one_that_has_not(self) -> None:
        self.both_kinds()
        self.batch()
        self.api.end("batch_0")
        self.assertEqual(len(self.batch("--cancel", code=None).saved), 2)
        self.assertEqual(self.api.batches["batch_1"]["status"], "cancelling")

    def test_cancel_gives_up_what_the_server_does_not_know(self) -> None:
        self.submitted(2)
        self.api.order(STATE, GONE)
        self.assertIn("--cancel", self.batch(code=1).err)
        self.check_states("deferred", "deferred")
        for what in (CANCEL, STATE):
            self.api.order(what, GONE)
        self.batch("--cancel", code=8)
        self.check_states("unknown", "unknown")

    def test_wait_and_cancel_need_deferred(self) -> None:
        self.numbered(1)
        for argv in (["--wait"], ["--cancel"]):
            self.at_once(*argv, code=2)
        self.assertEqual(self.api.requests, [])


class Ends(DeferredCase):
    """What becomes of the jobs."""

    def test_failures_are_told_apart(self) -> None:
        self.api.result = answers(
            job_2=refused(400, "moderation_blocked"),
            job_3=refused(500, "server_error"),
            job_4=lost("batch_expired", "This request could not be executed."),
            job_5=None,
            job_6=refused(400, "invalid_value"),
            job_7=refused(429, "rate_limit_exceeded"),
            job_8=refused(503, "overloaded"),
        )
        self.submitted(8)
        self.api.end(status="expired")
        run = self.batch(code=9)
        self.assertEqual(len(run.saved), 1)
        self.assertNotIn("may have been billed", run.err)
        ends = ["saved", "refused", "failed", "failed", "failed", "refused", "failed", "failed"]
        self.check_states(*ends)
        self.api.result = made
        self.batch()
        again = ["job 3", "job 4", "job 5", "job 7", "job 8"]
        self.assertEqual(self.api.prompts("batch_1"), again)
        self.api.end("batch_1")
        self.batch(code=9)
        self.batch(code=9)
        self.check_batches(generations=2)
        self.check_pictures("job 1", *again)

    def test_batches_without_any_file(self) -> None:
        rows = [{"code": "token_limit_exceeded", "message": "Enqueued token limit.", "line": None}]
        for status, more in (("failed", {"errors": {"data": rows}}), ("expired", {})):
            with self.subTest(status):
                self.fresh()
                self.submitted(2)
                self.api.batches["batch_0"].update(status=status, **more)
                self.api.good["batch_0"] = set()
                run = self.batch(code=1)
                self.assertIn("Enqueued token limit." if more else "expired", run.err)
                self.assertNotIn("may have been billed", run.err)
                self.check_states("failed", "failed")
                self.settle()
                self.check_pictures("job 1", "job 2")

    def test_a_job_without_a_word_in_a_whole_batch_is_unknown(self) -> None:
        self.api.result = answers(job_2=None)
        self.submitted(2)
        self.api.end()
        self.batch(code=9)
        self.check_states("saved", "unknown")
        self.batch(code=9)
        self.check_batches(generations=1)
        self.api.result = made
        self.batch("--redo", "unknown")
        self.assertEqual(self.api.prompts("batch_1"), ["job 2"])

    def test_results_in_another_dress(self) -> None:
        link = self.api.put("/pictures/2.png", picture_of("job 2"))
        urls = answers(
            job_1=served({"url": data_url(PICTURE)}),
            job_2=served({"url": link}),
        )
        shapes: dict[str, tuple[Callable[[bytes], bytes], Callable[[Any], Any]]] = {
            "gzip": (gzip.compress, made),
            "BOM": (lambda body: b"\xef\xbb\xbf" + body, made),
            "no last line break": (lambda body: body.rstrip(b"\n"), made),
            "links": (bytes, urls),
        }
        for name, (shape, result) in shapes.items():
            with self.subTest(name):
                self.fresh()
                self.submitted(2)
                self.api.result = result
                self.api.end(shape=shape)
                self.batch()
                self.check_pictures("job 1", "job 2")

    def test_odd_lines_among_the_results(self) -> None:
        """Foreign ids, rubbish, too much text, a duplicate, and a last line that is torn."""
        junk = [b'{"custom_id": "x", "response": [' + b"1, " * n + b"1]}" for n in (3, 4)]
        junk = [line.replace(b"1, ", b"1, " * 950_000) for line in junk]

        def shape(body: bytes) -> bytes:
            first, second, third = body.splitlines()
            strange = first.replace(b'"custom_id": "', b'"custom_id": "x')
            rubbish = b'\xff\n[]\nnull\n{"custom_id": 7}\n{"custom_id": "a", "response": []}\n'
            lines = [strange, first, rubbish, junk[0], first, junk[1], second, third[:-80]]
            return b"\n".join(lines)

        self.submitted(3)
        self.api.end(shape=shape)
        self.batch(code=9)
        self.check_pictures("job 1", "job 2")
        self.check_states("saved", "saved", "unknown")

    def test_a_wide_line(self) -> None:
        """Three pictures of 2 MB in one line; others around it."""
        pictures = [large(picture_of("job 2", k), 2_000_000) for k in (1, 2, 3)]
        self.api.result = answers(job_2=served(*({"b64_json": b64(one)} for one in pictures)))
        self.write("job 1", {"prompt": "job 2", "n": 3}, "job 3")
        self.batch()
        self.api.end()
        self.batch()
        expected = {f"0002-{k}.png": pictures[k - 1] for k in (1, 2, 3)}
        expected.update({f"000{n}.png": picture_of(f"job {n}") for n in (1, 3)})
        self.assertEqual(self.pictures(), expected)

    def test_what_can_not_be_read_is_kept(self) -> None:
        self.submitted(2)
        self.api.end(shape=lambda body: body.replace(b'"b64_json"', b'"b65_json"'))
        self.batch(code=8)
        self.check_states("unknown", "unknown")
        texts = [path.read_bytes() for path in self.files_with("b65_json")]
        for number in (1, 2):
            picture = b64(picture_of(f"job {number}")).encode()
            self.assertTrue(any(picture in text for text in texts))

    def test_a_picture_that_nobody_can_save_stops_no_other(self) -> None:
        dead = self.api.origin + "/gone.png"
        for name, data in (("broken", {"b64_json": "A" * 200}), ("dead", {"url": dead})):
            with self.subTest(name):
                self.fresh()
                self.submitted(2)
                self.api.result = answers(job_1=served(data))
                self.api.end()
                self.assertIn(self.batch(code=None).code, (9, 10))
                self.check_pictures("job 2")
                self.numbered(3)
                self.batch(code=None)
                self.batch(code=None)
                self.assertEqual(self.api.prompts("batch_1"), ["job 3"])


class Places(DeferredCase):
    """Where results can't go, and files that don't come."""

    def test_a_file_in_the_place_of_a_folder(self) -> None:
        self.write({"prompt": "job 1", "output": "sub/one.png"}, "job 2")
        self.batch()
        self.api.end()
        blocked = self.folder / "sub"
        blocked.write_text("in the way")
        with pauses():
            self.assertIn(self.batch("--wait", code=None).code, (9, 10))
        blocked.unlink()
        self.batch()
        expected = {"sub/one.png": PICTURE, "0002.png": picture_of("job 2")}
        self.assertEqual(self.pictures(), expected)
        self.check_states("saved", "saved")
        self.check_nothing_left()

    def test_a_blocked_folder_of_a_job_without_a_picture(self) -> None:
        expired = lost("batch_expired", "Expired.")
        ends = {"job_1": refused(400, "invalid_value"), "job_2": expired, "job_3": None}
        self.write(*({"prompt": f"job {n}", "output": f"sub/{n}.png"} for n in (1, 2, 3)), "job 4")
        self.batch()
        self.api.result = answers(**ends)
        self.api.end(status="expired")
        (self.folder / "sub").write_text("in the way")
        self.batch(code=9)
        self.check_states("refused", "failed", "failed", "saved")

    def test_a_read_only_folder(self) -> None:
        self.heed_permissions()
        self.write({"prompt": "job 1", "output": "sub/one.png", "n": 2}, "job 2")
        for place in ("sub", "."):
            with self.subTest(place):
                self.fresh()
                self.batch()
                self.api.end()
                folder = self.folder / place
                folder.mkdir(exist_ok=True)
                folder.chmod(0o500)
                self.assertNotEqual(self.batch(code=None).code, 0)
                folder.chmod(0o700)
                self.batch()
                expected = {f"sub/one-{k}.png": picture_of("job 1", k) for k in (1, 2)}
                self.assertEqual(self.pictures(), {**expected, "0002.png": picture_of("job 2")})
                self.check_nothing_left()

    def test_downloads_that_are_cut_go_on(self) -> None:
        self.submitted(4)
        self.api.end()
        self.api.cut = len(self.api.contents["file_1"]) // 6 + 1
        with pauses():
            self.assertIn(self.batch(code=None).code, (1, 7, 10))
            self.assertEqual(self.pictures(), {})
            self.batch()
        self.check_pictures("job 1", "job 2", "job 3", "job 4")
        ranges = [request.headers.get("range") for request in self.api.asked(CONTENT)]
        steps = [None, *(f"bytes={self.api.cut * k}-" for k in range(1, 6))]
        self.assertEqual(ranges, steps)

    def test_downloads_that_fail_for_now(self) -> None:
        self.numbered(2)
        for name, first in {"500": OOPS, "silent": SILENT, "knows no ranges": None}.items():
            with self.subTest(name), pauses():
                self.fresh()
                self.batch()
                self.api.end()
                whole = Reply(body=self.api.contents["file_1"])
                self.api.order(CONTENT, first or whole._replace(cut=200))
                self.api.order(CONTENT, whole)
                self.api.order(CONTENT, whole)
                self.batch()
                self.check_pictures("job 1", "job 2")

    def test_a_file_that_expired(self) -> None:
        """Its jobs were billed and nothing will bring them: unknown, and others may be sent."""
        self.submitted(2)
        self.api.end()
        self.api.contents["file_1"], kept = b"", self.api.contents["file_1"]
        self.api.order(CONTENT, refusal(404, None, "No such File object: file_1"), times=9)
        self.assertRegex(self.batch(code=8).err, "404|gone")
        self.check_states("unknown", "unknown")
        self.numbered(3)
        self.batch(code=None)
        self.assertEqual(self.api.prompts("batch_1"), ["job 3"])
        self.assertTrue(kept)


class Limits(DeferredCase):
    """What is not even begun, and what stands beside it."""

    def test_more_than_the_api_takes(self) -> None:
        limits = {"MAX_DEFERRED_REQUESTS": 50_000, "MAX_DEFERRED_BYTES": 200_000_000}
        self.numbered(5)
        before = self.listing()
        for name, limit in limits.items():
            with self.subTest(name):
                self.assertEqual(getattr(gpt_image2, name), limit)
                least = 4 if limit == 50_000 else 400  # bytes: two requests of five
                with mock.patch.object(gpt_image2, name, least):
                    self.assertIn("--shard", self.batch(code=2).err)
                self.check_nothing_left()
        self.assertEqual(self.api.posts, [])
        self.assertEqual(self.listing(), before)
        with mock.patch.object(gpt_image2, "MAX_DEFERRED_REQUESTS", 5):
            self.batch()

    def test_what_can_not_be_deferred(self) -> None:
        self.numbered(1)
        for option in ("--stream", "--sandbox"):
            with self.subTest(option):
                self.batch(option, code=2)
                self.check_nothing_left()
        self.assertEqual(self.api.posts, [])

    def test_shards_at_once_on_two_machines(self) -> None:
        """They share the output folder, not the state folder."""
        self.numbered(4)
        for what in (UPLOAD, CREATE):
            with self.subTest(what):
                self.fresh()
                held = self.hold(what)
                first = self.begin("--shard", "1/2")
                self.reached(held)
                other = {"XDG_STATE_HOME": str(self.tmp / "other")}
                self.check(self.run_tool(*self.words("--shard", "2/2"), env=other), 0)
                held.release.set()
                self.check(self.finish(first), 0)
                found = sorted(self.api.prompts(name) for name in self.api.own())
                self.assertEqual(found, [["job 1", "job 3"], ["job 2", "job 4"]])
                self.api.end_all()
                self.batch("--shard", "1/2")
                self.check_pictures("job 1", "job 3")
                self.check(self.run_tool(*self.words("--shard", "2/2"), env=other), 0)
                self.check_pictures("job 1", "job 2", "job 3", "job 4")

    def test_the_lock(self) -> None:
        self.numbered(1)
        held = self.hold(CREATE)
        first = self.begin()
        self.reached(held)
        self.assertIn(str(first.pid), self.batch(code=2).err)
        self.assertIn(str(first.pid), self.at_once(code=2).err)
        held.release.set()
        self.check(self.finish(first), 0)
        self.check_batches(generations=1)

    def test_a_deferred_job_is_not_paid_for_beside_its_batch(self) -> None:
        self.submitted(2)
        posts = len(self.api.posts)
        self.assertIn("--deferred", self.at_once(code=1).err)
        for redo, code in (("failed", 1), ("unknown", 1), ("0001", 2), ("all", 2)):
            with self.subTest(redo):
                self.at_once("--redo", redo, code=code)
        self.at_once("--quality", "low", code=2)
        self.batch("--quality", "low", code=2)
        self.batch("--redo", "all")
        self.assertEqual(len(self.api.posts), posts)
        self.api.end()
        self.assertEqual(len(self.batch().saved), 2)
        self.at_once()
        self.assertEqual(len(self.api.posts), posts)

    def test_another_base_url_while_a_batch_is_pending(self) -> None:
        self.submitted(1)
        other = self.serve(otherwise=self.api.answered)
        other.put("/v1/batches", json_reply({"object": "list", "data": []}))
        run = self.run_tool(*self.words("--base-url", other.base_url, "--api-key", KEY))
        self.assertIn(self.api.base_url, self.check(run, 2).err)
        self.assertEqual(other.posts, [])

    def test_max_cost(self) -> None:
        self.numbered(3)
        price = float(self.at_once(*LOW, "--dry-run").out.rpartition("$")[2]) / 2
        before = self.listing()
        for limit in (price - 0.0011, 0.0001):
            self.batch(*LOW, "--max-cost", f"{limit:.4f}", code=2)
        self.assertEqual(self.api.posts, [])
        self.assertEqual(self.listing(), before)
        self.batch(*LOW, "--max-cost", f"{price + 0.0011:.4f}")
        self.check_batches(generations=1)
        self.api.end()
        self.batch(*LOW, "--max-cost", "0.0001")  # it is paid; nothing new is asked for
        self.check_pictures("job 1", "job 2", "job 3")

    def test_it_costs_half_wherever_it_is_told(self) -> None:
        self.numbered(2)
        full, half = (
            float(run.out.rpartition("$")[2])
            for run in (self.at_once(*LOW, "--dry-run"), self.batch(*LOW, "--dry-run"))
        )
        self.assertAlmostEqual(full / 2, half, delta=0.0001)
        self.assertEqual(self.api.requests, [])
        self.batch(*LOW)
        self.assertAlmostEqual(sum(line["estimate"] for line in self.lines()), half, delta=0.0001)
        self.api.end()
        run = self.batch(*LOW, "--json")
        self.assertIn("$0.0083", run.err)
        *_, told = [json.loads(line) for line in run.out.splitlines()]
        self.assertAlmostEqual(told["summary"]["cost"]["amount"], 0.00828, delta=0.00001)
        costs = [line["cost"]["amount"] for line in self.lines() if line["state"] == "saved"]
        self.assertEqual([round(cost, 5) for cost in costs], [0.00414, 0.00414])
        self.numbered(3)
        self.api.script.append(answer(picture_of("job 3")))
        self.at_once(*LOW)
        told_later = self.check(self.run_tool("history"), 0).out
        self.assertEqual(told_later.count("$0.0041 batch"), 2)
        self.assertEqual(told_later.count("$0.0083"), 1)

    def test_no_key_and_no_picture_in_the_journal(self) -> None:
        self.write(f"job 1 {KEY}", {"prompt": "job 2", "images": ["in.png"]})
        self.batch()
        self.write("job 1", {"prompt": "job 2"})
        self.api.end_all()
        self.batch(code=None)
        text = (self.folder / "results.jsonl").read_text()
        for secret in (KEY, b64(png(32, 32))[:40], b64(picture_of("job 2"))[:40]):
            self.assertNotIn(secret, text)
        shutil.rmtree(self.kept, ignore_errors=True)

    def test_a_journal_from_elsewhere_removes_nothing(self) -> None:
        """The key of a batch names a folder; a journal that came with an output folder may lie."""
        victim = self.tmp / "victim"
        for key in (str(victim), "../../../victim", "", "."):
            for step in ("uploading", "created"):
                with self.subTest(key, step=step):
                    self.fresh()
                    for folder in (victim, self.kept, self.folder):
                        folder.mkdir(parents=True, exist_ok=True)
                        (folder / "precious").write_text("mine")
                    self.api.batches["batch_0"] = {"id": "batch_0", "status": "expired"}
                    job = {"identity": "x-1", "id": "x", "state": "deferred", "job_id": key}
                    batch = {"state": "batch", "key": key, "step": step, "batch_id": "batch_0"}
                    rows = [{**job, "number": 9}, {**batch, "endpoint": "generations"}]
                    text = "".join(json.dumps({"schema": 1, **row}) + "\n" for row in rows)
                    (self.folder / "results.jsonl").write_text(text)
                    self.numbered(1)
                    self.batch(code=None)
                    for folder in (victim, self.kept, self.folder):
                        self.assertTrue((folder / "precious").exists())


def size_of(path: Path) -> int:
    """Return the size of a file that may be gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
