"""--stream and --partial-images: previews as they arrive, and the picture only when it is whole."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
import unittest
from pathlib import Path
from typing import Any

from tests.pictures import jpeg, png, read_png
from tests.support import (
    OPENAI_USAGE,
    SCRIPT,
    Argument,
    Case,
    Child,
    Chunk,
    Reply,
    Run,
    answer,
    b64,
    completed_event,
    event_stream,
    in_pieces,
    partial_event,
    refusal,
    sse,
)

FIRST, SECOND, PICTURE, OTHER = (png(64, 64, rgb=(shade, 0, 0)) for shade in (1, 2, 3, 4))
STREAM = [("Content-Type", "text/event-stream")]


def completed_bytes(picture: bytes = PICTURE) -> bytes:
    """Return the last event of a stream as it goes over the line."""
    event = sse(completed_event(picture))
    assert isinstance(event, bytes)
    return event


def many_lines(event: Any) -> str:
    """Return an event whose JSON is spread over many data lines."""
    return "".join(f"data: {line}\n" for line in json.dumps(event, indent=1).splitlines())


class StreamCase(Case):
    """A case that asks for previews."""

    def start(self, *argv: Argument) -> Child:
        """Start generate with two previews, into fox.png."""
        words = ("a fox", "--partial-images", "2", "-o", "fox.png")
        return self.start_tool("generate", *words, *argv)

    def stream(self, *argv: Argument, code: int = 0) -> Run:
        """Run generate with two previews, into fox.png."""
        return self.check(self.finish(self.start(*argv)), code)

    def work_file(self, name: str) -> bytes | None:
        """Return what a file of the work folder holds, None if it is not there."""
        path = self.work / name
        return path.read_bytes() if path.exists() else None

    def contents(self, files: list[dict[str, Any]]) -> list[bytes]:
        """Return what the files of a JSON document hold; its facts must be true."""
        found = [Path(file["path"]).read_bytes() for file in files]
        self.assertEqual([file["bytes"] for file in files], [len(data) for data in found])
        return found

    def stderr_until(self, process: Child, text: str) -> str:
        """Read what a running tool says, up to some text."""
        assert process.stderr
        said, end = b"", time.monotonic() + 20
        while text.encode() not in said:
            left = end - time.monotonic()
            if left < 0 or not select.select([process.stderr], [], [], left)[0]:
                self.fail(f"no {text!r} within 20 s in {said!r}")
            piece = os.read(process.stderr.fileno(), 65536)
            said += piece
            if not piece:
                self.fail(f"no {text!r} in {said!r}")
        return said.decode()


class WhileItComes(StreamCase):
    """What can be seen before the stream has ended."""

    def test_each_preview_is_saved_and_told_before_the_next_comes(self) -> None:
        go_on, finish = threading.Event(), threading.Event()
        events = (partial_event(FIRST), go_on, partial_event(SECOND, 1), finish)
        api = self.serve_base(event_stream(*events, completed_event(PICTURE), "[DONE]"))
        self.hurry(5)
        tool = self.start()

        said = self.stderr_until(tool, f"Partial: {self.work / 'fox.partial-1.png'}\n")
        self.assertEqual(self.listing(), ["fox.partial-1.png"])
        self.assertEqual(self.work_file("fox.partial-1.png"), FIRST)
        self.assertNotIn("partial-2", said)

        go_on.set()
        said += self.stderr_until(tool, f"Partial: {self.work / 'fox.partial-2.png'}\n")
        self.assertEqual(self.listing(), ["fox.partial-1.png", "fox.partial-2.png"])
        self.assertEqual(self.work_file("fox.partial-2.png"), SECOND)

        finish.set()
        run = self.check(self.finish(tool), 0)
        self.assertEqual(run.out, f"Saved: {self.work / 'fox.png'} (1 KB)\n")
        self.assertEqual(self.work_file("fox.png"), PICTURE)
        self.assertEqual((said + run.err).count("Partial: "), 2)
        self.assertNotIn("Saved:", said + run.err)
        fields = {"model": "gpt-image-2", "prompt": "a fox", "output_format": "png"}
        stream = {"stream": True, "partial_images": 2}
        self.assertEqual(api.posts[0].json, {**fields, **stream})

    def test_a_preview_in_single_bytes_is_saved_before_the_picture_comes(self) -> None:
        finish = threading.Event()
        early = sse(partial_event(FIRST))
        assert isinstance(early, bytes)
        pieces: list[Chunk] = [early[at : at + 1] for at in range(len(early))]
        pieces.insert(2, lambda: time.sleep(0.25))  # so long that the tool looks at these two
        self.serve_base(Reply(headers=STREAM, chunks=[*pieces, finish, completed_bytes()]))
        self.hurry(5)
        tool = self.start()
        self.stderr_until(tool, "Partial: ")
        self.assertEqual(self.listing(), ["fox.partial-1.png"])
        finish.set()
        self.check(self.finish(tool), 0)
        self.assertEqual(self.work_file("fox.png"), PICTURE)


class Outcomes(StreamCase):
    """What a stream comes to in the end."""

    def test_the_document_keeps_previews_and_pictures_apart(self) -> None:
        events = (partial_event(FIRST), partial_event(SECOND, 1), completed_event(PICTURE))
        self.serve_base(event_stream(*events))
        run = self.stream("--json")
        self.assertEqual(self.contents(run.json["images"]), [PICTURE])
        self.assertEqual(self.contents(run.json["partials"]), [FIRST, SECOND])
        sizes = [(file["format"], file["width"], file["height"]) for file in run.json["partials"]]
        self.assertEqual(sizes, [("png", 64, 64)] * 2)
        self.assertNotIn("Saved:", run.out + run.err)
        self.assertEqual((run.json["usage"], run.json["warnings"]), (OPENAI_USAGE, []))
        self.assertEqual(self.jobs(), [])

    def test_edits(self) -> None:
        (self.work / "a.png").write_bytes(OTHER)
        events = (
            partial_event(FIRST, kind="image_edit"),
            completed_event(PICTURE, kind="image_edit"),
        )
        api = self.serve_base(event_stream(*events))
        argv = ("edit", "a.png", "a fox", "--partial-images", "1", "-o", "fox.png")
        run = self.check(self.run_tool(*argv), 0)
        self.assertEqual(run.saved, [self.work / "fox.png"])
        self.assertEqual(self.work_file("fox.png"), PICTURE)
        self.assertEqual(self.work_file("fox.partial-1.png"), FIRST)
        fields = api.posts[0].fields
        self.assertEqual((fields["stream"], fields["partial_images"]), ("true", "1"))

    def test_stream_alone_brings_no_previews(self) -> None:
        api = self.serve_base(event_stream(completed_event(PICTURE)))
        run = self.check(self.run_tool("generate", "a fox", "--stream", "--json"), 0)
        self.assertEqual((run.json["partials"], len(run.json["images"])), ([], 1))
        self.assertNotIn("partial_images", api.posts[0].json)

    def test_a_server_that_ignores_stream(self) -> None:
        self.serve_base(answer(PICTURE))
        run = self.stream("--json")
        self.assertEqual(self.contents(run.json["images"]), [PICTURE])
        self.assertEqual((run.json["partials"], run.json["warnings"]), ([], []))

    def test_quiet_saves_the_previews_and_says_nothing(self) -> None:
        self.serve_base(event_stream(partial_event(FIRST), completed_event(PICTURE)))
        run = self.stream("--quiet")
        self.assertEqual((run.err, run.saved), ("", [self.work / "fox.png"]))
        self.assertEqual(self.work_file("fox.partial-1.png"), FIRST)

    def test_a_preview_that_cannot_be_read_costs_only_itself(self) -> None:
        bad = {**partial_event(FIRST), "b64_json": "no/picture"}
        self.serve_base(event_stream(bad, partial_event(SECOND, 1), completed_event(PICTURE)))
        run = self.stream("--json")
        self.assertEqual(self.contents(run.json["partials"]), [SECOND])
        self.assertEqual(self.contents(run.json["images"]), [PICTURE])
        self.assertRegex("\n".join(run.json["warnings"]), "partial image 1")

    def test_usage_and_cost_are_the_completed_events(self) -> None:
        events = [completed_event(PICTURE), completed_event(PICTURE, usage={})]
        priced, unknown = map(event_stream, events)
        self.serve_base(priced, unknown)
        run = self.stream("--json", "--provider", "openai")
        self.assertEqual(run.json["usage"], OPENAI_USAGE)
        self.assertAlmostEqual(run.json["cost"]["amount"], 0.00828)
        run = self.stream("--json", "--provider", "openai", "--force")
        self.assertIsNone(run.json["cost"])


class SeveralPictures(StreamCase):
    """n > 1: one completed event for each, and previews of each."""

    def test_previews_are_named_after_their_picture(self) -> None:
        events = (
            *(partial_event(FIRST), completed_event(PICTURE)),
            *(partial_event(SECOND), completed_event(OTHER)),
        )
        self.serve_base(event_stream(*events))
        run = self.stream("--n", "2")
        self.assertEqual(run.saved, [self.work / "fox-1.png", self.work / "fox-2.png"])
        files = {path: self.work_file(path) for path in self.listing()}
        expected = {"fox-1.png": PICTURE, "fox-2.png": OTHER}
        previews = {"fox-1.partial-1.png": FIRST, "fox-2.partial-1.png": SECOND}
        self.assertEqual(files, {**expected, **previews})

    def test_no_preview_is_lost_where_those_of_two_pictures_come_together(self) -> None:
        events = (partial_event(FIRST), partial_event(SECOND), completed_event(PICTURE))
        self.serve_base(event_stream(*events, completed_event(OTHER)))
        run = self.stream("--n", "2", "--json")
        self.assertEqual(self.contents(run.json["partials"]), [FIRST, SECOND])
        self.assertEqual(self.contents(run.json["images"]), [PICTURE, OTHER])

    def test_each_event_tells_the_tokens_of_its_own_picture(self) -> None:
        self.serve_base(event_stream(completed_event(PICTURE), completed_event(OTHER)))
        run = self.stream("--n", "2", "--provider", "openai", "--json")
        self.assertIn("562 tokens", run.err)
        self.assertAlmostEqual(run.json["cost"]["amount"], 2 * 0.00828)

    def test_a_stream_cut_after_the_first_picture(self) -> None:
        whole = event_stream(completed_event(PICTURE), completed_event(OTHER))
        self.serve_base(whole._replace(cut=len(completed_bytes()) + 50))
        run = self.stream("--n", "2", "--json", code=9)
        self.assertEqual(self.contents(run.json["images"]), [PICTURE])
        self.assertRegex(run.json["error"]["message"], r"\b1 of .*\b2\b")


class WithoutAnEnd(StreamCase):
    """A stream that brings no completed event brings no picture."""

    def assert_unknown(self, reply: Reply) -> None:
        """Assert exit 8, with the preview kept, and not taken for the picture by anyone."""
        self.servers.clear()
        api = self.serve_base(reply)
        run = self.stream("--json", "--force", "--new", code=8)
        self.assertEqual(self.listing(), ["fox.partial-1.png"])
        self.assertEqual(self.contents(run.json["partials"]), [FIRST])
        self.assertEqual(run.json["images"], [])
        self.assertEqual((run.json["ok"], run.json["error"]["maybe_billed"]), (False, True))
        recovered = self.check(self.run_tool("recover", run.json["recover_id"]), 10)
        self.assertEqual((recovered.out, self.listing()), ("", ["fox.partial-1.png"]))
        self.assertEqual(len(api.requests), 1)

    def test_it_is_unknown_and_the_preview_is_not_the_picture(self) -> None:
        preview, whole = (
            event_stream(partial_event(FIRST), *more) for more in ((), [completed_event(PICTURE)])
        )
        length = sum(len(chunk) for chunk in preview.chunks if isinstance(chunk, bytes))
        table = {
            "ended": preview,
            "cut": preview._replace(cut=length),
            "done": event_stream(partial_event(FIRST), "[DONE]"),
            "cut in the picture": whole._replace(cut=length + 200),
            "spread over lines": event_stream(f"{many_lines(partial_event(FIRST))}\n".encode()),
        }
        for name, reply in table.items():
            with self.subTest(name):
                self.assert_unknown(reply)

    def test_a_preview_that_only_the_name_of_its_event_tells(self) -> None:
        head = f'event: image_generation.partial_image\ndata: {{"b64_json": "{b64(FIRST)}"'
        for name, body in {"whole": head + "}\n\n", "cut before its type": head + ", "}.items():
            with self.subTest(name):
                self.serve_base(event_stream(body.encode()))
                run = self.stream("--json", "--new", "--force", code=8)
                self.assertEqual(run.json["images"], [])
                self.check(self.run_tool("recover", run.json["recover_id"]), 10)
                self.assertNotIn("fox.png", self.listing())

    def test_no_saved_line_and_the_way_on(self) -> None:
        self.serve_base(event_stream(partial_event(FIRST)))
        run = self.stream(code=8)
        self.assertEqual(run.out, "")
        self.assertNotIn("Saved:", run.err)
        self.assertRegex(run.err, "may have been billed")
        self.assertRegex(run.err.splitlines()[-1], r"^Recover: .* recover \S+$")

    def test_a_picture_whose_event_is_cut_behind_it_is_recovered(self) -> None:
        cut = len(completed_bytes()) - 20
        self.serve_base(event_stream(completed_event(PICTURE))._replace(cut=cut))
        run = self.stream("--json", code=8)
        self.check(self.run_tool("recover", run.json["recover_id"]), 0)
        self.assertEqual(self.work_file("fox.png"), PICTURE)

    def test_an_error_event_after_a_preview(self) -> None:
        error = {"message": "Not this.", "code": "moderation_blocked"}
        self.serve_base(event_stream(partial_event(FIRST), {"type": "error", "error": error}))
        run = self.stream("--json", code=5)
        self.assertEqual(run.json["error"]["code"], "moderation_blocked")
        self.assertEqual(self.contents(run.json["partials"]), [FIRST])
        self.assertEqual((run.json["images"], self.listing()), ([], ["fox.partial-1.png"]))

    def test_a_refusal_before_the_stream(self) -> None:
        self.serve_base(refusal(400, "invalid_value", "No streams here."))
        run = self.stream("--json", code=1)
        self.assertEqual((run.json["partials"], self.listing()), ([], []))


class Spellings(StreamCase):
    """Whatever may be done to an event stream, preview and picture come out of it."""

    def spellings(self) -> dict[str, bytes]:
        """Return streams of the same two events."""
        early, last = partial_event(FIRST), completed_event(PICTURE)
        plain = f"data: {json.dumps(early)}\n\ndata: {json.dumps(last)}\n\n"
        named = f"event: {early['type']}\n{plain}"
        tagged = plain.replace("data", "id: 1\nretry: 3000\ndata").replace("}\n", "}\nevent: x\n")
        many = f"{many_lines(early)}\n{many_lines(last)}\n"
        return {
            "data lines only": plain.encode(),
            "without a blank at the end": plain.rstrip("\n").encode(),
            "without spaces": plain.replace("data: ", "data:").encode(),
            "CRLF and a done line": f"{named}data: [DONE]\n\n".replace("\n", "\r\n").encode(),
            "comments": (': say "hi\n\n' + plain.replace("data:", ": ping\ndata:")).encode(),
            "blank lines and a BOM": f"\ufeff\n\n{plain}".encode(),
            "ids, retries and names behind the data": tagged.encode(),
            "data of many lines": many.encode(),
            "many lines and CRLF": many.replace("\n", "\r\n").encode(),
            "events of another kind": f'data: {{"type": "ping"}}\n\ndata: 1\n\n{plain}'.encode(),
        }

    def assert_both(self, reply: Reply) -> None:
        """Assert that preview and picture are saved."""
        self.serve_base(reply)
        run = self.stream("--json", "--force")
        self.assertEqual(self.contents(run.json["partials"]), [FIRST])
        self.assertEqual(self.contents(run.json["images"]), [PICTURE])
        self.assertEqual(run.json["usage"], OPENAI_USAGE)

    def test_every_spelling(self) -> None:
        for name, body in self.spellings().items():
            with self.subTest(name):
                self.assert_both(Reply(body=body, headers=STREAM))

    def test_single_bytes_and_other_content_types(self) -> None:
        body = self.spellings()["CRLF and a done line"]
        pieces = in_pieces(Reply(body=body, headers=STREAM, framing="chunked"), 1)
        for name, reply in {
            "bytes": pieces,
            "called JSON": Reply(body=body, headers=[("Content-Type", "application/json")]),
        }.items():
            with self.subTest(name):
                self.assert_both(reply)


class Places(StreamCase):
    """Where previews go."""

    def setUp(self) -> None:
        super().setUp()
        events = (partial_event(jpeg(64, 64)), completed_event(PICTURE))
        self.serve_base(otherwise=event_stream(*events))

    def names(self, *argv: Argument) -> list[str]:
        """Return what a run makes, as names below the work folder."""
        before = set(self.listing())
        argv = ("generate", "a fox", "--partial-images", "1", *argv)
        self.check(self.run_tool(*argv), 0)
        return sorted(set(self.listing()) - before)

    def test_beside_the_picture(self) -> None:
        self.assertEqual(self.names("-o", "fox.png"), ["fox.partial-1.png", "fox.png"])
        self.assertEqual(self.names("-o", "a.b/fox"), ["a.b/fox", "a.b/fox.partial-1"])

    def test_under_generated_names_with_the_suffix_of_their_own_bytes(self) -> None:
        for argv in ((), ("-o", "new/"), ("--output-dir", "other")):
            with self.subTest(argv):
                preview, picture = self.names(*argv)
                self.assertEqual(preview, picture.replace(".png", ".partial-1.jpg"))

    def test_standard_output_gets_the_picture_alone(self) -> None:
        argv = ("generate", "a fox", "--partial-images", "1", "-o", "-")
        run = self.check(self.run_tool(*argv), 0)
        self.assertEqual(run.raw_out, PICTURE)
        self.assertEqual(run.err.count("Saved:"), 1)
        self.assertEqual(self.listing(), [])

    def test_a_file_that_is_there_is_replaced_by_force_only(self) -> None:
        old = self.work / "fox.partial-1.png"
        old.write_bytes(b"old")
        run = self.run_tool("generate", "a fox", "--partial-images", "1", "-o", "fox.png")
        self.assertIn(run.code, (0, 2), self.story(run))  # refused, or saved under a free name
        self.assertEqual(old.read_bytes(), b"old")
        self.names("-o", "fox.png", "--force")
        self.assertEqual(old.read_bytes(), jpeg(64, 64))


@unittest.skipUnless(sys.platform == "linux", "elsewhere ru_maxrss is not in kilobytes")
class Memory(StreamCase):
    """Previews of any size pass through a small buffer."""

    def test_big_previews_take_no_more_than_small_ones(self) -> None:
        big, small = png(1320, 1320, seed=1), png(16, 16, seed=1)
        self.assertGreater(len(big), 5_000_000)
        peaks = [self.peak(small), self.peak(big)]
        self.assertLess(peaks[1] - peaks[0], 6_000, f"kilobytes: {peaks}")

    def peak(self, picture: bytes) -> int:
        """Return the most memory, in KB, that a run with three such previews takes."""
        self.script = self.tmp / "measured.py"
        self.script.write_text(
            "import resource, subprocess, sys\n"
            f"code = subprocess.call([sys.executable, {str(SCRIPT)!r}, *sys.argv[1:]])\n"
            "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
            f"open({str(self.tmp / 'peak')!r}, 'w').write(str(peak))\n"
            "sys.exit(code)\n"
        )
        previews = [partial_event(picture, index) for index in range(3)]
        self.serve_base(event_stream(*previews, completed_event(picture)))
        run = self.stream("--force")
        self.assertEqual(run.err.count("Partial: "), 3)
        for name in ("fox.partial-1.png", "fox.partial-3.png", "fox.png"):
            self.assertEqual(self.work_file(name), picture)
        return int((self.tmp / "peak").read_text())


class Sandbox(StreamCase):
    """The sandbox streams too."""

    def test_two_previews_and_a_picture(self) -> None:
        argv = ("--sandbox", "--json", "-s", "1024x1024")
        document = self.stream(*argv).json
        files = [*self.contents(document["partials"]), *self.contents(document["images"])]
        self.assertEqual(len(set(files)), 3)
        for data in files:
            self.assertEqual(read_png(data)[:2], (1024, 1024))
        self.assertTrue(document["sandbox"])

    def test_edits_and_several_pictures(self) -> None:
        (self.work / "a.png").write_bytes(OTHER)
        argv = ("a.png", "a fox", "--sandbox", "--json", "--n", "2", "--partial-images", "1")
        document = self.check(self.run_tool("edit", *argv), 0).json
        self.assertEqual((len(document["partials"]), len(document["images"])), (2, 2))
