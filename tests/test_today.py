"""What commit 221830f wrote is read, resumed and recovered: jobs, configs, the history."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path
from unittest import mock

import gpt_image2
from tests.pictures import png
from tests.support import Api, Case, answer

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
        api = self.serve_base()
        folder = self.put_job("killed", api)
        run = self.check(self.run_tool(*FOX, "--json"), 0)
        self.assertEqual((run.json["job_id"], run.json["resumed"]), (folder.name, True))
        self.assertEqual((self.work / "fox.png").read_bytes(), FIRST)
        self.assertEqual((api.posts, self.jobs()), ([], []))

    def test_one_with_a_generated_name(self) -> None:
        api = self.serve_base()
        self.put_job("killed-generated-name", api)
        run = self.check(self.run_tool("generate", "a fox", "--quality", "low"), 0)
        self.assertEqual([path.read_bytes() for path in run.saved], [FIRST])
        self.assertEqual((api.posts, self.jobs()), ([], []))

    def test_an_edit(self) -> None:
        api = self.serve_base()
        self.put_job("killed-edit", api)
        (self.work / "in.png").write_bytes(png(8, 8))
        run = self.check(self.run_tool("edit", "in.png", "a fox in snow", "-o", "fox.png"), 0)
        self.assertEqual([path.read_bytes() for path in run.saved], [FIRST])
        self.assertEqual((api.posts, self.jobs()), ([], []))

    def test_not_with_another_output(self) -> None:
        api = self.serve_base(answer(OTHER))
        self.put_job("killed", api)
        self.check(self.run_tool("generate", "a fox", "-o", "hen.png"), 0)
        self.assertEqual((len(api.posts), len(self.jobs())), (1, 1))

    def test_one_that_curl_never_began_is_sent(self) -> None:
        api = self.serve_base(answer(OTHER))
        folder = self.put_job("killed", api)
        for name, data in (("response.json", b""), ("curl.txt", b""), ("headers.txt", b"\n")):
            (folder / name).write_bytes(data)
        run = self.check(self.run_tool(*FOX), 0)
        self.assertEqual((len(api.posts), self.jobs()), (1, []))
        self.assertNotIn("billed", run.err)

    def test_a_curl_that_ends_between_two_questions_has_answered(self) -> None:
        """Asked whether it lives it is dead, and its answer came just before that."""
        api = self.serve_base()
        folder = self.put_job("killed", api)
        came = (folder / "response.json").read_bytes()
        for name in ("response.json", "headers.txt"):
            (folder / name).write_bytes(b"")

        def lives(place: str) -> bool:
            Path(place, "response.json").write_bytes(came)
            return False

        output, here = io.TextIOWrapper(io.BytesIO()), os.getcwd()
        os.chdir(self.work)
        self.addCleanup(os.chdir, here)
        for target, value in (
            ("gpt_image2.curl_lives", lives),
            ("gpt_image2.Signals.install", mock.Mock()),
            ("sys.stdout", output),
        ):
            patch = mock.patch(target, value)
            patch.start()
            self.addCleanup(patch.stop)
        with mock.patch.dict(os.environ, self.env):
            self.assertEqual(gpt_image2.main([*FOX, "--quiet"]), 0)
        self.assertEqual((self.work / "fox.png").read_bytes(), FIRST)
        self.assertEqual((api.posts, self.jobs()), ([], []))

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
        self.assertEqual({row["command"] for row in run.json["jobs"]}, {"generate", "edit"})

    def test_a_job_whose_caller_was_killed(self) -> None:
        folder = self.put_job("killed")
        run = self.check(self.run_tool("recover", folder.name), 0)
        self.assertEqual(run.saved, [self.work / "fox.png"])
        self.assertEqual(((self.work / "fox.png").read_bytes(), self.jobs()), (FIRST, []))

    def test_a_cut_answer(self) -> None:
        folder = self.put_job("cut")
        run = self.check(self.run_tool("recover", folder.name), 9)
        self.assertEqual(run.saved, [self.work / "fox-1.png"])
        self.assertEqual((self.work / "fox-1.png").read_bytes(), FIRST)

    def test_with_another_output(self) -> None:
        self.put_job("killed")
        run = self.check(self.run_tool("recover", "--last", "-o", "rescued/"), 0)
        self.assertEqual([path.parent for path in run.saved], [self.work / "rescued"])


class TestSettings(TodayCase):
    def test_a_config_with_profiles(self) -> None:
        self.configure(**json.loads((DATA / "config.json").read_text()))
        self.env["STUDIO_KEY"] = "sk-studio-0123456789abcdef"
        run = self.check(self.run_tool("config", "--show", "--json", "--profile", "studio"), 0)
        rows = {name: row["value"] for name, row in run.json["settings"].items()}
        self.assertEqual(rows["base_url"], "https://studio.example/v1")
        self.assertEqual((rows["api_key"], rows["profiles"]), ("sk-…cdef", ["openai-hk", "studio"]))
        run = self.check(self.run_tool("config", "--show", "--json", "--profile", "openai-hk"), 0)
        rows = {name: row["value"] for name, row in run.json["settings"].items()}
        self.assertEqual((rows["size"], rows["quality"]), ("1024x1024", "low"))

    def test_the_history(self) -> None:
        folder = self.state / "gpt-image-2"
        folder.mkdir()
        shutil.copy(DATA / "history.jsonl", folder)
        run = self.check(self.run_tool("history", "--json"), 0)
        self.assertEqual([len(entry["paths"]) for entry in run.json["entries"]], [0, 1])
        self.assertEqual(run.json["totals"][0]["calls"], 2)
