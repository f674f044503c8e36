"""Memory and disk have limits, whatever a server or a command sends; nothing breaks a reader.

Sizes are the smallest that show it: before there were limits each took over 64 MB.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import gpt_image2 as tool
from tests.case import SCRIPT, Case, Run
from tests.deferreds import BatchApi
from tests.images import png, png_chunk
from tests.server import (
    Reply,
    answer,
    b64,
    completed_event,
    event_stream,
    partial_event,
)

SMALL = png(40, 30, seed=1)
MEGABYTE = 1 << 20
MOST = 64 * MEGABYTE
IMAGE = f'{{"b64_json": "{b64(SMALL)}"}}'.encode()
# Between this process, whose own memory a child starts with, and the tool.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, {script!r}, *sys.argv[1:]])
with open({report!r}, "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def beside(*around: bytes) -> Reply:
    """Return an answer with one image and something large before or behind it."""
    before, behind = (*around, b"")[:2]
    return Reply(200, b'{%s "data": [%s]%s}' % (before, IMAGE, behind))


class LimitCase(Case):
    def measured(self, *argv: str, code: int = 0, **more: Any) -> tuple[Run, int]:
        """Run the tool; return the run and the most bytes of memory that it took."""
        report, self.script = self.tmp / "peak", self.tmp / "measured.py"
        self.script.write_text(MEASURED.format(script=str(SCRIPT), report=str(report)))
        run = self.check(self.run_tool(*argv, **more), code)
        return run, int(report.read_text()) * (1 if sys.platform == "darwin" else 1024)

    def check_memory(self, *argv: str, code: int = 0, **more: Any) -> Run:
        run, peak = self.measured(*argv, code=code, **more)
        self.assertLess(peak, MOST, f"{peak // MEGABYTE} MB")
        return run


class TestAnswers(LimitCase):
    """An image is saved whatever stands around it, and takes no more memory."""

    def test_large_images_take_no_more_than_small_ones(self) -> None:
        noise = random.Random(1).getrandbits(80_000_000).to_bytes(10_000_000, "big")
        large = SMALL[:-12] + png_chunk(b"noIs", noise) + SMALL[-12:]
        small = self.peak(SMALL)
        self.assertLess(self.peak(large), min(MOST, small + 8 * MEGABYTE))

    def peak(self, image: bytes) -> int:
        """Return the bytes that the tool takes at most for an image in each of three ways."""
        entry = b'{"b64_json": "' + b64(image).encode() + b'"}'
        in_json = Reply(200, b'{"data": [' + b",".join([entry] * 4) + b"]}")
        in_stream = event_stream(partial_event(image), completed_event(image))
        most = 0
        for reply in (in_json, in_stream, answer("/a.png")):
            api = self.serve_base(reply)
            api.put("/a.png", image)
            run, peak = self.measured("generate", "a fox", "--partial-images", "1")
            self.assertEqual(run.saved[-1].read_bytes(), image)
            most = max(most, peak)
        return most

    def test_what_stands_beside_an_image(self) -> None:
        words, deep = b'"a word",' * 300_000, b'{"a":' * 20_000 + b"1" + b"}" * 20_000
        plain = beside(b'"padding": "' + b" " * 70 * MEGABYTE + b'",').body
        for name, reply in {
            "small values": beside(b'"a": [' + b"{}," * 1_000_000 + b"1],"),
            "words behind it": beside(b"", b', "a": [' + words + b"1]"),
            "one long text": beside(b'"a": "' + b"word " * 2_000_000 + b'",'),
            "deep usage behind it": beside(b"", b', "usage": ' + deep),
            "a bomb": Reply(200, gzip.compress(plain, 9)),
            "keep-alives": event_stream(b": ping\n\n" * 700_000, completed_event(SMALL)),
            "words of the server": beside(b'"a": [' + b'{"message": "1"},' * 60_000 + b"1],"),
            "comments": event_stream(b": ping\n" * 700_000 + b"\n", completed_event(SMALL)),
            "long texts": beside(b'"log": [' + b'"%s",' % (b"a" * 200) * 4000 + b"1],"),
            "events": event_stream(b"data: {}\n\n" * 500_000, completed_event(SMALL)),
        }.items():
            with self.subTest(name):
                self.serve_base(reply)
                run = self.check_memory("generate", "a fox")
                self.assertEqual(run.saved[0].read_bytes(), SMALL)

    def test_a_percent_encoded_image(self) -> None:
        noise = random.Random(2).getrandbits(16_000_000).to_bytes(2_000_000, "big")
        large = SMALL[:-12] + png_chunk(b"noIs", noise) + SMALL[-12:]
        url = "data:image/png," + urllib.parse.quote_from_bytes(large, safe="")
        self.serve_base(answer(url))
        self.assertEqual(self.check_memory("generate", "a fox").saved[0].read_bytes(), large)

    def test_downloads(self) -> None:
        """Curls before 8.4 know no limit for a body whose length is not told."""
        endless = Reply(200, SMALL + bytes(104 * MEGABYTE), framing="close")
        bomb = Reply(200, gzip.compress(bytes(104 * MEGABYTE), 9))
        for name, reply in (("endless", endless), ("bomb", bomb)):
            with self.subTest(name):
                api = self.serve_base(answer("/a.png"))
                api.put("/a.png", reply)
                self.check_memory("generate", "a fox", code=10)
                left = [path.stat().st_size for path in self.tmp.rglob("*") if path.is_file()]
                self.assertLess(max(left), 101 * MEGABYTE)


class TestInputs(LimitCase):
    def test_a_key_command_that_prints_for_ever(self) -> None:
        self.serve_base()
        self.configure(base_url="https://relay.invalid/v1", api_key_command="yes")
        env = {"GPT_IMAGE2_BASE_URL": None, "GPT_IMAGE2_API_KEY": None}
        run = self.check_memory("generate", "a fox", code=3, env=env)
        self.assertIn("printed more than 65536 bytes", run.err)

    def test_a_long_history(self) -> None:
        path = self.state / "gpt-image-2" / "history.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"time": "2026-01-01T00:00:00Z", "model": "gpt-image-2", "prompt": "a fox " * 40}
        with path.open("w") as file:
            for number in range(100_000):
                file.write(json.dumps({**entry, "job_id": f"job-{number}"}) + "\n")
        run = self.check_memory("history", "--limit", "5", "--json")
        names = [entry["job_id"] for entry in run.json["entries"]]
        self.assertEqual(names, [f"job-{number}" for number in range(99_995, 100_000)])

    def test_large_inputs_of_a_deferred_job(self) -> None:
        noise = random.Random(3).getrandbits(88_000_000).to_bytes(11_000_000, "big")
        (self.work / "a.png").write_bytes(SMALL[:-12] + png_chunk(b"noIs", noise) + SMALL[-12:])
        line = {"prompt": "blend 1", "images": ["a.png"] * 10}
        (self.work / "jobs.jsonl").write_text(json.dumps(line))
        api = BatchApi()
        self.addCleanup(api.close)
        self.env.update(GPT_IMAGE2_BASE_URL=api.base_url, GPT_IMAGE2_API_KEY=api.key)
        self.check_memory("batch", "jobs.jsonl", "--deferred")
        images = api.lines()[0]["body"]["images"]
        self.assertEqual(len(images), 10)
        self.assertEqual(len(images[0]["image_url"]), len(images[9]["image_url"]))

    def test_half_a_surrogate_pair_is_no_text(self) -> None:
        api = self.serve_base()
        half = "x\ud83d"
        (self.work / "jobs.jsonl").write_text(json.dumps({"prompt": "a", "user": half}))
        self.check(self.run_tool("batch", "jobs.jsonl"), 2)
        for name in ("user_agent", "proxy", "model", "cacert", "output_dir", "size"):
            with self.subTest(name):
                self.configure(**{name: half})
                run = self.check(self.run_tool("generate", "x"), 3)
                self.assertEqual(len(run.err.splitlines()), 1, run.err)
        self.no_request(api)


class TestReaders(Case):
    """Random bytes at the readers: no exception but Failure."""

    def test_random_bytes(self) -> None:
        rng = random.Random(20261125)
        words: list[Any] = [
            *("b64_json", "url", "data", "error", "usage", "image", "type", "message", "code"),
            *("image_url", "result", "\ud800", "1e999", "NaN", "", "data:image/png;base64,", "%"),
            *(b64(SMALL), 10**30, -1, 1e308, None, True, "http://[", "//", "x" * 70_000),
        ]

        def value(depth: int = 0) -> Any:
            kind = rng.randrange(4) if depth < 5 else 3
            if kind == 0:
                return [value(depth + 1) for _ in range(rng.randrange(4))]
            if kind < 3:
                return {str(rng.choice(words)): value(depth + 1) for _ in range(rng.randrange(4))}
            return rng.choice(words)

        tags = [b"<svg", b" width='", b".", b"9" * 400, b"' viewBox='0 0 ", b"'>", b"</svg>", b"-"]
        path = self.work / "answer"
        for _ in range(150):
            text = json.dumps(value()).encode()
            data: list[bytes] = [
                text,
                text[: rng.randrange(1 + len(text))],
                b"data: " + text + b"\n\nevent: error\rdata:" + text[:40],
                b"".join(rng.choice(tags) for _ in range(rng.randrange(9))),
                SMALL[: rng.randrange(99)] + rng.getrandbits(400).to_bytes(50, "big"),
            ]
            for body in data:
                path.write_bytes(body)
                for salvage in (False, True):
                    reply = tool.read_reply(str(path), salvage, rng.choice((200, 400)))
                    end = tool.CurlEnd(0, rng.choice((200, 400, 503)))
                    tool.judge(end, {"retry-after": body[:20].decode("latin-1")}, reply, self.plain)
                    tool.openai_usage(reply.usage)
                    json.dumps([reply.usage, reply.words], allow_nan=False)
                tool.inspect_image(io.BytesIO(body))
                Path(self.work / "headers").write_bytes(b"HTTP/1.1 200 OK\r\n" + body)
                tool.read_headers_file(str(self.work / "headers"))

    def test_texts_that_took_minutes(self) -> None:
        """No limit by the clock: without the mending they would not end while one waits."""
        path = self.work / "answer"
        for body in (
            json.dumps({"image" * 40 + "!": "https://x.invalid/a"}),
            json.dumps({"message": "![" * 100_000, "a": "<img " * 40_000}),
            json.dumps({"error": {"code": list(range(10_000, 90_000))}}),
            '{"a":"' + "\\\\" * 5_000_000 + '"}',
            "[" * 90 + '{"error":' * 9 + "1" + "}" * 9 + "]" * 90,
        ):
            path.write_text(body)
            self.assertEqual(tool.read_reply(str(path)).images, ())
        (self.work / "a.jpg").write_bytes(b"\xff\xd8" + b"\xff\xe1\x00\x02" * 3_000_000)
        with open(self.work / "a.jpg", "rb") as file:
            self.assertFalse(tool.inspect_image(file).whole)  # type: ignore[union-attr]

    @property
    def plain(self) -> tool.Settings:
        args = tool.Args()
        return tool.resolve_settings(args, tool.Console(quiet=True))
