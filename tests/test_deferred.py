"""batch --deferred: through the Batch API, with one batch for the same jobs whatever happens."""

from __future__ import annotations

import base64
import collections
import gzip
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Callable

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
from tests.faults import Stage
from tests.pictures import png, png_chunk
from tests.support import KEY, Child, Reply, Run, b64, data_url, page, refusal

LOW = ("--quality", "low", "--size", "1024x1024")  # with a price
SILENT = Reply(silent=True)
BEGUN = Reply(200, b'{"id": "batch_0", "obj', cut=10)  # an answer that is cut
GATEWAY = page(502, "Bad Gateway")
OOPS = refusal(500, "server_error", "Oops.")
Result = Callable[[Any], Any]


def answers(**ends: Any) -> Result:
    """Return what becomes of each job: by its prompt's number, like job_2=...; else it is made."""
    known = {name.replace("_", " "): end for name, end in ends.items()}

    def result(line: Any) -> Any:
        end = known.get(line["body"]["prompt"], made)
        return end(line) if callable(end) else end

    return result


class Deferred(Stage):
    """A folder of jobs and a server with a Batch API."""

    def setUp(self) -> None:
        super().setUp()
        self.api = BatchApi()
        self.servers.append(self.api)
        self.addCleanup(self.api.check)
        self.addCleanup(self.api.close)
        self.env.update(GPT_IMAGE2_BASE_URL=self.api.base_url, GPT_IMAGE2_API_KEY=self.api.key)
        self.folder = self.work / "jobs"
        self.kept = self.state / "gpt-image-2" / "deferred"
        self.argv: tuple[str, ...] = ("--provider", "openai", "--deferred")

    def tearDown(self) -> None:
        self.assertEqual(self.files_with(KEY), [], "the key is in a file")
        self.assertEqual(self.api.doubled(), set(), "paid twice")

    def write(self, *jobs: dict[str, Any] | str) -> None:
        """Write jobs.jsonl; a text is a prompt."""
        lines = [{"prompt": job} if isinstance(job, str) else job for job in jobs]
        (self.work / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def numbered(self, count: int, **more: Any) -> None:
        """Write jobs.jsonl with the prompts "job 1" to "job COUNT"."""
        self.write(*({"prompt": f"job {number}", **more} for number in range(1, count + 1)))

    def begin(self, *argv: str) -> Child:
        """Start the batch, deferred."""
        return self.start_tool("batch", "jobs.jsonl", *self.argv, *argv)

    def batch(self, *argv: str, code: int = 0) -> Run:
        """Run the batch, deferred; stdout has nothing but its lines."""
        run = self.check(self.finish(self.begin(*argv)), code)
        if "--json" not in argv and "--dry-run" not in argv:
            for line in run.out.splitlines():
                self.assertRegex(line, r"^Saved: /.* \(\d+ KB\)$", self.story(run))
        return run

    def at_once(self, *argv: str, code: int = 0) -> Run:
        """Run the same batch without --deferred."""
        words = [word for word in self.argv if word != "--deferred"]
        return self.check(self.run_tool("batch", "jobs.jsonl", *words, *argv), code)

    def hold(self, what: str, **options: Any) -> Hold:
        """Hold the next request of a kind (see order()), at most to the end of the test."""
        held = self.api.order(what, hold=True, **options)
        self.addCleanup(held.release.set)
        return held

    def reached(self, held: Hold) -> None:
        """Wait until a request has come that is to be held."""
        if not held.reached.wait(20):
            self.fail(f"no such request came\n{self.api}")

    def kill_at(self, what: str, *argv: str, **options: Any) -> Hold:
        """Kill the tool alone while a request of a kind waits; its curl goes on waiting."""
        held = self.hold(what, **options)
        tool = self.begin(*argv)
        self.reached(held)
        tool.kill()
        self.finish(tool)
        return held

    def settle(self) -> list[int]:
        """Run the same command, and let batches end, until no job is left; return the codes."""
        codes = []
        for _ in range(8):
            run = self.finish(self.begin())
            self.check(run, run.code)
            codes.append(run.code)
            if not self.api.end_all() and run.code == 0 and not self.entries_in("deferred"):
                return codes
        return codes

    def lines(self) -> list[Any]:
        """Return all lines of the journal."""
        text = (self.folder / "results.jsonl").read_text(encoding="ascii")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def states(self) -> dict[str, str]:
        """Return the journal's last word on each job, by id."""
        return {line["id"]: line["state"] for line in self.lines() if "identity" in line}

    def entries_in(self, state: str) -> list[str]:
        """Return the ids of the jobs in a state."""
        return [name for name, found in self.states().items() if found == state]

    def pictures(self) -> dict[str, bytes]:  # type: ignore[override]
        """Return the pictures in the output folder, by name."""
        return {name: (self.folder / name).read_bytes() for name in self.picture_names()}

    def picture_names(self) -> list[str]:
        """Return the names of the pictures in the output folder."""
        found = self.listing(self.folder)
        return [name for name in found if not re.search(r"\.(jsonl|html|lock)$", name)]

    def check_pictures(self, *prompts: str) -> None:
        """Assert that the pictures of these prompts are saved, each once, and no others."""
        expected = collections.Counter(map(picture_of, prompts))
        self.assertEqual(collections.Counter(self.pictures().values()), expected)

    def endpoints(self) -> dict[str, int]:
        """Return how many batches were made, by endpoint."""
        names = [self.api.batches[name]["endpoint"].rpartition("/")[2] for name in self.api.own()]
        return dict(collections.Counter(names))

    def left(self) -> list[str]:
        """Return what is in the state folder for deferred batches."""
        return self.listing(self.kept) if self.kept.exists() else []


class Way(Deferred):
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
        self.assertEqual(run.saved[0].read_bytes(), picture_of("job 1"))
        self.assertEqual(len(self.api.batches), 1)
        self.assertEqual(self.batch().out, "")
        self.assertEqual(len(self.api.batches), 1)
        self.assertEqual(self.left(), [])

    def test_edits_go_as_json_in_a_batch_of_their_own(self) -> None:
        (self.work / "in.png").write_bytes(png(32, 32))
        (self.work / "mask.png").write_bytes(png(32, 32, hole=(1, 1, 4, 4)))
        edit = {"prompt": "job 2", "images": ["in.png", "in.png"], "mask": "mask.png"}
        self.write("job 1", edit)
        self.batch()
        (line,) = self.api.lines("batch_1")
        self.assertEqual(line["url"], "/v1/images/edits")
        for image in line["body"]["images"]:
            head, _, data = image["image_url"].partition(",")
            self.assertEqual(head, "data:image/png;base64")
            self.assertEqual(base64.b64decode(data), png(32, 32))
        mask = line["body"]["mask"]["image_url"].partition(",")[2]
        self.assertEqual(base64.b64decode(mask), png(32, 32, hole=(1, 1, 4, 4)))
        self.api.end("batch_0")
        self.assertIn("batch_1: validating", self.batch().err)
        self.api.end("batch_1")
        self.assertEqual([path.name for path in self.batch().saved], ["0002.png"])

    def test_the_lines_of_the_states(self) -> None:
        self.numbered(4)
        self.batch()
        counts = self.api.batches["batch_0"]["request_counts"]
        for status, completed, failed in (
            ("validating", 0, 0),
            ("in_progress", 1, 0),
            ("in_progress", 2, 1),
            ("finalizing", 3, 1),
            ("cancelling", 3, 1),
            ("something_new", 3, 1),
        ):
            with self.subTest(status, completed=completed):
                self.api.batches["batch_0"]["status"] = status
                counts.update(completed=completed, failed=failed)
                run = self.batch()
                self.assertEqual(run.out, "")
                self.assertIn(f"batch_0: {status} {completed}/4", run.err)
                told = self.batch("--json").json
                self.assertTrue(told["ok"])
                state = {"id": "batch_0", "status": status, "total": 4}
                state.update(completed=completed, failed=failed)
                endpoint = "/v1/images/generations"
                self.assertEqual(told["deferred"], [{**state, "endpoint": endpoint}])

    def test_the_end_as_json(self) -> None:
        self.numbered(2)
        self.batch()
        self.api.end()
        *jobs, told = [json.loads(line) for line in self.batch("--json").out.splitlines()]
        self.assertEqual([job["state"] for job in jobs], ["saved", "saved"])
        paths = [image["path"] for job in jobs for image in job["images"]]
        self.assertEqual([Path(path).name for path in paths], ["0001.png", "0002.png"])
        self.assertEqual((told["summary"]["jobs"], told["summary"]["saved"]), (2, 2))

    def test_new_lines_go_into_a_batch_once_the_first_has_ended(self) -> None:
        self.numbered(1)
        self.batch()
        self.numbered(2)
        self.batch()
        self.assertEqual(self.endpoints(), {"generations": 1})
        self.assertEqual(self.settle()[-1], 0)
        self.assertEqual(self.api.prompts("batch_1"), ["job 2"])
        self.check_pictures("job 1", "job 2")

    def test_output_id_and_n(self) -> None:
        (self.work / "jobs").mkdir()
        self.write(
            {"prompt": "job 1", "n": 2},
            {"prompt": "job 2", "id": "two", "n": 2},
            {"prompt": "job 3", "output": "sub/three.png"},
        )
        self.batch()
        self.assertEqual([line["body"].get("n") for line in self.api.lines()], [2, 2, None])
        self.api.end()
        saved = {str(path.relative_to(self.work)): path.read_bytes() for path in self.batch().saved}
        named = {"0001-1": (1, 1), "0001-2": (1, 2), "two-1": (2, 1), "two-2": (2, 2)}
        wanted = {f"jobs/{name}.png": picture_of(f"job {j}", k) for name, (j, k) in named.items()}
        self.assertEqual({name: data for name, data in saved.items() if name in wanted}, wanted)
        (third,) = set(saved) - set(wanted)
        self.assertTrue(third.endswith("sub/three.png"), third)
        self.assertEqual(saved[third], picture_of("job 3"))


PADDING = b'{"custom_id": "x", "padding": "' + b"A" * 300_000 + b'"}\n'


def padded(body: bytes) -> bytes:
    """Return results that curl has to write before they are whole."""
    return PADDING + body


class Kills(Deferred):
    """SIGKILL anywhere, then the same command until it is done."""

    def jobs_of_both_kinds(self) -> None:
        """Write two generations and an edit."""
        (self.work / "in.png").write_bytes(png(32, 32))
        self.write("job 1", {"prompt": "job 2", "images": ["in.png"]}, "job 3")

    def fresh(self) -> None:
        """Forget everything."""
        self.api.forget()
        for folder in (self.work, self.state):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)

    def made(self, number: int) -> None:
        """Wait until so many batches are made."""
        self.wait_until(lambda: len(self.api.own()) == number)

    def check_end(self) -> None:
        """Go on to the end, and assert that nothing was lost or paid twice."""
        self.assertEqual(self.settle()[-1], 0)
        self.assertEqual(self.endpoints(), {"generations": 1, "edits": 1})
        self.assertEqual(self.api.doubled(), set())
        self.check_pictures("job 1", "job 2", "job 3")
        self.assertEqual(set(self.states().values()), {"saved"})
        self.assertEqual(self.left(), [])

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
        for what, done, skip in points:
            with self.subTest(what, done=done, skip=skip):
                self.fresh()
                self.jobs_of_both_kinds()
                asked = len(self.api.asked(what))
                held = self.kill_at(what, done=done, skip=skip)
                self.assertEqual(len(self.api.asked(what)), asked + skip + 1)
                held.release.set()
                if what == CREATE:
                    self.made(skip + 1)
                self.check_end()

    def download_in_parts(self, *bounds: int, skip: int = 0) -> list[Hold]:
        """Let the next download stop at each of these places until it is released."""
        name = "error_file_id" if skip else "output_file_id"
        body = self.api.contents[self.api.batches["batch_0"][name]]
        chunks: list[Any] = []
        holds = [Hold() for _ in bounds]
        for held, start, end in zip(holds, (0, *bounds), bounds):
            self.addCleanup(held.release.set)
            chunks += [body[start:end], held.reached.set, held.release]
        reply = Reply(200, chunks=[*chunks, body[bounds[-1] :]])
        self.api.order(CONTENT, reply, skip=skip)
        return holds

    def kill_in_download(self, held: Hold) -> None:
        """Kill the tool once the first part of a result file has come."""
        tool = self.begin()
        self.reached(held)
        self.wait_until(lambda: sum(map(size_of, self.kept.rglob("*.part"))) > 100_000)
        tool.kill()
        self.finish(tool)

    def test_while_results_come(self) -> None:
        for skip in (0, 1):
            with self.subTest(skip=skip):
                self.fresh()
                self.numbered(3)
                self.api.result = answers(job_3=refused(500, "server_error"))
                self.batch()
                self.api.end(shape=padded)
                error_file = self.api.batches["batch_0"]["error_file_id"]
                self.api.contents[error_file] = padded(self.api.contents[error_file])
                (held,) = self.download_in_parts(200_000, skip=skip)
                self.kill_in_download(held)
                held.release.set()
                self.api.result = made
                self.settle()
                self.assertEqual(self.api.doubled(), set())
                self.check_pictures("job 1", "job 2", "job 3")

    def test_a_late_curl_of_the_results_beside_the_next_one(self) -> None:
        self.numbered(3)
        self.batch()
        self.api.end(shape=padded)
        first, second = self.download_in_parts(150_000, 250_000)
        self.kill_in_download(first)
        tool = self.begin()
        time.sleep(0.3)  # it has begun a download of its own by now, or waits
        first.release.set()
        time.sleep(0.1)
        second.release.set()
        self.check(self.finish(tool), 0)
        self.check_pictures("job 1", "job 2", "job 3")
        self.assertEqual(set(self.states().values()), {"saved"})

    def test_a_create_that_its_curl_brings_later_than_the_next_look(self) -> None:
        self.numbered(2)
        held = self.kill_at(CREATE)
        tool = self.begin()
        time.sleep(0.4)
        self.assertIsNone(tool.poll(), "it does not wait")
        self.assertEqual(len(self.api.asked(CREATE)), 1)
        held.release.set()
        self.check(self.finish(tool), 0)
        self.assertEqual(self.endpoints(), {"generations": 1})

    def test_ctrl_c_in_a_create_that_the_server_brings_later(self) -> None:
        self.numbered(2)
        held = self.hold(CREATE)
        tool = self.begin()
        self.reached(held)
        tool.send_signal(signal.SIGINT)
        time.sleep(0.3)
        again = self.begin()  # refused by the lock, or it waits, or it looks in vain
        time.sleep(0.3)
        held.release.set()
        self.finish(tool)
        self.finish(again)
        self.assertEqual(self.settle()[-1], 0)
        self.assertEqual(self.endpoints(), {"generations": 1})
        self.check_pictures("job 1", "job 2")

    def test_within_the_journal(self) -> None:
        """A kill leaves any number of lines; cut where nothing was sent yet, it's such a kill."""
        self.numbered(3)
        self.kill_at(UPLOAD).release.set()
        journal, world = self.folder / "results.jsonl", self.tmp / "world"
        lines = journal.read_bytes().splitlines(keepends=True)
        self.assertGreater(len(lines), 1)
        for folder in (self.work, self.state):
            shutil.copytree(folder, world / folder.name)
        for number in range(len(lines) + 1):
            with self.subTest(lines=number):
                self.api.forget()
                for folder in (self.work, self.state):
                    shutil.rmtree(folder)
                    shutil.copytree(world / folder.name, folder)
                journal.write_bytes(b"".join(lines[:number]))
                self.assertEqual(self.settle()[-1], 0)
                self.assertEqual(self.api.doubled(), set())
                self.check_pictures("job 1", "job 2", "job 3")

    def test_what_a_kill_leaves_goes_with_a_later_call(self) -> None:
        """The requests (input pictures are in them) of a batch that never was don't stay."""
        self.numbered(2)
        self.kill_at(UPLOAD).release.set()
        (self.folder / "results.jsonl").write_bytes(b"")  # killed before the first line
        self.assertEqual(self.settle()[-1], 0)
        self.assertEqual(self.left(), [])

    def test_at_random(self) -> None:
        draw = random.Random(7)
        self.numbered(6)
        kills = 0
        for _ in range(16):
            tool = self.begin()
            time.sleep(draw.uniform(0.0, 0.06))
            kills += tool.poll() is None
            tool.kill()
            self.finish(tool)
            if draw.random() < 0.2:
                self.api.end_all()
        self.assertGreater(kills, 3)
        self.assertEqual(self.settle()[-1], 0)
        self.assertEqual(self.endpoints(), {"generations": 1})
        self.check_pictures(*(f"job {number}" for number in range(1, 7)))

    def test_after_the_last_result_its_file_goes_too(self) -> None:
        """The folder is put back as a kill before its end leaves it."""
        self.numbered(2)
        self.batch()
        (key,) = {line["key"] for line in self.lines() if line["state"] == "batch"}
        self.api.end()
        self.batch()
        (self.kept / key).mkdir(parents=True)
        (self.kept / key / "output_file_id.jsonl").write_bytes(self.api.contents["file_1"])
        self.batch()
        self.assertEqual(self.left(), [])


