"""batch: what is sent, saved and said; its pace, its limits, its exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import unittest
from typing import Any

from tests.batches import BAD_REQUEST, LOW, POLICY, UNAUTHORIZED, BatchCase, drawn
from tests.pictures import jpeg, png
from tests.support import (
    KEY,
    OPENAI_USAGE,
    Reply,
    answer,
    hk_answer,
    json_reply,
    page,
    refusal,
    start,
    stop,
)

PICTURE_COST = 0.00828  # OPENAI_USAGE at OpenAI's prices
LOW_ESTIMATE = 0.0059  # a low 1024x1024: 16 * 16 * (2,000,000 + 1024 * 1024) / 4,000,000 tokens

SLOW_END = """
import threading, time

run = threading.Thread.run
threading.Thread.run = lambda self: (run(self), time.sleep(0.05))
"""


class Wire(BatchCase):
    """Jobs to POSTs to pictures."""

    def test_every_job_is_sent_once_and_saved_under_its_number(self) -> None:
        self.prompts(*(f"job {number}" for number in range(12)))
        run = self.batch()
        self.assertEqual(self.posted(), sorted(f"job {number}" for number in range(12)))
        expected = {f"{number + 1:04}.png": f"job {number}" for number in range(12)}
        self.assertEqual(self.painted(), expected)
        self.assertEqual(sorted(path.name for path in run.saved), sorted(expected))
        self.assertEqual({path.parent for path in run.saved}, {self.folder})
        self.assertEqual(self.jobs(), [])
        self.assertEqual(self.processes(), [])
        for post in self.api.posts:
            self.assertEqual(post.headers["authorization"], f"Bearer {KEY}")

    def test_two_identical_lines_are_two_pictures(self) -> None:
        self.prompts("a fox", "a fox")
        self.batch()
        self.assertEqual(self.posted(), ["a fox", "a fox"])
        self.assertEqual(sorted(self.painted()), ["0001.png", "0002.png"])
        self.assertEqual(sorted(self.painted().values()), ["a fox", "a fox again"])
        self.batch()
        self.assertEqual(len(self.api.posts), 2)

    def test_several_pictures_of_one_job(self) -> None:
        self.write({"prompt": "a", "n": 3}, {"prompt": "b"})
        self.batch()
        self.check_pictures(**{"0001-1": "a", "0001-2": "a, 2", "0001-3": "a, 3", "0002": "b"})

    def test_more_pictures_than_asked_are_all_saved(self) -> None:
        self.painter.order("a", answer(drawn("a"), drawn("more")))
        self.prompts("a")
        self.batch()
        self.assertEqual(len(self.painted()), 2)
        self.assertIn("0001.png", self.painted())

    def test_the_suffix_is_that_of_the_bytes(self) -> None:
        self.painter.order("a", answer(jpeg(8, 8)))
        self.prompts("a", "b")
        self.batch()
        self.assertEqual(sorted(self.painted()), ["0001.jpg", "0002.png"])
        self.assertEqual((self.folder / "0001.jpg").read_bytes(), jpeg(8, 8))

    def test_a_picture_that_comes_by_a_link(self) -> None:
        self.painter.order("a", answer(self.api.put("/a.png", drawn("linked"))))
        self.prompts("a")
        self.batch()
        self.assertEqual((self.folder / "0001.png").read_bytes(), drawn("linked"))

    def test_sidecars_and_history(self) -> None:
        self.write({"prompt": "a", "id": "fox"}, {"prompt": "b"})
        self.batch("--sidecar")
        side = json.loads((self.folder / "fox.png.json").read_text())
        self.assertEqual((side["prompt"], side["command"]), ("a", "generate"))
        self.assertTrue((self.folder / "0002.png.json").exists())
        history = self.check(self.run_tool("history", "--json"), 0).json
        told = {(row["prompt"], *row["paths"]) for row in history["entries"]}
        self.assertEqual(
            told, {("a", str(self.folder / "fox.png")), ("b", str(self.folder / "0002.png"))}
        )

    def test_a_foreign_file_of_the_same_name(self) -> None:
        self.folder.mkdir()
        (self.folder / "0002.png").write_bytes(b"mine")
        self.prompts("a", "b")
        self.assertRegex(self.refused().err, "0002.*--force")
        self.batch("--force")
        self.check_pictures(**{"0001": "a", "0002": "b"})

    def test_a_file_that_appears_meanwhile_stays(self) -> None:
        release = self.painter.hold("a")
        self.prompts("a")
        tool = self.start_tool("batch", "jobs.jsonl")
        self.api.wait_for_request()
        (self.folder / "0001.png").write_bytes(b"mine")
        release.set()
        run = self.check(self.finish(tool), 0)
        self.assertEqual((self.folder / "0001.png").read_bytes(), b"mine")
        self.assertEqual(run.saved, [self.folder / "0001-2.png"])

    def test_the_jobs_file_may_change_meanwhile(self) -> None:
        release = self.painter.hold("a")
        self.prompts("a", "b")
        tool = self.start_tool("batch", "jobs.jsonl", "--concurrency", "1")
        self.api.wait_for_request()
        self.prompts("x", "y")
        release.set()
        self.check(self.finish(tool), 0)
        self.check_pictures(**{"0001": "a", "0002": "b"})

    def test_a_picture_that_changes_meanwhile_is_not_sent(self) -> None:
        release = self.painter.hold("a")
        (self.work / "room.png").write_bytes(png(16, 16, seed=1))
        self.write({"prompt": "a"}, {"prompt": "b", "images": ["room.png"]}, {"prompt": "c"})
        tool = self.start_tool("batch", "jobs.jsonl", "--concurrency", "1")
        self.api.wait_for_request()
        (self.work / "room.png").write_bytes(png(16, 16, seed=2))
        release.set()
        run = self.check(self.finish(tool), 9)
        self.assertRegex(run.err, "0002: .*changed")
        self.assertEqual(self.posted(), ["a", "c"])
        self.assertEqual(self.states()["0002"], "failed")
        self.batch()
        self.assertEqual(self.posted(), ["a", "b", "c"])
        self.assertEqual(self.post_of("b").uploads[0].body, png(16, 16, seed=2))

    def test_the_key_is_in_no_file_and_no_line(self) -> None:
        self.painter.order("a", refusal(400, "x", f"You sent {KEY}."))
        self.prompts("a", f"my key is {KEY}")
        run = self.batch("--json", code=9)
        self.assertNotIn(KEY, run.out + run.err)
        (self.work / "jobs.jsonl").unlink()  # tearDown looks into all other files


class Folders(BatchCase):
    """Where a batch's pictures go."""

    def check_folder(self, expected: str, *argv: str, file: str = "jobs.jsonl", **o: Any) -> None:
        """Assert the folder that a batch of one job saves in."""
        run = self.batch(*argv, file=file, **o)
        self.assertEqual([str(path.parent) for path in run.saved], [expected], self.story(run))
        names = {path.name for path in run.saved[0].parent.iterdir()}
        self.assertLess({"results.jsonl", "index.html"}, names)

    def test_beside_the_jobs_file(self) -> None:
        (self.work / "sub").mkdir()
        self.prompts(
            "a",
        ).rename(self.work / "sub" / "my.jobs.jsonl")
        self.check_folder(f"{self.work}/sub/my.jobs", file="sub/my.jobs.jsonl")

    def test_where_output_dir_says(self) -> None:
        self.prompts("a")
        self.check_folder(f"{self.work}/deep/er", "--output-dir", "deep/er")

    def test_inside_the_configured_folder(self) -> None:
        self.prompts("a")
        self.check_folder(
            f"{self.tmp}/all/jobs", env={"GPT_IMAGE2_OUTPUT_DIR": str(self.tmp / "all")}
        )
        self.configure(output_dir=str(self.tmp / "mine"))
        self.check_folder(f"{self.tmp}/mine/jobs")
        self.check_folder(f"{self.work}/here", "--output-dir", "here")

    def test_two_jobs_files_in_one_folder(self) -> None:
        self.prompts("a", "b")
        self.write({"prompt": "c"}, {"prompt": "b"}, {"prompt": "d"}, name="more.jsonl")
        self.batch()
        self.batch("--output-dir", "jobs", file="more.jsonl")
        self.assertEqual(self.posted(), ["a", "b", "c", "d"])
        self.assertEqual(sorted(self.painted().values()), ["a", "b", "c", "d"])
        self.batch()
        self.batch("--output-dir", "jobs", file="more.jsonl")
        self.assertEqual(len(self.painter.seen), 4)

    def test_a_file_without_suffix_needs_output_dir(self) -> None:
        self.prompts("a").rename(self.work / "plain")
        self.assertIn("--output-dir", self.refused(file="plain").err)
        self.check_folder(f"{self.work}/out", "--output-dir", "out", file="plain")

    def test_a_folder_that_can_not_be(self) -> None:
        self.prompts("a")
        self.folder.write_bytes(b"a file")
        self.assertIn(str(self.folder), self.refused().err)

    def test_the_sandbox_has_its_own(self) -> None:
        self.write({"prompt": "a"}, {"prompt": "b", "n": 2, "id": "fox"})
        run = self.batch("--sandbox")
        self.no_request(self.api)
        self.assertEqual({path.parent.name for path in run.saved}, {"jobs-sandbox"})
        names = sorted(path.name for path in run.saved)
        self.assertEqual(names, ["0001-sandbox.png", "fox-sandbox-1.png", "fox-sandbox-2.png"])
        self.batch()
        self.assertEqual(self.posted(), ["a", "b"])

    def test_the_sandboxs_pictures_are_never_taken_for_real_ones(self) -> None:
        self.prompts("a")
        where = ("--output-dir", "one")
        self.batch("--sandbox", *where)
        self.batch(*where)
        self.assertEqual(self.posted(), ["a"])
        self.assertEqual(self.batch("--sandbox", *where).saved, [])
        self.assertEqual(self.batch(*where).saved, [])
        self.assertEqual(self.posted(), ["a"])


