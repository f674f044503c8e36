"""Every shape in which servers answer: the picture is saved byte for byte, or the refusal told."""

from __future__ import annotations

import gzip
import json
import re
from collections import deque
from typing import Any, Callable, Iterator, Mapping, NamedTuple
from urllib.parse import quote

from tests.pictures import png, svg
from tests.support import (
    NODEKEY_USAGE,
    OPENAI_USAGE,
    Api,
    Case,
    Child,
    Reply,
    Run,
    Script,
    answer,
    b64,
    completed_event,
    data_url,
    event_stream,
    hk_answer,
    in_pieces,
    json_reply,
    nodekey_answer,
    page,
    partial_event,
    refusal,
)

SMALL = png(20, 30, seed=1)  # its base64 is padded, and holds + and /
LARGE = png(400, 300, seed=3)  # the same, and longer than any buffer of the tool's
NO_RETRY = ("--retries", "0")
AT_ONCE = 3  # tools that a table keeps running


class Asked(NamedTuple):
    """One call of the tool, and the server of its own that it asked."""

    name: str
    api: Api
    run: Run


class AnswerCase(Case):
    """A case whose servers give one answer each; a second POST is a fault."""

    def ask(self, reply: Script, *argv: str) -> Asked:
        """Generate once against a server with that one answer."""
        return next(self.ask_each({"a fox": reply}, *argv))

    def ask_each(self, replies: Mapping[str, Script], *argv: str) -> Iterator[Asked]:
        """Generate once for each answer, a few side by side; its name is the prompt."""
        running: deque[tuple[str, Api, Child]] = deque()
        for name, reply in replies.items():
            if len(running) == AT_ONCE:
                yield self._ended(*running.popleft())
            api = self.serve_base(reply)
            running.append((name, api, self.start_tool("generate", name, *argv)))
        while running:
            yield self._ended(*running.popleft())

    def _ended(self, name: str, api: Api, process: Child) -> Asked:
        return Asked(name, api, self.finish(process))

    def job_left(self, run: Run) -> bool:
        """Return whether the job folder of a run is still there."""
        match = re.search("^Job: (.+)$", run.err, re.MULTILINE)
        assert match, run
        return match.group(1) in [job.name for job in self.jobs()]

    def check_saved(self, asked: Asked, *pictures: bytes) -> None:
        """Assert success: these pictures, one POST, no job left."""
        run = self.check(asked.run, 0)
        self.assertEqual(contents(run), list(pictures), run)
        self.assertEqual(len(asked.api.posts), 1, run)
        self.assertFalse(self.job_left(run), run)


def contents(run: Run) -> list[bytes]:
    """Return the bytes of the saved pictures."""
    return [path.read_bytes() for path in run.saved]


def wrapped(text: str, width: int, end: str) -> str:
    """Return text in lines of that width, each but the last ended by `end`."""
    return end.join(text[at : at + width] for at in range(0, len(text), width))


def url_safe(text: str) -> str:
    """Return base64 in the URL alphabet."""
    return text.replace("+", "-").replace("/", "_")


# ---- Pictures ---------------------------------------------------------------------------------

DRESSINGS: dict[str, Callable[[str], str]] = {  # base64 -> what stands between JSON's quotes
    "bare": lambda text: text,
    "data: prefix": lambda text: "data:image/png;base64," + text,
    "data: prefix, slash escaped": lambda text: "data:image\\/png;base64," + text,
    "data: prefix with a parameter": lambda text: "data:image/png;name=a.png;base64," + text,
    "data: prefix in capitals": lambda text: "DATA:image/PNG;BASE64," + text,
    "wrapped": lambda text: wrapped(text, 76, "\\n") + "\\n",
    "wrapped with carriage returns": lambda text: wrapped(text, 64, "\\r\\n"),
    "wrapped into odd lines": lambda text: wrapped(text, 61, "\\n"),
    "wrapped by raw line breaks": lambda text: wrapped(text, 76, "\n"),
    "spaces around": lambda text: f"  {text} ",
    "slashes escaped": lambda text: text.replace("/", "\\/"),
    "all escaped": lambda text: "".join(f"\\u{ord(character):04x}" for character in text),
    "some escaped": lambda text: text.replace("+", "\\u002B").replace("A", "\\u0041"),
    "padding escaped": lambda text: text.replace("=", "\\u003d"),
    "URL-safe": url_safe,
    "unpadded": lambda text: text.rstrip("="),
    "URL-safe, unpadded, wrapped": lambda text: wrapped(url_safe(text).rstrip("="), 70, "\\n"),
}