class Uncertain(Deferred):
    """Calls that fail, and those whose outcome nobody knows."""

    def test_a_create_that_was_made_is_found_by_its_metadata(self) -> None:
        replies = {"silent": SILENT, "cut": BEGUN, "500": OOPS, "502": GATEWAY}
        replies["504"] = page(504, "Gateway Time-out")
        for name, reply in replies.items():
            with self.subTest(name):
                self.api.forget()
                self.numbered(2)
                shutil.rmtree(self.folder, ignore_errors=True)
                self.api.order(CREATE, reply, done=True)
                self.batch(code=8)
                self.api.foreign(5)  # so that ours is on the third page
                looks = len(self.api.asked(CHECK))
                self.assertIn("batch_0: validating 0/2", self.batch().err)
                self.assertGreaterEqual(len(self.api.asked(CHECK)) - looks, 3)
                self.assertEqual(self.endpoints(), {"generations": 1})

    def test_a_create_that_was_not_made_is_made_once(self) -> None:
        self.numbered(2)
        self.api.foreign(3)
        self.api.order(CREATE, GATEWAY)
        self.batch(code=8)
        self.assertEqual(self.endpoints(), {})
        self.api.order(CHECK, OOPS, skip=1)  # the look-up fails: then nothing may be made
        run = self.finish(self.begin())
        self.assertNotEqual(run.code, 0)
        self.assertEqual(len(self.api.asked(CREATE)), 1)
        self.batch()
        self.assertEqual(self.endpoints(), {"generations": 1})

    def test_a_create_without_an_id_in_its_answer(self) -> None:
        self.numbered(1)
        self.api.order(CREATE, Reply(200, b"{}"), done=True)
        self.finish(self.begin())
        self.assertEqual(self.settle()[-1], 0)
        self.assertEqual(self.endpoints(), {"generations": 1})
        self.check_pictures("job 1")

    def test_ids_of_another_kind(self) -> None:
        odd = json.dumps({"id": "file:1/2"}).encode()
        self.numbered(1)
        self.api.order(UPLOAD, Reply(200, odd))
        self.api.contents["file:1/2"] = b""
        self.finish(self.begin())
        self.finish(self.begin())
        self.finish(self.begin())
        self.assertLessEqual(self.endpoints().get("generations", 0), 1)

    def test_a_list_that_never_ends(self) -> None:
        self.numbered(1)
        self.api.order(CREATE, GATEWAY)
        self.batch(code=8)
        self.api.foreign(1)
        rows = [self.api.batches["batch_0"]]
        endless = {"object": "list", "data": rows, "has_more": True}
        self.api.order(CHECK, Reply(200, json.dumps(endless).encode()), times=1000)
        tool = self.begin()
        self.wait_until(lambda: tool.poll() is not None or len(self.api.asked(CHECK)) > 30)
        self.assertLess(len(self.api.asked(CHECK)), 30)

    def test_an_upload_that_fails_costs_nothing(self) -> None:
        replies = {"silent": SILENT, "cut": BEGUN, "502": GATEWAY, "500": OOPS}
        for done in (False, True):
            for name, reply in replies.items():
                with self.subTest(name, done=done):
                    self.api.forget()
                    shutil.rmtree(self.folder, ignore_errors=True)
                    self.write("job 1")
                    self.api.order(UPLOAD, reply, done=done)
                    run = self.finish(self.begin())
                    self.assertEqual(self.endpoints(), {})
                    self.batch()
                    self.assertEqual(self.endpoints(), {"generations": 1})
                    self.assertNotIn("billed", run.err)
                    self.assertIn(run.code, (1, 7))

    def test_a_refused_upload_leaves_the_jobs_free(self) -> None:
        self.numbered(2)
        self.api.order(UPLOAD, refusal(400, "invalid_file", "No."))
        self.batch(code=1)
        self.assertEqual(self.entries_in("deferred"), [])
        self.assertEqual(self.left(), [])
        self.batch()
        self.assertEqual(self.api.prompts(), ["job 1", "job 2"])

    def test_a_refused_create_loses_nothing(self) -> None:
        limit = refusal(429, "rate_limit_exceeded", "Too many batches.")
        refusals = (refusal(400, "billing_hard_limit_reached", "Limit."), limit)
        for reply, code in zip(refusals, (6, 6)):
            with self.subTest(reply.status):
                self.api.forget()
                shutil.rmtree(self.folder, ignore_errors=True)
                self.numbered(2)
                self.api.order(CREATE, reply)
                self.batch(code=code)
                self.assertEqual(set(self.states().values()), {"failed"})
                self.assertEqual(self.left(), [])
                self.batch()
                self.assertEqual(self.api.prompts(), ["job 1", "job 2"])
                self.assertEqual(self.settle()[-1], 0)
                self.check_pictures("job 1", "job 2")

    def test_a_refused_create_of_one_of_two(self) -> None:
        (self.work / "in.png").write_bytes(png(32, 32))
        self.write("job 1", {"prompt": "job 2", "images": ["in.png"]})
        self.api.order(CREATE, refusal(429, "rate_limit_exceeded", "Too many batches."))
        self.batch(code=6)
        self.assertEqual(self.settle()[-1], 0)
        self.assertEqual(self.endpoints(), {"generations": 1, "edits": 1})
        self.check_pictures("job 1", "job 2")

    def test_a_wrong_key_changes_nothing(self) -> None:
        self.numbered(1)
        before = self.listing()
        self.api.before = lambda request: refusal(401, "invalid_api_key", "Wrong key.")
        self.batch(code=4)
        self.assertEqual(self.listing(), before)

    def test_a_failed_look_says_nothing_of_a_bill(self) -> None:
        self.numbered(1)
        self.batch()
        for what, reply in ((CHECK, OOPS), (STATE, OOPS), (STATE, SILENT), (CHECK, SILENT)):
            with self.subTest(what, status=reply.status):
                self.api.order(what, reply)
                run = self.finish(self.begin())
                self.check(run, run.code)
                self.assertNotIn("billed", run.err)
                self.assertIn(run.code, (0, 1, 7))


