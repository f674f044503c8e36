"""What version 0.1 (commit 221830f) wrote is read, resumed and recovered by this one."""

from __future__ import annotations

import base64
import json
import shutil
import time
from pathlib import Path
from typing import Any

from tests.batches import BatchCase, drawn
from tests.case import Case, Run
from tests.deferreds import CREATE, BatchApi, image_of
from tests.images import png
from tests.server import Api, answer
from tests.test_deferred import DeferredCase

DATA = Path(__file__).resolve().parent / "data" / "today"
FIRST, SECOND, OTHER = (png(8, 8, seed=seed) for seed in (1, 2, 3))
FOX = ("generate", "a fox", "-o", "fox.png")
NO_ADDRESS = "http://127.0.0.1:1/v1"


class TodayCase(Case):
    """A case with a job folder of that version in its state folder."""

    def put_job(self, name: str, api: Api | None = None) -> Path:
        """Copy a job to where a run finds it, and return its folder."""
        (source,) = (DATA / "jobs" / name).iterdir()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        folder = self.state / "gpt-image-2" / "jobs" / f"{stamp}{source.name[16:]}"
        shutil.copytree(source, folder)
        for path in (folder, folder.parent, folder.parent.parent, *folder.iterdir()):
            path.chmod(0o700 if path.is_dir() else 0o600)
        record = (folder / "job.json").read_text().replace("/WORK", str(self.work))
        if api:
            record = record.replace(NO_ADDRESS, api.base_url)
        (folder / "job.json").write_text(record)
        return folder


class TestResumed(TodayCase):
    """The same command, run again with this version."""

    def test_a_job_whose_caller_was_killed(self) -> None:
        (self.work / "in.png").write_bytes(png(8, 8))
        for name, command in (
            ("killed", FOX),
            ("killed-generated-name", ("generate", "a fox", "--quality", "low")),
            ("killed-edit", ("edit", "in.png", "a fox in snow", "-o", "fox.png")),
        ):
            with self.subTest(name):
                api = self.serve_base()
                folder = self.put_job(name, api)
                document = self.check(self.run_tool(*command, "--json"), 0).json
                self.assertEqual((document["job_id"], document["resumed"]), (folder.name, True))
                (path,) = (Path(image["path"]) for image in document["images"])
                self.assertEqual(path.read_bytes(), FIRST)
                self.assertEqual((api.posts, self.jobs()), ([], []))
                path.unlink()

    def test_one_that_curl_never_began_is_sent(self) -> None:
        api = self.serve_base(answer(OTHER))
        folder = self.put_job("killed", api)
        for name, data in (("response.json", b""), ("curl.txt", b""), ("headers.txt", b"\n")):
            (folder / name).write_bytes(data)
        run = self.check(self.run_tool(*FOX), 0)
        self.assertEqual((len(api.posts), self.jobs()), (1, []))
        self.assertNotIn("billed", run.err)

    def test_one_that_was_set_aside_is_not_taken_over(self) -> None:
        api = self.serve_base(answer(OTHER))
        folder = self.put_job("set-aside", api)
        (folder / "response.json").write_bytes(answer(FIRST).body)
        run = self.check(self.run_tool(*FOX), 0)
        self.assertEqual([path.read_bytes() for path in run.saved], [OTHER])
        self.assertEqual((len(api.posts), self.jobs()), (1, [folder]))


class TestRecovered(TodayCase):
    def test_they_are_listed(self) -> None:
        names = {self.put_job(name).name for name in ("killed", "cut", "killed-edit")}
        run = self.check(self.run_tool("recover", "--json"), 0)
        self.assertEqual({row["id"] for row in run.json["jobs"]}, names)

    def test_a_whole_answer_and_a_cut_one(self) -> None:
        for name, code, saved in (("killed", 0, "fox.png"), ("cut", 9, "fox-1.png")):
            folder = self.put_job(name)
            run = self.check(self.run_tool("recover", folder.name), code)
            self.assertEqual(run.saved, [self.work / saved])
            self.assertEqual(run.saved[0].read_bytes(), FIRST)


class TestSettings(TodayCase):
    def test_a_config_with_profiles(self) -> None:
        self.configure(**json.loads((DATA / "config.json").read_text()))
        self.env["STUDIO_KEY"] = "sk-studio-0123456789abcdef"
        run = self.check(self.run_tool("config", "--show", "--json", "--profile", "studio"), 0)
        rows = {name: row["value"] for name, row in run.json["settings"].items()}
        self.assertEqual(rows["base_url"], "https://studio.example/v1")
        self.assertEqual((rows["api_key"], rows["profiles"]), ("sk-…cdef", ["openai-hk", "studio"]))

    def test_the_history(self) -> None:
        folder = self.state / "gpt-image-2"
        folder.mkdir()
        shutil.copy(DATA / "history.jsonl", folder)
        run = self.check(self.run_tool("history", "--json"), 0)
        self.assertEqual([len(entry["paths"]) for entry in run.json["entries"]], [0, 1])
        self.assertEqual(run.json["totals"][0]["calls"], 2)


def unpack(case: Case, api: Api, name: str) -> Any:
    """Put a data file's folders into a case, and return the whole of it."""
    data = json.loads((DATA / f"{name}.json").read_text("ascii"))
    marks = {"@BASE@": api.base_url, "@WORK@": str(case.work), "@STATE@": str(case.state)}
    for label, held in data["files"].items():
        path = case.tmp / label
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if isinstance(held, str):
            for mark, found in marks.items():
                held = held.replace(mark, found)
            path.write_text(held, encoding="utf-8")
        else:
            path.write_bytes(base64.b64decode(held["base64"]))
        if path.name == "job.json":
            (path.parent / "lock").touch()
    return data


