"""The pure parts below an answer: its scanner, base64, pictures' headers, waits, addresses."""

from __future__ import annotations

import io
import json
import random
import socket
import sys
import tempfile
import time
import unittest
from email.utils import formatdate
from pathlib import Path
from typing import Any
from unittest import mock

import gpt_image2
from gpt_image2 import (
    PictureInfo,
    Reply,
    Scanner,
    Span,
    check_host,
    decode_text,
    inspect_picture,
    is_public,
    read_reply,
    retry_after,
    span_pieces,
)
from tests.pictures import gif, jpeg, jpeg_segment, png, png_chunk, svg, webp
from tests.support import SCRIPT, Case, b64
from tests.support import Reply as HttpReply

ROUNDS = 300  # of each fuzz, always the same ones
PICTURE = png(12, 9, seed=1)


class ReplyCase(unittest.TestCase):
    """A case that reads answers from a file, as curl leaves them."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name, "response.json")

    def buffers(self, window: int, long_string: int) -> None:
        """Make the scanner's buffers this small, until the test ends or calls it again."""
        for name, value in (("WINDOW", window), ("LONG_STRING", long_string)):
            patch = mock.patch.object(gpt_image2, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def read(self, body: bytes | str, *, salvage: bool = False) -> Reply:
        """Read an answer."""
        self.path.write_bytes(body.encode() if isinstance(body, str) else body)
        return read_reply(str(self.path), salvage)

    def pictures(self, reply: Reply) -> list[bytes]:
        """Return the bytes of an answer's base64 pictures."""
        with self.path.open("rb") as file:
            return [
                b"".join(
                    decode_text(
                        span_pieces(file, source.value)
                        if isinstance(source.value, Span)
                        else iter([source.value.encode()])
                    )
                )
                for source in reply.images
            ]


# ---- The scanner ------------------------------------------------------------------------------


class TestScanner(ReplyCase):
    """Long strings stay in the file, all else is JSON as before."""

    def test_marks_stand_for_long_strings_only(self) -> None:
        self.buffers(7, 10)
        text = json.dumps({"short": "x" * 10, "long": "y" * 11, "list": ["z" * 99, 'a "b" \\']})
        self.path.write_text(text)
        loaded, scanner = self.scanner(text.encode())
        self.assertEqual(loaded["short"], "x" * 10)
        self.assertEqual(loaded["list"][1], 'a "b" \\')
        start = text.index("y")
        self.assertEqual(scanner.span(loaded["long"]), Span(start, start + 11))
        self.assertLess(len(scanner.text), len(text) + 60)

    def test_any_json_survives_any_buffers(self) -> None:
        source = random.Random(1)
        for number in range(ROUNDS):
            value = random_json(source, 4)
            indent = source.choice((None, 1))
            text = json.dumps(value, ensure_ascii=source.random() < 0.5, indent=indent)
            body = text.encode("utf-8", "surrogatepass")
            self.buffers(source.randint(7, 60), source.randint(1, 40))
            with self.subTest(number, text=text):
                loaded, scanner = self.scanner(body)
                self.assertEqual(self.resolved(loaded, scanner, body), value)

    def test_a_mark_cannot_be_forged(self) -> None:
        marks = [f"{word}:1:5" for word in ("0123456789abcdef", "nonce", "0" * 16, "")]
        for mark in marks:
            with self.subTest(mark):
                loaded, scanner = self.scanner(json.dumps(mark).encode())
                self.assertEqual(scanner.span(loaded), mark)

    def scanner(self, body: bytes) -> tuple[Any, Scanner]:
        """Feed a body window by window; return what json reads from the scanner, and it."""
        scanner = Scanner(False)
        for at in range(0, len(body), gpt_image2.WINDOW):
            scanner.feed(body[at : at + gpt_image2.WINDOW])
        text = (scanner.text + scanner.head).decode("utf-8", "surrogatepass")
        return json.loads(text), scanner

    def resolved(self, value: Any, scanner: Scanner, body: bytes) -> Any:
        """Return a parsed value with its marks replaced by what they stand for."""
        if isinstance(value, dict):
            return {
                self.resolved(name, scanner, body): self.resolved(item, scanner, body)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self.resolved(item, scanner, body) for item in value]
        span = scanner.span(value)
        if not isinstance(span, Span):
            return value
        return json.loads(b'"' + body[span.start : span.end] + b'"')


def random_json(source: random.Random, depth: int) -> Any:
    """Return some JSON value, rich in quotes, backslashes and long strings."""
    kind = source.randrange(6 if depth else 4)
    if kind < 3:
        alphabet = source.choice(('"\\', "ab", 'a"\\/\n\u20ac\x00', "\\u002f{}[]:,"))
        return "".join(source.choices(alphabet, k=source.choice((0, 1, 3, 20, 200))))
    if kind == 3:
        return source.choice((None, True, 1.5, -7, 10**20))
    size = source.randrange(4)
    if kind == 4:
        return [random_json(source, depth - 1) for _ in range(size)]
    return {str(number): random_json(source, depth - 1) for number in range(size)}


class TestReadReply(ReplyCase):
    """From an answer's file to pictures, error and usage."""

    def test_dressed_pictures_through_any_buffers(self) -> None:
        source = random.Random(2)
        for number in range(ROUNDS):
            sizes = source.choices((1, 2, 3, 50, 1000), k=2)
            pictures = [bytes(source.choices(range(256), k=size)) for size in sizes]
            entries = [f'{{"b64_json": "{random_dress(source, p)}"}}' for p in pictures]
            self.buffers(source.randint(8, 80), source.choice((10, 16, 100)))
            with self.subTest(number):
                reply = self.read(f'\n{{"data": [{", ".join(entries)}], "usage": {{"a": 1}}}}')
                self.assertEqual(self.pictures(reply), pictures)
                self.assertEqual((reply.whole, reply.usage), (True, {"a": 1}))

    def test_streams_through_any_buffers(self) -> None:
        event = json.dumps({"type": "image_generation.completed", "b64_json": b64(PICTURE)})
        preview = json.dumps({"type": "image_generation.partial_image", "b64_json": "AAAA"})
        for newline in ("\n", "\r\n"):
            lines = [f": hi{newline}", f"data: {preview}{newline}", "event: x", f"data:{event}"]
            body = newline.join([*lines, "", "data: [DONE]", "", ""])
            for window in (16, 17, 40, 4096):
                with self.subTest(newline=newline, window=window):
                    self.buffers(window, 30)
                    reply = self.read(body)
                    self.assertEqual(self.pictures(reply), [PICTURE])
                    self.assertEqual((reply.kind, reply.whole), ("events", True))

    def test_a_cut_answer_gives_its_whole_pictures_to_recover_only(self) -> None:
        self.buffers(64, 20)
        data = [{"b64_json": b64(PICTURE)}, {"url": "http://a.example/b.png"}]
        text = json.dumps({"created": 1, "data": [*data, {"b64_json": b64(PICTURE)}]})
        end = text.rindex('"')
        for cut, count in ((end, 2), (end + 1, 3), (text.index("data"), 0)):
            with self.subTest(cut=cut):
                self.assertEqual(self.read(text[:cut]).images, ())
                reply = self.read(text[:cut], salvage=True)
                self.assertEqual((len(reply.images), reply.whole), (count, False))

    def test_what_json_chokes_on(self) -> None:
        deep = "[" * 100_000
        for name, value in {"deep": deep, "deep and closed": deep + "]" * 100_000}.items():
            with self.subTest(name):
                text = f'{{"data": [{{"b64_json": "{b64(PICTURE)}"}}], "x": {value}'
                self.assertEqual(self.read(text + "}").images, ())
                self.assertEqual(self.pictures(self.read(text, salvage=True)), [PICTURE])

    def test_odd_values_beside_a_picture(self) -> None:
        for value in ("NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', '"\\u0000"', '"\x01"'):
            with self.subTest(value[:20]):
                entry = f'{{"b64_json": "{b64(PICTURE)}", "revised_prompt": {value}}}'
                reply = self.read(f'{{"created": {value}, "usage": {value}, "data": [{entry}]}}')
                self.assertEqual(self.pictures(reply), [PICTURE])

    def test_what_an_answer_is(self) -> None:
        for body, kind in (
            (b"", "empty"),
            (b"\n \r\n", "empty"),
            (b"\xef\xbb\xbf", "empty"),
            (b" {}", "json"),
            (b"[", "json"),
            (b"<html>", "html"),
            (b"data: 1", "events"),
            (b": ping\n\n", "events"),
            (b"event: error\n", "events"),
            (b"502 Bad Gateway", "text"),
        ):
            with self.subTest(body):
                self.assertEqual(self.read(body).kind, kind)

    def test_no_file_is_an_empty_answer(self) -> None:
        self.assertEqual(read_reply(str(self.path)).kind, "empty")

    def test_a_cut_escape_is_no_crash(self) -> None:
        self.buffers(16, 4)
        for tail in ("\\", "\\u", "\\u12", '\\"', '\\"}', "\\x", '\\uD83D"}'):
            for salvage in (False, True):
                with self.subTest(tail, salvage=salvage):
                    self.read('{"data": [{"b64_json": "AAAAAAAA' + tail, salvage=salvage)


def random_dress(source: random.Random, picture: bytes) -> str:
    """Return base64 as a JSON string's text, dressed at random."""
    text = b64(picture)
    if source.random() < 0.3:
        text = text.replace("+", "-").replace("/", "_")
    if source.random() < 0.3:
        text = text.rstrip("=")
    if source.random() < 0.3:
        width, end = source.choice((1, 7, 64)), source.choice(("\\n", "\\r\\n", "\n", " "))
        text = end.join(text[at : at + width] for at in range(0, len(text), width))
    if source.random() < 0.3:
        text = text.replace("/", "\\/")
    if source.random() < 0.3:
        chosen = source.choice(text.replace("\\", "") or "A")
        if chosen.isalnum() and chosen not in "nru":
            text = text.replace(chosen, f"\\u{ord(chosen):04x}")
    return text


# ---- Base64 -----------------------------------------------------------------------------------


class TestDecodeBase64(unittest.TestCase):
    """Text in pieces of any size to bytes, and nothing that is no base64."""

    def decode(self, text: str, size: int) -> bytes:
        pieces = [text[at : at + size].encode() for at in range(0, len(text), size)]
        return b"".join(decode_text(iter(pieces)))

    def test_pieces_of_every_size(self) -> None:
        for picture in (b"a", b"ab", b"abc", PICTURE):
            for text in (b64(picture), b64(picture).rstrip("="), b64(picture) + "\n"):
                for size in (1, 2, 3, 4, 5, 64, len(text) + 1):
                    with self.subTest(text[:12], size=size):
                        self.assertEqual(self.decode(text, size), picture)

    def test_a_data_prefix(self) -> None:
        for prefix in ("data:image/png;base64,", " data:;base64,", "data:image/png;a=b;base64,"):
            with self.subTest(prefix):
                self.assertEqual(self.decode(prefix + b64(PICTURE), 100), PICTURE)

    def test_what_is_no_base64(self) -> None:
        good = b64(b"hello, fox")
        bad = ["!!!!", "A", "AAAAA", good + "A", good + good, good[:4] + "$" + good[4:]]
        bad += ["aGVs$$bG8=", good[:4] + "=" + good[4:], "näh", "<svg/>"]
        bad += [good[:6] + "\x00" + good[6:], "QUJD" * 40_000 + "*" * 4, "QUJD" * 40_000 + "A"]
        for text in bad:
            for size in (3, 4, 4096):
                with self.subTest(text[:20], size=size), self.assertRaises(ValueError):
                    self.decode(text, size)

    def test_nothing_is_nothing(self) -> None:
        self.assertEqual(self.decode("", 4), b"")


# ---- Pictures ---------------------------------------------------------------------------------


def look(data: bytes) -> PictureInfo | None:
    """Inspect bytes."""
    return inspect_picture(io.BytesIO(data))


KINDS = {
    "png": (png(40, 30), "png", False),
    "png with alpha": (png(40, 30, alpha=True), "png", True),
    "jpeg": (jpeg(40, 30), "jpeg", False),
    "webp lossy": (webp(40, 30, "VP8"), "webp", False),
    "webp lossless": (webp(40, 30, "VP8L"), "webp", False),
    "webp extended": (webp(40, 30, "VP8X"), "webp", False),
    "gif": (gif(40, 30), "gif", False),
    "animated gif": (gif(40, 30, frames=3), "gif", False),
    "svg": (svg(40, 30), "svg", True),
}


class TestInspectPicture(unittest.TestCase):
    """Format, size, alpha and wholeness, from the bytes alone."""

    def test_every_format(self) -> None:
        for name, (data, kind, alpha) in KINDS.items():
            with self.subTest(name):
                self.assertEqual(look(data), PictureInfo(kind, 40, 30, alpha, True))

    def test_extreme_sizes(self) -> None:
        for width, height in ((1, 1), (3840, 2160), (1, 9000)):
            for data in (jpeg(width, height), webp(width, height), gif(width, height)):
                with self.subTest(data[:4], width=width):
                    info = look(data)
                    assert info
                    self.assertEqual((info.width, info.height), (width, height))

    def test_cut_anywhere_is_not_whole(self) -> None:
        for name, (data, _, _) in KINDS.items():
            for size in range(len(data.rstrip())):
                info = look(data[:size])
                if info and info.whole:
                    self.fail(f"{name} cut after {size} of {len(data)} bytes passes as whole")

    def test_padding_after_the_end_is_whole(self) -> None:
        for name, (data, _, _) in KINDS.items():
            for padding in (b"\n", b"\r\n  \n") if "svg" in name else (b"\0", bytes(5000)):
                with self.subTest(name, padding=len(padding)):
                    info = look(data + padding)
                    self.assertTrue(info and info.whole)

    def test_a_jpeg_behind_200_kb_of_metadata(self) -> None:
        plain = jpeg(40, 30)
        metadata = b"".join(jpeg_segment(0xE1, bytes([n]) * 60_000) for n in range(4))
        for fill in (b"", b"\xff\xff\xff"):
            with self.subTest(fill):
                data = plain[:2] + metadata + fill + plain[2:]
                self.assertEqual(look(data), PictureInfo("jpeg", 40, 30, False, True))

    def test_an_end_mark_in_the_metadata_ends_nothing(self) -> None:
        thumbnail = jpeg(8, 8, comment=jpeg(8, 8))
        for name, data in {
            "jpeg with a thumbnail": jpeg(400, 300, comment=thumbnail)[:-200],
            "svg in an svg": svg(40, 30).replace(b"<rect", svg(8, 8) + b"<rect")[:-20],
        }.items():
            with self.subTest(name):
                info = look(data)
                self.assertFalse(info and info.whole)

    def test_a_png_with_transparency_in_a_chunk(self) -> None:
        data = png(40, 30)
        at = data.index(b"IDAT") - 4
        info = look(data[:at] + png_chunk(b"tRNS", bytes(6)) + data[at:])
        self.assertTrue(info and info.alpha)

    def test_every_beginning_of_an_svg(self) -> None:
        tail = b' viewBox="0 0 40 30"><rect/></svg>'
        for head in (
            b"<svg",
            b"\xef\xbb\xbf<svg",
            b"\n\t <svg",
            b'<?xml version="1.0" encoding="UTF-8"?>\n<svg',
            b"<!-- made by > a <svg> maker -->\n<!-- twice -->\n<svg",
            b'<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "a.dtd">\n<svg',
            b'<svg xmlns="http://www.w3.org/2000/svg" width="100%" height="100%"',
        ):
            with self.subTest(head):
                self.assertEqual(look(head + tail), PictureInfo("svg", 40, 30, True, True))

    def test_what_is_no_picture(self) -> None:
        drawing = svg(40, 30)
        for data in (
            b"",
            b"hello",
            bytes(5000),
            b"<!DOCTYPE html><html><body>" + drawing + b"</body></html>",
            b"<html><head></head><body>" + drawing,
            b"<!-- a page --><html>" + drawing,
            b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml">' + drawing,
            b"<p>see " + drawing,
            b"<svgx></svgx>",
            b'{"b64_json": "' + b64(PICTURE).encode(),
            b64(PICTURE).encode(),
            b"%PDF-1.7" + PICTURE,
            b"RIFF\x10\0\0\0WAVEfmt " + bytes(20),
            b"\x89PNG",
            b"GIF8",
            b"\xff\xd8",
        ):
            with self.subTest(data[:40]):
                self.assertIsNone(look(data))

    def test_a_hostile_beginning_costs_no_time(self) -> None:
        for piece in (b"<!-- -->", b"<!--", b" ", b"<?xml?>", b"<!DOCTYPE svg [", b"\xff\xd8\xff"):
            for count in (18, 24):  # an exponential search takes its time even with these
                with self.subTest(piece, count=count):
                    started = time.process_time()
                    look(piece * count + b"<html>")
                    self.assertLess(time.process_time() - started, 0.5)


# ---- Waits and addresses ----------------------------------------------------------------------


class TestRetryAfter(unittest.TestCase):
    """The wait that a server asks for."""

    def test_numbers(self) -> None:
        for value, seconds in (("0", 0), ("5", 5), ("1.5", 1.5), ("120", 120), ("86400", 86400)):
            with self.subTest(value):
                self.assertEqual(retry_after({"retry-after": value}), seconds)

    def test_milliseconds_go_first(self) -> None:
        self.assertEqual(retry_after({"retry-after-ms": "1500", "retry-after": "9"}), 1.5)
        self.assertEqual(retry_after({"retry-after-ms": "soon", "retry-after": "9"}), 9)

    def test_dates(self) -> None:
        wait = retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)})
        assert wait is not None
        self.assertTrue(50 < wait <= 60, wait)
        past = formatdate(time.time() - 60, usegmt=True)
        self.assertEqual(retry_after({"retry-after": past}), 0)

    def test_junk_is_ignored(self) -> None:
        junk = ["", "soon", "nan", "inf", "-inf", "-3", "+3", "1e9", "0x10", "1_0", "٣", "３", "5s"]
        junk += [" ", ",", "Mon,", "0,", "1,2", "Mon, 99 Foo 2026", "9" * 400, "٣.٥", "\x00"]
        junk += ["Fri, 31 Dec 99999999 23:59:59 GMT", "Fri, 31 Dec 2026 99:99:99 +9999999"]
        for value in junk:
            for name in ("retry-after", "retry-after-ms"):
                with self.subTest(value[:40], name=name):
                    self.assertIn(retry_after({name: value}), (None, 0))

    def test_none(self) -> None:
        self.assertIsNone(retry_after({}))