class Waiting(Deferred):
    """--wait and --cancel."""

    def test_waits_with_a_back_off(self) -> None:
        times: list[float] = []

        def noted(request: Any) -> None:
            if request.path.endswith("batch_0"):
                times.append(time.monotonic())
                if len(times) == 3:
                    self.api.batches["batch_0"]["status"] = "in_progress"
                if len(times) == 6:
                    self.api.end()

        self.numbered(2)
        self.hurry(200)
        self.api.before = noted
        run = self.batch("--wait")
        self.assertEqual(len(run.saved), 2)
        for wait, (first, second) in zip((10, 15, 22, 33, 50), zip(times, times[1:])):
            self.assertGreater(second - first, 0.95 * wait / 200)
        self.assertLess(times[1] - times[0], 15 / 200 + 0.2)
        told = re.findall(r"batch_0: \w+ \d/2", run.err)
        self.assertEqual(told, ["batch_0: validating 0/2", "batch_0: in_progress 0/2"])
        self.assertNotIn("\n\n", run.err)

    def test_survives_what_passes(self) -> None:
        self.numbered(1)
        self.hurry(2000)
        limit = refusal(429, "rate_limit_exceeded", "Slow down.")
        for reply in (OOPS, GATEWAY, SILENT, BEGUN, limit):
            self.api.order(STATE, reply, skip=1)
        tool = self.begin("--wait")
        self.wait_until(lambda: len(self.api.asked(STATE)) > 7 or tool.poll() is not None)
        self.api.end_all()
        self.assertEqual(len(self.check(self.finish(tool), 0).saved), 1)

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
        self.assertEqual(self.endpoints(), {"generations": 1})

    def test_waits_for_both(self) -> None:
        (self.work / "in.png").write_bytes(png(32, 32))
        self.write("job 1", {"prompt": "job 2", "images": ["in.png"]})
        self.batch()
        self.hurry(1000)
        tool = self.begin("--wait")
        self.api.end("batch_1")
        self.wait_until(lambda: len(self.api.asked(STATE)) > 3)
        self.api.end("batch_0")
        self.check(self.finish(tool), 0)
        self.check_pictures("job 1", "job 2")

    def test_cancel(self) -> None:
        self.numbered(3)
        self.batch()
        self.assertIn("cancelling", self.batch("--cancel").err)
        cancelled = lost("batch_cancelled", "Cancelled.")
        self.api.result = answers(job_2=cancelled, job_3=cancelled)
        self.api.end(status="cancelled")
        self.batch(code=9)
        self.assertEqual(list(self.states().values()), ["saved", "failed", "failed"])
        self.assertEqual(len(self.api.batches), 1)
        self.api.result = made
        self.assertEqual(self.settle()[-1], 0)
        self.assertEqual(self.api.prompts("batch_1"), ["job 2", "job 3"])
        self.check_pictures("job 1", "job 2", "job 3")

    def test_a_job_in_a_batch_is_not_sent_beside_it(self) -> None:
        self.numbered(2)
        self.batch()
        for redo in ("0001", "all"):
            run = self.at_once("--redo", redo, code=2)
            self.assertIn("0001 is in a batch at the server", run.err)
        self.assertEqual(self.endpoints(), {"generations": 1})
        self.api.end()
        self.assertEqual(len(self.batch().saved), 2)

    def test_one_that_the_server_does_not_know_can_be_given_up(self) -> None:
        self.numbered(2)
        self.batch()
        self.api.order(STATE, refusal(404, None, "No batch found."))
        self.assertIn("--cancel gives it up", self.batch(code=1).err)
        self.assertEqual(set(self.states().values()), {"deferred"})
        for what in (CANCEL, STATE):
            self.api.order(what, refusal(404, None, "No batch found."))
        self.batch("--cancel", code=8)
        self.assertEqual(set(self.states().values()), {"unknown"})

    def test_cancel_sends_nothing(self) -> None:
        self.numbered(1)
        self.finish(self.begin("--cancel"))
        self.assertEqual(self.api.posts, [])
        self.batch()
        self.api.result = lambda line: lost("batch_cancelled", "Cancelled.")
        self.api.end(status="cancelled")
        self.batch("--cancel", code=1)
        self.finish(self.begin("--cancel"))
        self.assertEqual(self.endpoints(), {"generations": 1})

    def test_cancel_of_what_was_never_made(self) -> None:
        for what in (UPLOAD, CREATE):
            with self.subTest(what):
                self.api.forget()
                shutil.rmtree(self.folder, ignore_errors=True)
                self.numbered(1)
                self.api.order(what, GATEWAY)
                self.finish(self.begin())
                self.finish(self.begin("--cancel"))
                self.assertEqual(self.endpoints(), {})
                self.assertEqual(self.entries_in("deferred"), [])

    def test_cancel_of_what_has_ended(self) -> None:
        self.numbered(2)
        self.batch()
        self.api.end()
        self.assertEqual(len(self.batch("--cancel").saved), 2)

    def test_cancel_of_one_that_has_ended_beside_one_that_has_not(self) -> None:
        (self.work / "in.png").write_bytes(png(32, 32))
        self.write("job 1", {"prompt": "job 2", "images": ["in.png"]})
        self.batch()
        self.api.end("batch_0")
        self.finish(self.begin("--cancel"))
        self.assertEqual(self.api.batches["batch_1"]["status"], "cancelling")


