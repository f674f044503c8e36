"""What an image cost, what it may cost, and where that is written down: history and sidecars."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from tests.case import Argument, Case, Run
from tests.images import png
from tests.server import KEY, NODEKEY_USAGE, OPENAI_USAGE, Json, Reply, answer, refusal

IMAGE, OTHER = png(64, 64), png(64, 64, rgb=(1, 2, 3))
COST = {"amount": 0.00828, "currency": "USD", "estimated": False}
WITH_IMAGES: Json = {
    "input_tokens": 1050,
    "input_tokens_details": {"text_tokens": 50, "image_tokens": 1000},
    "output_tokens": 1756,
    "total_tokens": 2806,
}
CACHED: Json = {  # all 50 of the text, and 200 of the images
    **WITH_IMAGES,
    "input_tokens_details": {"text_tokens": 50, "image_tokens": 1000, "cached_tokens": 250},
}


class Costs(Case):
    """From the server's own numbers, and the prices of the provider or of the config."""

    mine = {"text_in": 10, "image_in": 1, "out": 20}  # 6 * 10 + 275 * 20 = 5560

    def ask(self, words: str, usage: Json = OPENAI_USAGE, litellm: str = "") -> Run:
        """Run generate with these words, against a server that answers with this usage; return the
        document of one call and what another says, as with --json stderr says nothing of it."""
        reply = answer(IMAGE, usage=usage)
        header = [("x-litellm-response-cost", litellm)] if litellm else []
        self.serve_base(*[reply._replace(headers=[*reply.headers, *header])] * 2)
        argv = ("generate", "x", "--provider", *words.split())
        told, run = (self.check(self.run_tool(*argv, *more), 0) for more in ((), ("--json",)))
        self.assertNotRegex(run.err, "(?m)^(POST|Job|HTTP|.*tokens)")
        return run._replace(err=told.err.splitlines()[-1])

    def check_cost(self, run: Run, amount: float | None, currency: str, said: str = "") -> None:
        """Assert the cost in the document, which is no estimate, and the line on stderr."""
        cost = run.json["cost"]
        if amount is None:
            self.assertIsNone(cost)
            self.assertNotRegex(run.err, r"\$|credits")
        else:
            self.assertAlmostEqual(cost["amount"], amount, places=9)
            self.assertEqual({**cost, "amount": 0}, {**COST, "amount": 0, "currency": currency})
        self.assertIn(said, run.err)

    def test_of_each_provider(self) -> None:
        """Checked by hand; the prices are those of a million tokens."""
        table: list[tuple[str, Json, float | None]] = [
            # gpt-image-2: text 5, cached 1.25, images 8, cached 2, out 30
            ("openai", OPENAI_USAGE, 0.008280),  # 6 * 5 + 275 * 30
            ("openai", NODEKEY_USAGE, 0.008280),  # the same in other words
            ("openai", WITH_IMAGES, 0.060930),  # 50 * 5 + 1000 * 8 + 1756 * 30
            ("openai", CACHED, 0.0595425),  # 50 * 1.25 + 800 * 8 + 200 * 2 + 1756 * 30
            ("openai -m gpt-image-2.5-flare-2026-09-08", CACHED, 0.0595425),
            ("openai -m gpt-image-1.5", CACHED, 0.0630545),  # out 32
            # 2, 0.20, 2.50, 0.25, 8: 50 * 0.2 + 800 * 2.5 + 200 * 0.25 + 1756 * 8
            ("openai -m gpt-image-1-mini", CACHED, 0.016108),
            # 5, 1.25, 10, 2.50, 40: 50 * 1.25 + 800 * 10 + 200 * 2.5 + 1756 * 40
            ("openai -m gpt-image-1", CACHED, 0.0788025),
            ("openai -m gpt-image-3", OPENAI_USAGE, None),
            ("openai", {"total_tokens": 281}, None),  # which they were is not known
            # (text in * 5 + image in * 10 + image out * 40) * 0.071, and no discount
            ("openai-hk", OPENAI_USAGE, 783.13),  # its document's example
            ("openai-hk", WITH_IMAGES, 5714.79),
            ("openai-hk", CACHED, 5714.79),
            *((provider, NODEKEY_USAGE, None) for provider in ("nodekey", "azure", "generic")),
        ]
        for words, usage, amount in table:
            with self.subTest(words, usage=usage):
                currency = "credits" if words == "openai-hk" else "USD"
                self.check_cost(self.ask(words, usage), amount, currency)

    def test_what_is_said_and_what_litellm_tells_itself(self) -> None:
        table: list[tuple[str, Json, str, float | None, str]] = [
            ("openai", OPENAI_USAGE, "", 0.00828, "281 tokens, $0.0083"),
            ("openai-hk", OPENAI_USAGE, "", 783.13, "281 tokens, 783 credits"),
            ("generic", OPENAI_USAGE, "", None, "281 tokens, no price is known for this server"),
            ("generic", OPENAI_USAGE, "1.5e-05", 0.000015, "281 tokens, $0.0000"),
            ("generic", OPENAI_USAGE, "None", None, "281 tokens"),
            ("generic", OPENAI_USAGE, "-1", None, "281 tokens"),
            ("generic", {}, "0.0421", 0.0421, "$0.0421"),
            ("generic", {}, "", None, "no price is known for this server"),
            ("openai", {}, "", None, "the server reported no tokens"),
        ]
        for provider, usage, litellm, amount, said in table:
            with self.subTest(provider, usage=usage, litellm=litellm):
                run = self.ask(provider, usage, litellm)
                self.check_cost(run, amount, "credits" if provider == "openai-hk" else "USD", said)
                self.assertEqual(run.json["usage"], usage or None)

    def test_prices_of_ones_own(self) -> None:
        """For all models or for one; they beat the provider's, and what litellm tells."""
        euros, dollars = ("EUR", "281 tokens, 0.0056 EUR"), ("USD", "281 tokens, $0.0056")
        table: list[tuple[str, dict[str, Any], tuple[str, str]]] = [
            ("generic", {**self.mine, "currency": "EUR"}, euros),
            ("generic", {"gpt-image-2": self.mine, "currency": "EUR"}, euros),
            ("generic", {"gpt-image-2": self.mine, "text_in": 99, "out": 99}, dollars),
            ("openai-hk", {**self.mine, "currency": "EUR"}, euros),
        ]
        for provider, prices, (currency, said) in table:
            with self.subTest(provider, prices=prices):
                self.configure(prices=prices)
                self.check_cost(self.ask(provider, litellm="0.0421"), 0.00556, currency, said)
        self.configure(prices={"my-model": self.mine})
        self.check_cost(self.ask("openai"), 0.00828, "USD")

    def test_prices_of_ones_own_for_cached_tokens(self) -> None:
        """Else they cost as much as others: 50 text and 200 image tokens are cached."""
        self.configure(prices={**self.mine, "text_cached": 2, "image_cached": 0.5})
        self.check_cost(self.ask("generic", CACHED), 100e-6 + 800e-6 + 100e-6 + 35120e-6, "USD")
        self.configure(prices=self.mine)
        self.check_cost(self.ask("generic", CACHED), 500e-6 + 1000e-6 + 35120e-6, "USD")

    def test_what_is_no_price_is_refused_before_anything_is_paid(self) -> None:
        api = self.serve_base()
        wrong: list[Any] = [{"out": "much"}, {"gpt-image-2": {"out": []}}, {"out": -1}]
        for prices in [*wrong, {"out": 30, "text_in": None}]:
            with self.subTest(prices):
                self.configure(prices=prices)
                self.check(self.run_tool("generate", "x"), 3)
        self.no_request(api)


