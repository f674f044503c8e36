"""What a picture cost, from the server's own numbers; and what it may cost, said to be a guess."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.pictures import png
from tests.support import NODEKEY_USAGE, OPENAI_USAGE, Case, Child, Json, Run, answer

PICTURE = png(1024, 1024)
WITH_IMAGES: Json = {
    "input_tokens": 1050,
    "input_tokens_details": {"text_tokens": 50, "image_tokens": 1000},
    "output_tokens": 1756,
    "total_tokens": 2806,
}
CACHED: Json = {
    "prompt_tokens": 100,
    "prompt_tokens_details": {"text_tokens": 100, "image_tokens": 0, "cached_tokens": 40},
    "completion_tokens": 275,
    "total_tokens": 375,
}


class Row(NamedTuple):
    """A usage on a command line, and what it comes to."""

    argv: str
    usage: Json
    said: str
    amount: float | None


class CostCase(Case):
    """A case that asks what an answer cost."""

    def start(
        self,
        *argv: str,
        usage: Json = OPENAI_USAGE,
        headers: dict[str, str] | None = None,
    ) -> Child:
        """Start generate against a server that answers with this usage."""
        reply = answer(PICTURE, usage=usage)
        self.serve_base(reply._replace(headers=[*reply.headers, *(headers or {}).items()]))
        return self.start_tool("generate", "x", "--json", *argv)

    def ask(self, *argv: str, **options: Any) -> Run:
        """Run generate (options: see start), which must succeed."""
        return self.check(self.finish(self.start(*argv, **options)), 0)

    def assert_rows(self, rows: list[Row], provider: str, currency: str) -> None:
        """Assert what each row comes to, all of them running at once."""
        options = ("--provider", provider)
        started = [self.start(*options, *row.argv.split(), usage=row.usage) for row in rows]
        for row, process in zip(rows, started):
            with self.subTest(argv=row.argv, usage=row.usage):
                run = self.check(self.finish(process), 0)
                self.assert_cost(run, row.said, row.amount, currency)

    def assert_cost(self, run: Run, said: str, amount: float | None, currency: str) -> None:
        """Assert the line on stderr and the cost in the document, which is no estimate."""
        self.assertIn(f"\n{said}\n", run.err)
        cost = run.json["cost"]
        if amount is None:
            self.assertIsNone(cost)
            self.assertNotRegex(run.err, r"\$|credits")
            return
        self.assertAlmostEqual(cost["amount"], amount, places=9)
        self.assertEqual({**cost, "amount": 0}, cost_of(0, currency))


def cost_of(amount: float, currency: str) -> dict[str, Any]:
    """Return a cost as the document spells it."""
    return {"amount": amount, "currency": currency, "estimated": False}


class Openai(CostCase):
    """Dollars: tokens times OpenAI's prices of a million."""

    # Checked by hand; prices: text in, cached text, image in, image out.
    rows = [
        # gpt-image-2 at 5, 8, 30: 6 * 5 + 275 * 30 = 30 + 8250 = 8280
        Row("", OPENAI_USAGE, "281 tokens, $0.0083", 0.008280),
        # 50 * 5 + 1000 * 8 + 1756 * 30 = 250 + 8000 + 52680 = 60930
        Row("", WITH_IMAGES, "2806 tokens, $0.0609", 0.060930),
        # cached text at 1.25: 60 * 5 + 40 * 1.25 + 275 * 30 = 300 + 50 + 8250 = 8600
        Row("", CACHED, "375 tokens, $0.0086", 0.008600),
        # the same tokens in NodeKey's words
        Row("", NODEKEY_USAGE, "281 tokens, $0.0083", 0.008280),
        # the prices of gpt-image-2 hold for all of 2.5 and 2.6
        Row("-m gpt-image-2.5-flare-2026-09-08", OPENAI_USAGE, "281 tokens, $0.0083", 0.008280),
        Row("-m gpt-image-2.6-sunburst", OPENAI_USAGE, "281 tokens, $0.0083", 0.008280),
        # 32 a million out: 6 * 5 + 275 * 32 = 30 + 8800 = 8830
        Row("-m gpt-image-1.5", OPENAI_USAGE, "281 tokens, $0.0088", 0.008830),
        # 2, 2.50, 8: 50 * 2 + 1000 * 2.5 + 1756 * 8 = 100 + 2500 + 14048 = 16648
        Row("-m gpt-image-1-mini", WITH_IMAGES, "2806 tokens, $0.0166", 0.016648),
        # 5, 10, 40: 50 * 5 + 1000 * 10 + 1756 * 40 = 250 + 10000 + 70240 = 80490
        Row("-m gpt-image-1", WITH_IMAGES, "2806 tokens, $0.0805", 0.080490),
        Row("-m gpt-image-3", OPENAI_USAGE, "281 tokens", None),
        Row("-m dall-e-3", OPENAI_USAGE, "281 tokens", None),
        # which tokens they were is not known, so neither is their price
        Row("", {"total_tokens": 281}, "281 tokens", None),
    ]

    def test_dollars(self) -> None:
        self.assert_rows(self.rows, "openai", "USD")

    def test_without_usage_nothing_is_said(self) -> None:
        run = self.ask("--provider", "openai", usage={})
        self.assertEqual((run.json["usage"], run.json["cost"]), (None, None))
        self.assertNotRegex(run.err, r"tokens|\$")

    def test_the_sandbox_costs_nothing(self) -> None:
        argv = ("generate", "x", "--sandbox", "--provider", "openai", "--json")
        run = self.check(self.run_tool(*argv), 0)
        self.assertIsNone(run.json["cost"])
        self.assertNotIn("$", run.err)