class TestBase64(AnswerCase):
    """Pictures inside the answer."""

    def test_every_dressing(self) -> None:
        for picture in (SMALL, LARGE):
            self.assertTrue(all(mark in b64(picture) for mark in "+/="), "it can't show much")
            texts = [dress(b64(picture)) for dress in DRESSINGS.values()]
            entries = ", ".join(f'{{"b64_json": "{text}"}}' for text in texts)
            asked = self.ask(Reply(200, f'{{"data": [{entries}]}}'.encode()))
            for number, name in enumerate(DRESSINGS, 1):
                with self.subTest(name, bytes=len(picture)):
                    self.assertNotIn(f"picture {number}:", asked.run.err)
            self.check_saved(asked, *[picture] * len(texts))

    def test_every_layout_of_the_json(self) -> None:
        document = {"created": 1, "data": [{"b64_json": b64(SMALL)}, {"b64_json": b64(LARGE)}]}
        plain = json.dumps(document).encode()
        layouts = {
            "pretty-printed": json.dumps(document, indent=4).encode(),
            "dense": json.dumps(document, separators=(",", ":")).encode(),
            "keep-alive lines ahead": b"\n" * 5 + b" \r\n" * 3 + plain,
            "a megabyte of keep-alive": b"\n" * 1_100_000 + plain,
            "lines behind": plain + b"\r\n\n  \n",
            "BOM": b"\xef\xbb\xbf" + plain,
            "blank lines and BOM": b"\r\n\xef\xbb\xbf\n" + plain,
        }
        replies = {name: Reply(200, body) for name, body in layouts.items()}
        for asked in self.ask_each(replies, "-n", "2"):
            with self.subTest(asked.name):
                self.check_saved(asked, SMALL, LARGE)

    def test_whatever_stands_beside_it(self) -> None:
        picture = {"b64_json": b64(SMALL)}
        entries = [
            {"url": "", **picture, "revised_prompt": ""},
            {"url": None, **picture, "revised_prompt": None},
            {"revised_prompt": 'a "fox"\\', **picture},
            {"revised_prompt": '{"b64_json": "AAAA"}', **picture},
            {"revised_prompt": ["fox"], "id": 7, "seed": [1, {"b64_json": 2}], **picture},
            {"url": "http://127.0.0.1:9/never-fetched.png", **picture},
        ]
        asked = self.ask(json_reply({"data": entries, "size": [], "background": {}}))
        self.check_saved(asked, *[SMALL] * len(entries))

    def test_every_way_over_the_wire(self) -> None:
        whole = answer(SMALL, LARGE)
        ways = {
            "chunked": in_pieces(whole, 7001)._replace(framing="chunked"),
            "until the connection closes": whole._replace(framing="close"),
            "in small pieces": in_pieces(whole, 1999),
            "named HTML": whole._replace(headers=[("Content-Type", "text/html")]),
            "named a stream": whole._replace(headers=[("Content-Type", "text/event-stream")]),
            "not named": whole._replace(headers=[]),
            "as 201": whole._replace(status=201),
            "gzipped, unasked": whole._replace(body=gzip.compress(whole.body)),
        }
        for asked in self.ask_each(ways, "-n", "2"):
            with self.subTest(asked.name):
                self.check_saved(asked, SMALL, LARGE)

    def test_the_picture_itself_as_the_body(self) -> None:
        for name, body in (("plain", LARGE), ("gzipped", gzip.compress(LARGE))):
            with self.subTest(name):
                self.check_saved(self.ask(Reply(200, body, [("Content-Type", "image/png")])), LARGE)
        asked = self.ask(Reply(200, LARGE, cut=5000))
        self.check(asked.run, 8)
        self.assertTrue(self.job_left(asked.run))

    def test_other_text_before_and_after(self) -> None:
        whole = answer(SMALL, LARGE).body
        waiting = b'{"status": "processing", "data": null}\n'
        bodies = {
            "a comment after": whole + b"\n<!-- from the gateway -->",
            "lines of waiting before": 3 * waiting + whole,
            "lines of waiting around": waiting + whole + b"\n" + waiting,
        }
        replies = {name: Reply(200, body) for name, body in bodies.items()}
        for asked in self.ask_each(replies, "-n", "2"):
            with self.subTest(asked.name):
                self.check_saved(asked, SMALL, LARGE)

    def test_a_stream_that_was_not_asked_for(self) -> None:
        preview, first, second = (
            partial_event(png(8, 8)),
            completed_event(SMALL),
            completed_event(LARGE),
        )
        streams = {
            "after a preview": event_stream(preview, first, second),
            "with an end mark": event_stream(first, preview, second, "[DONE]"),
            "not named a stream": event_stream(first, second)._replace(headers=[]),
            "with comments": event_stream(b": keep-alive\n\n\n", first, second, b": bye\n\n"),
        }
        for asked in self.ask_each(streams, "-n", "2"):
            with self.subTest(asked.name):
                self.check_saved(asked, SMALL, LARGE)


