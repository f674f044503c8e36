"""Every shape in which servers answer: the image is saved byte for byte, or the error is told.

What becomes of the call where something fails (exit code, POSTs, what recover brings) stands in
the fault table, tests/faults.py; here is what the shapes are, links, streams, and words.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import socket
import threading
import zlib
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence
from unittest import mock
from urllib.parse import quote

import gpt_image2
from tests.case import Case, Run, SystemCase
from tests.images import jpeg, png, svg
from tests.server import (
    KEY,
    OPENAI_USAGE,
    STYLES,
    Api,
    Reply,
    Request,
    Script,
    answer,
    b64,
    completed_event,
    data_url,
    event_stream,
    file_reply,
    in_pieces,
    json_reply,
    page,
    partial_event,
    ranged,
    refusal,
)

SMALL = png(20, 30, seed=1)  # its base64 is padded, and holds + and /
LARGE = png(400, 300, seed=3)  # the same, and longer than any buffer of the tool's
EARLY, LATER = (png(64, 64, rgb=(shade, 0, 0)) for shade in (1, 2))  # previews
DENIED = refusal(401, "invalid_api_key", "Sign in.")


class AnswerCase(Case):
    """A case whose servers give one answer each; a second POST is a fault."""

    def ask(self, reply: Script, *argv: str) -> Run:
        """Generate once against a server of its own."""
        self.api = self.serve_base(reply)
        return self.run_tool("generate", "a fox", *argv)

    def check_saved(self, run: Run, *images: bytes) -> None:
        """Assert success: these images, one POST, no job left."""
        self.check(run, 0)
        self.assertEqual(contents(run.saved), list(images), run)
        self.assertEqual(len(self.api.posts), 1)
        self.assertEqual(self.jobs(), [])

    def check_each(self, replies: Mapping[str, Script], *images: bytes) -> None:
        """Assert that each of these answers brings these images."""
        for name, reply in replies.items():
            with self.subTest(name):
                self.check_saved(self.ask(reply, "-n", str(len(images))), *images)


def contents(paths: Sequence[Path]) -> list[bytes]:
    """Return what files hold."""
    return [path.read_bytes() for path in paths]


def moved(target: str, status: int = 302) -> Reply:
    """Return a redirect, whose body is no part of what it leads to."""
    return Reply(status, b"moved", [("Location", target)])


class TestShapes(AnswerCase):
    """Images inside the answer."""

    def test_every_dressing(self) -> None:
        for image in (SMALL, LARGE):
            self.assertTrue(all(mark in b64(image) for mark in "+/="), "it can't show much")
            self.check_each({style: answer(image, style=style) for style in STYLES}, image)

    def test_every_way_over_the_wire(self) -> None:
        document = {"created": 1, "data": [{"b64_json": b64(SMALL)}, {"b64_json": b64(LARGE)}]}
        whole = json_reply(document)
        plain, waiting = whole.body, b'{"status": "processing", "data": null}\n'
        bodies = {
            "a megabyte of keep-alive": b"\n" * 1_100_000 + plain,
            "blank lines and BOM": b"\r\n\xef\xbb\xbf\n" + plain,
            "a gateway's comment after it": plain + b"\n<!-- from the gateway -->",
            "lines of waiting around": 3 * waiting + plain + b"\n" + waiting,
            "gzipped, unasked": gzip.compress(plain),
            "gzipped in two members": gzip.compress(plain[:99]) + gzip.compress(plain[99:]) + b"\0",
            "deflated": zlib.compress(plain),
            "deflated, without a header": zlib.compress(plain)[2:-4],
        }
        first, second = completed_event(SMALL), completed_event(LARGE, kind="image_edit")
        replies = {
            **{name: whole._replace(body=body) for name, body in bodies.items()},
            "chunked": in_pieces(whole, 7001)._replace(framing="chunked"),
            "named a stream": whole._replace(headers=[("Content-Type", "text/event-stream")]),
            "a stream, unasked": event_stream(partial_event(EARLY), first, second),
            "a stream with comments": event_stream(b": ping\n\n\n", first, second, b": bye\n\n"),
        }
        self.check_each(replies, SMALL, LARGE)

    def test_the_image_itself_as_the_body(self) -> None:
        self.check_each({"alone": file_reply(LARGE)}, LARGE)

    def test_every_place(self) -> None:
        entry = {"b64_json": b64(SMALL)}
        usage = {"input_tokens": "6", "output_tokens": 10**400, "total_tokens": {"a": 1}}
        places: list[Any] = [
            *({"data": entry}, {"data": {"data": [entry]}}, [entry]),
            *({"images": [entry]}, {"data": [], "images": [entry]}),
            *({"error": None, "data": [entry]}, {"error": {}, "data": [entry]}),
            *({"data": [entry], "usage": usage}, {"data": [entry], "usage": [1]}),
            {"data": [{**entry, "url": "http://127.0.0.1:9/never-fetched.png"}]},
        ]
        for url in (data_url(SMALL), self.serve().put("/a.png", SMALL)):
            alone = {"b64_json": None, "url": url, "revised_prompt": None}
            places += [{"data": [entry]} for entry in ({"url": url}, alone, url)]
            places += [{"data": {"url": url}}, {"images": [{"url": url}]}, {"image_urls": [url]}]
        for place in places:
            with self.subTest(json.dumps(place)[:60]):
                self.check_saved(self.ask(json_reply(place)), SMALL)

    def test_every_spelling_of_a_url(self) -> None:
        api = self.api = self.serve_base()
        api.put("/v1/files/a.png", SMALL)
        url = api.origin + "/v1/files/a.png"
        spellings = {
            url: "/v1/files/a.png",
            url + "?a=[1]&b=é%20#top": "/v1/files/a.png?a=[1]&b=%C3%A9%20",
            "/v1/files/a.png?root": "/v1/files/a.png?root",
            "files/a.png?base": "/v1/files/a.png?base",
            url.partition(":")[2] + "?scheme": "/v1/files/a.png?scheme",
            f" {url}?space ": "/v1/files/a.png?space",
        }
        api.script.append(answer(*spellings))
        self.check_saved(self.run_tool("generate", "a fox"), *[SMALL] * len(spellings))
        self.assertEqual([request.target for request in api.gets], list(spellings.values()))

    def test_an_svg_in_a_data_url(self) -> None:
        drawing = svg(64, 64)
        texts = (f";charset=utf-8,{quote(drawing)}", f";base64,{b64(drawing)}")
        self.check_each({text[:9]: answer("data:image/svg+xml" + text) for text in texts}, drawing)

    def test_more_images_than_asked_for(self) -> None:
        images = [png(8, 8, seed=seed) for seed in range(3)]
        run = self.ask(answer(*images), "-n", "2", "-o", "b.png")
        self.check_saved(run, *images)
        self.assertEqual([path.stem for path in run.saved], ["b-1", "b-2", "b-3"])


class TestWords(AnswerCase):
    """The server's own words reach the user, whatever it wraps them in."""

    def told(self, reply: Reply) -> Any:
        """Return the error that a refusal comes to; stderr says the same."""
        run = self.check(self.ask(reply, "--json"), 1)
        error = run.json["error"]
        self.assertIn(error["message"], run.err)
        self.assertEqual(error["http_status"], reply.status)
        return error

    def test_every_shape_of_an_error(self) -> None:
        said = {"message": "bad thing"}
        rows: list[tuple[str, Any]] = [
            ("oops", {"error": {**said, "code": "oops"}}),
            ("oops", {"error": {**said, "type": "oops"}}),
            ("oops", {"error": "bad thing", "code": "oops"}),
            ("40001", {"error": {**said, "code": 40001}}),
            ("refused", {"error": {"detail": "bad thing"}}),
            ("refused", [{"error": said}]),
            ("refused", {"detail": {"error": said}}),
            ("refused", {"detail": [{"loc": ["body", "n"], "msg": "bad thing"}]}),
        ]
        for code, document in rows:
            with self.subTest(document):
                error = self.told(json_reply(document, 400))
                self.assertIn("bad thing", error["message"])
                self.assertEqual(error["code"], code)

    def test_errors_that_are_no_json(self) -> None:
        for body, words in (("bad thing", "bad thing"), ('{"error": {"mess', "HTTP 400")):
            with self.subTest(body):
                self.assertIn(words, self.told(Reply(400, body.encode()))["message"])

    def test_a_redirect_names_its_target_without_its_query(self) -> None:
        target = "https://console.example/login"
        error = self.told(moved(f"{target}?token=secret-word#top"))
        self.assertIn(target, error["message"])
        self.assertNotIn("secret-word", str(error))


