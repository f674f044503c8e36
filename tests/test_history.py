"""What was made is written down: one line a call in the history, and a sidecar where asked."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

from tests.pictures import png
from tests.support import (
    KEY,
    OPENAI_USAGE,
    Argument,
    Case,
    Reply,
    Request,
    Run,
    answer,
    b64,
    json_reply,
    refusal,
)

PICTURE, OTHER = png(64, 64), png(64, 64, rgb=(1, 2, 3))
COST = {"amount": 0.00828, "currency": "USD", "estimated": False}


def stamp(seconds_ago: float = 0) -> str:
    """Return a time as the history writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds_ago))


def entry(days_ago: float = 0, **more: Any) -> dict[str, Any]:
    """Return an entry as the tool writes it."""
    return {
        "time": stamp(days_ago * 86400),
        "command": "generate",
        "host": "api.openai.com",
        "model": "gpt-image-2",
        "size": "1024x1024",
        "quality": "low",
        "prompt": "a fox",
        "paths": ["/tmp/fox.png"],
        "usage": OPENAI_USAGE,
        "cost": COST,
        "request_id": "req_1",
        "seconds": 71.3,
        **more,
    }


class HistoryCase(Case):
    """A case that looks into the history."""

    @property
    def file(self) -> Path:
        """The history's file."""
        return self.state / "gpt-image-2" / "history.jsonl"

    def write(self, *entries: Any) -> None:
        """Write a history; a string goes as it is."""
        texts = [item if isinstance(item, str) else json.dumps(item) + "\n" for item in entries]
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text("".join(texts), encoding="utf-8")

    def entries(self) -> list[dict[str, Any]]:
        """Return the history's entries; every line of it must be whole."""
        lines = self.file.read_bytes().splitlines(keepends=True) if self.file.exists() else []
        self.assertEqual([line for line in lines if not line.endswith(b"\n")], [])
        # Who sees another's line half written ends it, which may leave an empty one.
        return [json.loads(line) for line in lines if line.strip()]

    def generate(self, *argv: Argument, code: int = 0, prompt: str = "a fox") -> Run:
        """Run generate."""
        return self.check(self.run_tool("generate", prompt, *argv), code)

    def history(self, *argv: str) -> Any:
        """Return the document of the command history."""
        return self.check(self.run_tool("history", "--json", *argv), 0).json