class TestPlaces(AnswerCase):
    """Where the pictures lie in an answer."""

    def test_every_place_of_base64(self) -> None:
        entry = {"b64_json": b64(SMALL)}
        places: dict[str, Any] = {
            "data is an object": {"data": entry},
            "data in data": {"data": {"data": [entry]}},
            "images": {"images": [entry]},
            "images of data: URLs": {"images": [data_url(SMALL)]},
            "empty data beside images": {"data": [], "images": [entry]},
            "no envelope": [entry],
            "image_url as in chats": {"data": [{"image_url": {"url": data_url(SMALL)}}]},
            "null error": {"error": None, "data": [entry]},
            "empty error": {"error": {}, "data": [entry]},
            "data: URL": {"data": [{"url": data_url(SMALL)}]},
            "data: URL beside empty base64": {"data": [{"b64_json": "", "url": data_url(SMALL)}]},
            "data: URL beside null": {"data": [{"b64_json": None, "url": data_url(SMALL)}]},
        }
        replies = {name: json_reply(document) for name, document in places.items()}
        for asked in self.ask_each(replies):
            with self.subTest(asked.name):
                self.check_saved(asked, SMALL)

    def test_every_place_of_a_url(self) -> None:
        host = self.serve()
        url = host.put("/a.png", SMALL)
        places: dict[str, Any] = {
            "data": {"data": [{"url": url}]},
            "beside empty base64": {"data": [{"b64_json": "", "url": url}]},
            "beside null": {"data": [{"b64_json": None, "url": url, "revised_prompt": None}]},
            "strings": {"data": [url]},
            "data is an object": {"data": {"url": url}},
            "images": {"images": [{"url": url}]},
            "images of strings": {"images": [url]},
            "image_urls": {"image_urls": [url]},
        }
        replies = {name: json_reply(document) for name, document in places.items()}
        for asked in self.ask_each(replies):
            with self.subTest(asked.name):
                self.check_saved(asked, SMALL)

    def test_every_spelling_of_a_url(self) -> None:
        api = self.serve_base()
        api.put("/v1/files/a.png", SMALL)
        url = api.origin + "/v1/files/a.png"
        spellings = {
            url: "/v1/files/a.png",
            url + "?a=[1]&b=%C3%A9%20#top": "/v1/files/a.png?a=[1]&b=%C3%A9%20",
            "/v1/files/a.png?root": "/v1/files/a.png?root",
            "files/a.png?base": "/v1/files/a.png?base",
            url.partition(":")[2] + "?scheme": "/v1/files/a.png?scheme",
            f" {url}?space ": "/v1/files/a.png?space",
        }
        api.script.append(answer(*spellings))
        run = self.check(self.run_tool("generate", "a fox"), 0)
        self.assertEqual([request.target for request in api.gets], list(spellings.values()))
        self.assertEqual(contents(run), [SMALL] * len(spellings))

    def test_an_svg_in_a_data_url(self) -> None:
        filler = b"<!-- %b -->\n<rect" % ("ä 100 % ".encode() * 12_000)
        for drawing in (svg(64, 64), svg(64, 64).replace(b"<rect", filler)):
            spellings = [
                "data:image/svg+xml," + quote(drawing),
                "data:image/svg+xml;charset=utf-8," + quote(drawing),
                "data:image/svg+xml;base64," + b64(drawing),
            ]
            for asked in self.ask_each({url[:40]: answer(url) for url in spellings}):
                with self.subTest(asked.name, bytes=len(drawing)):
                    self.check_saved(asked, drawing)

    def test_relays_as_they_document_themselves(self) -> None:
        url = self.serve().put("/a.png", SMALL)
        relays = {
            "OpenAI-HK by url": hk_answer(url),
            "OpenAI-HK by base64": hk_answer(SMALL),
            "NodeKey by url": nodekey_answer(url),
            "NodeKey by base64": nodekey_answer(SMALL),
        }
        for asked in self.ask_each(relays):
            with self.subTest(asked.name):
                self.check_saved(asked, SMALL)
                self.assertIn("281 tokens", asked.run.err)

    def test_more_pictures_than_asked_for(self) -> None:
        pictures = [png(8, 8, seed=seed) for seed in range(3)]
        for n, names in (("1", ["a", "a-2", "a-3"]), ("2", ["b-1", "b-2", "b-3"])):
            with self.subTest(n=n):
                asked = self.ask(answer(*pictures), "-n", n, "-o", names[0][0] + ".png")
                self.check_saved(asked, *pictures)
                self.assertEqual([path.stem for path in asked.run.saved], names)

    def test_fewer_pictures_than_asked_for(self) -> None:
        _, api, run = self.ask(answer(SMALL), "-n", "2", "--json")
        document = self.check(run, 9).json
        self.assertEqual((document["ok"], document["error"]["exit_code"]), (False, 9))
        self.assertEqual((len(document["images"]), len(api.posts)), (1, 1))

    def test_a_bad_picture_stops_no_other(self) -> None:
        bad = {"no base64": "!!", "no picture": b64(b"hello"), "cut": b64(SMALL[:-40])}
        replies = {
            name: json_reply({"data": [{"b64_json": t} for t in (b64(SMALL), text, b64(LARGE))]})
            for name, text in bad.items()
        }
        for name, _, run in self.ask_each(replies, "-n", "3"):
            with self.subTest(name):
                self.check(run, 9)
                self.assertEqual(contents(run), [SMALL, LARGE])
                self.assertIn("picture 2", run.err)
                self.assertTrue(self.job_left(run))