class Estimates(Case):
    """--dry-run says what a request may cost, and that it is a guess."""

    def estimate(self, line: str) -> Any:
        """Return the estimate of a dry run at OpenAI, or elsewhere if the line says so."""
        self.env.update(GPT_IMAGE2_API_KEY=KEY, GPT_IMAGE2_BASE_URL="http://127.0.0.1:9/v1")
        argv = ("generate", "x", "--dry-run", "--json", "--provider=openai", *line.split())
        return self.check(self.run_tool(*argv), 0).json["dry_run"]["estimate"]

    def test_dollars(self) -> None:
        """1024x1024 of gpt-image-2 is published in dollars too: 0.006, 0.053 and 0.211."""
        square = "-s 1024x1024"
        table = {
            f"{square} --quality low": (196, 30),
            f"{square} --quality medium": (1756, 30),
            f"{square} --quality high": (7024, 30),
            "-s 1536x1024 --quality medium": (1372, 30),
            "-s 3840x2160 --quality high": (13342, 30),
            square: (7024, 30),  # auto counts as high
            f"{square} --quality low --n 3": (3 * 196, 30),
            # each preview is about 100 output tokens
            f"{square} --quality low --partial-images 2": (196 + 200, 30),
            "-m gpt-image-1.5 -s 1024x1536 --quality medium": (1584, 32),
            "-m gpt-image-1-mini -s 1536x1024 --quality medium": (1568, 8),
            f"-m gpt-image-1 {square} --quality high": (4160, 40),
        }
        for line, (tokens, price) in table.items():
            with self.subTest(line):
                estimate = self.estimate(line)
                self.assertEqual((estimate["currency"], estimate["estimated"]), ("USD", True))
                about, near = tokens * price / 1_000_000, price / 2_000_000
                self.assertAlmostEqual(estimate["amount"], about, delta=near + 1e-9)

    def test_credits_at_openai_hk_and_nothing_where_no_price_is_known(self) -> None:
        known = self.estimate("-s 1024x1024 --quality low --provider openai-hk")
        self.assertEqual((known["currency"], known["estimated"]), ("credits", True))
        # (1 * 5 + 275 * 40) * 0.071 = 11005 * 0.071 = 781.355
        self.assertAlmostEqual(known["amount"], 781.355, 3)
        medium = self.estimate("--quality medium --provider openai-hk")
        self.assertAlmostEqual(medium["amount"], (5 + 1056 * 40) * 0.071, 3)
        self.assertIsNone(self.estimate("--provider nodekey"))


