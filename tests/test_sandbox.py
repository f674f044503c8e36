"""The sandbox: pictures without key, cost or network, by the real way."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import unittest
from base64 import b64decode
from pathlib import Path
from typing import Any

from tests.pictures import Png, png, read_png
from tests.support import KEY, Case, Run


def lines_of_writing(picture: Png) -> int:
    """Return how many lines of nearly white writing a picture holds."""
    bright = "".join("#" if max(row[1::3]) > 200 else " " for row in picture.rows)
    return len(bright.split())


class TestSandboxFlag(Case):
    """`--sandbox` on generate and edit."""

    def setUp(self) -> None:
        super().setUp()
        (self.work / "fox.png").write_bytes(png(640, 480))

    def sandbox(self, *argv: str, code: int = 0) -> Run:
        """Run the tool with --sandbox."""
        return self.check(self.run_tool(*argv, "--sandbox"), code)

    def test_a_picture_of_the_size_asked(self) -> None:
        for words, size in (
            ("generate fox --size 1280x720", (1280, 720)),
            ("generate fox --size portrait", (672, 1008)),
            ("edit fox.png blue --size 1024x768", (1024, 768)),
        ):
            with self.subTest(words):
                [path] = self.sandbox(*words.split()).saved
                picture = read_png(path.read_bytes())
                self.assertEqual((picture.width, picture.height), size)
                self.assertGreater(len(set(picture.rows)), 20)  # there is something to look at
                self.assertRegex(path.name, r"\A\d{4}-\d\d-\d\d-[0-9a-f]{8}-sandbox\.png\Z")

    def test_several_pictures_under_a_name(self) -> None:
        run = self.sandbox("generate", "fox", "--n", "2", "-o", "den.png")
        self.assertEqual([path.name for path in run.saved], ["den-1.png", "den-2.png"])
        first, second = (path.read_bytes() for path in run.saved)
        self.assertNotEqual(first, second)

    def test_the_document_says_so(self) -> None:
        document = self.sandbox("generate", "fox", "--json").json
        self.assertIs(document["sandbox"], True)
        self.assertIsNone(document["cost"])
        self.assertEqual(document["images"][0]["width"], 1024)

    def test_it_leaves_nothing_behind(self) -> None:
        self.sandbox("generate", "fox")
        self.assertEqual(self.jobs(), [])
        self.assertNotIn("history.jsonl", " ".join(self.listing(self.state)))

    def test_whatever_else_is_set(self) -> None:
        nobody = "http://127.0.0.1:9"
        proxies = ("http_proxy", "HTTPS_PROXY", "ALL_PROXY")
        self.env.update(dict.fromkeys(proxies, nobody))
        self.env.update(OPENAI_API_KEY=KEY, GPT_IMAGE2_PROXY=nobody)
        for base in ("https://no.such.example", "http://relay.example", nobody):
            with self.subTest(base):
                run = self.sandbox("generate", "fox", "--base-url", base)
                self.assertEqual(len(run.saved), 1)
                self.assertRegex(run.err, r"(?m)^POST http://127\.0\.0\.1:\d+/v1/images")

    def test_openai_refuses_unknown_fields(self) -> None:
        run = self.sandbox("generate", "fox", "--param", "colour=7", "--json", code=1)
        self.assertEqual(run.json["error"]["code"], "unknown_parameter")
        self.assertIn("colour", run.json["error"]["message"])
        self.sandbox("edit", "fox.png", "blue", "--param", "colour=7", code=1)
        self.sandbox("generate", "fox", "--param", "colour=7", "--provider", "generic")

    def test_openai_refuses_illegal_sizes(self) -> None:
        run = self.sandbox("generate", "fox", "--param", "size=512x512", "--json", code=1)
        self.assertEqual(run.json["error"]["code"], "invalid_value")

    def test_openai_hk_answers_links(self) -> None:
        argv = ["generate", "fox", "--provider", "openai-hk", "--size", "1280x720"]
        [path] = self.sandbox(*argv).saved
        self.assertEqual(read_png(path.read_bytes()).width, 1280)

    def test_streaming(self) -> None:
        run = self.sandbox("generate", "fox", "--partial-images", "1", "--size", "1280x720")
        [path] = run.saved
        self.assertEqual(read_png(path.read_bytes()).width, 1280)
        [partial] = re.findall(r"(?m)^Partial: (.+)$", run.err)
        self.assertTrue(os.path.isfile(partial))

    def test_config_check(self) -> None:
        self.assertIn("200", self.sandbox("config", "--check").out)

    def test_bad_input_is_refused_as_ever(self) -> None:
        run = self.sandbox("generate", "fox", "--size", "1000x1000", code=2)
        self.assertEqual((run.out, self.listing()), ("", ["fox.png"]))


class TestSandboxServer(Case):
    """`sandbox`: a server for pipelines."""

    def start(self, *argv: str) -> str:
        """Start the server, and return its base URL."""
        self.process = self.start_tool("sandbox", "--port", "0", *argv)
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], 20)
        self.assertTrue(ready, "the server said nothing")
        found = re.search(
            rb"http://127\.0\.0\.1:\d+/v1", os.read(self.process.stdout.fileno(), 999)
        )
        assert found
        return found[0].decode()

    def curl(self, *argv: str) -> bytes:
        """Run curl, and return what it printed."""
        command = ["curl", "-q", "-s", "--max-time", "20", *argv]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=self.env, check=True)
        return done.stdout

    def post(self, base: str, **fields: Any) -> Any:
        """POST a generation, and return the answer's JSON."""
        body = ["-H", "Content-Type: application/json", "-d", json.dumps(fields)]
        return json.loads(self.curl(*body, f"{base}/images/generations"))

    def test_by_plain_curl(self) -> None:
        base = self.start()
        answer = self.post(base, model="gpt-image-2", prompt="a fox", size="1280x720", n=2)
        pictures = [read_png(b64decode(item["b64_json"])) for item in answer["data"]]
        self.assertEqual([(p.width, p.height) for p in pictures], [(1280, 720)] * 2)
        self.assertEqual(lines_of_writing(pictures[0]), 3)  # SANDBOX, the size, the prompt
        listed = [model["id"] for model in json.loads(self.curl(f"{base}/models"))["data"]]
        self.assertIn("gpt-image-2", listed)
        error = self.post(base, model="gpt-image-2", prompt="a fox", colour="red")["error"]
        self.assertEqual((error["code"], error["param"]), ("unknown_parameter", "colour"))
        self.assertIn("error", list(self.post(base, model="gpt-image-2")))
        stream = self.curl(
            "-d", '{"prompt": "a fox", "stream": true}', f"{base}/images/generations"
        )
        self.assertIn(b'"type": "image_generation.completed"', stream.replace(b'":"', b'": "'))

    def test_by_the_tool(self) -> None:
        (self.work / "in.png").write_bytes(png(8, 8))
        base = self.start()
        for words in (["generate", "a fox"], ["edit", "in.png", "a fox"]):
            with self.subTest(words):
                run = self.check(self.run_tool(*words, "--base-url", base, "--size", "1K"), 0)
                self.assertEqual(read_png(run.saved[0].read_bytes()).width, 1024)
        self.check(self.run_tool("config", "--check", "--base-url", base), 0)

    def test_as_another_provider(self) -> None:
        base = self.start("--provider", "openai-hk")
        url = self.post(base, model="gpt-image-2", prompt="a fox")["data"][0]["url"]
        self.assertEqual(read_png(self.curl(url)).width, 1024)

    def test_rubbish_is_answered(self) -> None:
        base = self.start()
        for argv, path in (
            (["-d", "{"], "/images/generations"),
            (["-d", "[]"], "/images/generations"),
            (["-F", "prompt=a fox"], "/images/edits"),
            (["-d", "{}"], "/no/such"),
        ):
            with self.subTest(argv=argv, path=path):
                self.assertIn("error", list(json.loads(self.curl(*argv, base + path))))
        self.assertIn("data", list(self.post(base, prompt="a fox", size="1024x1024")))

    @unittest.skipUnless(os.path.exists("/proc/net/tcp"), "Linux only")
    def test_it_listens_on_loopback_only(self) -> None:
        port = int(self.start().rpartition(":")[2][:-3])
        table = Path("/proc/net/tcp").read_text(encoding="ascii")
        addresses = re.findall(rf"\d+: (\w+):{port:04X} 0+:0000 0A", table)
        self.assertEqual(addresses, ["0100007F"])

    def test_ctrl_c_ends_it_quietly(self) -> None:
        hears = signal.signal(signal.SIGINT, signal.default_int_handler)  # deaf in background jobs
        self.addCleanup(signal.signal, signal.SIGINT, hears)
        for number, codes in ((signal.SIGINT, (0, 130)), (signal.SIGTERM, (0, 143))):
            with self.subTest(number):
                self.start()
                self.process.send_signal(number)
                run = self.finish(self.process, timeout=20)
                self.assertIn(run.code, codes, run)
                self.assertNotIn("Traceback", run.err)

    def test_a_port_that_is_taken(self) -> None:
        port = self.start().rpartition(":")[2][:-3]
        run = self.run_tool("sandbox", "--port", port, timeout=20)
        self.assertNotEqual(run.code, 0)
        self.assertRegex(run.err, rf"\Agpt-image2: .*{port}.*\n\Z")