class Ends(Deferred):
    """What becomes of the jobs."""

    def test_failures_are_told_apart(self) -> None:
        self.api.result = answers(
            job_2=refused(400, "moderation_blocked"),
            job_3=refused(500, "server_error"),
            job_4=lost("batch_expired", "This request could not be executed."),
            job_5=lambda line: None,
            job_6=refused(400, "invalid_value"),
            job_7=refused(429, "rate_limit_exceeded"),
            job_8=refused(503, "overloaded"),
        )
        self.numbered(8)
        self.batch()
        self.api.end(status="expired")
        run = self.batch(code=9)
        self.assertEqual(len(run.saved), 1)
        self.assertEqual(
            list(self.states().values()),
            ["saved", "refused", "failed", "failed", "failed", "refused", "failed", "failed"],
        )
        self.api.result = made
        self.batch()
        again = ["job 3", "job 4", "job 5", "job 7", "job 8"]
        self.assertEqual(self.api.prompts("batch_1"), again)
        self.api.end("batch_1")
        self.batch(code=9)
        self.batch(code=9)
        self.assertEqual(len(self.api.batches), 2)
        self.check_pictures("job 1", *again)

    def test_a_batch_that_failed(self) -> None:
        self.numbered(2)
        self.batch()
        rows = [{"code": "token_limit_exceeded", "message": "Enqueued token limit.", "line": None}]
        batch = self.api.batches["batch_0"]
        batch.update(status="failed", errors={"object": "list", "data": rows})
        run = self.batch(code=1)
        self.assertIn("Enqueued token limit.", run.err)
        self.assertEqual(set(self.states().values()), {"failed"})
        self.assertNotIn("may have been billed", run.err)
        self.api.good["batch_0"] = set()
        self.assertEqual(self.settle()[-1], 0)
        self.check_pictures("job 1", "job 2")

    def test_expired_and_cancelled(self) -> None:
        for status in ("expired", "cancelled"):
            with self.subTest(status):
                self.api.forget()
                shutil.rmtree(self.folder, ignore_errors=True)
                self.numbered(4)
                gone = lost(f"batch_{status}", "Not made.")
                self.api.result = answers(job_2=gone, job_4=lambda line: None)
                self.batch()
                self.api.end(status=status)
                run = self.batch(code=9)
                self.assertNotIn("may have been billed", run.err)
                self.assertEqual(list(self.states().values()), ["saved", "failed"] * 2)
                self.api.result = made
                self.assertEqual(self.settle()[-1], 0)
                self.assertEqual(self.api.prompts("batch_1"), ["job 2", "job 4"])
                self.check_pictures("job 1", "job 2", "job 3", "job 4")

    def test_without_any_file(self) -> None:
        self.numbered(2)
        self.batch()
        self.api.good["batch_0"] = set()
        self.api.batches["batch_0"]["status"] = "expired"
        self.batch(code=1)
        self.assertEqual(set(self.states().values()), {"failed"})

    def test_a_job_without_a_word_is_unknown(self) -> None:
        self.api.result = answers(job_2=lambda line: None)
        self.numbered(2)
        self.batch()
        self.api.end()
        self.batch(code=9)
        self.assertEqual(list(self.states().values()), ["saved", "unknown"])
        self.batch(code=9)
        self.assertEqual(len(self.api.batches), 1)
        self.api.result = made
        self.api.good["batch_0"] = {self.api.lines()[0]["custom_id"]}
        self.batch("--redo", "unknown")
        self.assertEqual(self.api.prompts("batch_1"), ["job 2"])

    def test_a_result_file_in_another_dress(self) -> None:
        for name, shape in (("gzip", gzip.compress), ("BOM", lambda body: b"\xef\xbb\xbf" + body)):
            with self.subTest(name):
                self.api.forget()
                shutil.rmtree(self.folder, ignore_errors=True)
                self.numbered(2)
                self.batch()
                self.api.end(shape=shape)
                self.batch()
                self.check_pictures("job 1", "job 2")

    def test_what_can_not_be_read_is_kept(self) -> None:
        self.numbered(2)
        self.batch()
        self.api.end(shape=lambda body: body.replace(b'"b64_json"', b'"b65_json"'))
        self.assertIn("what could not be saved is kept in", self.batch(code=8).err)
        self.assertEqual(set(self.states().values()), {"unknown"})
        answers = [(job / "response.json").read_bytes() for job in self.jobs()]
        self.assertEqual([text.count(b'"b65_json"') for text in answers], [1, 1])

    def test_a_line_that_is_torn_is_kept(self) -> None:
        """Its job was billed: what the server sent of it stays, and no later run removes it."""
        self.numbered(2)
        self.batch()
        self.api.end(shape=lambda body: body[:-200])
        self.assertIn("what could not be saved is kept in", self.batch(code=9).err)
        self.assertEqual(list(self.states().values()), ["saved", "unknown"])
        self.batch(code=9)
        (file,) = self.kept.rglob("output_file_id.jsonl")
        self.assertEqual(file.read_bytes(), self.api.contents["file_1"])

    def test_lines_that_are_odd(self) -> None:
        """Foreign ids, rubbish, a duplicate, and a last line that is torn."""

        def shape(body: bytes) -> bytes:
            first, second, third = body.splitlines(keepends=True)
            strange = first.replace(b'"custom_id": "', b'"custom_id": "x')
            rubbish = b'\xff\n[]\nnull\n{"custom_id": 7}\n{"custom_id": "a", "response": []}\n\n'
            return strange + first + rubbish + first + second + third[:-80]

        self.numbered(3)
        self.batch()
        self.api.end(shape=shape)
        self.batch(code=9)
        self.check_pictures("job 1", "job 2")
        self.assertEqual(list(self.states().values()), ["saved", "saved", "unknown"])

    def test_a_line_with_too_much_text(self) -> None:
        """Numbers, say: nothing of that size is a picture; the other lines are saved."""
        for count in (2_830_000, 4_000_000):
            with self.subTest(count):
                self.api.forget()
                shutil.rmtree(self.folder, ignore_errors=True)
                junk = b'{"custom_id": "x", "response": [' + b"1, " * count + b"1]}\n"
                self.numbered(4)
                self.batch()
                self.api.end()
                first, rest = self.api.contents["file_1"].split(b"\n", 1)
                self.api.contents["file_1"] = first + b"\n" + junk + rest
                self.finish(self.begin())
                self.check_pictures("job 1", "job 2", "job 3", "job 4")

    def test_a_line_without_its_line_break(self) -> None:
        self.numbered(2)
        self.batch()
        self.api.end(shape=lambda body: body.rstrip(b"\n"))
        self.batch()
        self.check_pictures("job 1", "job 2")

    def test_a_wide_line(self) -> None:
        """30 MB with three pictures; others around it."""
        noise = random.Random(1).getrandbits(60_000_000).to_bytes(7_500_000, "big")
        pictures = [
            base[:-12] + png_chunk(b"noIs", noise) + base[-12:]
            for base in (picture_of("job 2", k) for k in (1, 2, 3))
        ]
        wide = served(*({"b64_json": b64(picture)} for picture in pictures))
        self.api.result = answers(job_2=wide)
        self.write("job 1", {"prompt": "job 2", "n": 3}, "job 3")
        self.batch()
        self.api.end()
        self.batch()
        found = self.pictures()
        self.assertEqual([found[f"0002-{k}.png"] for k in (1, 2, 3)], pictures)
        self.assertEqual(found["0003.png"], picture_of("job 3"))

    def test_urls(self) -> None:
        link = self.api.put("/pictures/2.png", picture_of("job 2"))
        self.api.result = answers(
            job_1=served({"url": data_url(picture_of("job 1"))}),
            job_2=served({"url": link}),
        )
        self.numbered(2)
        self.batch()
        self.api.end()
        self.batch()
        self.check_pictures("job 1", "job 2")

    def test_ctrl_c_while_a_link_is_fetched(self) -> None:
        release = Hold()
        self.addCleanup(release.release.set)
        picture = picture_of("job 1")
        pieces = (picture[:20], release.reached.set, release.release, picture[20:])
        reply = Reply(chunks=pieces)
        link = self.api.put("/pictures/1.png", lambda request: reply)
        self.api.result = answers(job_1=served({"url": link}), job_2=served({"url": link}))
        self.numbered(3)
        self.batch()
        self.api.end()
        tool = self.begin()
        self.wait_until(lambda: release.reached.is_set() or tool.poll() is not None)
        tool.send_signal(signal.SIGINT)
        time.sleep(0.2)
        tool.send_signal(signal.SIGTERM)  # leave now, with no time for the answer
        self.finish(tool)
        self.api.put("/pictures/1.png", picture)
        release.release.set()
        run = self.finish(self.begin())
        self.check(run, 0)
        found = self.pictures()
        saved = [found.get(f"000{number}.png") for number in (1, 2, 3)]
        self.assertEqual(saved, [picture_of(f"job {number}") for number in (1, 1, 3)])

    def test_a_picture_that_nobody_can_save_stops_no_other(self) -> None:
        """Broken base64 or a dead link: what came is kept or told, and the batch has an end."""
        dead = self.api.origin + "/gone.png"
        for name, data in (("broken", {"b64_json": "A" * 200}), ("dead", {"url": dead})):
            with self.subTest(name):
                self.api.forget()
                shutil.rmtree(self.folder, ignore_errors=True)
                self.api.result = answers(job_1=served(data))
                self.numbered(2)
                self.batch()
                self.api.end()
                run = self.finish(self.begin())
                self.assertIn(run.code, (9, 10))
                self.check_pictures("job 2")
                self.numbered(3)
                self.finish(self.begin())
                self.finish(self.begin())
                self.assertEqual(self.api.prompts("batch_1"), ["job 3"])

    def test_jobs_whose_lines_are_gone_or_changed(self) -> None:
        (self.work / "in.png").write_bytes(png(32, 32))
        edit = {"prompt": "job 4", "images": ["in.png"], "id": "four"}
        output = {"prompt": "job 5", "output": "five.png"}
        self.write("job 1", {"prompt": "job 2", "id": "two"}, "job 3", edit, output)
        self.batch()
        self.write("job 3", {"prompt": "job 22", "id": "two"}, "job 7")
        os.unlink(self.work / "in.png")
        self.api.end("batch_0")
        self.api.end("batch_1")
        run = self.finish(self.begin())
        self.check(run, run.code)
        names = [path.name for path in run.saved]
        self.assertEqual(names, ["0001.png", "two.png", "0003.png", "five.png", "four.png"])
        prompts = [f"job {number}" for number in (1, 2, 3, 5, 4)]
        self.assertEqual([p.read_bytes() for p in run.saved], [picture_of(p) for p in prompts])
        self.assertEqual(self.settle()[-1], 0)
        self.assertEqual(self.api.prompts("batch_2"), ["job 22", "job 7"])
        self.assertIn(picture_of("job 22"), self.pictures().values())