class Lines(HistoryCase):
    """The line that a call leaves."""

    def test_what_it_holds(self) -> None:
        reply = answer(PICTURE, OTHER)
        headers = [*reply.headers, ("x-request-id", "req_7")]
        self.serve_base(reply._replace(headers=headers))
        argv = ("-s", "1024x1024", "--quality", "low", "-n", "2", "--provider", "openai")
        before, run, after = stamp(), self.generate(*argv, prompt="a naïve 🦊"), stamp()
        (line,) = self.entries()
        expected = {
            "command": "generate",
            "host": "127.0.0.1",
            "model": "gpt-image-2",
            "size": "1024x1024",
            "quality": "low",
            "prompt": "a naïve 🦊",
            "paths": [str(path) for path in run.saved],
            "usage": OPENAI_USAGE,
            "request_id": "req_7",
        }
        self.assertEqual({name: line.get(name) for name in expected}, expected)
        self.assertEqual({**line["cost"], "amount": round(line["cost"]["amount"], 9)}, COST)
        self.assertTrue(before <= line["time"] <= after, line)
        self.assertTrue(0 <= line["seconds"] < 30, line)

    def test_only_the_owner_can_read_it(self) -> None:
        self.serve_base(answer(PICTURE))
        self.generate()
        self.assertEqual(self.file.stat().st_mode & 0o777, 0o600)

    def test_edits_count_too(self) -> None:
        self.serve_base(answer(PICTURE))
        (self.work / "a.png").write_bytes(OTHER)
        self.check(self.run_tool("edit", "a.png", "blue"), 0)
        (line,) = self.entries()
        self.assertEqual((line["command"], line["prompt"]), ("edit", "blue"))

    def test_the_key_is_never_in_it(self) -> None:
        usage = {**OPENAI_USAGE, "note": KEY}
        reply = answer(PICTURE, usage=usage, revised_prompt=KEY)
        self.serve_base(reply._replace(headers=[*reply.headers, ("x-request-id", KEY)]))
        self.generate("--user", KEY, "--sidecar", prompt=f"a fox with {KEY}")
        written = [self.file, *self.work.glob("*.json")]
        self.assertEqual(len(written), 2)
        for path in written:
            self.assertNotIn(KEY[5:-4], path.read_text())

    def test_calls_that_were_not_served_leave_none(self) -> None:
        unsent = {"GPT_IMAGE2_BASE_URL": "http://127.0.0.1:1/v1", "GPT_IMAGE2_API_KEY": KEY}
        argv = ("generate", "a fox")
        self.check(self.run_tool(*argv, "--retries", "0", env=unsent), 7)
        self.serve_base(refusal(400, "invalid_value", "No."), refusal(401, None, "Who?"))
        self.generate(code=1)
        self.generate(code=4)
        self.generate("-s", "1x1", code=2)
        self.generate("--dry-run")
        self.generate("--sandbox", "-s", "1024x1024")
        self.assertFalse(self.file.exists())

    def test_a_call_that_may_have_been_billed_leaves_one(self) -> None:
        self.serve_base(refusal(500, "server_error", "Oh."))
        self.generate(code=8)
        (line,) = self.entries()
        self.assertEqual((line["paths"], line["cost"]), ([], None))

    def test_it_can_be_turned_off(self) -> None:
        self.serve_base(otherwise=answer(PICTURE))
        self.configure(history=False)
        self.generate()
        self.configure(profiles={"quiet": {"history": False}})
        self.generate("--profile", "quiet")
        self.assertFalse(self.file.exists())
        self.generate()
        self.assertEqual(len(self.entries()), 1)

    def test_thirty_at_once_append_whole_lines(self) -> None:
        self.serve_base(otherwise=answer(PICTURE))
        prompts = [f"{number} " + "fox" * 5000 for number in range(30)]
        runs = [self.start_tool("generate", "-", "-n", "1", stdin=prompt) for prompt in prompts]
        for run in runs:
            self.check(self.finish(run), 0)
        self.assertEqual(sorted(line["prompt"] for line in self.entries()), sorted(prompts))

    def test_a_line_that_was_torn_spoils_no_other(self) -> None:
        self.write(entry(), '{"time": "2026-11-2')
        self.serve_base(answer(PICTURE))
        self.generate(prompt="after the tear")
        prompts = [line["prompt"] for line in self.history()["entries"]]
        self.assertEqual(prompts, ["a fox", "after the tear"])


class Recovered(HistoryCase):
    """recover writes the line that the call could not write, and no second one."""

    def totals(self) -> list[tuple[int, int, float]]:
        """Return calls, pictures and amount of each row of the totals."""
        rows = self.history()["totals"]
        return [(row["calls"], row["pictures"], round(row["amount"], 6)) for row in rows]

    def test_after_a_kill(self) -> None:
        answered = threading.Event()
        api = self.serve_base(answer(PICTURE)._replace(before=answered))
        tool = self.start_tool("generate", "a fox", "-o", "fox.png", "--provider", "openai")
        api.wait_for_request()
        tool.send_signal(signal.SIGKILL)
        tool.wait()
        answered.set()
        self.check(self.run_tool("recover", "--last", "--provider", "openai"), 0)
        (line,) = self.entries()
        self.assertEqual((line["prompt"], line["paths"]), ("a fox", [str(self.work / "fox.png")]))
        self.assertEqual(line["cost"]["currency"], "USD")

    def test_a_cut_answer_counts_once(self) -> None:
        reply = answer(PICTURE)
        self.serve_base(reply._replace(cut=len(reply.body) - 2))
        self.run_tool("generate", "a fox", "-o", "fox.png", "--provider", "openai")
        self.run_tool("recover", "--last", "--provider", "openai")
        ((calls, pictures, _),) = self.totals()
        self.assertEqual((calls, pictures), (1, 1))

    def test_what_cannot_be_saved_is_not_paid_again_by_each_try(self) -> None:
        entries = [{"b64_json": b64(PICTURE)}, {"b64_json": b64(b"no picture")}]
        self.serve_base(json_reply({"data": entries, "usage": OPENAI_USAGE}))
        self.generate("-n", "2", "--provider", "openai", code=9)
        for _ in range(2):
            self.run_tool("recover", "--last", "--provider", "openai", "-o", "again/")
        ((calls, _, amount),) = self.totals()
        self.assertEqual((calls, amount), (1, 0.00828))