class Relays(CostCase):
    """Credits by a formula, a header, or only the tokens."""

    def test_openai_hk_counts_in_credits(self) -> None:
        """(text in * 5 + image in * 10 + image out * 40) * 7.1 * 10000 / 1,000,000."""
        rows = [
            # its document's example: (6 * 5 + 275 * 40) * 0.071 = 11030 * 0.071 = 783.13
            Row("", OPENAI_USAGE, "281 tokens, 783 credits", 783.13),
            # (50 * 5 + 1000 * 10 + 1756 * 40) * 0.071 = 80490 * 0.071 = 5714.79
            Row("", WITH_IMAGES, "2806 tokens, 5715 credits", 5714.79),
            # the formula knows no discount: (100 * 5 + 275 * 40) * 0.071 = 11500 * 0.071 = 816.5
            Row("", CACHED, "375 tokens, 816 credits", 816.5),
        ]
        self.assert_rows(rows, "openai-hk", "credits")

    def test_where_no_price_is_known_the_tokens_are_told(self) -> None:
        for provider in ("nodekey", "azure", "generic"):
            with self.subTest(provider):
                run = self.ask("--provider", provider, usage=NODEKEY_USAGE)
                self.assert_cost(run, "281 tokens", None, "")
                self.assertEqual(run.json["usage"], NODEKEY_USAGE)

    def test_litellm_tells_the_cost_itself(self) -> None:
        rows = {
            "0.0421": ("281 tokens, $0.0421", 0.0421),
            "1.5e-05": ("281 tokens, $0.0000", 0.000015),
            "None": ("281 tokens", None),
            "-1": ("281 tokens", None),
        }
        started = [self.start(headers={"x-litellm-response-cost": value}) for value in rows]
        for (value, (said, amount)), process in zip(rows.items(), started):
            with self.subTest(value):
                run = self.check(self.finish(process), 0)
                self.assert_cost(run, said, amount, "USD")

    def test_litellm_without_usage(self) -> None:
        run = self.ask(usage={}, headers={"X-LiteLLM-Response-Cost": "0.0421"})
        self.assert_cost(run, "$0.0421", 0.0421, "USD")


class OwnPrices(CostCase):
    """`prices` in the config, per million tokens."""

    # 6 * 10 + 275 * 20 = 60 + 5500 = 5560
    mine = {"text_in": 10, "image_in": 1, "out": 20}

    def test_for_all_models_or_for_one(self) -> None:
        for prices, currency in (
            ({**self.mine, "currency": "EUR"}, "EUR"),
            ({"gpt-image-2": self.mine, "currency": "EUR"}, "EUR"),
            ({"gpt-image-2": self.mine, "text_in": 99, "out": 99}, "USD"),
            (self.mine, "USD"),
        ):
            with self.subTest(prices):
                self.configure(prices=prices)
                run = self.ask()
                amount = "$0.0056" if currency == "USD" else "0.00556 EUR"
                self.assert_cost(run, f"281 tokens, {amount}", 0.00556, currency)

    def test_they_beat_the_providers(self) -> None:
        self.configure(prices={**self.mine, "currency": "points"})
        for provider in ("openai", "openai-hk"):
            with self.subTest(provider):
                cost = self.ask("--provider", provider).json["cost"]
                self.assertEqual((round(cost["amount"], 6), cost["currency"]), (0.00556, "points"))

    def test_those_of_other_models_leave_the_providers(self) -> None:
        self.configure(prices={"my-model": self.mine})
        run = self.ask("--provider", "openai")
        self.assert_cost(run, "281 tokens, $0.0083", 0.00828, "USD")

    def test_what_is_no_price_is_refused_before_anything_is_paid(self) -> None:
        table: list[dict[str, Any]] = [
            {"out": "much"},
            {"gpt-image-2": {"out": []}},
            {"out": -1},
            {"out": 30, "text_in": None},
        ]
        for prices in table:
            with self.subTest(prices):
                self.configure(prices=prices)
                api = self.serve_base(otherwise=answer(PICTURE))
                self.check(self.run_tool("generate", "x"), 3)
                self.no_request(api)