class TestRetries(AnswerCase):
    """What is sent again, and when; what is not is in the fault table."""

    def test_the_same_request_goes_out_again_and_the_old_answer_is_gone_before(self) -> None:
        """Else that would be taken for the answer to a request that got none."""
        left: list[bytes] = []

        def second(_: Request) -> Reply:
            (job,) = self.jobs()
            left.append((job / "response.json").read_bytes())
            return Reply(silent=True)

        api = self.serve_base(refusal(429, None, "Wait.", headers=[("Retry-After", "0")]), second)
        run = self.check(self.run_tool("generate", "a fox", "--json"), 8)
        waits = "HTTP 429 invalid_request_error: Wait; waiting 0 s before retry 1 of 2"
        self.assertEqual(run.err.splitlines()[0], waits)
        error = run.json
        self.assertEqual((left, error["recover_id"], error["http_status"]), ([b""], None, None))
        self.assertNotIn("Wait", error["error"]["message"])
        self.assertEqual(error["attempts"], 2)
        sent = [(one.target, one.body, one.headers["authorization"]) for one in api.posts]
        self.assertEqual(sent, [sent[0]] * 2)

    def test_retry_unsafe_sends_another_and_loses_nothing_that_came(self) -> None:
        cut = answer(SMALL, LARGE)._replace(cut=len(b64(SMALL)) + 5000)
        for first, came in ((page(500, "Oops"), {EARLY, LATER}), (cut, {SMALL})):
            with self.subTest(first.status), mock.patch("random.uniform", return_value=0):
                api = self.serve_base(first, otherwise=answer(EARLY, LATER))
                run = self.run_tool("generate", "a fox", "-n", "2", "--retry-unsafe", "--new")
                saved = run.saved
                if self.jobs():
                    saved += self.run_tool("recover", "--all").saved
                self.assertLessEqual(came, set(contents(saved)), run)
                self.assertGreaterEqual(len(api.posts), 1 + (first.status == 500))

    def test_a_signal_before_another_attempt_hides_no_image(self) -> None:
        self.serve_base(answer(SMALL, LARGE)._replace(cut=len(b64(SMALL)) + 5000))
        with mock.patch.object(gpt_image2.Job, "pause", side_effect=gpt_image2.Interrupted(2)):
            run = self.run_tool("generate", "a fox", "-n", "2", "--retry-unsafe")
        self.assertRegex(self.check(run, 9).err, "received 1 of 2 requested images .*SIGINT")
        self.assertEqual(contents(run.saved), [SMALL])