class Places(Deferred):
    """Where results can't go, and files that don't come."""

    def test_a_file_in_the_place_of_a_folder(self) -> None:
        self.write({"prompt": "job 1", "output": "sub/one.png"}, "job 2", {"prompt": "job 3"})
        self.batch()
        self.api.end()
        blocked = self.folder / "sub"
        blocked.write_text("in the way")
        run = self.finish(self.begin())
        self.assertIn(run.code, (9, 10), self.story(run))
        blocked.unlink()
        self.assertEqual(self.finish(self.begin()).code, 0)
        self.check_pictures("job 1", "job 2", "job 3")
        self.assertEqual((blocked / "one.png").read_bytes(), picture_of("job 1"))
        self.assertEqual(set(self.states().values()), {"saved"})
        self.assertEqual(self.left(), [])

    def test_waiting_for_a_blocked_folder_ends(self) -> None:
        self.write({"prompt": "job 1", "output": "sub/one.png"})
        self.batch()
        self.api.end()
        (self.folder / "sub").write_text("in the way")
        self.hurry(1000)
        tool = self.begin("--wait")
        self.wait_until(lambda: len(self.api.asked(STATE)) > 8 or tool.poll() is not None)
        self.assertIn(tool.poll(), (9, 10))

    def test_a_blocked_folder_of_a_job_without_a_picture(self) -> None:
        ends = {"1": refused(400, "invalid_value"), "2": lost("batch_expired", "Expired.")}
        self.api.result = answers(job_1=ends["1"], job_2=ends["2"], job_3=lambda line: None)
        self.write(*({"prompt": f"job {n}", "output": f"sub/{n}.png"} for n in (1, 2, 3)), "job 4")
        self.batch()
        self.api.end(status="expired")
        (self.folder / "sub").write_text("in the way")
        self.finish(self.begin())
        self.assertEqual(list(self.states().values()), ["refused", "failed", "failed", "saved"])

    def test_a_read_only_folder(self) -> None:
        self.heed_permissions()
        self.write({"prompt": "job 1", "output": "sub/one.png", "n": 2}, "job 2")
        self.batch()
        self.api.end()
        (self.folder / "sub").mkdir(mode=0o500)
        self.finish(self.begin())
        (self.folder / "sub").chmod(0o700)
        self.assertEqual(self.finish(self.begin()).code, 0)
        found = self.pictures()
        first = [found.get(f"sub/one-{k}.png") for k in (1, 2)]
        self.assertEqual(first, [picture_of("job 1", k) for k in (1, 2)])
        self.assertEqual(found["0002.png"], picture_of("job 2"))

    def test_a_read_only_output_folder(self) -> None:
        self.heed_permissions()
        self.numbered(1)
        self.batch()
        self.api.end()
        self.folder.chmod(0o500)
        run = self.finish(self.begin())
        self.folder.chmod(0o700)
        self.assertNotEqual(run.code, 0)
        self.batch()
        self.check_pictures("job 1")

    def test_downloads_that_are_cut_go_on(self) -> None:
        self.numbered(4)
        self.batch()
        self.api.end()
        size = len(self.api.contents["file_1"])
        self.api.cut = size // 6 + 1
        self.hurry(500)
        run = self.finish(self.begin())
        self.assertIn(self.check(run, run.code).code, (1, 7, 10))
        self.assertEqual(self.pictures(), {})
        self.batch()
        self.check_pictures("job 1", "job 2", "job 3", "job 4")
        ranges = [request.headers.get("range") for request in self.api.asked(CONTENT)]
        steps = [None, *(f"bytes={self.api.cut * k}-" for k in range(1, 6))]
        self.assertEqual(ranges, steps)

    def test_a_server_that_knows_no_ranges(self) -> None:
        self.numbered(2)
        self.batch()
        self.api.end()
        whole = self.api.contents["file_1"]
        self.hurry(500)
        self.api.order(CONTENT, Reply(body=whole, cut=200))
        self.api.order(CONTENT, Reply(body=whole))
        self.batch()
        self.check_pictures("job 1", "job 2")

    def test_errors_of_the_download_pass(self) -> None:
        self.numbered(2)
        self.batch()
        self.api.end()
        self.hurry(500)
        self.api.order(CONTENT, OOPS)
        self.api.order(CONTENT, SILENT)
        self.batch()
        self.check_pictures("job 1", "job 2")

    def test_a_file_that_expired(self) -> None:
        """Its jobs were billed and nothing will bring them: unknown, and others may be sent."""
        self.numbered(2)
        self.batch()
        self.api.end()
        whole = self.api.contents.pop("file_1")
        run = self.finish(self.begin())
        self.assertNotEqual(run.code, 0)
        self.assertRegex(run.err, "404|gone")
        self.finish(self.begin())
        self.assertEqual(set(self.states().values()), {"unknown"})
        self.numbered(3)
        self.finish(self.begin())
        self.assertEqual(self.api.prompts("batch_1"), ["job 3"])
        self.assertTrue(whole)

    def test_another_key_finds_no_batch_and_loses_nothing(self) -> None:
        self.numbered(1)
        self.batch()
        self.api.order(STATE, refusal(404, None, "No batch found."))
        self.batch(code=1)
        self.assertEqual(self.entries_in("deferred"), ["0001"])
        self.assertEqual(self.settle()[-1], 0)
        self.assertEqual(self.endpoints(), {"generations": 1})