class Estimates(CostCase):
    """--dry-run says what a request may cost, and that it is a guess."""

    def estimates(self, *lines: str) -> list[Any]:
        """Return the estimates of dry runs at OpenAI, or elsewhere if a line says so."""
        self.env.update(GPT_IMAGE2_API_KEY="sk-none", GPT_IMAGE2_BASE_URL="http://127.0.0.1:9/v1")
        start = ("generate", "x", "--dry-run", "--json", "--provider=openai")
        started = [self.start_tool(*start, *line.split()) for line in lines]
        runs = [self.check(self.finish(process), 0) for process in started]
        return [run.json["dry_run"]["estimate"] for run in runs]

    def assert_tokens(self, table: dict[str, tuple[int, float]]) -> None:
        """Assert estimates of so many output tokens at a price, and next to nothing in."""
        for (line, (tokens, price)), estimate in zip(table.items(), self.estimates(*table)):
            with self.subTest(line):
                self.assertEqual((estimate["currency"], estimate["estimated"]), ("USD", True))
                about = tokens * price / 1_000_000
                self.assertAlmostEqual(estimate["amount"], about, delta=price / 2_000_000)

    def test_the_nine_published_points(self) -> None:
        """1024x1024 is published in dollars too: 0.006, 0.053 and 0.211."""
        points = {
            "1024x1024": (196, 1756, 7024),
            "1536x1024": (158, 1372, 5488),
            "3840x2160": (371, 3336, 13342),
        }
        for size, row in points.items():
            low, medium, high = (
                f"-s {size} --quality {name}" for name in ("low", "medium", "high")
            )
            self.assert_tokens({low: (row[0], 30), medium: (row[1], 30), high: (row[2], 30)})

    def test_the_tables_of_the_older_models(self) -> None:
        self.assert_tokens(
            {
                "-m gpt-image-1.5 -s 1024x1024 --quality low": (272, 32),
                "-m gpt-image-1.5 -s 1024x1536 --quality medium": (1584, 32),
                "-m gpt-image-1.5 -s 1536x1024 --quality high": (6208, 32),
                "-m gpt-image-1-mini -s 1536x1024 --quality medium": (1568, 8),
                "-m gpt-image-1 -s 1024x1024 --quality high": (4160, 40),
            }
        )

    def test_auto_counts_as_high_and_several_pictures_as_several(self) -> None:
        self.assert_tokens(
            {
                "-s 1024x1024": (7024, 30),
                "-s 1024x1024 --quality auto": (7024, 30),
                "-s 1024x1024 --quality low --n 3": (3 * 196, 30),
                # each preview is about 100 output tokens
                "-s 1024x1024 --quality low --partial-images 2": (196 + 200, 30),
            }
        )

    def test_credits_at_openai_hk_and_nothing_where_no_price_is_known(self) -> None:
        known, *unknown = self.estimates(
            "-s 1024x1024 --quality low --provider openai-hk",
            "--provider nodekey",
            "-m gpt-image-3",
        )
        self.assertEqual((known["currency"], known["estimated"]), ("credits", True))
        # (1 * 5 + 196 * 40) * 0.071 = 7845 * 0.071 = 556.995
        self.assertAlmostEqual(known["amount"], 557, delta=1)
        self.assertEqual(unknown, [None, None])

    def test_the_text_says_about(self) -> None:
        argv = ("generate", "x", "--dry-run", "-s", "1024x1024", "--quality", "low")
        run = self.check(self.run_tool(*argv, "--provider", "openai"), 0)
        self.assertRegex(run.out, r"(?m)^estimate: about \$0\.0059$")
        run = self.check(self.run_tool(*argv, "--provider", "nodekey"), 0)
        self.assertRegex(run.out, r"(?m)^estimate: no price is known")