class LinkCase(AnswerCase):
    """A case whose server answers with links to images, and often serves those too."""

    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch("random.uniform", return_value=0)  # no wait before another try
        patch.start()
        self.addCleanup(patch.stop)

    def follow(self, *urls: str, files: Any = (), api: Api | None = None) -> Run:
        """Generate and let the answer hold these links; `files` are served beside it."""
        self.api = api or self.serve_base()
        self.api.script.append(answer(*urls))
        self.api.files.update(files)
        return self.run_tool("generate", "a fox", "-n", str(min(len(urls), 10)), "--new")

    def check_kept(self, run: Run) -> Path:
        """Assert that nothing could be saved and the answer is kept; return its folder."""
        self.check(run, 10)
        self.assertEqual((run.saved, self.listing()), ([], []))
        (name,) = re.findall(r"(?m)^Recover: .* recover (\S+)\n\Z", run.err)
        (job,) = [job for job in self.jobs() if job.name == name]
        self.assertTrue((job / "response.json").stat().st_size)
        return job

    def check_keyless(self, *servers: Api) -> None:
        """Assert that no GET of these servers carried the key, in whatever form."""
        gets = [request for api in servers for request in api.gets]
        self.assertTrue(gets)
        for request in gets:
            self.assertNotIn("authorization", request.headers)
            self.assertNotIn(KEY, str(request))

    def wrap_curl(self, script: str = 'echo curl >>"$log"; real "$@"') -> Path:
        """Put a sh script before curl, which it runs as `real`; return a file of its own."""
        real = shutil.which("curl")
        log, curl = self.tmp / "curls", self.new_folder("bin") / "curl"
        curl.write_text(f"#!/bin/sh\nlog='{log}'\nreal() {{ '{real}' \"$@\"; }}\n{script}\n")
        curl.chmod(0o755)
        self.env["PATH"] = os.pathsep.join([str(curl.parent), self.env["PATH"]])
        return log