class TestAddresses(unittest.TestCase):
    """Which addresses a link from a server may lead to."""

    def test_public_ones(self) -> None:
        for address in (
            "8.8.8.8",
            "1.1.1.1",
            "2606:4700:4700::1111",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
            "2002:808:808::1",
        ):
            with self.subTest(address):
                self.assertTrue(is_public(address, True))
                self.assertTrue(is_public(address, False))

    def test_private_ones(self) -> None:
        for address in (
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "fe80::1%eth0",
            "fc00::1",
            "fd00:ec2::254",
            "fec0::1",
            "ff02::1",
            "ff0e::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:224.0.0.1",
            "::127.0.0.1",
            "::10.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::10.0.0.1",
            "2002:7f00:1::1",
            "2002:a9fe:a9fe::1",
            "2001:0:a00:1::1",
            "no address",
            "",
        ):
            with self.subTest(address):
                self.assertFalse(is_public(address, True))
                self.assertFalse(is_public(address, False))

    def test_fake_ip_proxies_pass_only_by_name(self) -> None:
        for address in ("198.18.0.1", "198.19.255.254"):
            with self.subTest(address):
                self.assertTrue(is_public(address, False))
                self.assertFalse(is_public(address, True))
        self.assertTrue(is_public("198.20.0.1", True))

    def checked(self, host: str) -> str:
        """Return the address that a link's host is fetched from, where names lead to 8.8.8.8."""

        def lookup(name: str, port: int, **options: int) -> list[Any]:
            if options.get("flags", 0) & socket.AI_NUMERICHOST:
                return numeric(name, port, **options)
            return [(0, 0, 0, "", ("8.8.8.8", port))]

        numeric = socket.getaddrinfo
        base = gpt_image2.parse_base_url("https://relay.example/v1")
        settings = gpt_image2.Settings({}, base=base, proxy=None)
        with mock.patch("socket.getaddrinfo", lookup):
            return check_host(host, 443, settings)

    def test_every_spelling_of_a_literal(self) -> None:
        for host in (
            *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.01"),
            *("017700000001", "0", "167772161", "0xa9fea9fe", "::1", "::ffff:10.0.0.1"),
            "localhost",
        ):
            with self.subTest(host), self.assertRaises(gpt_image2.Failure):
                self.checked(host)

    def test_a_public_literal_is_left_to_curl(self) -> None:
        for host in ("8.8.8.8", "134744072"):
            self.assertEqual(self.checked(host), "")

    def test_names_are_no_literals(self) -> None:
        for host in ("example.com", "1.example.com", "ä.example"):
            with self.subTest(host):
                self.assertEqual(self.checked(host), "8.8.8.8")