class Said(BatchCase):
    """stdout, stderr, and the documents."""

    def test_one_table_at_the_end(self) -> None:
        self.prompts("a", "b", "c", "d")
        self.painter.order("b", BAD_REQUEST)
        self.painter.order("c", UNAUTHORIZED)
        self.painter.order("d", Reply(silent=True))
        run = self.batch("--concurrency", "1", code=9)
        self.assertEqual([path.name for path in run.saved], ["0001.png"])
        counts = {"saved": "1", "skipped": "0", "partial": "0", "failed": "1", "refused": "1"}
        rest = {"unknown": "1", "left": "0", "cost": "-"}
        self.assertEqual(self.summary(run), {**counts, **rest})
        self.assertIn(f"\nGallery: {self.folder}/index.html\n", run.err)
        self.assertRegex(run.err, r"(?m)^gpt-image2: 0002: .*No such size")
        self.assertRegex(run.err, r"(?m)^gpt-image2: 0003: .*Wrong key")
        self.assertRegex(run.err, r"(?m)^gpt-image2: 0004: ")
        self.assertRegex(run.err.splitlines()[-1], "^gpt-image2: 1 of 4 jobs are saved")

    def test_quiet(self) -> None:
        self.prompts("a", "b")
        self.painter.order("b", BAD_REQUEST)
        run = self.batch("--quiet", code=9)
        self.assertEqual(len(run.saved), 1)
        self.assertEqual(len(run.err.splitlines()), 2, run.err)
        self.prompts("a")
        self.assertEqual(self.batch("--quiet").err, "")

    def test_documents(self) -> None:
        (self.work / "room.png").write_bytes(png(16, 16))
        self.write(
            {"prompt": "a", "id": "fox"},
            {"prompt": "b", "images": ["room.png"]},
            {"prompt": "c"},
            {"prompt": "d"},
        )
        self.painter.order("c", BAD_REQUEST)
        argv = ("--json", "--provider", "openai", "--concurrency", "1", *LOW)
        *jobs, total = self.documents(self.batch(*argv, code=9))
        told = [(job["id"], job["command"], job["state"], job["ok"]) for job in jobs]
        self.assertEqual(
            told,
            [
                ("fox", "generate", "saved", True),
                ("0002", "edit", "saved", True),
                ("0003", "generate", "refused", False),
                ("0004", "generate", "saved", True),
            ],
        )
        self.assertEqual([image["path"] for image in jobs[0]["images"]], [f"{self.folder}/fox.png"])
        self.assertEqual(len(jobs[0]["images"][0]["sha256"]), 64)
        self.assertEqual(jobs[0]["usage"], OPENAI_USAGE)
        self.assertAlmostEqual(jobs[0]["cost"]["amount"], PICTURE_COST)
        self.assertEqual(jobs[2]["error"]["code"], "invalid_value")
        self.assertEqual((total["ok"], total["command"], total["schema"]), (False, "batch", 1))
        cost = total["summary"].pop("cost")
        self.assertAlmostEqual(cost["amount"], 3 * PICTURE_COST)
        self.assertEqual(cost["currency"], "USD")
        counts = {"saved": 3, "skipped": 0, "partial": 0, "failed": 0, "refused": 1}
        self.assertEqual(
            total["summary"], {"jobs": 4, **counts, "unknown": 0, "deferred": 0, "left": 0}
        )
        self.assertEqual(total["folder"], str(self.folder))
        self.assertEqual(total["journal"], f"{self.folder}/results.jsonl")
        self.assertEqual(total["gallery"], f"{self.folder}/index.html")
        self.assertEqual(total["error"]["exit_code"], 9)

        (again,) = self.documents(self.batch(*argv, code=9))
        self.assertEqual(again["summary"]["skipped"], 3)
        self.assertEqual(again["summary"]["refused"], 1)

    def test_a_document_is_printed_as_its_job_finishes(self) -> None:
        release = self.painter.hold("b")
        self.prompts("a", "b")
        tool = self.start_tool("batch", "jobs.jsonl", "--json")
        assert tool.stdout
        first = json.loads(tool.stdout.readline())
        self.assertEqual(first["state"], "saved")
        release.set()
        run = self.check(self.finish(tool), 0)
        self.assertEqual([doc["ok"] for doc in self.documents(run)], [True, True])

    @unittest.skipUnless(hasattr(os, "openpty"), "needs pseudo-terminals")
    def test_on_a_terminal_one_line_that_is_written_over(self) -> None:
        release = self.painter.hold("b")
        self.prompts("a", "b", "c")
        self.painter.order("c", BAD_REQUEST)
        master, slave = os.openpty()
        self.addCleanup(os.close, master)
        argv, env = ["batch", "jobs.jsonl"], {**self.env, "TERM": "xterm"}
        tool = start(self.script, argv, stderr=slave, env=env, cwd=self.work)
        self.addCleanup(stop, tool)
        os.close(slave)
        shown = ""
        while not re.search("1 done, 1 failed, 1 left", shown):
            shown += os.read(master, 65536).decode()
        release.set()
        out, _ = tool.communicate(timeout=20)
        self.assertEqual(tool.wait(), 9)
        self.assertRegex(shown, r"\r\x1b\[K[-|/\\] [^\n]*1 done, 1 failed, 1 left")
        self.assertRegex(out.decode(), r"^(Saved: [^\n]*\n){2}$")

    def test_a_stdout_that_is_closed_loses_no_picture(self) -> None:
        self.prompts("a", "b")
        self.shell('exec "$@" >&-')
        run = self.check(self.run_tool("batch", "jobs.jsonl"), 0)
        self.assertIn("0001.png", run.err)
        self.check_pictures(**{"0001": "a", "0002": "b"})

    def test_without_a_terminal_no_control_characters(self) -> None:
        self.prompts("a\x1b[31m", "b\u202e")
        self.painter.order("b\u202e", refusal(400, "x\x1b", "no\x1b[2J \u202e way"))
        run = self.batch(code=9)
        self.assertNotRegex(run.out + run.err, "[\x1b\u202e]")