class Limits(Deferred):
    """What is not even begun, and what stands beside it."""

    def nothing_left(self, run: Run) -> None:
        """Assert that a refused run sent nothing and left nothing in the state folder."""
        self.assertEqual(self.api.posts, [])
        self.assertEqual(self.left(), [])
        self.assertIn("--shard", run.err)

    def test_over_50000_requests(self) -> None:
        prompts = (f'{{"prompt": "{number}"}}\n' for number in range(50_001))
        (self.work / "jobs.jsonl").write_text("".join(prompts))
        self.nothing_left(self.batch(code=2))

    def test_over_200_megabytes(self) -> None:
        base = png(32, 32)
        noise = bytes(35_000_000)
        (self.work / "in.png").write_bytes(base[:-12] + png_chunk(b"noIs", noise) + base[-12:])
        edits = [{"prompt": f"job {number}", "images": ["in.png"]} for number in range(5)]
        self.write("job 9", *edits)
        self.nothing_left(self.batch(code=2))
        self.assertEqual(self.listing(self.folder) if self.folder.exists() else [], [])

    def test_a_stream(self) -> None:
        self.numbered(1)
        self.batch("--stream", code=2)
        self.assertEqual(self.api.posts, [])
        self.assertEqual(self.left(), [])

    def test_shards(self) -> None:
        self.numbered(4)
        self.batch("--shard", "1/2")
        self.batch("--shard", "2/2")
        self.assertEqual(self.api.prompts("batch_0"), ["job 1", "job 3"])
        self.assertEqual(self.api.prompts("batch_1"), ["job 2", "job 4"])
        self.api.end_all()
        self.batch("--shard", "1/2")
        self.check_pictures("job 1", "job 3")
        self.batch("--shard", "2/2")
        self.check_pictures("job 1", "job 2", "job 3", "job 4")

    def test_shards_at_once_on_two_machines(self) -> None:
        """They share the output folder, not the state folder."""
        for what in (UPLOAD, CREATE):
            with self.subTest(what):
                self.api.forget()
                shutil.rmtree(self.folder, ignore_errors=True)
                self.numbered(4)
                held = self.hold(what)
                first = self.begin("--shard", "1/2")
                self.reached(held)
                words = ("batch", "jobs.jsonl", *self.argv, "--shard", "2/2")
                other = {"XDG_STATE_HOME": str(self.tmp / "other")}
                self.check(self.run_tool(*words, env=other), 0)
                held.release.set()
                self.check(self.finish(first), 0)
                found = sorted(self.api.prompts(name) for name in self.api.own())
                self.assertEqual(found, [["job 1", "job 3"], ["job 2", "job 4"]])

    def test_the_lock(self) -> None:
        self.numbered(1)
        held = self.hold(CREATE)
        first = self.begin()
        self.reached(held)
        self.assertIn(str(first.pid), self.batch(code=2).err)
        self.assertIn(str(first.pid), self.at_once(code=2).err)
        held.release.set()
        self.check(self.finish(first), 0)
        self.assertEqual(self.endpoints(), {"generations": 1})

    def test_a_plain_batch_sends_no_deferred_job(self) -> None:
        self.numbered(2)
        self.batch()
        posts = len(self.api.posts)
        run = self.at_once(code=1)
        self.assertEqual(len(self.api.posts), posts)
        self.assertIn("--deferred", run.err)
        self.at_once("--redo", "failed", code=1)
        self.at_once("--redo", "unknown", code=1)
        self.assertEqual(len(self.api.posts), posts)
        self.api.end()
        self.assertEqual(len(self.batch().saved), 2)
        self.at_once()
        self.assertEqual(len(self.api.posts), posts)

    def test_changed_options_while_jobs_are_deferred(self) -> None:
        self.numbered(2)
        self.batch()
        posts = len(self.api.posts)
        self.batch("--quality", "low", code=2)
        self.at_once("--quality", "low", code=2)
        self.assertEqual(len(self.api.posts), posts)

    def test_redo_all_does_not_pay_for_what_is_under_way(self) -> None:
        self.numbered(2)
        self.batch()
        self.batch("--redo", "all")
        self.assertEqual(self.endpoints(), {"generations": 1})

    def test_max_cost(self) -> None:
        self.numbered(3)
        full = self.at_once(*LOW, "--dry-run")
        price = float(full.out.rpartition("$")[2])
        before = self.listing()
        for limit in (price / 2 - 0.0011, 0.0001):
            self.batch(*LOW, "--max-cost", f"{limit:.4f}", code=2)
        self.assertEqual(self.api.posts, [])
        self.assertEqual(self.listing(), before)
        self.batch(*LOW, "--max-cost", f"{price / 2 + 0.0011:.4f}")
        self.assertEqual(self.endpoints(), {"generations": 1})
        self.api.end()
        self.batch(*LOW, "--max-cost", "0.0001")  # it is paid; nothing new is asked for

    def test_no_key_and_no_picture_in_the_journal(self) -> None:
        (self.work / "in.png").write_bytes(png(32, 32))
        self.write(f"job 1 {KEY}", {"prompt": "job 2", "images": ["in.png"]})
        self.batch()
        self.assertNotIn(KEY, (self.folder / "results.jsonl").read_text())
        os.unlink(self.work / "jobs.jsonl")
        self.write("job 1", {"prompt": "job 2"})
        self.api.end_all()
        self.finish(self.begin())
        text = (self.folder / "results.jsonl").read_text()
        self.assertNotIn(KEY, text)
        self.assertNotIn(b64(png(32, 32))[:40], text)
        self.assertNotIn(b64(picture_of("job 2"))[:40], text)
        shutil.rmtree(self.kept, ignore_errors=True)

    def test_a_server_without_batches(self) -> None:
        for name, reply in {
            "404": page(404, "Not Found"),
            "404 as JSON": refusal(404, "not_found", "Invalid URL (GET /v1/batches)"),
            "405": page(405, "Method Not Allowed"),
            "a page": page(200, "Welcome"),
            "501": page(501, "Not Implemented"),
        }.items():
            with self.subTest(name):
                self.numbered(1)
                before = self.listing()
                self.api.before = lambda request, reply=reply: reply  # type: ignore[misc]
                run = self.batch(code=1)
                self.assertIn("/batches", run.err)
                self.assertEqual(len(run.err.splitlines()), 1)
                self.assertEqual(self.listing(), before)
                self.assertEqual(self.api.posts, [])

    def test_a_server_without_batches_beside_a_journal(self) -> None:
        self.numbered(2)
        self.batch()
        self.api.end()
        self.batch()
        self.numbered(3)
        before = {name: (self.work / name).read_bytes() for name in self.listing()}
        self.api.before = lambda request: page(404, "Not Found")
        self.batch(code=1)
        after = {name: (self.work / name).read_bytes() for name in self.listing()}
        after["jobs/results.lock"] = before["jobs/results.lock"]
        self.assertEqual(after, before)

    def test_a_journal_from_elsewhere_removes_nothing(self) -> None:
        """The key of a batch names a folder; a journal that came with an output folder may lie."""
        victim = self.tmp / "victim"
        for key in (str(victim), "../../../victim", "", "."):
            for step in ("uploading", "created"):
                with self.subTest(key, step=step):
                    victim.mkdir(exist_ok=True)
                    (victim / "precious").write_text("mine")
                    self.kept.mkdir(parents=True, exist_ok=True)
                    (self.kept / "other").write_text("mine")
                    self.api.forget()
                    self.api.batches["batch_0"] = {"id": "batch_0", "status": "expired"}
                    line = {"state": "batch", "key": key, "step": step, "batch_id": "batch_0"}
                    self.folder.mkdir(exist_ok=True)
                    lines: list[dict[str, Any]] = [{**line, "endpoint": "generations"}]
                    lines.append({"identity": "x-1", "id": "x", "state": "saved", "number": 9})
                    text = "".join(json.dumps({"schema": 1, **row}) + "\n" for row in lines)
                    (self.folder / "results.jsonl").write_text(text)
                    self.numbered(1)
                    self.finish(self.begin())
                    self.assertTrue((victim / "precious").exists())
                    self.assertTrue((self.kept / "other").exists())
                    shutil.rmtree(self.folder)

    def test_the_sandbox(self) -> None:
        self.numbered(1)
        self.batch("--sandbox", code=2)
        self.assertEqual(self.api.requests, [])

    def test_wait_and_cancel_alone(self) -> None:
        self.numbered(1)
        self.at_once("--wait", code=2)
        self.at_once("--cancel", code=2)
        self.assertEqual(self.api.requests, [])