class Command(HistoryCase):
    """The command history."""

    def test_the_table(self) -> None:
        self.write(
            entry(prompt="a fox\x1b[31m\nin the snow"),
            entry(paths=["/tmp/a.png", "/tmp/b.png"]),
            entry(cost={**COST, "amount": 783.13, "currency": "credits"}),
            entry(model="gpt-image-2.6-flare", cost=None, size=None, quality=None),
        )
        run = self.check(self.run_tool("history"), 0)
        self.assertNotRegex(run.out, "[\x00-\x09\x0b-\x1f]")
        lines = run.out.splitlines()
        first = r"\d{4}-\d\d-\d\dT.* gpt-image-2 .*1024x1024.*low.*\$0\.0083.*a fox.*in the snow"
        self.assertRegex(lines[0], first)
        self.assertRegex(lines[2], r"783 credits.*a fox")
        self.assertRegex(lines[3], r"gpt-image-2\.6-flare")
        totals = "\n".join(lines[4:])
        self.assertRegex(totals, r"gpt-image-2\b(?!\.).*\b3 pictures.*\b2 calls.*\$0\.0166")
        self.assertRegex(totals, r"gpt-image-2\b(?!\.).*\b1 picture.*\b1 call.*783 credits")
        self.assertRegex(totals, r"gpt-image-2\.6-flare.*\b1 picture.*\b1 call")

    def test_the_document(self) -> None:
        lines = [entry(), entry(prompt="two"), entry(model="m", cost=None)]
        self.write(*lines)
        document = self.history()
        self.assertEqual((document["schema"], document["ok"]), (1, True))
        self.assertEqual(document["command"], "history")
        self.assertEqual(document["entries"], lines)
        totals = [(row["model"], row["currency"], row["calls"]) for row in document["totals"]]
        self.assertEqual([row[::2] for row in totals], [("gpt-image-2", 2), ("m", 1)])
        self.assertAlmostEqual(document["totals"][0]["amount"], 0.01656)

    def test_since_and_limit(self) -> None:
        self.write(*(entry(days, prompt=f"{days} days") for days in (40, 8, 6, 0.6, 0.4)))
        table = {
            "": ["40 days", "8 days", "6 days", "0.6 days", "0.4 days"],
            "--since 7d": ["6 days", "0.6 days", "0.4 days"],
            "--since 12h": ["0.4 days"],
            "--since 7d --limit 1": ["0.4 days"],
            "--limit 99": ["40 days", "8 days", "6 days", "0.6 days", "0.4 days"],
        }
        for argv, prompts in table.items():
            with self.subTest(argv):
                found = self.history(*argv.split())["entries"]
                self.assertEqual([line["prompt"] for line in found], prompts)

    def test_the_newest_is_last_whatever_the_order_of_the_lines(self) -> None:
        self.write(*(entry(days, prompt=str(days)) for days in (1, 3, 2)))
        prompts = [line["prompt"] for line in self.history()["entries"]]
        self.assertEqual(prompts, ["3", "2", "1"])

    def test_clear(self) -> None:
        self.write(entry())
        self.check(self.run_tool("history", "--clear"), 0)
        self.assertEqual(self.entries(), [])
        self.assertEqual((self.history()["entries"], self.history()["totals"]), ([], []))
        self.check(self.run_tool("history", "--clear"), 0)  # twice is no fault

    def test_without_a_history(self) -> None:
        self.assertEqual((self.history()["entries"], self.history()["totals"]), ([], []))
        self.check(self.run_tool("history"), 0)

    def test_lines_that_cannot_be_read_are_passed_over(self) -> None:
        broken = ['{"time": "2026-\n', "\n", "[]\n", "1\n", "null\n", '{"no": "time"}\n', "\0\n"]
        whole = entry()
        self.write(*broken, whole, *broken)
        self.assertEqual(self.history()["entries"], [whole])
        self.assertIn("a fox", self.check(self.run_tool("history"), 0).out)

    def test_lines_of_another_version(self) -> None:
        odd: list[dict[str, Any]] = [
            {"cost": {**COST, "tax": 0.19}},
            {"cost": {"amount": 1}},
            {"cost": "free"},
            {"cost": {"amount": "1", "currency": None}},
            {"paths": None, "prompt": None, "model": None},
            {"paths": 3},
        ]
        for more in odd:
            with self.subTest(more):
                self.write(entry(**more), entry(prompt="two"))
                self.assertIn("two", self.check(self.run_tool("history"), 0).out)
        self.write(*(entry(**more) for more in odd))
        self.assertEqual(len(self.history()["entries"]), len(odd))

    def test_ages_and_numbers_that_are_none(self) -> None:
        for argv in (("--since", "7"), ("--since", "-1d"), ("--limit", "0"), ("--limit", "x")):
            with self.subTest(argv):
                self.check(self.run_tool("history", *argv), 2)