def entry(days_ago: float = 0, **more: Any) -> dict[str, Any]:
    """Return an entry as the tool writes it."""
    then = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days_ago * 86400))
    request = {"command": "generate", "host": "api.openai.com", "model": "gpt-image-2"}
    request.update(size="1024x1024", quality="low", prompt="a fox")
    outcome = {"paths": ["/tmp/fox.png"], "usage": OPENAI_USAGE, "cost": COST, "seconds": 71.3}
    return {"time": then, **request, **outcome, "request_id": "req_1", **more}


class RecordCase(Case):
    def setUp(self) -> None:
        super().setUp()
        self.file = self.state / "gpt-image-2" / "history.jsonl"

    def write(self, *entries: Any) -> None:
        """Write a history; a string goes as it is."""
        texts = [item if isinstance(item, str) else json.dumps(item) + "\n" for item in entries]
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text("".join(texts), encoding="utf-8")

    def entries(self) -> list[dict[str, Any]]:
        """Return the history's entries."""
        return [json.loads(line) for line in self.file.read_bytes().splitlines()]

    def generate(self, *argv: Argument, code: int = 0, prompt: str = "a fox") -> Run:
        """Run generate at OpenAI's prices."""
        return self.check(self.run_tool("generate", prompt, "--provider", "openai", *argv), code)

    def recover(self, *argv: Argument) -> Run:
        return self.run_tool("recover", "--last", "--provider", "openai", *argv)

    def history(self, *argv: str) -> Any:
        return self.check(self.run_tool("history", "--json", *argv), 0).json

    def prompts(self, *argv: str) -> list[str]:
        return [line["prompt"] for line in self.history(*argv)["entries"]]

    def totals(self) -> list[tuple[int, int, float]]:
        """Return calls, images and amount of each row of the history's totals."""
        rows = self.history()["totals"]
        return [(row["calls"], row["pictures"], round(row["amount"] or 0, 6)) for row in rows]