class DryRun(BatchCase):
    """Shows everything, makes nothing."""

    def test_as_text(self) -> None:
        (self.work / "room.png").write_bytes(png(16, 16))
        self.write(
            {"prompt": "a fox"},
            {"prompt": "b", "id": "own", "images": ["room.png"], "size": "1024x1024"},
            {"prompt": "c\x1b[31m"},
        )
        before = self.listing(self.tmp)
        run = self.batch("--dry-run", "--provider", "openai", *LOW)
        self.assertEqual(self.listing(self.tmp), before)
        self.no_request(self.api)
        first, second, third, totals, estimate = run.out.splitlines()
        self.assertRegex(first, "^0001  send  generate .*gpt-image-2.* low .*a fox")
        self.assertRegex(second, "^own  send  edit .*1024x1024")
        self.assertNotIn("\x1b", third)
        self.assertIn("3 jobs: 3 to send", totals)
        self.assertIn(str(self.folder), totals)
        self.assertRegex(estimate, r"^estimate: about \$0\.01[78]")

    def test_of_a_batch_that_is_half_done(self) -> None:
        self.prompts("a", "b", "c")
        self.painter.order("b", UNAUTHORIZED)
        self.painter.order("c", Reply(silent=True))
        self.batch(code=9)
        before = self.files()
        lines = self.batch("--dry-run").out.splitlines()
        self.assertEqual([line.split()[1] for line in lines[:3]], ["skip", "send", "look"])
        self.assertEqual(self.files(), before)
        self.assertEqual(len(self.api.posts), 3)

    def test_as_json(self) -> None:
        self.write({"prompt": "a fox", "n": 2}, {"prompt": "b", "id": "own"})
        run = self.batch("--dry-run", "--json", "--provider", "openai", *LOW)
        first, second, total = self.documents(run)
        told = first["dry_run"]
        self.assertEqual((first["id"], first["command"]), ("0001", "generate"))
        self.assertEqual(told["fields"]["prompt"], "a fox")
        self.assertEqual(told["paths"], [f"{self.folder}/0001-1.png", f"{self.folder}/0001-2.png"])
        self.assertEqual(second["dry_run"]["paths"], [f"{self.folder}/own.png"])
        self.assertEqual((total["command"], total["summary"]["send"]), ("batch", 2))
        self.assertAlmostEqual(total["summary"]["estimate"]["amount"], 3 * LOW_ESTIMATE, places=3)
        self.assertEqual(self.listing(), ["jobs.jsonl"])
        self.assertNotIn(KEY, run.out)


