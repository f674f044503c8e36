"""The harness itself, proved on a real curl: what it records, how it fails, what it notices."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zlib
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.nursery import Nursery, Nursling
from tests.pictures import gif, jpeg, png, png_chunk, png_file, read_png, svg, webp
from tests.support import (
    ROOT,
    SCRIPT,
    Api,
    Case,
    Child,
    Nurseries,
    Reply,
    Request,
    Run,
    answer,
    clean_environment,
    completed_event,
    event_stream,
    file_reply,
    hk_answer,
    in_pieces,
    json_reply,
    models,
    nodekey_answer,
    page,
    parse_multipart,
    partial_event,
    ranged,
    refusal,
    stop,
)


class Fetched(NamedTuple):
    """What one curl brought."""

    code: int
    status: str
    body: bytes


class CurlCase(Case):
    """A case that talks to the server by curl alone."""

    def start_curl(self, *argv: str) -> subprocess.Popen[bytes]:
        """Start a curl that writes the body to stdout, and the status after it."""
        command = ["curl", "-q", "-sN", "-w", "%{http_code}", "--max-time", "20", *argv]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, env=self.env, cwd=self.work)
        self.addCleanup(stop, process)
        return process

    def curl(self, *argv: str) -> Fetched:
        """Run curl to its end."""
        return fetched(self.start_curl(*argv))

    def post(self, api: Api, *argv: str) -> Fetched:
        """POST a small JSON body."""
        return self.curl("-d", '{"prompt": "a fox"}', *argv, api.base_url + "/images/generations")


def fetched(process: subprocess.Popen[bytes]) -> Fetched:
    """Wait for a curl to end, and return what it brought."""
    out, _ = process.communicate(timeout=30)
    return Fetched(process.returncode, out[-3:].decode(), out[:-3])


class TestRequests(CurlCase):
    """What the server records."""

    def test_records_method_target_headers_and_body(self) -> None:
        api = self.serve(answer(b"x"))
        url = api.base_url + "/images/generations?a=b%20c"
        self.curl("-H", "X-One: 1", "-H", "x-one: 2", "--data-binary", '{"prompt": "ä"}', url)
        (request,) = api.posts
        self.assertEqual(request.target, "/v1/images/generations?a=b%20c")
        self.assertEqual(request.path, "/v1/images/generations")
        self.assertEqual(request.json, {"prompt": "ä"})
        self.assertEqual(request.headers["x-one"], "1, 2")
        self.assertEqual(request.header_list[-4:-2], [("X-One", "1"), ("x-one", "2")])

    def test_parses_a_form_as_curl_sends_it(self) -> None:
        api = self.serve(answer(b"x"))
        text = 'a "fox";type=x\r\n--\n'
        (self.work / "p.txt").write_bytes(text.encode())
        (self.work / "a b.png").write_bytes(png(3, 2))
        image = 'image[]=@"a b.png";filename="image.png";type=image/png'
        self.curl("-F", "prompt=<p.txt", "-F", image, "-F", "n=2", api.base_url + "/images/edits")
        prompt, picture, _ = api.posts[0].parts
        self.assertEqual((prompt.text, prompt.filename, prompt.content_type), (text, None, None))
        self.assertEqual((picture.name, picture.filename), ("image[]", "image.png"))
        self.assertEqual((picture.content_type, picture.body), ("image/png", png(3, 2)))
        self.assertEqual(api.posts[0].fields, {"prompt": text, "n": "2"})
        self.assertEqual(api.posts[0].uploads, [picture])

    def test_refuses_a_malformed_form(self) -> None:
        head = b'--B\r\nContent-Disposition: form-data; name="a"\r\n'
        for body in (
            b"",
            head + b"\r\nx",
            head + b"\r\nx\r\n--B--",
            b"x" + head + b"\r\n--B--\r\n",
        ):
            with self.subTest(body=body), self.assertRaises(ValueError):
                parse_multipart("multipart/form-data; boundary=B", body)
        whole = head + b"\r\nx\r\n--B--\r\n"
        self.assertEqual(parse_multipart("multipart/form-data; boundary=B", whole)[0].body, b"x")
        with self.assertRaises(ValueError):
            parse_multipart("application/json", whole)

    def test_takes_a_large_body_after_100_continue(self) -> None:
        api = self.serve(answer(b"x"))
        (self.work / "large").write_bytes(b"x" * 20_000_000)
        began = time.monotonic()
        expect = ("--expect100-timeout", "15", "-H", "Expect: 100-continue")
        self.curl(*expect, "--data-binary", "@large", api.base_url)
        self.assertLess(time.monotonic() - began, 10)
        self.assertEqual(len(api.posts[0].body), 20_000_000)

    def test_waits_for_the_request_that_a_test_names(self) -> None:
        api = self.serve(answer(b"1"), answer(b"2"))
        processes = [self.start_curl("-d", str(i), api.base_url) for i in range(2)]
        api.wait_for_request(2)
        self.assertEqual(sorted(request.body for request in api.posts), [b"0", b"1"])
        self.assertEqual([fetched(process).status for process in processes], ["200", "200"])
        with self.assertRaisesRegex(AssertionError, "no request 3 within"):
            api.wait_for_request(3, timeout=0)

    def test_keeps_apart_what_was_cut_while_it_was_sent(self) -> None:
        api = self.serve()
        with socket.create_connection(("127.0.0.1", api.port)) as client:
            client.sendall(b"POST /v1 HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf")
        self.wait_until(lambda: api.incomplete)
        self.assertEqual((api.incomplete[0].body, api.posts), (b"half", []))


class TestReplies(CurlCase):
    """What the server does to a client."""

    def test_misbehaves_as_told(self) -> None:
        body = Reply(body=b"0123456789")
        cases: dict[str, tuple[Reply, int, str, bytes]] = {
            "whole": (body, 0, "200", b"0123456789"),
            "in pieces": (in_pieces(body, 3), 0, "200", b"0123456789"),
            "nothing": (Reply(framing="chunked"), 0, "200", b""),
            "chunked": (in_pieces(body, 3)._replace(framing="chunked"), 0, "200", b"0123456789"),
            "cut": (body._replace(cut=4), 18, "200", b"0123"),
            "cut while chunked": (body._replace(cut=4, framing="chunked"), 18, "200", b"0123"),
            "cut unnoticed": (body._replace(cut=4, framing="close"), 0, "200", b"0123"),
            "too little": (body._replace(content_length=11), 18, "200", b"0123456789"),
            "silent": (Reply(silent=True), 52, "000", b""),
            "reset": (Reply(reset=True), 56, "000", b""),
            "reset midway": (body._replace(cut=4, reset=True), 56, "200", b"0123"),
            "garbage": (Reply(raw=b"\x00\x01garbage"), 1, "000", b""),
            "by hand": (Reply(raw=b"HTTP/1.0 299 Odd\r\n\r\n", chunks=[b"x"]), 0, "299", b"x"),
            "gateway": (page(524, "timed out")._replace(body=b"<p>"), 0, "524", b"<p>"),
        }
        api = self.serve(*(reply for reply, *_ in cases.values()))
        for name, (_, *expected) in cases.items():
            with self.subTest(name):
                self.assertEqual(list(self.post(api)), expected)

    def test_huge_headers_are_too_much_for_curl(self) -> None:
        api = self.serve(Reply(headers=[("X-Huge", "x" * 2_000_000)]))
        self.assertNotEqual(self.post(api).code, 0)

    def test_answers_early_without_reading(self) -> None:
        api = self.serve(refusal(413, None, "too large")._replace(early=True))
        (self.work / "large").write_bytes(b"x" * 20_000_000)
        self.assertEqual(self.post(api, "--data-binary", "@large", "-H", "Expect:").status, "413")
        self.assertEqual(api.posts[0].body, b"")

    def test_holds_an_answer_until_told(self) -> None:
        go = threading.Event()
        api = self.serve(answer(b"x")._replace(before=go))
        process = self.start_curl("-d", "{}", api.base_url)
        api.wait_for_request(1)
        self.assertIsNone(process.poll())
        go.set()
        self.assertEqual((fetched(process).status, process.returncode), ("200", 0))

    def test_holds_in_the_middle_and_tells_when(self) -> None:
        there, go = threading.Event(), threading.Event()
        api = self.serve(Reply(chunks=[b"one", there.set, go, b"two"]))
        process = self.start_curl("-d", "{}", api.base_url)
        self.assertTrue(there.wait(20))
        assert process.stdout
        self.assertEqual(process.stdout.read(3), b"one")
        go.set()
        self.assertEqual(fetched(process).body, b"two")

    def test_closing_lets_go_of_everybody(self) -> None:
        api = self.serve(answer(b"x")._replace(before=threading.Event()))
        process = self.start_curl("-d", "{}", api.base_url)
        api.wait_for_request(1)
        api.close()
        self.assertEqual((fetched(process).code, api.faults), (52, []))

    def test_serves_files_by_range_and_by_turns(self) -> None:
        api = self.serve()
        picture = png(8, 8)
        api.files["/a.png"] = [ranged(picture, cut=20), ranged(picture)]
        url = api.origin + "/a.png"
        self.assertEqual(self.curl("-o", "a.png", url).code, 18)
        self.assertEqual(self.curl("-o", "a.png", "-C", "-", url + "?signed=1").status, "206")
        self.assertEqual((self.work / "a.png").read_bytes(), picture)
        self.assertEqual(api.gets[1].headers["range"], "bytes=20-")
        self.assertEqual(self.curl(api.put("/b.png", picture)).body, picture)
        self.assertEqual(self.curl(api.origin + "/c.png").status, "404")
        self.assertEqual(self.curl("-I", api.origin + "/b.png").status, "200")

    def test_answers_by_function(self) -> None:
        def echo(request: Request) -> Reply:
            return json_reply({"got": request.json["prompt"]})

        api = self.serve(otherwise=echo)
        self.assertEqual([self.post(api).body for _ in range(2)], [b'{"got": "a fox"}'] * 2)


class TestFaults(CurlCase):
    """What the server doesn't let pass."""

    def faults(self, api: Api) -> str:
        """Return what the check at the end of a test says."""
        api.close()
        with self.assertRaises(AssertionError) as caught:
            api.check()
        return str(caught.exception)

    def test_an_unscripted_post(self) -> None:
        api = Api()
        self.assertEqual(self.post(api).status, "400")
        self.assertIn("unscripted POST /v1/images/generations", self.faults(api))

    def test_a_reply_that_nobody_asked_for(self) -> None:
        self.assertIn("1 scripted replies were not asked for", self.faults(Api(answer(b"x"))))

    def test_a_file_asked_for_too_often(self) -> None:
        api = Api()
        api.files["/v1/models"] = [models("gpt-image-2")]
        self.assertEqual(self.curl(api.base_url + "/models").status, "200")
        self.assertEqual(self.curl(api.base_url + "/models").status, "404")
        self.assertIn("no more replies for GET /v1/models", self.faults(api))

    def test_a_script_that_fails(self) -> None:
        def script(request: Request) -> Reply:
            raise FileNotFoundError("of the test")

        api = Api(script)
        self.assertEqual(self.post(api).code, 52)
        self.assertIn("FileNotFoundError: of the test", self.faults(api))

    def test_a_second_request_in_the_first(self) -> None:
        api = Api(answer(b"x"))
        with socket.create_connection(("127.0.0.1", api.port)) as client:
            client.sendall(
                b"POST /v1 HTTP/1.1\r\nContent-Length: 0\r\n\r\nPOST /v2 HTTP/1.1\r\n\r\n"
            )
            client.shutdown(socket.SHUT_WR)
            self.wait_until(lambda: api.faults)
        self.assertIn("sent after the end of POST /v1", self.faults(api))

    def test_what_is_not_http(self) -> None:
        api = Api()
        self.assertEqual(self.curl(api.origin.replace("http:", "https:")).code, 35)
        self.assertIn("a TLS handshake", self.faults(api))

    def test_all_of_it_is_left_to_the_test_that_says_so(self) -> None:
        api = self.serve(answer(b"1"), answer(b"2"), strict=False)
        self.assertEqual(self.post(api).status, "200")


