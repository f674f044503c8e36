"""The sandbox: placeholders without key, cost or network, by the real way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from base64 import b64decode
from pathlib import Path
from typing import Any
from unittest import mock

import gpt_image2
from tests.case import Case, Run, SystemCase
from tests.images import png, read_png
from tests.server import KEY, data_url

NOBODY = "http://127.0.0.1:9"


class TestSandboxFlag(Case):
    """`--sandbox` starts it for one call."""

    def setUp(self) -> None:
        super().setUp()
        (self.work / "fox.png").write_bytes(png(640, 480))

    def sandbox(self, words: str, code: int = 0) -> Run:
        return self.check(self.run_tool(*words.split(), "--sandbox"), code)

    def test_images_of_the_size_asked_several_and_partial_ones_too(self) -> None:
        for words, size in (
            ("generate fox --size portrait", (672, 1008)),
            ("edit fox.png blue --size 1024x768", (1024, 768)),
            ("generate fox --provider openai-hk --size 1280x720", (1280, 720)),  # by a link
            ("generate fox --stream --size 1280x720", (1280, 720)),
        ):
            with self.subTest(words):
                [path] = self.sandbox(words).saved
                image = read_png(path.read_bytes())
                self.assertEqual((image.width, image.height), size)
                self.assertRegex(path.name, r"\A\d{4}-\d\d-\d\d-[0-9a-f]{8}-sandbox\.png\Z")
                path.unlink()
        run = self.sandbox("generate fox --n 2 --partial-images 1 -o den.png")
        names = ["den-1.partial-1.png", "den-1.png", "den-2.partial-1.png", "den-2.png"]
        self.assertEqual(self.listing(), [*names, "fox.png"])
        first, second = (path.read_bytes() for path in run.saved)
        self.assertNotEqual(first, second)

    def test_whatever_else_is_set_it_says_so_and_leaves_nothing_behind(self) -> None:
        proxies = ("http_proxy", "HTTPS_PROXY", "ALL_PROXY", "GPT_IMAGE2_PROXY")
        self.env.update(dict.fromkeys(proxies, NOBODY), OPENAI_API_KEY=KEY)
        for base in ("https://no.such.example", NOBODY):
            with self.subTest(base):
                run = self.sandbox(f"generate fox --size portrait --base-url {base}")
                self.assertRegex(run.err, r"(?m)^POST http://127\.0\.0\.1:\d+/v1/images")
                self.assertRegex(run.err, r"\d+ tokens, sandbox: no cost\n\Z")
                run = self.sandbox(f"generate fox --json --size portrait --base-url {base}")
                self.assertEqual(run.err, "")
                self.assertEqual((run.json["sandbox"], run.json["cost"]), (True, None))
        self.assertNotRegex(str(self.listing(self.state)), "history.jsonl|jobs/")
        self.assertIn("200", self.sandbox("config --check").out)

    def test_it_refuses_what_the_provider_refuses(self) -> None:
        for words, exit_code, code in (
            ("generate fox --param colour=7", 1, "unknown_parameter"),
            ("edit fox.png blue --param colour=7", 1, "unknown_parameter"),
            ("generate fox --param size=512x512", 1, "invalid_value"),
            ("generate fox --size 1000x1000", 2, "usage"),  # never sent
        ):
            with self.subTest(words):
                error = self.sandbox(f"{words} --json", exit_code).json["error"]
                self.assertEqual(error["code"], code)
        self.sandbox("generate fox -s portrait --param colour=7 --provider generic")


class TestSandboxServer(SystemCase):
    """`sandbox` serves pipelines until it is stopped."""

    def start(self, *argv: str) -> str:
        """Start the server, and return its base URL."""
        self.process = self.start_tool("sandbox", "--port", "0", *argv)
        self.hear(self.process, "Ctrl-C")
        assert self.process.stdout
        line = self.process.stdout.readline().decode()
        found = re.search(r"http://127\.0\.0\.1:\d+/v1$", line)
        assert found, line
        return found[0]

    def curl(self, *argv: str) -> bytes:
        return subprocess.check_output(["curl", "-q", "-s", *argv], env=self.env)

    def post(self, base: str, **fields: Any) -> Any:
        body = ["-H", "Content-Type: application/json", "-d", json.dumps(fields)]
        return json.loads(self.curl(*body, f"{base}/images/generations"))

    def test_by_plain_curl(self) -> None:
        base = self.start()
        for flag, body, path in (
            *(("-d", body, "/images/generations") for body in ("{", "[]", '{"model": "m"}')),
            *(("-F", "prompt=a fox", "/images/edits"), ("-d", '{"prompt": "a"}', "/no/such")),
        ):
            self.assertIn("error", json.loads(self.curl(flag, body, base + path)), body)
        error = self.post(base, prompt="a fox", colour="red")["error"]
        self.assertEqual((error["code"], error["param"]), ("unknown_parameter", "colour"))
        [item] = self.post(base, model="gpt-image-2", prompt="a fox", size="1280x720")["data"]
        image = read_png(b64decode(item["b64_json"]))
        self.assertEqual((image.width, image.height), (1280, 720))
        # Nearly white rows, in groups: SANDBOX, the size, the prompt.
        white = "".join("#" if max(row[1::3]) > 200 else " " for row in image.rows)
        self.assertEqual(len(white.split()), 3)
        listed = [model["id"] for model in json.loads(self.curl(f"{base}/models"))["data"]]
        self.assertIn("gpt-image-2", listed)

    def test_what_curl_can_send(self) -> None:
        base, url = self.start(), {"image_url": data_url(png(1040, 832))}
        edit = json.dumps({"prompt": "blue", "images": [url], "model": "gpt-image-2"})
        chunked = ("-H", "Transfer-Encoding: chunked", "-d", edit)
        for sent in (("-d", edit), chunked):
            [item] = json.loads(self.curl(*sent, f"{base}/images/edits"))["data"]
            self.assertEqual(read_png(b64decode(item["b64_json"])).width, 1040)
        odd = '{"prompt": "x", "%s": %s}'
        for name, more in {
            "length": ("-H", "Content-Length: many", "-d", "{}"),
            "below 0": ("-H", "Content-Length: -5", "-d", "{}"),
            "deep": ("-d", "[" * 100_000),
            "UTF-16": ("-d", "\xff\xfe{"),
            "digits": ("-d", odd % ("n", "1" * 5000)),
            "partials": ("-d", odd % ("partial_images", "1e99")),
            "list": ("-d", odd % ("size", "[1]")),
            "images": ("-d", odd % ("images", '[{"image_url": "data:,x"}]')),
            "boundary": ("-H", "Content-Type: multipart/form-data", "-d", "x"),
        }.items():
            with self.subTest(name):
                error = json.loads(self.curl("-m", "9", *more, f"{base}/images/edits"))["error"]
                self.assertEqual(error["type"], "invalid_request_error")
                self.assertRegex(error["code"], "^(invalid|missing)_[a-z]+$")
                self.assertNotIn("invalid", error["param"])

    def test_by_the_tool(self) -> None:
        base = self.start("--provider", "openai-hk")
        argv = ["generate", "a fox", "--base-url", base, "--size", "portrait"]
        run = self.check(self.run_tool(*argv), 0)
        self.assertEqual(read_png(run.saved[0].read_bytes()).width, 672)

    def test_where_it_listens_and_how_it_ends(self) -> None:
        for number, codes in ((signal.SIGINT, (0, 130)), (signal.SIGTERM, (0, 143))):
            with self.subTest(number):
                port = self.start().rpartition(":")[2][:-3]
                taken = self.check(self.run_tool("sandbox", "--port", port), 2)
                self.assertRegex(taken.err, rf"\Agpt-image2: .*{port}.*\n\Z")
                if os.path.exists("/proc/net/tcp"):
                    table = Path("/proc/net/tcp").read_text(encoding="ascii")
                    addresses = re.findall(rf"\d+: (\w+):{int(port):04X} 0+:0000 0A", table)
                    self.assertEqual(addresses, ["0100007F"])
                self.process.send_signal(number)
                run = self.finish(self.process)
                self.assertIn(run.code, codes, run)
                self.assertEqual(len(run.err.splitlines()), 1, run.err)

    def test_what_it_reports(self) -> None:
        """Each request, and tokens as the model has them: 400 for a portrait of low quality."""
        base = self.start("--provider", "generic")
        usage = self.post(base, prompt="a fox", model="gpt-image-1", quality="low", n=2)["usage"]
        self.assertEqual((usage["output_tokens"], usage["total_tokens"]), (544, 548))
        self.hear(self.process, '"POST /v1/images/generations HTTP/1.1" 200')

    def test_json(self) -> None:
        process = self.start_tool("sandbox", "--json")
        self.hear(process, "Ctrl-C")
        process.send_signal(signal.SIGTERM)
        run = self.finish(process)
        self.assertEqual((run.code, run.json["command"]), (143, "sandbox"))
        self.assertRegex(run.json["base_url"], r"^http://127\.0\.0\.1:\d+/v1$")

    def test_delay(self) -> None:
        server = gpt_image2.make_sandbox(gpt_image2.PROVIDERS["generic"], 0, delay=7)
        self.addCleanup(server.server_close)
        with mock.patch("gpt_image2.time.sleep") as sleep:
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            self.post(f"http://127.0.0.1:{server.server_port}/v1", prompt="a fox")
            thread.join()
        sleep.assert_called_once_with(7)