# ---- Memory -----------------------------------------------------------------------------------

MEASURED = """
import os, sys
child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, {script!r}, *sys.argv[1:]])
_, status, usage = os.wait4(child, 0)
with open({report!r}, "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(os.WEXITSTATUS(status))
"""  # between this process, whose own memory a child starts with, and the tool


class TestMemory(Case):
    """Memory doesn't grow with the answer."""

    def test_160_mb_of_pictures_take_no_more_than_a_small_one(self) -> None:
        small = self.peak(PICTURE, 1)
        noise = random.Random(1).getrandbits(96_000_000).to_bytes(12_000_000, "big")
        large = self.peak(PICTURE[:-12] + png_chunk(b"noIs", noise) + PICTURE[-12:], 10)
        self.assertLess(large, 64 << 20)
        self.assertLess(large, small + (8 << 20))

    def peak(self, picture: bytes, count: int) -> int:
        """Return the memory, in bytes, that the tool takes at most for so many pictures."""
        entry = [b'{"b64_json": "', b64(picture).encode(), b'"}']
        chunks = [b'{"data": [', *entry, *[b",", *entry] * (count - 1), b"]}"]
        self.serve_base(HttpReply(chunks=chunks))
        report, measured = self.tmp / "peak", self.tmp / "measured.py"
        measured.write_text(MEASURED.format(script=str(SCRIPT), report=str(report)))
        self.script = measured
        run = self.check(self.run_tool("generate", "a fox", "-n", str(count)), 0)
        self.assertEqual([path.stat().st_size for path in run.saved], [len(picture)] * count)
        self.assertEqual(run.saved[-1].read_bytes(), picture)
        return int(report.read_text()) * (1 if sys.platform == "darwin" else 1024)