class TestAnswers(unittest.TestCase):
    """The documents that servers send."""

    def test_pictures_go_in_as_the_style_says(self) -> None:
        picture = b"\xfb\xff\x00 picture"
        for style, item in {
            "b64_json": {"b64_json": "+/8AIHBpY3R1cmU="},
            "data": {"b64_json": "data:image/png;base64,+/8AIHBpY3R1cmU="},
            "url": {"url": "data:image/png;base64,+/8AIHBpY3R1cmU="},
            "urlsafe": {"b64_json": "-_8AIHBpY3R1cmU"},
            "wrapped": {"b64_json": "+/8AIHBpY3R1cmU=\n"},
            "blanks": {"b64_json": "+/8AIHBpY3R1cmU=", "url": "", "revised_prompt": ""},
        }.items():
            with self.subTest(style):
                self.assertEqual(parsed(answer(picture, style=style))["data"], [item])

    def test_the_rest_is_as_each_server_has_it(self) -> None:
        self.assertEqual(parsed(answer(b"x"))["usage"]["total_tokens"], 281)
        self.assertNotIn("usage", parsed(answer(b"x", usage={})))
        self.assertEqual(parsed(answer(size="8x8"))["size"], "8x8")
        self.assertEqual(parsed(answer(b"x", revised_prompt="y"))["data"][0]["revised_prompt"], "y")
        self.assertEqual(parsed(hk_answer("https://h/a"))["data"], [{"url": "https://h/a"}])
        self.assertEqual(parsed(nodekey_answer(b"x"))["usage"]["completion_tokens"], 275)
        refused = parsed(
            refusal(400, "moderation_blocked", "no", type="image_generation_user_error")
        )
        self.assertEqual(refused["error"]["code"], "moderation_blocked")

    def test_events_are_framed(self) -> None:
        pause = threading.Event()
        events = partial_event(b"x"), pause, completed_event(b"y", usage={}), "[DONE]"
        chunks = list(event_stream(*events).chunks)
        self.assertEqual(chunks[1:2] + chunks[3:], [pause, b"data: [DONE]\n\n"])
        start = b'event: image_generation.partial_image\ndata: {"type": "image_generation.partial_'
        assert isinstance(chunks[0], bytes)
        self.assertTrue(chunks[0].startswith(start) and chunks[0].endswith(b"}\n\n"), chunks[0])


