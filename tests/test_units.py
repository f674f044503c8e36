"""The pure parts, called alone: sizes, base URLs, addresses, waits, answers in pieces, images."""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
import unittest
from email.utils import formatdate
from pathlib import Path
from typing import Any
from unittest import mock

import gpt_image2 as tool
from tests.case import Case
from tests.images import gif, jpeg, jpeg_segment, png, png_chunk, svg, webp
from tests.server import b64

IMAGE = png(12, 9, seed=1)

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


def is_legal(width: int, height: int) -> bool:
    """Return whether a size keeps the flexible rule, as API.md words it."""
    in_steps = width % 16 == 0 and height % 16 == 0
    in_shape = max(width, height) <= min(3840, 3 * min(width, height))
    return in_steps and in_shape and 655_360 <= width * height <= 8_294_400


def pixels(text: str) -> tuple[int, int]:
    """Return WIDTHxHEIGHT as numbers."""
    width, height = text.split("x")
    return int(width), int(height)


class TestSpellings(unittest.TestCase):
    """From what a person types to pixels, the flexible rule, and the nearest legal size."""

    def test_the_thirty_named_sizes_and_others(self) -> None:
        for ratio, name, *sizes in ROWS:
            for tier, size in zip(("1K", "2K", "4K"), sizes):
                self.assertTrue(is_legal(*pixels(size)), size)
                for spelling in (f"{name}@{tier}", f"{ratio}@{tier}", size):
                    self.assertEqual(tool.parse_size(spelling), pixels(size))
                    self.assertEqual(tool.parse_size(spelling.swapcase()), pixels(size))
            self.assertEqual(tool.parse_size(name), pixels(sizes[0]))  # without a tier
            self.assertEqual(tool.parse_size(ratio), pixels(sizes[0]))
        self.assertIsNone(tool.parse_size("AUTO"))
        for spelling, text in (
            *(("1536×1024", "1536x1024"), ("1536*1024", "1536x1024"), ("1K", "1024x1024")),
            *(("2k", "2048x2048"), ("4K", "2880x2880")),
            *(("32:18@2K", "2048x1152"), ("7:3", "1344x576")),  # multiples of a row's ratio
        ):
            self.assertEqual(tool.parse_size(spelling), pixels(text), spelling)

    def test_what_is_no_size(self) -> None:
        for spelling in (
            *("", " ", "big", "1024", "1024x", "x1024", "1024x1024x1024", "-16x16", "+16x16", "8K"),
            *("1_024x1024", "１０２４x1024", "1024.0x1024", "1e3x1e3", "1024px", "0x400h", "1024:"),
            *("4:1", "1:100", "301:100@4K"),  # flatter than the API takes
            *("@2K", "story@", "story@8K", "auto@2K", "2K@2K", "story@2K@2K", "0:1", "1:0", ":"),
        ):
            with self.subTest(spelling), self.assertRaises(ValueError):
                tool.parse_size(spelling)

    def test_ratios_that_are_not_in_the_table(self) -> None:
        """Within one percent of the ratio the nearest area, else the nearest ratio."""
        for spelling, text in (
            *(("7:5@1K", "1216x864"), ("2:1@2K", "2896x1456"), ("1:3@4K", "1280x3840")),
            *(("13:11@1K", "1120x944"), ("29:10@2K", "3488x1200")),
        ):
            self.assertEqual(tool.parse_size(spelling), pixels(text), spelling)

    def test_every_size_on_the_grid(self) -> None:
        grid = [(width, height) for width in range(0, 4000, 16) for height in range(0, 4000, 16)]
        grid += [(1920, 1080), (1024, 1025), (1025, 1024), (1000, 1000), (1, 1)]
        wrong = [size for size in grid if is_legal(*size) == bool(tool.size_fault(*size))]
        self.assertEqual(wrong, [])

    def test_the_nearest_is_the_least_distance(self) -> None:
        for asked, text in (
            *(("99999x1", "1440x480"), ("1500x600", "1504x608"), ("37x6011", "480x1440")),
            *(("1000x1000", "1008x1008"), ("1920x1080", "1920x1088"), ("7680x4320", "3840x2160")),
            *(("256x256", "816x816"), ("4000x4000", "2880x2880"), ("640x480", "944x704")),
        ):
            self.assertEqual(tool.nearest_size(*pixels(asked)), pixels(text), asked)