class TestDownloads(LinkCase):
    """What a server may do to a download, three redirects, and the one case that gets the key."""

    def test_a_download_carries_no_key(self) -> None:
        host = self.serve()
        self.env["GPT_IMAGE2_HEADERS"] = '{"X-Team": "secret-team"}'
        links = (host.put("/a.png", SMALL), "/b.png")
        self.check_saved(self.follow(*links, files={"/b.png": file_reply(LARGE)}), SMALL, LARGE)
        sent = self.api.posts[0].headers
        self.assertEqual((sent["authorization"], sent["x-team"]), (f"Bearer {KEY}", "secret-team"))
        self.check_keyless(host, self.api)
        for api in (host, self.api):
            self.assertNotIn("secret-team", str(api.gets[0]))

    def test_another_file_by_then_is_fetched_anew(self) -> None:
        def tagged(body: bytes, tag: str, cut: int | None = None) -> Script:
            play = ranged(body, cut=cut)
            return lambda request: play(request)._replace(
                headers=[*play(request).headers, ("ETag", tag)]
            )

        replies = [tagged(SMALL, '"a"', 500), tagged(LARGE, '"b"'), tagged(LARGE, '"b"')]
        self.check_saved(self.follow("/a.png", files={"/a.png": replies}), LARGE)

    def test_a_cut_file_is_resumed_where_the_server_can(self) -> None:
        whole, cut = file_reply(SMALL), len(SMALL) // 2
        for replies, ranges in (
            ([ranged(SMALL, cut=cut), ranged(SMALL)], [None, f"bytes={cut}-"]),
            ([whole._replace(cut=cut), whole, whole], [None, f"bytes={cut}-", None]),
        ):
            with self.subTest(ranges):
                self.check_saved(self.follow("/a.png", files={"/a.png": replies}), SMALL)
                self.assertEqual([get.headers.get("range") for get in self.api.gets], ranges)

    def test_tries_end(self) -> None:
        self.check_kept(self.follow("/a.png", files={"/a.png": page(500, "Oops")}))
        self.assertEqual(len(self.api.gets), 4)

    def test_what_is_no_image_is_kept_raw_and_fetched_anew(self) -> None:
        drawing, error = b"<html><svg></svg></html>", b'{"error": "expired"}'
        for body in (page(200, "Log in").body, drawing, error, SMALL[:-10], b""):
            with self.subTest(body):
                job = self.check_kept(self.follow("/a.png", files={"/a.png": file_reply(body)}))
                self.assertIn(body, contents(list(job.iterdir())))
                self.api.put("/a.png", ranged(SMALL))
                self.check_saved(self.run_tool("recover", job.name, "-o", "a.png"), SMALL)
                (self.work / "a.png").unlink()

    def test_a_file_too_large_is_refused_whether_its_length_is_told_or_not(self) -> None:
        told = file_reply(SMALL)._replace(content_length=200_000_000, cut=len(SMALL))
        for framing in ("length", "close", "chunked"):
            reply = told if framing == "length" else file_reply(LARGE)._replace(framing=framing)
            limit = gpt_image2.MAX_DOWNLOAD_BYTES if framing == "length" else 100_000
            with self.subTest(framing), mock.patch.object(gpt_image2, "MAX_DOWNLOAD_BYTES", limit):
                job = self.check_kept(self.follow("/a.png", files={"/a.png": reply}))
                self.assertEqual(len(self.api.gets), 1)
                self.assertLess(max(map(len, contents(list(job.iterdir())))), 100_000)

    def test_three_redirects_are_followed_and_a_fourth_is_not(self) -> None:
        statuses = enumerate((301, 303, 307, 308))
        hops = {f"/{i}": moved(f"/{i + 1}", status) for i, status in statuses}
        self.check_saved(self.follow("/0", files={**hops, "/3": file_reply(SMALL)}), SMALL)
        (self.work / self.listing()[0]).unlink()
        self.check_kept(self.follow("/0", files={**hops, "/4": file_reply(SMALL)}))
        self.assertEqual([get.target for get in self.api.gets], ["/0", "/1", "/2", "/3"])

    def test_a_redirect_to_a_private_place_is_refused(self) -> None:
        curls = self.wrap_curl()
        targets = ("http://10.0.0.1/", "http://[::ffff:10.0.0.1]/", "file:///etc/hostname")
        files = {f"/{number}": moved(target) for number, target in enumerate(targets)}
        self.check_kept(self.follow(*files, files=files))
        self.assertEqual(len(self.api.gets), len(targets))
        self.assertEqual(len(curls.read_text().split()), 1 + len(targets))

    def test_a_401_from_the_base_is_tried_once_with_the_key(self) -> None:
        for status in (401, 403):
            with self.subTest(status):
                replies = [DENIED._replace(status=status), file_reply(SMALL)]
                self.check_saved(self.follow("/a.png", files={"/a.png": replies}), SMALL)
                keys = [get.headers.get("authorization") for get in self.api.gets]
                self.assertEqual(keys, [None, f"Bearer {KEY}"])
        self.check(self.follow("/a.png", files={"/a.png": [DENIED, DENIED]}), 10)

    def test_no_other_place_gets_the_key(self) -> None:
        host = self.serve()
        elsewhere = host.put("/a.png", DENIED)
        self.check_kept(self.follow(elsewhere))
        self.check_kept(self.follow("/a.png", files={"/a.png": moved(elsewhere)}))
        self.check_keyless(host, self.api)
        replies = [DENIED, moved(host.put("/b.png", SMALL))]
        self.check_kept(self.follow("/a.png", files={"/a.png": replies}))
        self.assertEqual(len(host.gets), 2, "a redirect was followed with the key")
        api = self.serve_base()
        api.put("/a.png", DENIED)
        for spelling in ("localhost", "127.1", "2130706433"):  # of the base's own host
            self.check_kept(self.follow(f"http://{spelling}:{api.port}/a.png", api=api))
        self.check_keyless(api)