class Sidecars(HistoryCase):
    """PICTURE.json beside the picture."""

    def sidecar(self, name: str) -> dict[str, Any]:
        """Return what a file of the work folder holds."""
        document: dict[str, Any] = json.loads((self.work / name).read_text("utf-8"))
        return document

    def test_what_it_holds(self) -> None:
        reply = answer(PICTURE)
        self.serve_base(reply._replace(headers=[*reply.headers, ("x-request-id", "req_7")]))
        argv = ("-o", "fox.png", "--quality", "low", "--sidecar", "--provider", "openai")
        self.generate(*argv, prompt="a naïve 🦊")
        self.assertEqual(self.listing(), ["fox.png", "fox.png.json"])
        document = self.sidecar("fox.png.json")
        request = {"model": "gpt-image-2", "prompt": "a naïve 🦊", "quality": "low"}
        self.assertEqual(document["request"], {**request, "output_format": "png"})
        self.assertEqual((document["usage"], document["request_id"]), (OPENAI_USAGE, "req_7"))
        self.assertAlmostEqual(document["cost"]["amount"], 0.00828)

    def test_one_for_each_picture(self) -> None:
        self.serve_base(answer(PICTURE, OTHER))
        run = self.generate("-o", "fox.png", "-n", "2", "--sidecar")
        names = ["fox-1.png", "fox-1.png.json", "fox-2.png", "fox-2.png.json"]
        self.assertEqual(self.listing(), names)
        for path in run.saved:
            self.assertIn(str(path), json.dumps(self.sidecar(f"{path.name}.json")))

    def test_beside_generated_names(self) -> None:
        self.serve_base(answer(PICTURE))
        (path,) = self.generate("-o", "new/", "--sidecar").saved
        self.assertEqual(self.listing(), [f"new/{path.name}", f"new/{path.name}.json"])

    def test_one_that_exists_is_refused_beforehand_and_replaced_by_force(self) -> None:
        api = self.serve_base(answer(PICTURE))
        old = self.work / "fox.png.json"
        old.write_text("old")
        run = self.generate("-o", "fox.png", "--sidecar", code=2)
        self.assertRegex(run.err, r"fox\.png\.json exists.*--force")
        self.no_request(api)
        self.assertEqual((old.read_text(), self.listing()), ("old", ["fox.png.json"]))
        self.generate("-o", "fox.png", "--sidecar", "--force")
        self.assertEqual(self.sidecar("fox.png.json")["prompt"], "a fox")

    def test_one_of_several_that_exists(self) -> None:
        api = self.serve_base()
        (self.work / "fox-2.png.json").write_text("old")
        self.generate("-o", "fox.png", "-n", "2", "--sidecar", code=2)
        self.no_request(api)

    def test_one_that_appears_meanwhile_is_not_replaced(self) -> None:
        theirs = self.work / "fox.png.json"

        def meanwhile(request: Request) -> Reply:
            theirs.write_text("theirs")
            return answer(PICTURE)

        self.serve_base(meanwhile)
        run = self.generate("-o", "fox.png", "--sidecar")
        self.assertEqual(run.saved, [self.work / "fox.png"])
        self.assertEqual(theirs.read_text(), "theirs")

    def test_standard_output_has_no_beside(self) -> None:
        api = self.serve_base()
        run = self.generate("-o", "-", "--sidecar", code=2)
        self.assertRegex(run.err, "--sidecar")
        self.no_request(api)

    def test_without_a_picture_there_is_none(self) -> None:
        self.serve_base(refusal(400, "invalid_value", "No."), refusal(500, None, "Oh."))
        self.generate("-o", "fox.png", "--sidecar", code=1)
        self.generate("-o", "fox.png", "--sidecar", code=8)
        self.assertEqual(self.listing(), [])

    def test_without_the_option_there_is_none(self) -> None:
        self.serve_base(answer(PICTURE))
        self.generate("-o", "fox.png")
        self.assertEqual(self.listing(), ["fox.png"])