OPENAI = ("--provider", "openai")


class Journals(BatchCase):
    """Half-done batches with their job folders."""

    def unpack(self, name: str) -> None:
        """Put a batch of version 0.1 into the work and state folders."""
        unpack(self, self.api, name)
        for label in "abcdef":  # what the server of that day painted
            for take in ("", ", 2", " again"):
                self.painter.labels[drawn(label + take)] = label + take

    def test_killed_with_answers_on_the_way(self) -> None:
        self.unpack("killed")
        self.assertEqual(len(self.jobs()), 4)
        run = self.batch(*OPENAI, "--concurrency", "1", code=9)
        self.assertEqual(self.painter.seen, ["e", "f"], "what curl never sent, and what was left")
        self.assertEqual(len(run.saved), 4)
        told = {**dict.fromkeys(["0001", "0002", "0003", "0005", "0006"], "saved")}
        self.assertEqual(self.states(), {**told, "0004": "unknown"})
        self.assertEqual(self.batch(*OPENAI, code=9).saved, [])
        self.batch(*OPENAI, "--redo", "unknown")
        self.assertEqual(self.painter.seen, ["e", "f", "d"])
        self.assertEqual(sorted(self.painted().values()), list("abcdef"))

    def test_recover_tells_the_batch(self) -> None:
        self.unpack("killed")
        run = self.check(self.run_tool("recover", "--all"), 9)
        self.assertEqual({path.parent for path in run.saved}, {self.folder})
        self.assertEqual(len(run.saved), 2)
        states = self.states()
        self.assertEqual([states[f"000{n}"] for n in (1, 2, 3)], ["saved"] * 3)
        self.no_request(self.api)

    def test_each_state_is_taken_over(self) -> None:
        self.unpack("states")
        argv = (*OPENAI, "--quality", "low")
        self.assertEqual(self.states()["0004"], "unknown")
        run = self.batch(*argv, code=9)
        self.assertEqual(self.painter.seen, ["b"], "only what was not billed")
        states = list(self.states().values())
        self.assertEqual(states, ["saved", "saved", "refused", "saved", "partial"])
        names = {path.name: self.painter.labels[path.read_bytes()] for path in run.saved}
        self.assertEqual(names, {"0002.png": "b", "0004.png": "d"}, "d is whole in half an answer")
        dry = self.batch(*argv, "--dry-run").out.splitlines()
        self.assertEqual([line.split()[1] for line in dry[:5]], ["skip"] * 5)
        self.batch(*argv, "--redo", "failed", code=9)
        self.assertEqual(self.painter.seen, ["b", "c"])

    def test_what_was_spent_counts_and_a_change_is_seen(self) -> None:
        self.unpack("states")
        self.assertIn("quality low -> high", self.batch(*OPENAI, "--quality", "high", code=2).err)
        argv = (*OPENAI, "--quality", "low", "--max-cost", "0.02")
        self.assertIn("--max-cost 0.02 is too low for the next job", self.batch(*argv, code=9).err)
        self.assertEqual(self.painter.seen, [])

    def test_a_redo_is_finished_and_not_begun_again(self) -> None:
        self.unpack("redo")
        run = self.batch("--redo", "all")
        self.assertEqual(self.painter.seen, ["c"])
        self.assertEqual(len(run.saved), 2)
        self.assertEqual(self.jobs(), [])


class Pending(DeferredCase):
    """Batches at OpenAI."""

    def unpack(self, name: str) -> None:
        """Put a deferred batch of version 0.1 into the folders, and its like into the server."""
        data: Any = unpack(self, self.api, name)
        self.api.batches.update(data["batches"])
        contents = {file: text.encode("ascii") for file, text in data["contents"].items()}
        self.api.contents.update(contents)

    def check_brought(self, run: Run) -> None:
        """Assert that the four images are there."""
        self.assertEqual(len(run.saved), 4, run)
        found = self.images()
        self.assertEqual(found["0001.png"], image_of("job 1"))
        self.assertEqual(found["two.png"], image_of("job 2"))
        self.assertEqual(found["0003-2.png"], image_of("job 3", 2))
        self.assertEqual(set(self.states().values()), {"saved"})
        self.assertEqual(list(self.kept.glob("*")), [])
        self.assertEqual(self.jobs(), [])

    def test_one_that_runs_is_followed_and_fetched_at_its_own_server(self) -> None:
        self.unpack("deferred-created")
        other = BatchApi()
        self.addCleanup(other.close)
        self.assertIn("pending at", self.batch("--base-url", other.base_url, code=2).err)
        self.assertEqual(other.posts, [])
        self.assertIn("batch_0: validating 0/3", self.batch().err)
        self.api.end()
        self.check_brought(self.batch())
        self.assertEqual(len(self.api.batches), 1)

    def test_a_create_that_was_cut_is_found(self) -> None:
        self.unpack("deferred-creating")
        self.assertIn("batch_0: validating 0/3", self.batch().err)
        self.assertEqual(self.api.asked(CREATE), [])
        self.api.end()
        self.check_brought(self.batch())

    def test_one_that_was_never_made_is_made_once(self) -> None:
        self.unpack("deferred-uploading")
        self.assertIn("batch_0: validating 0/3", self.batch().err)
        self.assertEqual(len(self.api.asked(CREATE)), 1)
        self.api.end()
        self.check_brought(self.batch())