class TestSameCall(unittest.TestCase):
    """Whether two calls ask the same of the same place, however that is spelled."""

    def test_spellings(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            link = f"{folder}/link"
            os.symlink(folder, link)
            target = {"folder": folder, "name": "c.png", "stdout": False}
            record = {"base_url": "http://127.0.0.1:8/v1", "batch": None, "target": target}
            other = {**record, "base_url": "http://localhost:8/v1"}
            other["target"] = {**target, "folder": link}
            self.assertEqual(tool.same_call(record), tool.same_call(other))
            for changed in (
                {"base_url": "http://localhost:8/v2"},
                {"base_url": "http://[::1]:9/v1"},
            ):
                self.assertNotEqual(tool.same_call(record), tool.same_call({**record, **changed}))


class TestSizes(Case):
    """Who enforces which sizes, and the command that explains them."""

    def planned(self, line: str, code: int = 0) -> Any:
        """Return the document of a dry run of generate."""
        run = self.run_tool("generate", "x", *line.split(), "--dry-run", "--json")
        return self.check(run, code).json

    def test_illegal_ones_are_refused_at_every_provider(self) -> None:
        for size, provider, rule, legal in (
            ("1920x1080", "openai", "16", "1920x1088"),
            ("512x512", "openai-hk", "655,?360", "816x816"),
            ("3840x3840", "generic", "8,?294,?400", "2880x2880"),
            ("3856x2160", "nodekey", "3840", "3840x2160"),
            ("3072x1008", "generic", "3:1", "[0-9]+x[0-9]+"),
        ):
            with self.subTest(size, provider=provider):
                found = self.planned(f"-s {size} --provider {provider}", 2)["error"]
                self.assertRegex(found["message"], f"{size}.*{rule}.*{legal}.*--nearest-size")
        argv = ("generate", "x", "-s", "1920x1080", "--nearest-size", "--dry-run")
        self.assertRegex(self.check(self.run_tool(*argv), 0).err, "1920x1080.*1920x1088")

    def test_older_models_and_unknown_ones(self) -> None:
        asked, sizes = "-s 2048x2048 -m gpt-image-1", "1024x1024.*1536x1024.*1024x1536"
        error = self.planned(f"{asked} --provider openai", 2)["error"]
        self.assertRegex(error["message"], sizes)
        for line, size, warning in (
            (f"{asked} --provider generic", "2048x2048", f"2048x2048.*{sizes}"),
            ("-s 1536x1024 -m gpt-image-1 --provider openai", "1536x1024", ".*"),
            ("-s 512x512 -m flux-9", "512x512", "512x512.*816x816"),
        ):
            with self.subTest(line):
                found = self.planned(line)
                self.assertEqual(found["dry_run"]["fields"]["size"], size)
                self.assertRegex("\n".join(found["warnings"]), warning)

    def test_the_command(self) -> None:
        for line, code, out, err in (
            ("story@2K", 0, "1152x2048\n", r"\A\Z"),
            ("4K", 0, "2880x2880\n", "16:9@4K.*3840x2160"),  # not what a television calls it
            ("1920x1080 --nearest-size", 0, "1920x1088\n", ".*"),
            ("1920x1080", 2, "", "16.*1920x1088"),
            ("wide-screen@2K", 2, "", "mean widescreen"),
        ):
            with self.subTest(line):
                run = self.check(self.run_tool("sizes", *line.split()), code)
                self.assertEqual(run.out, out)
                self.assertRegex(run.err, err)

    def test_the_table(self) -> None:
        lines = [line.split() for line in self.check(self.run_tool("sizes"), 0).out.splitlines()]
        self.assertEqual([line for line in lines if ":" in line[0]], ROWS)
        text = json.dumps(self.check(self.run_tool("sizes", "--json"), 0).json)
        self.assertEqual([size for row in ROWS for size in row[2:] if size not in text], [])


class TestBaseUrl(unittest.TestCase):
    """What a person types or pastes, and what is made of it."""

    def test_normal_forms(self) -> None:
        ends = ["", "/v1///", "/v1/models", "/v1/chat/completions", "/v1/images/edits/"]
        for given, base in (
            *((f"relay.example{path}", "https://relay.example/v1") for path in ends),
            ("relay.example:8443", "https://relay.example:8443/v1"),
            (" HTTPS://Relay.Example/V1///\n", "https://relay.example/V1"),
            ("https://relay.example/images/edits", "https://relay.example/v1"),
            ("https://r.openai.azure.com/openai/v1", "https://r.openai.azure.com/openai/v1"),
            ("https://gate.example/v1/a/b/openai", "https://gate.example/v1/a/b/openai"),
            ("localhost:8080", "http://localhost:8080/v1"),
            ("https://localhost:8080", "https://localhost:8080/v1"),
        ):
            self.assertEqual(tool.parse_base_url(given).url, base, given)

    def test_refusals(self) -> None:
        paths = ('"v1"', "{v1,v2}", "[1-3]", "v1#top", "a b", "\x1b[31m", "a\nurl = b.example")
        for given in (
            *(f"{start}hunter2@relay.example" for start in ("https://user:", "user:", "https://")),
            *("ftp://relay.example", "file:///etc/passwd", "https://", "https://:8080", ""),
            *("relay.example:99999", "relay.example:0", "relay.exämple", "a.example\\@b.example"),
            *(f"https://relay.example/{path}" for path in paths),
        ):
            with self.subTest(given):
                with self.assertRaises(ValueError) as caught:
                    tool.parse_base_url(given)
                self.assertNotIn("hunter2", str(caught.exception))

    def test_what_a_key_belongs_to(self) -> None:
        """Scheme, host and port, the spellings of this machine being one host."""
        same = ("relay.example", "https://RELAY.example:443/v2", "https://relay.example/a/b")
        others = ("http://relay.example:443", "relay.example:444", "relay.example.evil")
        origin = tool.parse_base_url(same[0]).origin
        self.assertEqual({tool.parse_base_url(text).origin for text in same}, {origin})
        self.assertNotIn(origin, [tool.parse_base_url(text).origin for text in others])
        here = ("localhost:80", "127.0.0.1:80", "127.9.9.9:80", "[::1]:80", "LOCALHOST.:80")
        self.assertEqual(len({tool.parse_base_url(text).origin for text in here}), 1)

    def test_loopback_is_no_more_than_that(self) -> None:
        here = ("localhost", "127.0.0.1", "127.1", "[::1]")
        others = ("127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", "128.0.0.1")
        for host in (*here, *others):
            base, loopback = tool.parse_base_url(host), host in here
            self.assertEqual((base.loopback, base.scheme == "http"), (loopback, loopback), host)


class TestAddresses(unittest.TestCase):
    """Which addresses a link from a server may lead to, as literals and as what a name means."""

    public = (
        *("8.8.8.8", "1.1.1.1", "198.20.0.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"),
        *("64:ff9b::808:808", "2002:808:808::1"),
    )
    private = (
        *("0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254"),
        *("172.16.0.1", "172.31.255.255", "192.168.1.1", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254"),
        *("fec0::1", "ff02::1", "ff0e::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
        *("::ffff:169.254.169.254", "::ffff:224.0.0.1", "::127.0.0.1", "::10.0.0.1"),
        *("64:ff9b::127.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::10.0.0.1"),
        *("2002:7f00:1::1", "2002:a9fe:a9fe::1", "2001:0:a00:1::1", "no address", ""),
    )
    fake = ("198.18.0.1", "198.19.255.254")  # what a fake-IP proxy gives to every name

    def test_which_are_public(self) -> None:
        everyone = (*self.public, *self.private, *self.fake)
        for literal, wanted in ((True, self.public), (False, (*self.public, *self.fake))):
            found = [address for address in everyone if tool.is_public(address, literal)]
            self.assertEqual(found, list(wanted), f"literal: {literal}")


class TestWaits(unittest.TestCase):
    """How long to wait before another try."""

    def test_what_the_server_asks_for(self) -> None:
        for headers, seconds in (
            *(({"retry-after": text}, float(text)) for text in ("0", "1.5", "86400")),
            ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
            ({"retry-after-ms": "soon", "retry-after": "9"}, 9),
            ({"retry-after": formatdate(1_800_000_060, usegmt=True)}, 60),
            ({"retry-after": formatdate(1_799_999_940, usegmt=True)}, 0),
            (
                {"retry-after": formatdate(60), "date": formatdate(30)},
                30,
            ),  # whatever our clock says
            ({}, None),
        ):
            with self.subTest(headers), mock.patch("time.time", return_value=1_800_000_000):
                self.assertEqual(tool.retry_after(headers), seconds)

    def test_a_wait_ends_even_if_the_clock_is_set_back(self) -> None:
        slept: list[float] = []
        with mock.patch("time.sleep", slept.append), mock.patch("time.monotonic", lambda: 0.0):
            tool.Signals().pause(1.05)
        self.assertAlmostEqual(sum(slept), 1.05)

    def test_junk_is_ignored(self) -> None:
        junk = ["", "soon", "nan", "inf", "-3", "+3", "1e9", "0x10", "1_0", "３", "5s", "9" * 400]
        junk += ["Mon, 99 Foo 2026", "Fri, 31 Dec 99999999 23:59:59 GMT", "٣.٥", "\x00", "1,2"]
        for value in junk:
            self.assertIn(tool.retry_after({"retry-after": value}), (None, 0), value)
            self.assertIn(tool.retry_after({"retry-after-ms": value}), (None, 0), value)

    def test_without_a_word_it_doubles_up_to_half_a_minute(self) -> None:
        with mock.patch("random.uniform", return_value=1.0) as jitter:
            waits = [tool.retry_delay(attempt, None) for attempt in range(9)]
        self.assertEqual(waits, [0.5, 1, 2, 4, 8, 16, 30, 30, 30])
        jitter.assert_called_with(0.75, 1.0)
        self.assertEqual(tool.retry_delay(3, 7.5), 7.5)

    def test_in_words(self) -> None:
        """A wait over 10 s says until when."""
        for seconds, words in ((2.0, "2 s"), (0.5, "0.5 s"), (10.0, "10 s")):
            self.assertEqual(tool.wait_text(seconds), words)
        with mock.patch("time.time", lambda: 0.0), mock.patch("time.localtime", time.gmtime):
            self.assertEqual(tool.wait_text(119.5), "119.5 s (until 00:01:59)")


class TestPieces(unittest.TestCase):
    """An answer is read window by window; no edge of a window may show."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name, "response.json")

    def read(self, body: str, window: int, long_string: int, *, salvage: bool = False) -> Any:
        """Read an answer through buffers of these sizes; return it and its images."""
        self.path.write_text(body, encoding="utf-8")
        found = []
        with mock.patch.multiple(tool, WINDOW=window, LONG_STRING=long_string):
            reply = tool.read_reply(str(self.path), salvage)
            with self.path.open("rb") as file:
                for value in (source.value for source in reply.images):
                    if isinstance(value, str):
                        pieces = iter([value.encode()])
                    else:  # a long one is still in the file
                        pieces = tool.span_pieces(file, value)
                    found.append(b"".join(tool.decode_text(pieces)))
        return reply, found

    def test_dressed_images_beside_hostile_json_under_every_window(self) -> None:
        image = bytes(range(255, 164, -1))
        plain = b64(image)
        lines = [plain[at : at + 64] for at in range(0, len(plain), 64)]
        dresses = [plain, plain.rstrip("="), plain.replace("+", "-").replace("/", "_")]
        dresses += ["\\n".join(lines), "\\r\\n".join(lines), " ".join(plain)]
        dresses += [plain.replace("/", "\\/"), plain.replace("P", "\\u0050")]
        entries = ", ".join(f'{{"b64_json": "{text}"}}' for text in dresses)
        values: list[Any] = [
            '"\\' * 30,
            "\\u002f{}[]:," * 9,
            'a"\\/\n\u20ac\x00' * 20,
            "",
            [],
            {},
            None,
            1.5,
        ]
        other = {"list": values, 'k"\\': {"deep": [[values], {"": "\u20ac\\"}]}}
        usage = {"a": 1, "b": {"c": 'x\\"\u20ac' * 3}}
        for window in range(8, 81):
            for ascii_only in (True, False):
                with self.subTest(window=window, ascii_only=ascii_only):
                    text = json.dumps(other, ensure_ascii=ascii_only)
                    body = f'\n{{"x": {text}, "data": [{entries}], "usage": {json.dumps(usage)}}}'
                    reply, found = self.read(body, window, 40 + window % 3 * 30)
                    self.assertEqual(found, [image] * len(dresses))
                    self.assertEqual((reply.whole, reply.usage), (True, usage))

    def test_streams(self) -> None:
        event = json.dumps({"type": "image_generation.completed", "b64_json": b64(IMAGE)})
        preview = json.dumps({"type": "image_generation.partial_image", "b64_json": "AAAA"})
        lines = [": hi\n", f"data: {preview}\n", "event: x", f"data:{event}"]
        body = "\n".join([*lines, "", "data: [DONE]", "", ""])
        for text in (body, body.replace("\n", "\r\n")):
            for window in (16, 17, 40, 4096):
                with self.subTest(text[:9], window=window):
                    reply, found = self.read(text, window, 30)
                    self.assertEqual((found, reply.whole), ([IMAGE], True))

    def test_what_a_gateway_adds_to_a_cut_answer_hides_no_image(self) -> None:
        cut = f'{{"data": [{{"b64_json": "{b64(IMAGE)}"}}], "usage": {{"input_tokens":'
        for tail in (
            'event: error\ndata: {"error": {"code": 504}}\n\n',
            'upstream error: {"code": 504}',
            ' timeout {"a": 1}',
            " [1]",
        ):
            with self.subTest(tail):
                self.assertEqual(self.read(cut + tail, 4096, 1000, salvage=True)[1], [IMAGE])

    def test_many_images_below_the_length_that_stays_in_the_file(self) -> None:
        image = IMAGE + bytes(23_000)
        entry = f'{{"b64_json": "{b64(image)}", "revised_prompt": "{b64(image)}"}}'
        body = f'{{"data": [{", ".join([entry] * 10)}]}}'
        self.assertEqual(self.read(body, tool.WINDOW, tool.LONG_STRING)[1], [image] * 10)

    def test_a_cut_answer_gives_its_whole_images_to_recover_only(self) -> None:
        data = [{"b64_json": b64(IMAGE)}, {"b64_json": b64(IMAGE[:50])}]
        text = json.dumps({"created": 1, "data": [*data, {"b64_json": b64(IMAGE)}]})
        end = text.rindex('"')
        for cut, count in ((end, 2), (end + 1, 3), (text.index("data"), 0)):
            for window in (16, 64, 4096):
                with self.subTest(cut=cut, window=window):
                    self.assertEqual(self.read(text[:cut], window, 20)[1], [])
                    reply, found = self.read(text[:cut], window, 20, salvage=True)
                    self.assertEqual(found, [IMAGE, IMAGE[:50], IMAGE][:count])
                    self.assertFalse(reply.whole)

    def test_a_cut_escape_is_no_crash(self) -> None:
        for tail in ("\\", "\\u", "\\u12", '\\"', '\\"}', "\\x", '\\uD83D"}'):
            with self.subTest(tail):
                body = '{"data": [{"b64_json": "AAAAAAAA' + tail
                self.assertFalse(self.read(body, 16, 4)[0].whole)
                self.assertFalse(self.read(body, 16, 4, salvage=True)[0].whole)

    def test_what_json_chokes_on(self) -> None:
        entry = f'"data": [{{"b64_json": "{b64(IMAGE)}", "revised_prompt": '
        for value in ("NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', '"\\u0000"', '"\x01"'):
            with self.subTest(value[:20]):
                body = f'{{"created": {value}, "usage": {value}, {entry}{value}}}]}}'
                self.assertEqual(self.read(body, 4096, 1000)[1], [IMAGE])
        deep = "[" * 100_000
        text = f'{{"data": [{{"b64_json": "{b64(IMAGE)}"}}], "x": {deep}'
        self.assertEqual(self.read(text, 4096, 100)[1], [], "it is cut")
        self.assertEqual(self.read(text + "}", 4096, 100)[1], [IMAGE])
        self.assertEqual(self.read(text, 4096, 100, salvage=True)[1], [IMAGE])


class TestBase64(unittest.TestCase):
    """Text in pieces of any size to bytes, and nothing that is no base64."""

    def decode(self, text: str, size: int) -> bytes:
        """Decode a text that comes so many characters at a time."""
        pieces = [text[at : at + size].encode() for at in range(0, len(text), size)]
        return b"".join(tool.decode_text(iter(pieces)))

    def test_pieces_of_every_size(self) -> None:
        for image in (b"", b"a", b"ab", b"abc", IMAGE):
            for text in (b64(image), b64(image).rstrip("="), b64(image) + "\n"):
                for size in (1, 2, 3, 4, 5, 64, len(text) + 1):
                    self.assertEqual(self.decode(text, size), image, (text, size))

    def test_a_data_prefix(self) -> None:
        for prefix in ("data:image/png;base64,", " data:;base64,", "DATA:image/png;a=b;BASE64,"):
            self.assertEqual(self.decode(prefix + b64(IMAGE), 100), IMAGE, prefix)
        self.assertEqual(self.decode("data:image/svg+xml,%3Csvg a='b'%3E", 100), b"<svg a='b'>")

    def test_what_is_no_base64(self) -> None:
        good = b64(b"hello, fox")
        bad = ["!!!!", "A", "AAAAA", good + "A", good + good, good[:4] + "$" + good[4:], "näh"]
        bad += [good[:4] + "=" + good[4:], good[:6] + "\x00" + good[6:], "QUJD" * 40_000 + "A"]
        for text in bad:
            for size in (3, 4, 4096):
                with self.subTest(text[:20], size=size), self.assertRaises(ValueError):
                    self.decode(text, size)


def look(data: bytes) -> Any:
    """Return what is seen of an image (see ImageInfo), or None."""
    return tool.inspect_image(io.BytesIO(data))


def is_whole(data: bytes) -> bool:
    """Return whether bytes are an image to its end."""
    return bool(look(data) and look(data).whole)


KINDS = {
    "png": (png(40, 30), "png", False),
    "png with alpha": (png(40, 30, alpha=True), "png", True),
    "jpeg": (jpeg(40, 30), "jpeg", False),
    "webp lossy": (webp(40, 30, "VP8"), "webp", False),
    "webp lossless": (webp(40, 30, "VP8L"), "webp", False),
    "webp extended": (webp(40, 30, "VP8X"), "webp", False),
    "animated gif": (gif(40, 30, frames=3), "gif", False),
    "svg": (svg(40, 30), "svg", True),
}
IDAT = png(40, 30)[33:41]  # the length and the name of the chunk that follows the header
SVG_TAIL = b' viewBox="0 0 40 30"><rect/></svg>'
METADATA = b"".join(jpeg_segment(0xE1, bytes([number]) * 60_000) for number in range(4))
SVG_HEADS = (
    *(b"<svg", b"\xef\xbb\xbf<svg", b"\n\t <svg", b'<?xml version="1.0"?>\n<svg'),
    b"<!-- made by > a <svg> maker -->\n<!-- twice -->\n<svg",
    b'<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "a.dtd">\n<svg',
    b'<svg xmlns="http://www.w3.org/2000/svg" width="100%" height="100%"',
)
ODD_KINDS = {
    "png with tRNS": (png(40, 30).replace(IDAT, png_chunk(b"tRNS", bytes(6)) + IDAT), "png", True),
    "jpeg behind 240 KB": (
        b"\xff\xd8" + METADATA + b"\xff\xff\xff" + jpeg(40, 30)[2:],
        "jpeg",
        False,
    ),
    **{f"{head!r}": (head + SVG_TAIL, "svg", True) for head in SVG_HEADS},
}


class TestImages(unittest.TestCase):
    """Format, size, alpha and wholeness, from the bytes alone."""

    def test_every_format(self) -> None:
        for name, (data, kind, alpha) in {**KINDS, **ODD_KINDS}.items():
            with self.subTest(name):
                self.assertEqual(look(data), tool.ImageInfo(kind, 40, 30, alpha, True))
        for data in (jpeg(3840, 2160), webp(3840, 2160), gif(3840, 2160)):
            self.assertEqual(look(data)[1:3], (3840, 2160), data[:4])

    def test_cut_anywhere_is_not_whole_and_padded_is(self) -> None:
        for name, (data, _, _) in KINDS.items():
            self.assertTrue(is_whole(data + (b"\r\n  \n" if name == "svg" else bytes(5000))), name)
            found = [size for size in range(len(data.rstrip())) if is_whole(data[:size])]
            self.assertEqual(found, [], f"{name} of {len(data)} bytes cut after these is whole")
        # an end mark in the metadata, or of an inner drawing, ends nothing
        self.assertFalse(is_whole(jpeg(400, 300, comment=jpeg(8, 8, comment=jpeg(8, 8)))[:-200]))
        self.assertFalse(is_whole(svg(40, 30).replace(b"<rect", svg(8, 8) + b"<rect")[:-20]))

    def test_what_is_no_image(self) -> None:
        drawing = svg(40, 30)
        for data in (
            *(b"", b"hello", bytes(5000), b"\x89PNG", b"GIF8", b"\xff\xd8", b"<svgx></svgx>"),
            b"<!DOCTYPE html><html><body>" + drawing + b"</body></html>",
            *(page + drawing for page in (b"<html>", b"<!-- 1 --><html><!-- 2 -->", b"<p>see ")),
            b'{"b64_json": "' + b64(IMAGE).encode(),
            b"%PDF-1.7" + IMAGE,
            b"RIFF\x10\0\0\0WAVEfmt " + bytes(20),
            # an exponential search for the root of an SVG would never end with these
            *(piece * 300 + b"<html>" for piece in (b"<!-- -->", b"<!--", b" ", b"<?xml?>")),
            b"<!DOCTYPE svg [" * 300 + b"<html>",
        ):
            with self.subTest(data[:40]):
                self.assertIsNone(look(data))


class TestSuggestions(unittest.TestCase):
    """A wrong option is answered with the right one, or with none."""

    def test_options(self) -> None:
        for words, told in {
            "generate a --qualty low": "did you mean --quality?",
            "batch a.txt -o out": "not of this command; did you mean --output-dir?",
            "generate a --ratio 1:1": "not an option here$",
            "generate a --seed 7": "not an option here$",
            "generate a --foo": "not an option here$",
        }.items():
            with self.subTest(words), self.assertRaisesRegex(tool.Failure, told):
                tool.parse_arguments(words.split())