class Verdicts(BatchCase):
    """What the journal says of an outcome, what the exit code says of all of them."""

    def test_ten_refusals_of_the_account_in_a_row_end_it(self) -> None:
        spent = refusal(429, "insufficient_quota", "Pay first.", type="insufficient_quota")
        for code, reply in ((4, UNAUTHORIZED), (6, spent)):
            with self.subTest(code=code):
                names = [f"{code}-{number:02}" for number in range(18)]
                for name in names[:15]:  # the fifth says nothing of the account
                    self.painter.order(name, BAD_REQUEST if name == names[4] else reply)
                self.prompts(*names)
                before = len(self.posted())
                run = self.batch("--concurrency", "1", "--output-dir", str(code), code=1)
                told = "0 of 18 jobs are saved; the last 10 jobs were refused for the key or"
                self.assertIn(told, run.err)
                self.assertEqual(self.posted()[before:], names[:15])
                run = self.batch("--output-dir", str(code), code=9)
                self.assertEqual(len(run.saved), 17)

    def test_states(self) -> None:
        location = [("Location", "https://elsewhere.example/v1")]
        limit = refusal(429, "insufficient_quota", "Pay first.", type="insufficient_quota")
        whole = answer(drawn("x"))
        table: list[tuple[str, int, Reply]] = [
            ("refused", 1, BAD_REQUEST),
            ("refused", 5, refusal(400, POLICY, "Not this.")),
            ("refused", 1, refusal(404, None, "No such model.")),
            ("refused", 1, refusal(413, None, "Too large.")),
            ("refused", 1, refusal(422, None, "No.")),
            ("failed", 4, UNAUTHORIZED),
            ("failed", 4, refusal(403, None, "Not you.")),
            ("failed", 6, refusal(402, None, "Pay.")),
            ("failed", 6, limit),
            ("failed", 6, refusal(429, "rate_limit_exceeded", "Slow.")),
            ("failed", 1, Reply(301, b"", location)),
            ("unknown", 8, refusal(500, "server_error", "Oops.")),
            ("unknown", 8, page(504, "Gateway Time-out")),
            ("unknown", 8, Reply(silent=True)),
            ("unknown", 8, Reply(reset=True)),
            ("unknown", 8, json_reply({"created": 1, "data": []})),
            ("unknown", 8, whole._replace(cut=len(whole.body) // 3)),
            ("unknown", 10, answer(b"no picture at all")),
            ("partial", 9, answer(drawn("x"), b"no picture")),
            ("saved", 0, whole),
        ]
        for number, (_, _, reply) in enumerate(table):
            self.painter.order(f"p{number}", reply)
        self.write(*({"prompt": f"p{i}", "id": f"j{i}"} for i in range(len(table))))
        *jobs, total = self.documents(self.batch("--json", "--retries", "0", code=9))
        codes = {job["id"]: job["error"]["exit_code"] if job["error"] else 0 for job in jobs}
        for number, (state, code, reply) in enumerate(table):
            with self.subTest(state=state, status=reply.status, body=reply.body[:80]):
                name = f"j{number}"
                self.assertEqual((self.states()[name], codes[name]), (state, code))
        for document in jobs:
            self.assertEqual(document["state"], self.states()[document["id"]])
        self.assertEqual(total["summary"]["refused"], 5)
        self.assertEqual(len(self.api.posts), len(table))

    def test_a_line_of_the_journal(self) -> None:
        self.write({"prompt": "a", "n": 2}, {"prompt": "b", "id": "fox"})
        self.painter.order("b", refusal(400, POLICY, "Not this."))
        self.batch("--concurrency", "1", "--provider", "openai", *LOW, code=9)
        sent, saved, sent_too, refused = self.lines()
        self.assertEqual([sent["state"], sent_too["state"]], ["sent", "sent"])
        for line in (sent, saved):
            self.assertEqual((line["id"], line["number"], line["file_line"]), ("0001", 1, 1))
            self.assertEqual((line["schema"], line["prompt"]), (1, "a"))
        self.assertEqual(sent["identity"], saved["identity"])
        self.assertEqual(sent["job_id"], saved["job_id"])
        self.assertEqual(saved["state"], "saved")
        names = ("0001-1.png", "0001-2.png")
        self.assertEqual(saved["paths"], [str(self.folder / name) for name in names])
        self.assertEqual([image["width"] for image in saved["images"]], [16, 16])
        self.assertEqual(saved["usage"], OPENAI_USAGE)
        self.assertAlmostEqual(saved["cost"]["amount"], PICTURE_COST)
        self.assertIsNone(saved["error"])
        self.assertGreaterEqual(saved["seconds"], 0)
        self.assertEqual((refused["state"], refused["id"]), ("refused", "fox"))
        self.assertEqual(refused["paths"], [])
        self.assertEqual(refused["error"]["code"], POLICY)
        self.assertEqual(refused["error"]["exit_code"], 5)

    def test_sent_is_on_record_before_the_post_arrives(self) -> None:
        release = self.painter.hold("a")
        self.prompts("a", "b")
        tool = self.start_tool("batch", "jobs.jsonl", "--concurrency", "1")
        self.api.wait_for_request()
        self.assertEqual([line["state"] for line in self.lines()], ["sent"])
        self.assertEqual(self.lines()[0]["prompt"], "a")
        release.set()
        self.check(self.finish(tool), 0)

    def test_exit_codes_of_the_whole(self) -> None:
        policy = refusal(400, POLICY, "Not this.")
        silent = Reply(silent=True)
        partial = answer(drawn("x"), b"no picture")
        table: list[tuple[int, list[Reply]]] = [
            (0, [Reply(), Reply()]),
            (9, [Reply(), BAD_REQUEST]),
            (9, [Reply(), silent]),
            (1, [BAD_REQUEST, BAD_REQUEST]),
            (5, [policy, policy]),
            (4, [UNAUTHORIZED, UNAUTHORIZED]),
            (8, [silent, silent]),
            (1, [BAD_REQUEST, UNAUTHORIZED]),
            (9, [partial, BAD_REQUEST]),
        ]
        started = []
        for number, (_, replies) in enumerate(table):
            prompts = [f"{number} {index}" for index in range(len(replies))]
            for prompt, reply in zip(prompts, replies):
                self.painter.order(prompt, reply)
            name = f"{number}.jsonl"
            self.write(*({"prompt": prompt} for prompt in prompts), name=name)
            started.append(self.start_tool("batch", name))
        for tool, (code, replies) in zip(started, table):
            with self.subTest(code=code, statuses=[reply.status for reply in replies]):
                self.check(self.finish(tool), code)

    def test_nobody_listens(self) -> None:
        self.prompts("a", "b")
        base = f"http://127.0.0.1:{self.closed_port()}/v1"
        run = self.batch("--retries", "0", code=7, env={"GPT_IMAGE2_BASE_URL": base})
        self.assertEqual(set(self.states().values()), {"failed"}, self.story(run))
        self.batch()
        self.assertEqual(self.posted(), ["a", "b"])

    def test_no_key_and_no_curl(self) -> None:
        self.prompts("a")
        env = {"GPT_IMAGE2_API_KEY": None, "GPT_IMAGE2_BASE_URL": "https://relay.example/v1"}
        self.batch(code=3, env=env)
        self.assertEqual(self.listing(), ["jobs.jsonl"])
        self.batch(code=3, env={"PATH": str(self.home)})
        self.batch()
        self.assertEqual(self.posted(), ["a"])

    def test_fail_fast(self) -> None:
        self.prompts("a", "b", "c", "d")
        self.painter.order("b", BAD_REQUEST)
        run = self.batch("--fail-fast", "--concurrency", "1", code=9)
        self.assertEqual(self.painter.seen, ["a", "b"])
        self.assertEqual(self.summary(run)["left"], "2")
        self.assertIn("--fail-fast", run.err)
        self.batch("--fail-fast", "--concurrency", "1", code=9)
        self.assertEqual(self.painter.seen, ["a", "b", "c", "d"])

    def test_retry_unsafe_sends_again(self) -> None:
        self.hurry(10)
        self.prompts("a")
        self.painter.order("a", refusal(500, "server_error", "Oops."))
        self.batch("--retry-unsafe")
        self.assertEqual(self.painter.seen, ["a", "a"])
        self.assertEqual(self.states(), {"0001": "saved"})


class Pace(BatchCase):
    """How many at once, and how fast."""

    def test_four_at_once_unless_told_otherwise(self) -> None:
        for argv, expected in (((), 4), (("--concurrency", "2"), 2), (("--concurrency", "7"), 7)):
            with self.subTest(argv=argv):
                posts = len(self.api.posts)
                names = [f"{expected} {number}" for number in range(8)]
                releases = {name: self.painter.hold(name) for name in names}
                self.write(*({"prompt": name} for name in names), name=f"{expected}.jsonl")
                tool = self.start_tool("batch", f"{expected}.jsonl", *argv)
                self.api.wait_for_request(posts + expected)
                time.sleep(0.05)
                self.assertEqual(len(self.api.posts) - posts, expected)
                releases[self.painter.seen[posts]].set()
                self.api.wait_for_request(posts + expected + 1)
                for release in releases.values():
                    release.set()
                self.check(self.finish(tool), 0)

    def test_the_end_is_not_waited_for(self) -> None:
        """Also where threads take their time to die: that must not be a second's wait."""
        (self.home / "sitecustomize.py").write_text(SLOW_END)
        self.prompts("a", "b")
        started = time.monotonic()
        self.batch(env={"PYTHONPATH": str(self.home)})
        self.assertLess(time.monotonic() - started, 0.9)

    def test_in_the_order_of_the_file(self) -> None:
        names = [f"job {number}" for number in range(6)]
        self.prompts(*names)
        self.batch("--concurrency", "1")
        self.assertEqual(self.painter.seen, names)

    def test_so_many_a_minute(self) -> None:
        self.prompts("a", "b", "c", "d")
        self.batch("--rpm", "400")
        first, *_, last = self.painter.times
        self.assertGreater(last - first, 3 * 0.15 - 0.15)

    def test_a_429_holds_all_workers(self) -> None:
        self.hurry(20)
        slow = refusal(429, "rate_limit_exceeded", "Slow.", headers=[("Retry-After", "6")])
        self.painter.order("a", slow)
        release = self.painter.hold("b")
        self.prompts("a", "b", "c", "d")
        tool = self.start_tool("batch", "jobs.jsonl", "--concurrency", "2")
        self.hear(tool, "all wait 6 s")
        told = time.monotonic()
        self.api.wait_for_request(2)
        release.set()  # b's worker is free; it must not begin c
        self.check(self.finish(tool), 0)
        self.assertEqual(sorted(self.painter.seen[:2]), ["a", "b"])
        self.assertEqual(sorted(self.painter.seen[2:]), ["a", "c", "d"])
        self.assertGreater(self.painter.times[2] - told, 0.15)
        self.assertEqual(len(self.painted()), 4)

    def test_a_429_that_does_not_end_is_no_loss(self) -> None:
        slow = refusal(429, "rate_limit_exceeded", "Slow.", headers=[("Retry-After", "0")])
        self.painter.order("a", slow, slow, slow)
        self.prompts("a")
        self.batch(code=6)
        self.assertEqual(self.states(), {"0001": "failed"})
        self.batch()
        self.assertEqual(self.painter.seen, ["a"] * 4)

    def test_an_hours_wait_can_be_left(self) -> None:
        self.hurry(10)
        slow = refusal(429, "rate_limit_exceeded", "Slow.", headers=[("Retry-After", "3600")])
        self.painter.order("a", slow)
        self.prompts("a", "b")
        tool = self.start_tool("batch", "jobs.jsonl", "--concurrency", "1")
        self.hear(tool, "3600 s")
        started = time.monotonic()
        tool.send_signal(signal.SIGINT)
        run = self.check(self.finish(tool), 130)
        self.assertLess(time.monotonic() - started, 5)
        self.assertEqual(run.out, "")
        self.batch()
        self.assertEqual(self.posted(), ["a", "a", "b"])
        self.check_pictures(**{"0001": "a again", "0002": "b"})


class MaxCost(BatchCase):
    """--max-cost: spent, unknown, in flight and the next one."""

    openai = ("--provider", "openai", *LOW)

    def left(self, limit: str, *argv: str, code: int = 9, one: bool = True) -> str:
        """Return how many jobs a limit leaves."""
        at_once = ("--concurrency", "1") if one else ()
        run = self.batch("--max-cost", limit, *(argv or self.openai), *at_once, code=code)
        if code:
            self.assertIn(f"--max-cost {limit}", run.err)
        return str(self.summary(run)["left"])

    def test_leaves_what_could_pass_it_for_another_run(self) -> None:
        self.prompts("a", "b", "c")
        self.assertEqual(self.left("0.015"), "1")
        self.assertEqual(self.painter.seen, ["a", "b"])
        self.assertEqual(self.left("0.015"), "1")
        self.assertEqual(self.painter.seen, ["a", "b"], "what an earlier run spent counts")
        self.assertEqual(self.left("0.03", code=0), "0")
        self.assertEqual(self.painter.seen, ["a", "b", "c"])

    def test_counts_what_is_in_flight(self) -> None:
        release = self.painter.hold("a", "b", "c", "d")
        self.prompts("a", "b", "c", "d")
        tool = self.start_tool("batch", "jobs.jsonl", *self.openai, "--max-cost", "0.013")
        self.api.wait_for_request(2)
        time.sleep(0.25)
        self.assertEqual(len(self.api.posts), 2)
        release.set()
        self.check(self.finish(tool), 9)
        self.assertEqual(len(self.api.posts), 2)

    def test_a_job_that_was_not_billed_gives_its_money_back(self) -> None:
        self.prompts("a", "b")
        self.painter.order("a", BAD_REQUEST)
        self.batch("--max-cost", "0.006", *self.openai, code=9)
        self.assertEqual(self.posted(), ["a", "b"])

    def test_counts_what_may_have_been_billed(self) -> None:
        """A is unknown (0.0059), b saved (0.0083): with c (0.0059) that makes 0.0201."""
        self.prompts("a", "b", "c")
        self.painter.order("a", Reply(silent=True))
        self.assertEqual(self.left("0.0195"), "1")
        self.assertEqual(self.left("0.0195"), "1")
        self.assertEqual(self.painter.seen, ["a", "b"])
        self.batch("--max-cost", "0.0205", *self.openai, code=9)
        self.assertEqual(self.painter.seen, ["a", "b", "c"], "but no more than once")

    def test_auto_counts_as_high(self) -> None:
        self.prompts("a")
        self.assertEqual(self.left("0.2", "--provider", "openai", code=6), "1")
        self.assertEqual(self.painter.seen, [])
        self.assertEqual(self.left("0.22", "--provider", "openai", code=0), "0")

    def test_counts_what_a_redo_pays_again(self) -> None:
        self.prompts("a", "b")
        self.batch(*self.openai)
        self.left("0.023", *self.openai, "--redo", "all")
        self.assertEqual(len(self.painter.seen), 3)

    def test_where_no_price_is_known(self) -> None:
        self.prompts("a", "b")
        run = self.refused("--max-cost", "5", "--provider", "generic")
        self.assertIn("price", run.err)
        self.write({"prompt": "a"}, {"prompt": "b", "model": "gpt-image-9"})
        self.assertIn("line 2", self.refused("--max-cost", "5", "--provider", "openai").err)

    def test_in_credits(self) -> None:
        self.prompts("a", "b")
        self.painter.order("a", hk_answer(drawn("a")))
        self.assertEqual(self.left("800", "--provider", "openai-hk", *LOW), "1")
        self.assertEqual(self.painter.seen, ["a"])

    def test_prices_of_ones_own(self) -> None:
        prices = {"text_in": 5, "image_in": 8, "out": 30}
        self.configure(prices=prices)
        self.prompts("a", "b")
        self.assertEqual(self.left("0.007", *LOW, "--provider", "generic"), "1")


class Company(BatchCase):
    """Two runs at once."""

    def test_the_second_run_names_the_first(self) -> None:
        release = self.painter.hold("a")
        self.prompts("a")
        tool = self.start_tool("batch", "jobs.jsonl")
        self.api.wait_for_request()
        run = self.check(self.run_tool("batch", "jobs.jsonl"), 2)
        self.assertRegex(run.err, rf"process {tool.pid}\b")
        document = self.check(self.run_tool("batch", "jobs.jsonl", "--json"), 2).json
        self.assertEqual(document["error"]["exit_code"], 2)
        release.set()
        self.check(self.finish(tool), 0)
        self.assertEqual(self.painter.seen, ["a"])
        self.batch()

    def test_two_at_the_very_same_moment(self) -> None:
        self.prompts("a", "b", "c")
        tools = [self.start_tool("batch", "jobs.jsonl") for _ in range(3)]
        runs = [self.finish(tool) for tool in tools]
        codes = sorted(run.code for run in runs)
        self.assertEqual(codes[0], 0, "\n".join(map(str, runs)))
        self.assertLessEqual(set(codes), {0, 2})
        self.assertEqual(self.posted(), ["a", "b", "c"])
        self.check_pictures(**{"0001": "a", "0002": "b", "0003": "c"})

    def test_different_batches_do_not_mind_each_other(self) -> None:
        self.prompts("a")
        self.write({"prompt": "a"}, name="other.jsonl")
        release = self.painter.hold("a")
        tool = self.start_tool("batch", "jobs.jsonl")
        self.api.wait_for_request()
        self.batch(file="other.jsonl")
        release.set()
        self.check(self.finish(tool), 0)
        self.assertEqual(self.painter.seen, ["a", "a"])

    def test_a_single_request_that_is_the_same_is_another(self) -> None:
        release = self.painter.hold("a")
        self.prompts("a")
        tool = self.start_tool("batch", "jobs.jsonl")
        self.api.wait_for_request()
        self.check(self.run_tool("generate", "a"), 0)
        release.set()
        self.check(self.finish(tool), 0)
        self.assertEqual(self.painter.seen, ["a", "a"])