class Lines(RecordCase):
    def test_what_it_holds_and_what_the_sidecars_hold(self) -> None:
        reply = answer(IMAGE, OTHER)
        self.serve_base(reply._replace(headers=[*reply.headers, ("x-request-id", "req_7")]))
        argv = ("-s", "1024x1024", "--quality", "low", "-n", "2", "-o", "new/", "--sidecar")
        run = self.generate(*argv, prompt="a naïve 🦊")
        (line,) = self.entries()
        paths = [str(path) for path in run.saved]
        expected = entry(host="127.0.0.1", prompt="a naïve 🦊", paths=paths, request_id="req_7")
        expected.update(time=line["time"], seconds=line["seconds"])
        expected["cost"] = {**COST, "amount": line["cost"]["amount"]}
        self.assertEqual({**line, **expected}, line)
        self.assertAlmostEqual(line["cost"]["amount"], 0.00828)
        self.assertEqual(self.prompts("--since", "1h"), ["a naïve 🦊"])
        self.assertGreater(line["seconds"], 0)
        self.assertEqual(self.file.stat().st_mode & 0o777, 0o600)
        names = [f"new/{path.name}{end}" for path in run.saved for end in ("", ".json")]
        self.assertEqual(self.listing(), sorted(names))
        request = {"model": "gpt-image-2", "prompt": "a naïve 🦊", "quality": "low", "n": 2}
        for path in paths:
            document = json.loads((self.work / f"{path}.json").read_text("utf-8"))
            self.assertEqual({**document["request"], **request}, document["request"])
            self.assertEqual((document["usage"], document["request_id"]), (OPENAI_USAGE, "req_7"))
            self.assertEqual(document["cost"], line["cost"])
            self.assertIn(path, json.dumps(document))

    def test_the_key_is_never_in_it(self) -> None:
        reply = answer(IMAGE, usage={**OPENAI_USAGE, "note": KEY}, revised_prompt=KEY)
        self.serve_base(reply._replace(headers=[*reply.headers, ("x-request-id", KEY)]))
        self.generate("--user", KEY, "--sidecar", prompt=f"a fox with {KEY}")
        (sidecar,) = self.work.glob("*.json")
        self.assertNotIn(KEY[5:-4], self.file.read_text() + sidecar.read_text())

    def test_which_calls_leave_one(self) -> None:
        """Those that may have been billed; and it can be turned off."""
        self.env.update(GPT_IMAGE2_BASE_URL="http://127.0.0.1:1/v1", GPT_IMAGE2_API_KEY=KEY)
        self.generate("--retries", "0", code=7)
        no, who = refusal(400, "invalid_value", "No."), refusal(401, None, "Who?")
        self.serve_base(no, who, refusal(500, None, "Oh."), *[answer(IMAGE)] * 3)
        self.generate(code=1)
        self.generate(code=4)
        self.generate("--dry-run")
        self.generate("--sandbox", "-s", "1024x1024")
        self.assertFalse(self.file.exists())
        self.generate(code=8)
        (line,) = self.entries()
        self.assertEqual((line["paths"], line["cost"]), ([], None))
        self.configure(history=False, profiles={"loud": {"history": True}})
        self.generate(prompt="not noted")
        self.assertEqual(len(self.entries()), 1)
        (self.work / "a.png").write_bytes(OTHER)
        for profile in ([], ["--profile", "loud"]):
            self.check(self.run_tool("edit", "a.png", "blue", *profile), 0)
        self.assertEqual(self.entries()[1]["command"], "edit")

    def test_recover_writes_what_the_call_could_not(self) -> None:
        answered = threading.Event()
        api = self.serve_base(answer(IMAGE)._replace(before=answered))
        tool = self.start_tool("generate", "a fox", "-o", "fox.png", "--provider", "openai")
        api.wait_for_request()
        tool.kill()
        tool.wait()
        answered.set()
        self.check(self.recover(), 0)
        (line,) = self.entries()
        self.assertEqual((line["prompt"], line["paths"]), ("a fox", [str(self.work / "fox.png")]))
        self.assertEqual(self.totals(), [(1, 1, 0.00828)])

    def test_recover_counts_no_call_twice(self) -> None:
        cut = answer(IMAGE)
        self.serve_base(cut._replace(cut=len(cut.body) - 2), answer(IMAGE, b"none"))
        self.generate("-o", "fox.png", code=8)
        self.recover()
        self.assertEqual([row[:2] for row in self.totals()], [(1, 1)])
        self.run_tool("history", "--clear")
        self.generate("-n", "2", code=9)
        for _ in range(2):  # what can't be saved
            self.recover("-o", "again/")
        self.assertEqual([row[::2] for row in self.totals()], [(1, 0.00828)])