# A curl that goes to the test's server instead of the address that it shall use.
REROUTED = """sed 's/2606:4700::1111\\|8\\.8\\.8\\.8/127.0.0.1/; s/\\[127.0.0.1\\]/127.0.0.1/' \
>"$log.config"; real "$@" <"$log.config" """


class TestPlaces(LinkCase):
    """Where a link may lead."""

    def behind_proxy(self) -> Api:
        """Start a server that is also the proxy of an invented, public base."""
        api = self.serve_base()
        base = "http://images.example/v1"
        self.env.update(GPT_IMAGE2_BASE_URL=base, GPT_IMAGE2_ALLOW_HTTP="1", http_proxy=api.origin)
        return api

    def test_private_addresses_in_every_spelling_and_what_is_no_http(self) -> None:
        """To a base elsewhere loopback is private too."""
        api = self.behind_proxy()
        places = ["10.0.0.1", "169.254.169.254", "192.168.0.1:8080", "224.0.0.1", "0.0.0.0"]
        places += ["[::ffff:10.0.0.1]", "[64:ff9b::a00:1]", "[fd00:ec2::254]", "[fe80::1]"]
        places += ["167772161", "0xa9fea9fe", "0251.0376.0251.0376", "10.1", "012.0.0.1"]
        places += ["198.18.0.1", "10.0.0.1.", "user:pw@8.8.8.8", "8.8.8.8:99999", "[::1"]
        hosts = ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"]
        hosts += ["%31%32%37.0.0.1", "127%2e1", "１２７.0.0.1", "127.0.0.1.", "localhost"]
        places += [f"{host}:{api.port}" for host in hosts]
        links = ["file:///etc/hostname", "ftp://8.8.8.8/a.png", "gopher://8.8.8.8/1", "dict://x/"]
        links += ["FILE:///etc/hostname", "//@8.8.8.8/a.png", "https://"]
        links += [f"http://{place}/a.png" for place in places]
        curls = self.wrap_curl()
        run = self.check(self.follow(*links, api=api), 10)
        for number, link in enumerate(links, 1):
            with self.subTest(link):
                self.assertIn(f"image {number}: ", run.err)
        self.assertEqual(curls.read_text().splitlines(), ["curl"], run)

    def test_names_are_the_proxys_business(self) -> None:
        api, url = self.behind_proxy(), "http://cdn.example/a.png"
        with mock.patch("socket.getaddrinfo", looked_up("10.0.0.1")):
            self.check_saved(self.follow(url, files={url: file_reply(SMALL)}, api=api), SMALL)
        self.check_keyless(api)

    def test_only_the_proxy_of_this_very_link_counts(self) -> None:
        """Another name's, or another scheme's, looks nothing up; curl goes where we think."""
        url = "http://cdn.example/a.png"
        for env, proxied in (
            ({"all_proxy": "{}", "https_proxy": "http://a.invalid"}, True),
            ({"http_proxy": "{}", "no_proxy": "a.example cdn.example"}, True),  # curl's way
            ({"GPT_IMAGE2_PROXY": "{}", "no_proxy": "images.example"}, True),
            ({"https_proxy": "{}"}, False),
            ({"http_proxy": "{}", "no_proxy": "a.example,.cdn.example"}, False),
            ({"ALL_PROXY": "{}", "NO_PROXY": "*"}, False),
            ({"GPT_IMAGE2_PROXY": "{}", "no_proxy": "example"}, False),
        ):
            with self.subTest(env), mock.patch("socket.getaddrinfo", looked_up("10.0.0.1")):
                api = self.serve_base()
                variables = {name: text.format(api.origin) for name, text in env.items()}
                with mock.patch.dict(self.env, variables):
                    run = self.follow(url, files={url: file_reply(SMALL)}, api=api)
                self.check(run, 0 if proxied else 10)
                self.assertEqual(bool(api.gets), proxied)

    def test_allow_private(self) -> None:
        api = self.behind_proxy()
        run = self.follow(api.put("/a.png", SMALL), api=api)
        job = self.check_kept(run)
        self.assertIn("--allow-private", run.err)
        self.check_saved(self.run_tool("recover", job.name, "--allow-private"), SMALL)

    def test_a_name_with_any_private_address_is_refused(self) -> None:
        curls = self.wrap_curl()
        found: list[list[str]] = [["10.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::1"], ["fe80::1%eth0"]]
        for count, addresses in enumerate([*found, []], 1):
            with self.subTest(addresses):
                with mock.patch("socket.getaddrinfo", looked_up(*addresses)):
                    self.check_kept(self.follow("http://cdn.example/a.png"))
                self.assertEqual(len(curls.read_text().split()), count, "the link was followed")

    def test_a_name_leads_to_the_address_that_was_checked(self) -> None:
        """Nobody looks it up once more, as what is said then may be another address."""
        self.wrap_curl(REROUTED)
        for address, dot in (("8.8.8.8", ""), ("2606:4700::1111", ""), ("8.8.8.8", ".")):
            with self.subTest(address), mock.patch("socket.getaddrinfo", looked_up(address)):
                api = self.serve_base()
                url = f"http://cdn.invalid{dot}:{api.port}/a.png"
                run = self.follow(url, files={"/a.png": file_reply(SMALL)}, api=api)
                self.check_saved(run, SMALL)
                self.assertEqual(api.gets[0].headers["host"], f"cdn.invalid:{api.port}")