def parsed(reply: Reply) -> Any:
    """Return a reply's JSON."""
    return Request("", "", [], {}, reply.body).json


class TestTheCase(Case):
    """The test case: its runs, its environment, its end."""

    def tool(self, source: str) -> None:
        """Let a small script stand for the tool."""
        path = self.tmp / "tool.py"
        path.write_text("import os, sys, time\n" + source, encoding="utf-8")
        self.script = path

    def test_a_run_tells_everything(self) -> None:
        self.tool("print('Saved: /a b/\\u00fc.png (3 KB)', sys.stdin.read()); sys.exit('no')")
        run = self.check(self.run_tool("generate", Path("x"), stdin="hello"), 1)
        self.assertEqual((run.argv, run.code, run.err), (["generate", "x"], 1, "no\n"))
        self.assertEqual((run.out, run.saved), ("Saved: /a b/ü.png (3 KB) hello\n", []))
        run = run._replace(raw_out=b"Saved: /a (b)/\xff (3 KB).png (12 KB)\nSaved: /c (1 KB)\n")
        self.assertEqual(run.saved, [Path("/a (b)/\udcff (3 KB).png"), Path("/c")])
        self.assertEqual(run._replace(raw_out=b'{"ok": true}').json, {"ok": True})

    def test_a_failed_check_tells_the_whole_story(self) -> None:
        self.tool("sys.exit('Traceback, and no picture')")
        api = self.serve()
        for code, first in ((0, "exit code 1, not 0"), (1, "a traceback")):
            with self.assertRaises(AssertionError) as caught:
                self.check(self.run_tool("a fox"), code)
            for text in (
                first,
                "$ gpt_image2.py 'a fox'",
                "no picture",
                f"no request at {api.origin}",
            ):
                self.assertIn(text, str(caught.exception))

    def test_the_environment_is_clean(self) -> None:
        api = self.serve_base()
        self.tool("print(sorted(os.environ.items())); print(os.getcwd())")
        run = self.run_tool(env={"HOME": None, "EXTRA": "1"})
        self.assertNotIn("'HOME'", run.out)
        for text in ("('EXTRA', '1')", api.key, api.base_url, str(self.state), str(self.work)):
            self.assertIn(text, run.out)
        self.assertEqual([name for name in self.env if name.lower().endswith("_proxy")], [])

    def test_a_started_tool_is_finished_or_stopped(self) -> None:
        self.tool("print('up', flush=True); time.sleep(60)")
        with self.assertRaisesRegex(AssertionError, "no end within 0.5 s"):
            self.run_tool(timeout=0.5)
        process = self.start_tool()
        assert process.stdout
        self.assertEqual(process.stdout.readline(), b"up\n")
        process.terminate()
        self.assertEqual(self.finish(process).code, -15)

    def test_time_can_fly(self) -> None:
        self.tool("""
began = time.monotonic()
time.sleep(30)
try:
    import subprocess
    subprocess.run(["sleep", "60"], stdout=subprocess.PIPE, timeout=30)
except subprocess.TimeoutExpired:
    print(time.monotonic() - began)
""")
        self.hurry(100)
        began = time.monotonic()
        passed = float(self.check(self.run_tool(), 0).out)
        self.assertGreaterEqual(passed, 60)
        self.assertLess(time.monotonic() - began, 20)

    def test_a_launcher_starts_the_tool(self) -> None:
        self.tool("print(os.environ['EXTRA'], sys.argv[1:])")
        self.launcher = ["env", "EXTRA=1"]
        run = self.check(self.run_tool("a fox"), 0)
        self.assertEqual((run.out, run.argv), ("1 ['a fox']\n", ["a fox"]))

    def test_files_and_jobs_are_listed(self) -> None:
        job = self.state / "gpt-image-2" / "jobs" / "1"
        job.mkdir(parents=True)
        (self.work / ".a.part").touch()
        self.assertEqual((self.jobs(), self.listing()), ([job], [".a.part"]))
        self.assertEqual(self.listing(self.config), [])
        self.assertEqual(self.configure(model="m").stat().st_mode & 0o777, 0o600)
        self.assertEqual(self.listing(self.config), ["gpt-image-2/config.json"])

    def test_nothing_is_left_behind(self) -> None:
        class Untidy(Case):
            def runTest(self) -> None:
                left.append(self.tmp)
                children.append(self.start_tool())
                (self.work / "locked" / "inner").mkdir(parents=True)
                os.symlink("/", self.work / "locked" / "root")
                (self.work / "locked").chmod(0o500)
                self.work.chmod(0)
                self.serve(answer(b"x"))

        left: list[Path] = []
        children: list[Child] = []
        self.tool("time.sleep(60)")
        Untidy.script = self.script
        result = unittest.TestResult()
        Untidy().run(result)
        self.assertEqual(children[0].returncode, -9)
        self.assertFalse(left[0].exists())
        self.assertEqual(len(result.errors) + len(result.failures), 1)
        self.assertIn("not asked for", (result.errors + result.failures)[0][1])