class TestUsage(AnswerCase):
    """Tokens and what they cost, in whichever names they come."""

    def test_usage_in_every_form(self) -> None:
        usages: dict[str, tuple[Any, str]] = {
            "OpenAI's": (OPENAI_USAGE, "281 tokens"),
            "NodeKey's": (NODEKEY_USAGE, "281 tokens"),
            "without a total": ({"input_tokens": 6, "output_tokens": 275}, "281 tokens"),
            "null": (None, ""),
            "a word": ("none", ""),
            "a list": ([1], ""),
            "zeros": ({"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}, ""),
            "nulls": ({"input_tokens": None, "input_tokens_details": None}, ""),
            "words": ({"input_tokens": "6", "total_tokens": {"a": 1}, "output_tokens": []}, ""),
            "huge": ({"output_tokens": 10**400, "total_tokens": -1}, ""),
        }
        entries = [{"b64_json": b64(SMALL)}]
        replies = {
            name: json_reply({"data": entries, "usage": usage})
            for name, (usage, _) in usages.items()
        }
        for asked in self.ask_each(replies):
            with self.subTest(asked.name):
                self.check_saved(asked, SMALL)
                self.assertIn(usages[asked.name][1], asked.run.err)

    def test_usage_and_cost_in_the_document(self) -> None:
        replies = {"with": answer(SMALL), "without": answer(SMALL, usage={})}
        given, missing = (asked.run.json for asked in self.ask_each(replies, "--json"))
        self.assertEqual(given["usage"], OPENAI_USAGE)
        self.assertEqual((missing["usage"], missing["cost"]), (None, None))


# ---- Refusals and unknown outcomes ------------------------------------------------------------


class Fault(NamedTuple):
    """A server's answer without a picture, and what the tool makes of it."""

    reply: Reply
    exit_code: int
    code: str | None = None  # the API's; None: one of the tool's own
    shown: str = ""  # stands in the message or its hint


class FaultCase(AnswerCase):
    """A case for answers without a picture."""

    def check_faults(self, faults: Mapping[str, Fault], *argv: str) -> None:
        """Assert what each fault comes to: exit code, code, words, one POST, nothing saved."""
        replies = {name: fault.reply for name, fault in faults.items()}
        for name, api, run in self.ask_each(replies, "--json", *argv):
            with self.subTest(name):
                self.check_fault(faults[name], self.check(run, faults[name].exit_code))
                self.assertEqual(len(api.posts), 1)
        self.assertEqual(self.listing(), [])

    def check_fault(self, fault: Fault, run: Run) -> None:
        """Assert what the document and the terminal say of a fault."""
        error, unknown = run.json["error"], fault.exit_code == 8
        self.assertIn(fault.shown, f"{error['message']}; {error['hint']}")
        self.assertIn(fault.shown, run.err)
        self.assertEqual(error["exit_code"], fault.exit_code)
        self.assertEqual(error["code"], fault.code or error["code"])
        self.assertTrue(error["code"])
        self.assertIs(error["maybe_billed"], unknown)
        self.assertEqual((run.json["ok"], run.json["images"]), (False, []))
        if not unknown:
            self.assertIsNone(run.json["recover_id"])
            self.assertFalse(self.job_left(run))


def coded(status: int, exit_code: int, *codes: str) -> dict[str, Fault]:
    """Return the faults of a server that answers with each of these codes."""
    return {
        f"{status} {code}": Fault(
            refusal(status, code, f"Sorry: {code}, no.", type="some_error"),
            exit_code,
            code,
            f"Sorry: {code}, no",
        )
        for code in codes
    }


class TestRefusals(FaultCase):
    """Answers that say that nothing was made."""

    def test_the_codes_of_the_api(self) -> None:
        self.check_faults(
            {
                **coded(400, 5, "moderation_blocked", "content_policy_violation"),
                **coded(400, 1, "invalid_value", "unknown_parameter", "duplicate_parameter"),
                **coded(400, 1, "invalid_image_file", "invalid_input_fidelity_model"),
                **coded(400, 6, "billing_hard_limit_reached"),
                **coded(401, 4, "invalid_api_key"),
                **coded(404, 1, "model_not_found"),
                **coded(422, 1, "never_heard_of_it"),
                **coded(429, 6, "insufficient_quota", "credit_balance_exhausted"),
                **coded(429, 6, "organization_spend_limit_exceeded"),
                **coded(429, 6, "project_spend_limit_exceeded"),
                **coded(429, 6, "organization_usage_limit_exceeded"),
            }
        )

    def test_what_only_type_or_message_tell(self) -> None:
        policy = "Rejected. safety_violations=[violence]"
        quota = refusal(429, None, "You are out of credit.", type="insufficient_quota")
        self.check_faults(
            {
                "policy": Fault(refusal(400, None, policy), 5, shown=policy),
                "policy as a value": Fault(refusal(400, "invalid_value", policy), 5, shown=policy),
                "quota": Fault(quota, 6, "insufficient_quota", "out of credit"),
                "organisation": Fault(
                    refusal(403, None, "Your organization must be verified."), 4, shown="15 minutes"
                ),
                "forbidden": Fault(page(403, "Access denied"), 4, shown="HTTP 403"),
            }
        )

    def test_limits_that_pass(self) -> None:
        busy = page(503, "Busy", [("Retry-After", "1")])
        self.check_faults(
            {
                **coded(429, 6, "rate_limit_exceeded"),
                **coded(503, 6, "slow_down", "server_is_overloaded"),
                "429 in words": Fault(Reply(429, b"slower"), 6, shown="HTTP 429"),
                "503 that says when to come back": Fault(busy, 6, shown="HTTP 503"),
            },
            *NO_RETRY,
        )

    def test_limits_that_pass_are_tried_again(self) -> None:
        soon = [("Retry-After-Ms", "1")]
        for reply in (
            refusal(429, "rate_limit_exceeded", "Wait.", headers=soon),
            refusal(503, "slow_down", "Wait.", headers=soon),
            page(503, "Busy", soon),
        ):
            with self.subTest(reply.body):
                api = self.serve_base(reply, answer(SMALL))
                run = self.check(self.run_tool("generate", "a fox", "--json"), 0)
                self.assertEqual(run.json["attempts"], 2)
                self.assertEqual(api.posts[0].body, api.posts[1].body)
                self.assertEqual(self.jobs(), [])

    def test_every_shape_of_an_error(self) -> None:
        documents: dict[str, tuple[Any, str | None]] = {
            "string": ({"error": "bad thing"}, None),
            "flat": ({"message": "bad thing", "code": "relay_code"}, "relay_code"),
            "detail": ({"detail": "bad thing"}, None),
            "list of details": ({"detail": [{"loc": ["body", "n"], "msg": "bad thing"}]}, None),
            "integer code": ({"error": {"message": "bad thing", "code": 40001}}, "40001"),
            "nulls": ({"error": {"message": "bad thing", "type": None, "code": None}}, None),
            "detail in error": ({"error": {"detail": "bad thing"}}, None),
            "error in detail": ({"detail": {"error": {"message": "bad thing"}}}, None),
        }
        self.check_faults(
            {
                name: Fault(json_reply(document, 400), 1, code, "bad thing")
                for name, (document, code) in documents.items()
            }
        )

    def test_errors_that_are_no_json(self) -> None:
        self.check_faults(
            {
                "nothing": Fault(Reply(400), 1, shown="HTTP 400"),
                "HTML": Fault(page(404, "Not here"), 1, shown="HTTP 404"),
                "words": Fault(Reply(400, b"bad thing"), 1, shown="bad thing"),
                "number": Fault(Reply(400, b"17"), 1, shown="HTTP 400"),
                "null": Fault(Reply(400, b"null"), 1, shown="HTTP 400"),
                "cut": Fault(Reply(400, b'{"error": {"message": "bad th'), 1, shown="HTTP 400"),
                "garbage": Fault(Reply(413, bytes(range(256))), 1, shown="HTTP 413"),
            }
        )

    def test_a_redirect_names_its_target(self) -> None:
        target = "https://console.example/login"
        faults = {
            str(status): Fault(Reply(status, headers=[("Location", target)]), 1, shown=target)
            for status in (301, 302, 307)
        }
        self.check_faults({**faults, "to nowhere": Fault(Reply(302), 1, shown="base URL")})

    def test_an_error_inside_a_200(self) -> None:
        faults = {
            **coded(200, 5, "moderation_blocked"),
            **coded(200, 6, "insufficient_quota"),
            **coded(200, 4, "invalid_api_key"),
            **coded(200, 1, "unknown_parameter"),
            **coded(200, 8, "upstream_error", "500"),
        }
        after_blank_lines = {
            name: fault._replace(reply=fault.reply._replace(body=b"\n \r\n" + fault.reply.body))
            for name, fault in faults.items()
        }
        words = Fault(json_reply({"error": "upstream timed out"}), 8, shown="upstream timed out")
        self.check_faults({**after_blank_lines, "in words": words})

    def test_an_error_in_a_stream(self) -> None:
        error = {"message": "bad thing", "code": "moderation_blocked"}
        bare = f"event: error\ndata: {json.dumps(error)}\n\n".encode()
        streams = {
            "as an object": event_stream({"type": "error", "error": error}),
            "as an event": event_stream(bare),
            "after a preview": event_stream(partial_event(SMALL), {"error": error}),
        }
        self.check_faults(
            {
                name: Fault(reply, 5, "moderation_blocked", "bad thing")
                for name, reply in streams.items()
            }
        )


class TestUnknownOutcomes(FaultCase):
    """Answers after which nobody knows whether a picture was made: never a second POST."""

    def test_server_errors(self) -> None:
        codes = ("server_error", "bad_response_status_code", "do_request_failed", "upstream_error")
        statuses = (408, 409, 500, 502, 503, 521, 529)
        pages = {
            str(status): Fault(page(status, "Sorry"), 8, shown=f"HTTP {status}")
            for status in statuses
        }
        self.check_faults({**coded(500, 8, *codes), **pages, "empty": Fault(Reply(500), 8)})

    def test_a_gateway_that_cut_it_gets_the_hint_to_stream(self) -> None:
        self.check_faults(
            {
                str(status): Fault(page(status, "Time-out"), 8, shown="--stream --partial-images 1")
                for status in (504, 520, 524)
            }
        )

    def test_advice_to_retry_changes_nothing(self) -> None:
        headers = [("Retry-After", "0"), ("X-Should-Retry", "true")]
        self.check_faults(
            {
                str(status): Fault(refusal(status, None, "Again.", headers=headers), 8)
                for status in (409, 500)
            }
        )

    def test_json_without_a_picture(self) -> None:
        documents: list[Any] = [
            {},
            [],
            None,
            "fine",
            {"data": []},
            {"data": None},
            {"data": [None]},
            {"data": [{"b64_json": "", "url": ""}]},
            {"data": {"task_id": "t1"}},
            {"created": 1, "data": "pending"},
        ]
        self.check_faults({repr(value): Fault(json_reply(value), 8) for value in documents})

    def test_bodies_that_cannot_be_read(self) -> None:
        whole = answer(LARGE)
        bodies = {
            "nothing": Reply(200),
            "blank lines": Reply(200, b"\n\n\n"),
            "a login page": page(200, "Sign in"),
            "words": Reply(200, b"fine"),
            "cut": whole._replace(cut=5000),
            "cut, and the framing hides it": whole._replace(cut=5000, framing="close"),
            "cut chunks": in_pieces(whole, 999)._replace(framing="chunked", cut=5000),
            "reset halfway": whole._replace(cut=5000, reset=True),
            "cut inside the head": Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Ty"),
            "a preview only": event_stream(partial_event(SMALL)),
        }
        self.check_faults({name: Fault(reply, 8) for name, reply in bodies.items()})

    def test_lines_that_break(self) -> None:
        breaks = {
            "closed": Reply(silent=True),
            "reset": Reply(reset=True),
            "not HTTP": Reply(raw=b"hello\r\n\r\n"),
            "HTML without a head": Reply(raw=b"<html>hello</html>"),
        }
        faults = {name: Fault(reply, 8, shown="billed") for name, reply in breaks.items()}
        self.check_faults(faults)

    def test_bytes_that_came_can_be_recovered(self) -> None:
        cut = answer(SMALL, LARGE)._replace(cut=5000)
        failed = self.check(self.ask(cut, "-n", "2").run, 8)
        (job,) = self.jobs()
        last = failed.err.splitlines()[-1]
        self.assertRegex(last, rf"^Recover: \S*python\S* \S+ recover {job.name}$")
        run = self.check(self.run_tool("recover", job.name, "-o", "fox.png"), 9)
        self.assertEqual(contents(run), [SMALL])

    def test_nothing_listens(self) -> None:
        api = Api()
        api.close()
        self.env.update(GPT_IMAGE2_BASE_URL=api.base_url, GPT_IMAGE2_API_KEY=api.key)
        run = self.check(self.run_tool("generate", "a fox", "--json", *NO_RETRY), 7)
        self.assertIs(run.json["error"]["maybe_billed"], False)
        self.assertEqual(self.jobs(), [])