class History(RecordCase):
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
        self.assertRegex(lines[0], "^time  model  size  .*cost")
        self.assertRegex(lines[1], first)
        self.assertEqual(lines[4:6], ["  /tmp/a.png", "  /tmp/b.png"])
        totals = "\n".join(lines[10:])
        self.assertEqual([row["amount"] for row in self.history()["totals"]][2:], [None])
        self.assertRegex(totals, r"gpt-image-2\b(?!\.).*\b3 images.*\b2 calls.*\$0\.0166")
        self.assertRegex(totals, r"gpt-image-2\b(?!\.).*\b1 image.*\b1 call.*783 credits")
        self.assertRegex(totals, r"gpt-image-2\.6-flare.*\b1 image.*\b1 call")

    def test_a_cost_of_nothing_is_known(self) -> None:
        self.write(entry(cost={**COST, "amount": 0.0}))
        self.assertEqual(self.history()["entries"][0]["cost"], {**COST, "amount": 0.0})
        self.assertIn("$0.0000", self.check(self.run_tool("history"), 0).out)

    def test_since_and_limit_and_the_newest_last(self) -> None:
        self.write(*(entry(days, prompt=str(days)) for days in (8, 40, 6, 0.6, 0.4)))
        table = {
            "": ["40", "8", "6", "0.6", "0.4"],
            "--since 7d": ["6", "0.6", "0.4"],
            "--since 12h": ["0.4"],
            "--since 7d --limit 1": ["0.4"],
        }
        for argv, prompts in table.items():
            with self.subTest(argv):
                self.assertEqual(self.prompts(*argv.split()), prompts)
        for words in ("--since 7", "--since=-1d", "--limit 0", "--limit x"):
            with self.subTest(words):
                self.check(self.run_tool("history", *words.split()), 2)

    def test_none_and_cleared(self) -> None:
        for argv in ((), ("--clear",), ("--clear",), ()):
            run = self.check(self.run_tool("history", *argv), 0)
            self.assertEqual((run.out, run.err), ("", "nothing yet\n"))
            document = self.history()
            self.assertEqual((document["entries"], document["totals"]), ([], []))
            if not argv:
                self.write(entry())

    def test_lines_that_cannot_be_read_or_are_of_another_version(self) -> None:
        """A torn last one is ended before the next, so that it spoils no other."""
        broken = ['{"time": "2026-\n', "\n", "[]\n", "1\n", "null\n", '{"no": "time"}\n', "\0\n"]
        self.write(*broken, entry(), *broken, '{"time": "2026-11-2')
        self.serve_base(answer(IMAGE))
        self.generate(prompt="after the tear")
        self.assertEqual(self.prompts(), ["a fox", "after the tear"])
        odd: list[dict[str, Any]] = [
            {"cost": {**COST, "tax": 0.19}},
            {"cost": {"amount": 1}},
            {"cost": "free"},
            {"paths": None, "prompt": None, "model": None},
            {"paths": 3},
        ]
        self.write(*(entry(**more) for more in odd), entry(prompt="the last"))
        self.assertEqual(len(self.prompts()), len(odd) + 1)
        self.assertIn("the last", self.check(self.run_tool("history"), 0).out)


class Sidecars(RecordCase):
    def test_one_that_exists_is_refused_beforehand_and_replaced_by_force(self) -> None:
        api = self.serve_base(answer(IMAGE))
        for name in ("fox.png.json", "owl-2.png.json"):
            (self.work / name).write_text("old")
        run = self.generate("-o", "fox.png", "--sidecar", code=2)
        self.assertRegex(run.err, r"fox\.png\.json exists.*--force")
        self.generate("-o", "owl.png", "-n", "2", "--sidecar", code=2)
        self.assertRegex(self.generate("-o", "-", "--sidecar", code=2).err, "--sidecar")
        self.no_request(api)
        self.generate("-o", "fox.png", "--sidecar", "--force")
        sidecar = json.loads((self.work / "fox.png.json").read_text())
        self.assertEqual(sidecar["prompt"], "a fox")
        (self.work / "owl.png.json").symlink_to("fox.png.json")
        api.script.append(answer(IMAGE))
        self.generate("-o", "owl.png", "--sidecar", "--force", prompt="an owl")
        names = ["fox.png.json", "owl.png.json"]
        prompts = [json.loads((self.work / name).read_text())["prompt"] for name in names]
        self.assertEqual(prompts, ["a fox", "an owl"], "the link is replaced, not its target")
        self.assertEqual([name for name in self.listing() if "part" in name], [])

    def test_one_that_appears_meanwhile_is_not_replaced(self) -> None:
        theirs = self.work / "fox.png.json"

        def meanwhile(_: object) -> Reply:
            theirs.write_text("theirs")
            return answer(IMAGE)

        self.serve_base(meanwhile)
        run = self.generate("-o", "fox.png", "--sidecar")
        self.assertEqual((len(run.saved), theirs.read_text()), (1, "theirs"))

    def test_without_a_image_or_the_option_there_is_none(self) -> None:
        self.serve_base(refusal(400, None, "No."), refusal(500, None, "Oh."), answer(IMAGE))
        self.generate("-o", "fox.png", "--sidecar", code=1)
        self.generate("-o", "fox.png", "--sidecar", code=8)
        self.assertEqual(self.listing(), [])
        self.generate("-o", "fox.png", prompt="an owl")
        self.assertEqual(self.listing(), ["fox.png"])