NURSED = """
import os, signal, sys, time

def main():
    what, *words = sys.argv[1:]
    if what == "tell":
        print([__name__, __file__, sys.argv, os.getcwd(), dict(os.environ), sys.stdin.read()])
        print(sys.path[0], sys.flags)
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            print(stream.encoding, stream.errors, stream.line_buffering, stream.write_through)
            print(stream, stream.buffer, stream.isatty(), stream is getattr(sys, "__stdout__"))
        print(sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else [])
        print([str(signal.getsignal(getattr(signal, "SIG" + name))) for name in words])
        print(sys.modules["__main__"].main is main, time.strftime("%Z"), os.getpgrp())
        print("a line for stderr", file=sys.stderr)
    elif what == "end":
        import atexit
        atexit.register(print, "at exit", end="")
        print("not yet flushed,", end=" ")
        sys.exit(eval(words[0]))
    elif what == "raise":
        raise ValueError(words)
    elif what == "kill":
        os.kill(os.getpid(), int(words[0]))
    elif what == "wait":
        print(os.getppid(), flush=True)
        time.sleep(60)
    elif what == "keep":
        global kept
        kept = open("kept", "w")
        print(kept.write("half a line"))

if __name__ == "__main__":
    main()
"""


@unittest.skipUnless(hasattr(os, "fork"), "nothing forks here")
class TestTheNursery(Case):
    """Runs from the nursery: what they find, and how they end, is what plain ones do."""

    def setUp(self) -> None:
        super().setUp()
        self.script = self.tmp / "nursed.py"
        self.script.write_text(NURSED, encoding="utf-8")
        self.env.pop("PYTHONUNBUFFERED", None)
        self.open_nursery()

    def open_nursery(self) -> None:
        """Start a nursery in the environment as it is now."""
        self.nursery = Nursery(self.script, self.env)
        self.addCleanup(self.nursery.close)

    def nursed(self, *argv: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> Nursling:
        """Start a run from the nursery."""
        with tempfile.TemporaryFile() as source:
            source.write(stdin)
            source.seek(0)
            wanted = {**self.env, **(env or {})}
            child = self.nursery.start(argv, stdin=source, env=wanted, cwd=self.work)
        self.addCleanup(stop, child)
        return child

    def both(self, *argv: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> list[Run]:
        """Return what becomes of a plain run, and of one from the nursery."""
        plain = self.run_tool(*argv, stdin=stdin, env=env)
        return [plain, self.finish(self.nursed(*argv, stdin=stdin, env=env))]

    def test_a_run_finds_what_a_plain_one_finds(self) -> None:
        words = ["tell", "INT", "TERM", "HUP", "QUIT", "CHLD", "PIPE", "USR1"]
        env = {"EXTRA": "ä\udcff", "TZ": "XYZ-3", "HOME": "/"}
        for unbuffered, stdin in (("", b""), ("1", b"from stdin\r\n\xc3\xa4" * 9999)):
            self.env["PYTHONUNBUFFERED"] = unbuffered
            self.open_nursery()
            plain, nursed = self.both(*words, stdin=stdin, env=env)
            self.assertEqual(nursed, plain)
            self.assertEqual((nursed.code, nursed.err), (0, "a line for stderr\n"))
            self.assertIn(" XYZ ", nursed.out)

    def test_a_run_has_no_more_in_its_environment(self) -> None:
        self.env["FROM_THE_NURSERY"] = "1"
        self.open_nursery()
        del self.env["FROM_THE_NURSERY"]
        plain, nursed = self.both("tell")
        self.assertEqual(nursed, plain)

    def test_a_deaf_parent_has_deaf_children(self) -> None:
        for hears in (signal.SIG_IGN, signal.default_int_handler, lambda number, frame: None):
            before = signal.signal(signal.SIGINT, hears)
            try:
                plain, nursed = self.both("tell", "INT")
            finally:
                signal.signal(signal.SIGINT, before)
            self.assertEqual(nursed, plain)

    def test_it_ends_as_a_plain_one_ends(self) -> None:
        ends = {"0": 0, "7": 7, "None": 0, "256 + 3": 3, "-1": 255, "True": 1, "'no'": 1, "[1]": 1}
        for what, code in ends.items():
            with self.subTest(what):
                plain, nursed = self.both("end", what)
                self.assertEqual((nursed, nursed.code), (plain, code))
                self.assertEqual(nursed.out, "not yet flushed, at exit")
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1):
            plain, nursed = self.both("kill", str(int(number)))
            self.assertEqual((nursed, nursed.code), (plain, -number))

    def test_a_traceback_is_the_plain_one_below_the_nursery_s(self) -> None:
        for words in (["raise", "this"], ["kill", str(int(signal.SIGINT))]):
            before = signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                plain, nursed = self.both(*words)
            finally:
                signal.signal(signal.SIGINT, before)
            head, *frames = plain.err.splitlines()
            self.assertEqual(head, "Traceback (most recent call last):")
            self.assertEqual(nursed.err.splitlines()[0], head)
            self.assertEqual(nursed.err.splitlines()[-len(frames) :], frames)
            self.assertEqual(nursed.code, plain.code)

    def test_an_open_file_and_a_full_stdout(self) -> None:
        for run in self.both("keep"):
            self.assertEqual((run.code, run.out), (0, "11\n"))
            self.assertEqual((self.work / "kept").read_text(), "half a line")

    def test_it_is_a_process_of_its_own(self) -> None:
        child = self.nursed("wait")
        other = self.nursed("wait")
        for running in (child, other):
            assert running.stdout
            self.assertEqual(running.stdout.readline(), b"%d\n" % self.nursery.process.pid)
        self.assertIsNone(child.poll())
        with self.assertRaises(subprocess.TimeoutExpired):
            child.wait(0.01)
        child.terminate()
        self.assertEqual((child.wait(20), child.poll()), (-signal.SIGTERM, -signal.SIGTERM))
        self.assertIsNone(other.poll())
        with self.assertRaises(ProcessLookupError):
            os.kill(child.pid, 0)
        child.kill()  # harms nobody

    def test_what_came_before_a_time_out_is_kept(self) -> None:
        child = self.nursed("wait")
        assert child.stdout
        select.select([child.stdout], [], [], 20)
        with self.assertRaises(subprocess.TimeoutExpired) as late:
            child.communicate(timeout=0.1)
        self.assertEqual(late.exception.stdout, b"%d\n" % self.nursery.process.pid)
        child.kill()
        self.assertEqual(child.communicate(timeout=20), (late.exception.stdout, b""))

    def test_it_ends_with_its_socket_and_leaves_its_children(self) -> None:
        child = self.nursed("wait")
        self.nursery.close()
        self.assertEqual(self.nursery.process.poll(), 0)
        os.kill(child.pid, 0)
        os.kill(child.pid, signal.SIGKILL)
        with self.assertRaisesRegex(RuntimeError, "the nursery is dead"):
            child.wait(20)

    def test_it_ends_with_a_killed_parent(self) -> None:
        code = (
            "import sys, time; from pathlib import Path; from tests.nursery import Nursery\n"
            "nursery = Nursery(Path(sys.argv[1]), {})\n"
            "print(nursery.process.pid, flush=True); time.sleep(60)"
        )
        command = [sys.executable, "-c", code, str(self.script)]
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        self.addCleanup(stop, parent)
        assert parent.stdout
        nursery = int(parent.stdout.readline())
        parent.kill()
        self.wait_until(lambda: not runs(nursery))

    def test_a_script_that_has_changed_is_read_anew(self) -> None:
        self.assertTrue(self.nursery.fresh)
        self.script.write_text(NURSED + "\n")
        self.assertFalse(self.nursery.fresh)
        nurseries = self.nurseries()
        first = nurseries.of(self.script, self.env)
        self.assertIsInstance(first, Nursery)
        self.assertIs(nurseries.of(self.script, self.env), first)
        self.script.write_text(NURSED)
        self.assertIsNot(nurseries.of(self.script, self.env), first)

    def test_what_a_fork_cannot_take_on_runs_plain(self) -> None:
        nurseries = self.nurseries()
        self.script.write_text("def broken(")
        self.assertIsNone(nurseries.of(self.script, self.env))
        self.script.write_text(NURSED)
        self.assertIsInstance(nurseries.of(self.script, self.env), Nursery)
        for extra in ({"PYTHONPATH": "/x"}, {"LC_ALL": "C"}, {"LANG": "de"}, {"LD_PRELOAD": "x"}):
            self.assertIsNone(nurseries.of(self.script, {**self.env, **extra}), extra)
        with mock.patch.dict(os.environ, TESTS_SPAWN="plain"):
            self.assertIsNone(nurseries.of(self.script, self.env))
        self.assertIsInstance(self.run_nothing(), subprocess.Popen)
        self.script = SCRIPT
        self.assertIsInstance(self.run_nothing(), Nursling)
        self.launcher = ["env"]
        self.assertIsInstance(self.run_nothing(), subprocess.Popen)
        self.launcher, self.plain = (), True
        self.assertIsInstance(self.run_nothing(), subprocess.Popen)

    def nurseries(self) -> Nurseries:
        """Return what chooses between the ways, as it is without TESTS_SPAWN."""
        patch = mock.patch.dict(os.environ)
        patch.start()
        self.addCleanup(patch.stop)
        os.environ.pop("TESTS_SPAWN", None)
        self.env = clean_environment()
        nurseries = Nurseries()
        self.addCleanup(nurseries.close)
        return nurseries

    def run_nothing(self) -> Child:
        """Start a run that says and does nothing of interest."""
        return self.start_tool("--version")


def runs(pid: int) -> bool:
    """Return whether a process runs; one that has ended may wait for init to see it."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestPictures(unittest.TestCase):
    """The makers and the reader."""

    def test_png_comes_back_as_it_was_made(self) -> None:
        picture = read_png(png(5, 4, hole=(1, 2, 3, 1), rgb=(1, 2, 3)))
        self.assertEqual((picture.width, picture.height, picture.mode), (5, 4, "RGBA"))
        clear = [(x, y) for y in range(4) for x in range(5) if picture.pixel(x, y)[3] == 0]
        self.assertEqual(clear, [(1, 2), (2, 2), (3, 2)])
        self.assertEqual(picture.pixel(0, 0), (1, 2, 3, 255))
        self.assertEqual(read_png(png(2, 1)).rows, [bytes((200, 80, 40)) * 2])
        self.assertEqual(png(9, 9, seed=1), png(9, 9, seed=1))
        self.assertNotEqual(png(9, 9, seed=1), png(9, 9, seed=2))

    def test_every_filter_is_undone(self) -> None:
        lines = [
            (0, (10, 20, 30)),
            (1, (5, 1, 255)),
            (2, (1, 1, 1)),
            (3, (4, 4, 4)),
            (4, (1, 2, 3)),
        ]
        expected = [(10, 20, 30), (5, 6, 5), (6, 7, 6), (7, 11, 12), (8, 13, 16)]
        scanlines = b"".join(bytes((kind, *values)) for kind, values in lines)
        rows = read_png(png_file(3, 5, 0, scanlines)).rows
        self.assertEqual([tuple(row) for row in rows], expected)

    def test_a_damaged_png_is_refused(self) -> None:
        whole = png(3, 3)
        header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
        tail = png_chunk(b"IHDR", header), png_chunk(b"IEND", b"")
        for name, data in {
            "empty": b"",
            "only a signature": whole[:8],
            "cut": whole[:-1],
            "without its end": whole[:-12],
            "with a tail": whole + b"\0",
            "with a wrong byte": whole[:45] + bytes([whole[45] ^ 1]) + whole[46:],
            "without pixels": whole[:8] + b"".join(tail),
            "with too many": png_file(1, 1, 0, b"\0\0\0"),
            "with an unknown filter": png_file(1, 1, 0, b"\5\0"),
            "with a palette": png_file(1, 1, 3, b"\0\0"),
            "with cut pixels": whole[:8]
            + tail[0]
            + png_chunk(b"IDAT", zlib.compress(b""))
            + tail[1],
        }.items():
            with self.subTest(name), self.assertRaises(ValueError):
                read_png(data)

    def test_each_format_states_its_size_where_it_should(self) -> None:
        frame = jpeg(300, 200).index(b"\xff\xc0")
        self.assertEqual(struct.unpack_from(">HH", jpeg(300, 200), frame + 5), (200, 300))
        self.assertEqual(struct.unpack_from("<HH", gif(300, 200), 6), (300, 200))
        self.assertEqual(struct.unpack_from("<HH", webp(300, 200, "VP8"), 26), (300, 200))
        lossless = struct.unpack_from("<I", webp(300, 200), 21)[0]
        self.assertEqual((lossless & 0x3FFF, lossless >> 14 & 0x3FFF), (299, 199))
        self.assertEqual(webp(300, 200, "VP8X")[24:30], b"\x2b\1\0\xc7\0\0")
        self.assertIn(b'width="300" height="200"', svg(300, 200))
        for data in (webp(3, 3), webp(3, 3, "VP8"), webp(3, 3, "VP8X")):
            self.assertEqual(struct.unpack_from("<I", data, 4)[0], len(data) - 8)
        self.assertNotEqual(jpeg(8, 8), jpeg(8, 8, comment=b"other"))
        self.assertEqual(
            file_reply(jpeg(8, 8), "image/jpeg").headers, [("Content-Type", "image/jpeg")]
        )