class Money(Deferred):
    """Half the price, wherever it is told."""

    def test_costs_half(self) -> None:
        self.numbered(2)
        amounts = [
            float(run.out.rpartition("$")[2])
            for run in (self.at_once(*LOW, "--dry-run"), self.batch(*LOW, "--dry-run"))
        ]
        self.assertAlmostEqual(amounts[0] / 2, amounts[1], delta=0.0001)
        self.assertEqual(self.api.requests, [])
        self.batch(*LOW)
        estimates = [line["estimate"] for line in self.lines() if "identity" in line]
        self.assertAlmostEqual(sum(estimates), amounts[1], delta=0.0001)
        self.api.end()
        *_, told = [json.loads(line) for line in self.batch(*LOW, "--json").out.splitlines()]
        self.assertAlmostEqual(told["summary"]["cost"]["amount"], 0.00828, delta=0.00001)
        costs = [line["cost"]["amount"] for line in self.lines() if line["state"] == "saved"]
        self.assertEqual([round(cost, 5) for cost in costs], [0.00414, 0.00414])
        run = self.check(self.run_tool("history"), 0)
        self.assertEqual(run.out.count("$0.0041 batch"), 2)

    def test_the_table_at_the_end(self) -> None:
        self.numbered(2)
        self.batch(*LOW)
        self.api.end()
        self.assertIn("$0.0083", self.batch(*LOW).err)

    def test_a_plain_batch_costs_the_whole(self) -> None:
        self.numbered(1)
        self.batch()
        self.api.end()
        self.batch()
        self.numbered(2)
        self.api.script.append(
            Reply(200, json.dumps(made(line_of("job 2"))["response"]["body"]).encode())
        )
        self.at_once()
        run = self.check(self.run_tool("history"), 0)
        self.assertEqual(run.out.count("$0.0083"), 1)
        self.assertEqual(run.out.count("batch"), 1)


def line_of(prompt: str) -> Any:
    """Return a request line of a prompt."""
    return {"body": {"prompt": prompt}}


def size_of(path: Path) -> int:
    """Return the size of a file that may be gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