def looked_up(*addresses: str) -> Callable[..., Any]:
    """Return a getaddrinfo that says these of every name, and of a literal what it is."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: Any, **options: Any) -> Any:
        if options.get("flags") == socket.AI_NUMERICHOST or not addresses:
            return real(host, port, flags=socket.AI_NUMERICHOST)
        return [(0, 0, 0, "", (address, port)) for address in addresses]

    return getaddrinfo


class TestStreams(SystemCase):
    """--stream and --partial-images: previews as they come, the image only when it is whole."""

    words: tuple[str, ...] = ("generate", "a fox", "--partial-images", "2", "-o", "fox.png")

    def stream(self, reply: Reply, *argv: str, code: int = 0) -> Run:
        """Run generate with two previews, into fox.png."""
        self.api = self.serve_base(reply)
        return self.check(self.run_tool(*self.words, *argv), code)

    def files(self) -> dict[str, bytes]:
        """Return what lies in the work folder."""
        return {name: (self.work / name).read_bytes() for name in self.listing()}

    def told(self, files: list[dict[str, Any]]) -> list[bytes]:
        """Return what the files of a JSON document hold; its facts must be true."""
        found = contents([Path(file["path"]) for file in files])
        self.assertEqual([file["bytes"] for file in files], [len(data) for data in found])
        return found

    def test_each_preview_is_saved_and_told_before_the_next_comes(self) -> None:
        go_on, finish = threading.Event(), threading.Event()
        previews, last = (partial_event(EARLY), partial_event(LATER, 1)), completed_event(SMALL)
        self.serve_base(event_stream(previews[0], go_on, previews[1], finish, last, "[DONE]"))
        self.hurry(20)
        tool = self.start_tool(*self.words)
        self.hear(tool, f"Partial: {self.work / 'fox.partial-1.png'}\n")
        self.assertEqual(self.files(), {"fox.partial-1.png": EARLY})
        go_on.set()
        self.hear(tool, f"Partial: {self.work / 'fox.partial-2.png'}\n")
        self.assertEqual(self.files(), {"fox.partial-1.png": EARLY, "fox.partial-2.png": LATER})
        finish.set()
        run = self.check(self.finish(tool), 0)
        self.assertEqual(run.saved, [self.work / "fox.png"])
        self.assertEqual(self.files()["fox.png"], SMALL)
        self.assertEqual((run.err.count("Partial: "), run.err.count("Saved:")), (2, 0))

    def test_the_document_keeps_previews_and_images_apart(self) -> None:
        """A preview that can't be read costs only itself."""
        bad = {**partial_event(LATER), "b64_json": "no/image"}
        events = (bad, partial_event(EARLY, 1), partial_event(LATER, 2), completed_event(SMALL))
        document = self.stream(event_stream(*events), "--json", "--provider", "openai").json
        self.assertEqual(self.told(document["images"]), [SMALL])
        self.assertEqual(self.told(document["partials"]), [EARLY, LATER])
        self.assertRegex("\n".join(document["warnings"]), "partial image 1")
        sizes = [(file["format"], file["width"], file["height"]) for file in document["partials"]]
        self.assertEqual(sizes, [("png", 64, 64)] * 2)
        self.assertEqual(document["usage"], OPENAI_USAGE)
        self.assertAlmostEqual(document["cost"]["amount"], 0.00828)
        self.assertEqual(self.jobs(), [])
        post = self.api.posts[0].json
        self.assertEqual((post["stream"], post["partial_images"]), (True, 2))

    def test_previews_of_several_images(self) -> None:
        events = (partial_event(EARLY), completed_event(SMALL))
        more = (partial_event(LATER), completed_event(LARGE))
        run = self.stream(event_stream(*events, *more), "--n", "2", "--provider", "openai")
        images = {"fox-1.png": SMALL, "fox-2.png": LARGE}
        previews = {"fox-1.partial-1.png": EARLY, "fox-2.partial-1.png": LATER}
        self.assertEqual(self.files(), {**images, **previews})
        self.assertIn("562 tokens, $0.0166", run.err)  # each event tells its own image's

    def test_no_preview_is_lost_where_those_of_two_images_come_together(self) -> None:
        early = (partial_event(EARLY), partial_event(LATER))
        events = (*early, completed_event(SMALL), completed_event(LARGE))
        document = self.stream(event_stream(*events), "--n", "2", "--json").json
        self.assertEqual(self.told(document["partials"]), [EARLY, LATER])
        self.assertEqual(self.told(document["images"]), [SMALL, LARGE])

    def test_without_an_end_the_preview_is_not_the_image(self) -> None:
        early, last = partial_event(EARLY), completed_event(SMALL)
        named = f'event: image_generation.partial_image\ndata: {{"b64_json": "{b64(EARLY)}"'
        for name, reply in {
            "ended": event_stream(early),
            "cut in the image": event_stream(early, last)._replace(cut=len(b64(EARLY)) + 1000),
            "told by its name alone": event_stream(f"{named}}}\n\n".encode()),
        }.items():
            with self.subTest(name):
                run = self.stream(reply, "--json", "--force", "--new", code=8)
                document = run.json
                self.assertRegex(run.err.splitlines()[-1], r"^Recover: .* recover \S+$")
                self.assertEqual((document["ok"], document["images"]), (False, []))
                self.assertTrue(document["error"]["maybe_billed"])
                self.assertEqual(self.told(document["partials"]), [EARLY])
                run = self.check(self.run_tool("recover", document["recover_id"]), 10)
                self.assertEqual((run.out, self.listing()), ("", ["fox.partial-1.png"]))
                self.assertEqual(len(self.api.requests), 1)

    def test_a_image_whose_event_is_cut_behind_it_is_recovered(self) -> None:
        cut = event_stream(completed_event(SMALL))._replace(cut=len(b64(SMALL)) + 200)
        document = self.stream(cut, "--json", code=8).json
        self.check(self.run_tool("recover", document["recover_id"]), 0)
        self.assertEqual(self.files(), {"fox.png": SMALL})

    def test_every_spelling(self) -> None:
        early, last = partial_event(EARLY), completed_event(SMALL)
        plain = f"data: {json.dumps(early)}\n\ndata: {json.dumps(last)}\n\n"
        named = f"event: {early['type']}\n{plain}"
        texts = [json.dumps(event, indent=1) for event in (early, last)]
        many = "".join("data: " + text.replace("\n", "\ndata: ") + "\n\n" for text in texts)
        spellings = {
            "without spaces, and a blank at the end": plain.replace("data: ", "data:").rstrip("\n"),
            "CRLF and a done line": f"{named}data: [DONE]\n\n".replace("\n", "\r\n"),
            "comments": ': say "hi\n\n' + plain.replace("data:", ": ping\ndata:"),
            "blank lines and a BOM": f"\ufeff\n\n{plain}",
            "many lines and CRLF": many.replace("\n", "\r\n"),
            "events of another kind": f'data: {{"type": "ping"}}\n\ndata: 1\n\n{plain}',
        }
        replies = {name: Reply(200, text.encode()) for name, text in spellings.items()}
        crlf = replies["CRLF and a done line"]
        replies["single bytes"] = in_pieces(crlf._replace(framing="chunked"), 1)
        for name, reply in replies.items():
            with self.subTest(name):
                document = self.stream(reply, "--json", "--force").json
                self.assertEqual(self.told(document["partials"]), [EARLY])
                self.assertEqual(self.told(document["images"]), [SMALL])

    def test_where_previews_go(self) -> None:
        reply = event_stream(partial_event(jpeg(64, 64)), completed_event(SMALL))
        self.stream(reply, "-o", "a.b/fox")
        self.assertEqual(self.listing(), ["a.b/fox", "a.b/fox.partial-1"])
        self.stream(reply, "-o", "other/")
        preview, image = self.listing(self.work / "other")
        self.assertEqual(preview, image.replace(".png", ".partial-1.jpg"))

    def test_a_file_that_is_there_is_replaced_by_force_only(self) -> None:
        old, reply = self.work / "fox.partial-1.png", (partial_event(EARLY), completed_event(SMALL))
        old.write_bytes(b"old")
        self.api = self.serve_base(otherwise=event_stream(*reply))
        run = self.run_tool(*self.words)
        self.assertIn(run.code, (0, 2), self.story(run))  # refused, or saved under a free name
        self.assertEqual(old.read_bytes(), b"old")
        run = self.check(self.run_tool(*self.words, "--force", "--quiet"), 0)
        self.assertEqual((old.read_bytes(), run.err), (EARLY, ""))
