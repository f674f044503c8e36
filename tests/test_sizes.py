"""Sizes: every spelling, the rule, and the nearest size that keeps it."""

from __future__ import annotations

import random
import re
import unittest
from math import log
from typing import Any, Iterator

from gpt_image2 import nearest_size, parse_size, size_fault
from tests.support import Case, Run

TABLE = """
    1:1  square     1024x1024 2048x2048 2880x2880
    16:9 widescreen 1280x720  2048x1152 3840x2160
    9:16 story      720x1280  1152x2048 2160x3840
    5:4  print      1040x832  2080x1664 3200x2560
    4:5  feed       832x1040  1664x2080 2560x3200
    4:3  classic    1024x768  2048x1536 3264x2448
    3:4  vertical   768x1024  1536x2048 2448x3264
    3:2  photo      1008x672  2064x1376 3504x2336
    2:3  portrait   672x1008  1376x2064 2336x3504
    21:9 exclusive  1344x576  2016x864  3808x1632
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]
AREAS = {"1K": 1024**2, "2K": 2048**2, "4K": 8_294_400}


def is_legal(width: int, height: int) -> bool:
    """Return whether a size keeps the flexible rule, as API.md words it."""
    in_steps = width % 16 == 0 and height % 16 == 0
    in_shape = max(width, height) <= min(3840, 3 * min(width, height))
    return in_steps and in_shape and 655_360 <= width * height <= 8_294_400


STEPS = range(16, 3841, 16)
LEGAL = [(width, height) for width in STEPS for height in STEPS if is_legal(width, height)]


def distance(size: tuple[int, int], asked: tuple[int, int]) -> float:
    """Return ln²(w/W) + ln²(h/H)."""
    return log(size[0] / asked[0]) ** 2 + log(size[1] / asked[1]) ** 2


def pixels(text: str) -> tuple[int, int]:
    """Return WIDTHxHEIGHT as numbers."""
    width, height = text.split("x")
    return int(width), int(height)


class TestSpellings(unittest.TestCase):
    """From what a person types to pixels."""

    def test_the_thirty_named_sizes(self) -> None:
        for ratio, name, *sizes in ROWS:
            for tier, size in zip(AREAS, sizes):
                for spelling in (f"{name}@{tier}", f"{ratio}@{tier}", size):
                    with self.subTest(spelling):
                        self.assertEqual(parse_size(spelling), pixels(size))
                        self.assertTrue(is_legal(*pixels(size)))

    def test_the_tier_may_be_left_out(self) -> None:
        for ratio, name, small, *_ in ROWS:
            self.assertEqual(parse_size(name), pixels(small))
            self.assertEqual(parse_size(ratio), pixels(small))

    def test_names_and_tiers_in_any_case(self) -> None:
        for spelling in ("STORY@2K", "Story@2k", "sToRy@2K", "9:16@2k"):
            with self.subTest(spelling):
                self.assertEqual(parse_size(spelling), (1152, 2048))

    def test_a_tier_alone_is_square(self) -> None:
        self.assertEqual([parse_size(tier) for tier in ("1K", "2k")], [(1024,) * 2, (2048,) * 2])
        self.assertEqual(parse_size("4K"), (2880, 2880))

    def test_the_signs_between_width_and_height(self) -> None:
        for sign in "xX×*":
            with self.subTest(sign):
                self.assertEqual(parse_size(f"1536{sign}1024"), (1536, 1024))

    def test_auto(self) -> None:
        self.assertIsNone(parse_size("auto"))
        self.assertIsNone(parse_size("AUTO"))

    def test_what_is_no_size(self) -> None:
        for spelling in (
            *("", " ", "big", "x", "1024", "1024x", "x1024", "1024x1024x1024", "-16x16", "+16x16"),
            *("1_024x1024", "１０２４x1024", "1024.0x1024", "1e3x1e3", "1024px", "0x400h", "1024:"),
            *("8K", "0K", "@2K", "story@", "story@8K", "auto@2K", "2K@2K", "story@2K@2K", "16:9@"),
            *("0:1", "1:0", ":", "16:9:4", "-1:1", "1.5:1", "1024x1024@2K", "story 2K", "a\nb"),
        ):
            with self.subTest(spelling), self.assertRaises(ValueError):
                parse_size(spelling)

    def test_the_refusal_names_the_nearest_name(self) -> None:
        for wrong, right in (("storry", "story"), ("wide-screen@2K", "widescreen")):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, f"did you mean {right}"):
                parse_size(wrong)


class TestRatios(unittest.TestCase):
    """Ratios that are not in the table."""

    def test_a_multiple_of_a_row_is_that_row(self) -> None:
        self.assertEqual(parse_size("32:18@2K"), (2048, 1152))
        self.assertEqual(parse_size("7:3"), (1344, 576))

    def test_within_one_percent_the_nearest_area(self) -> None:
        for ratio, tier in (("7:5", "1K"), ("2:1", "2K"), ("1:3", "4K"), ("13:11", "1K")):
            with self.subTest(ratio=ratio, tier=tier):
                across, down = map(int, ratio.split(":"))
                size = parse_size(f"{ratio}@{tier}")
                assert size
                close = [s for s in LEGAL if abs(s[0] / s[1] * down / across - 1) <= 0.01]
                self.assertIn(size, close)
                gaps = {s: abs(log(s[0] * s[1] / AREAS[tier])) for s in close}
                self.assertAlmostEqual(gaps[size], min(gaps.values()))

    def test_beyond_the_rule_the_nearest_ratio(self) -> None:
        size = parse_size("4:1@2K")
        assert size
        self.assertEqual(size[0], 3 * size[1])
        self.assertTrue(is_legal(*size))


class TestRule(unittest.TestCase):
    """The flexible rule, and the legal size that is nearest."""

    def test_the_rule_at_its_edges(self) -> None:
        for width, height, rule in (
            (1024, 1024, ""),
            (3840, 2160, ""),
            (1280, 512, ""),
            (2880, 960, ""),
            (1920, 1080, "multiples of 16"),
            (1025, 1024, "multiples of 16"),
            (0, 1024, "0"),
            (3856, 2048, "3840"),
            (3840, 1264, "3:1"),
            (800, 816, "655360"),
            (3840, 2176, "8294400"),
            (2896, 2880, "8294400"),
        ):
            with self.subTest(width=width, height=height):
                self.assertEqual(bool(rule), not is_legal(width, height))
                fault = size_fault(width, height).replace(",", "")
                self.assertRegex(fault, rule or r"\A\Z")

    def test_every_size_on_the_grid(self) -> None:
        grid = [(width, height) for width in range(16, 4000, 16) for height in range(16, 4000, 16)]
        wrong = [size for size in grid if is_legal(*size) == bool(size_fault(*size))]
        self.assertEqual(wrong, [])

    def test_the_nearest_of_some(self) -> None:
        for asked, nearest in (
            ("1920x1080", "1920x1088"),
            ("512x512", "816x816"),
            ("4096x4096", "2880x2880"),
            ("1080x1920", "1088x1920"),
            ("7680x4320", "3840x2160"),
        ):
            with self.subTest(asked):
                self.assertEqual(nearest_size(*pixels(asked)), pixels(nearest))

    def test_the_nearest_is_the_least_distance_and_on_a_tie_the_larger(self) -> None:
        for asked in self.sizes_to_ask():
            with self.subTest(asked):
                least = min(distance(size, asked) for size in LEGAL)
                tied = [size for size in LEGAL if distance(size, asked) < least + 1e-9]
                largest = max(width * height for width, height in tied)
                found = nearest_size(*asked)
                self.assertIn(found, tied)
                self.assertEqual(found[0] * found[1], largest)

    def sizes_to_ask(self) -> Iterator[tuple[int, int]]:
        """Yield sizes of every kind: tiny, huge, long, and off the grid."""
        yield from ((1, 1), (99_999, 1), (1500, 600))
        source = random.Random(2026)
        for _ in range(6):
            yield int(2 ** source.uniform(4, 13)), int(2 ** source.uniform(4, 13))


class TestOptions(Case):
    """--size on the command line, and who enforces what."""

    def dry_run(self, code: int, *argv: str) -> Run:
        """Run `generate --dry-run`."""
        run = self.run_tool("generate", "a fox", "--dry-run", "--json", *argv)
        self.assertEqual(self.listing(), [])
        return self.check(run, code)

    def fields(self, *argv: str) -> Any:
        """Return the fields that would be sent."""
        return self.dry_run(0, *argv).json["dry_run"]["fields"]

    def test_what_is_sent(self) -> None:
        for spelling, sent in (("Story@4k", "2160x3840"), ("1536×1024", "1536x1024")):
            with self.subTest(spelling):
                self.assertEqual(self.fields("--size", spelling)["size"], sent)
        self.assertEqual(self.fields("--size", "auto")["size"], "auto")
        self.assertNotIn("size", self.fields())

    def test_an_illegal_size_is_refused_with_the_rule_and_the_nearest(self) -> None:
        for size, rule, nearest in (
            ("1920x1080", "multiples of 16", "1920x1088"),
            ("512x512", "655", "816x816"),
        ):
            with self.subTest(size):
                run = self.dry_run(2, "-s", size)
                self.assertRegex(run.err, rf"\Agpt-image2: .*{size}.*{rule}.*{nearest}.*\n\Z")
                self.assertIn("--nearest-size", run.err)

    def test_nearest_size_takes_it(self) -> None:
        run = self.dry_run(0, "-s", "1920x1080", "--nearest-size")
        self.assertEqual(run.json["dry_run"]["fields"]["size"], "1920x1088")
        self.assertIn("1920x1088", run.err)
        self.assertEqual(self.fields("-s", "story", "--nearest-size")["size"], "720x1280")

    def test_param_passes_anything(self) -> None:
        self.assertEqual(self.fields("--param", "size=512x512")["size"], "512x512")

    def test_the_flexible_rule_refuses_at_every_provider(self) -> None:
        for provider in ("openai", "generic", "openai-hk"):
            with self.subTest(provider):
                run = self.dry_run(2, "-s", "512x512", "--provider", provider)
                self.assertIn("816x816", run.err)

    def test_an_unknown_model_follows_it_as_a_warning(self) -> None:
        run = self.dry_run(0, "-s", "512x512", "-m", "flux-9")
        self.assertEqual(run.json["dry_run"]["fields"]["size"], "512x512")
        self.assertRegex("\n".join(run.json["warnings"]), "512x512.*816x816")

    def test_an_older_models_three_sizes(self) -> None:
        asked = ("-m", "gpt-image-1", "-s", "2048x2048")
        run = self.dry_run(2, *asked)
        for size in ("1024x1024", "1536x1024", "1024x1536"):
            self.assertIn(size, run.err)
        run = self.dry_run(0, *asked, "--provider", "generic")
        self.assertEqual(run.json["dry_run"]["fields"]["size"], "2048x2048")
        self.assertRegex("\n".join(run.json["warnings"]), "2048x2048.*1536x1024")
        self.assertEqual(self.fields("-m", "gpt-image-1", "-s", "1536x1024")["size"], "1536x1024")


class TestCommand(Case):
    """`sizes`: the table, and what a spelling resolves to."""

    def sizes(self, *argv: str, code: int = 0) -> Run:
        """Run `sizes`."""
        return self.check(self.run_tool("sizes", *argv), code)

    def test_the_table(self) -> None:
        lines = [line.split() for line in self.sizes().out.splitlines()]
        self.assertEqual([line for line in lines if ":" in line[0]], ROWS)

    def test_the_table_as_json(self) -> None:
        text = str(self.sizes("--json").json)
        for size in re.findall(r"\d+x\d+", TABLE):
            self.assertIn(size, text)

    def test_a_spelling(self) -> None:
        self.assertEqual(self.sizes("story@2K").out, "1152x2048\n")
        self.assertIn("1152x2048", str(self.sizes("story@2K", "--json").json))

    def test_4k_is_not_what_a_television_calls_it(self) -> None:
        run = self.sizes("4K")
        self.assertEqual(run.out, "2880x2880\n")
        self.assertRegex(run.err, "16:9@4K.*3840x2160")

    def test_an_illegal_one(self) -> None:
        self.assertRegex(self.sizes("1920x1080", code=2).err, "multiples of 16.*1920x1088")
        self.assertEqual(self.sizes("1920x1080", "--nearest-size").out, "1920x1088\n")
        self.assertIn("did you mean story", self.sizes("storry", code=2).err)
