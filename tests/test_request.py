"""Requests: from the command line to the bytes on the wire, and what is refused before that."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
from itertools import zip_longest
from pathlib import Path
from typing import Any, Iterator
from unittest import mock

from tests.case import Argument, Case, Run
from tests.pictures import gif, jpeg, png, read_png, svg, webp
from tests.server import KEY, Part, Reply, Request, answer

PICTURE = png(1024, 1024)
ONE, TWO, THREE = (png(64, 48, rgb=(shade, 0, 0)) for shade in (1, 2, 3))
CLEAR = png(64, 48, hole=(8, 8, 16, 16))  # fit for a mask of the others
LATIN = os.fsdecode(b"caf\xe9")  # an argument that is not UTF-8

STARTS = {"generations": ["generate", "a fox"], "edits": ["edit", "a.png", "a fox"]}

# Texts that mean something to a shell, to JSON, to curl's config or to its form syntax.
HOSTILE_TEXTS = (
    "naïve 日本語 🦊 e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u202eabc\u2028",
    'say "hi" \\"there\\" \\n \'x\' $HOME `id` %s {a,b}[1-3] @file <b> a=b;type=x',
    "  two\nlines\r\nand\ta tab\n",
    "@/etc/passwd",
    "</etc/passwd",
    "<-",
    '"quoted"',
    "blue;filename=x,y;headers=@a",
    '--boundary\r\nContent-Disposition: form-data; name="n"\r\n\r\n9',
)


def as_many_as_asked(request: Request) -> Reply:
    """Answer JSON or a form with as many pictures as it asks for."""
    is_json = request.headers["content-type"] == "application/json"
    fields = request.json if is_json else request.fields
    return answer(*[PICTURE] * int(fields.get("n", 1)))


def spelled(value: Any) -> str:
    """Return JSON as text, in which 1, 1.0, true and "1" are four different things."""
    return json.dumps(value, sort_keys=True)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Return dotted names as JSON nests them."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        place = result
        for step in path:
            place = place.setdefault(step, {})
        place[last] = value
    return result


def in_a_form(values: dict[str, Any]) -> dict[str, str]:
    """Return dotted names as a form spells them, and values as text."""
    result = {}
    for name, value in values.items():
        first, *steps = name.split(".")
        text = value if isinstance(value, str) else json.dumps(value)
        result[first + "".join(f"[{step}]" for step in steps)] = text
    return result


class RequestCase(Case):
    """A case with pictures in the work folder, and a server that gives what it is asked for."""

    def setUp(self) -> None:
        super().setUp()
        self.api = self.serve_base(otherwise=as_many_as_asked)
        for name, data in (("a", ONE), ("b", TWO), ("c", THREE), ("clear", CLEAR)):
            self.put(f"{name}.png", data)

    def put(self, name: str, data: bytes) -> Path:
        """Write a file of the work folder, and return its path."""
        path = self.work / name
        path.write_bytes(data)
        return path

    def sent(self, *argv: Argument, **options: Any) -> Request:
        """Return the request of a command line, which must succeed."""
        posts = len(self.api.posts)
        self.check(self.run_tool(*argv, **options), 0)
        self.assertEqual(len(self.api.posts), posts + 1)
        return self.api.posts[-1]

    def edited(self, *argv: Argument, **options: Any) -> Request:
        """Return the request of an edit."""
        return self.sent("edit", *argv, **options)

    def uploads(self, *argv: Argument) -> list[Part]:
        """Return the files that an edit sends."""
        return self.edited(*argv).uploads

    def assert_sends(self, endpoint: str, argv: list[str], values: dict[str, Any]) -> None:
        """Assert that options add exactly these fields, as the endpoint spells them."""
        request = self.sent(*STARTS[endpoint], *argv)
        self.assertEqual(request.path, f"/v1/images/{endpoint}")
        values = {"model": "gpt-image-2", "prompt": "a fox", **values}
        if endpoint == "generations":
            self.assertEqual(spelled(request.json), spelled(nested(values)))
        else:
            self.assertEqual(request.fields, in_a_form({"size": "auto", **values}))

    def planned(self, line: str, code: int = 0) -> Any:
        """Return the document of a dry run."""
        return self.check(self.run_tool(*shlex.split(line), "--dry-run", "--json"), code).json

    def world(self) -> list[str]:
        """Return every file and folder of this test."""
        return sorted(map(str, self.tmp.rglob("*")))


class TestHead(RequestCase):
    """The request line, its headers, and where they may not go."""

    def test_a_bare_prompt_sends_model_and_prompt_and_nothing_else(self) -> None:
        request = self.sent("generate", "a fox")
        self.assertEqual(request.json, {"model": "gpt-image-2", "prompt": "a fox"})
        self.assertEqual((request.method, request.target), ("POST", "/v1/images/generations"))
        self.assertEqual(request.headers["content-type"], "application/json")
        self.assertEqual(request.headers["authorization"], f"Bearer {KEY}")
        self.assertEqual(request.headers["host"], f"127.0.0.1:{self.api.port}")
        self.assertRegex(request.headers["user-agent"], r"^gpt-image-?2/\d")
        names = [name.lower() for name in request.headers]
        self.assertEqual(len(names), len(set(names)), "a header came twice")
        self.assertEqual(self.api.connections, 1)

    def test_an_edit_sends_its_image_and_three_fields(self) -> None:
        request = self.edited("a.png", "make it blue")
        self.assertEqual((request.method, request.target), ("POST", "/v1/images/edits"))
        self.assertEqual(request.headers["authorization"], f"Bearer {KEY}")
        fields = {"model": "gpt-image-2", "prompt": "make it blue", "size": "auto"}
        self.assertEqual((request.fields, len(request.parts)), (fields, 4))
        (image,) = request.uploads
        told = (image.name, image.content_type, image.body)
        self.assertEqual(told, ("image", "image/png", ONE))

    def test_only_openai_gets_a_request_id_and_it_is_the_job_id(self) -> None:
        for provider in ("openai", "openai-hk", "nodekey", "azure", "generic"):
            for start in STARTS.values():
                with self.subTest(provider, start=start):
                    run = self.run_tool(*start, "--provider", provider, "--json")
                    job = self.check(run, 0).json["job_id"]
                    found = self.api.posts[-1].headers.get("x-client-request-id")
                    self.assertEqual(found, job if provider == "openai" else None)


# ---- Prompts and words ------------------------------------------------------------------------


class TestPrompts(RequestCase):
    """Every prompt arrives byte for byte, whichever way it comes."""

    def test_any_text_survives(self) -> None:
        for prompt in HOSTILE_TEXTS:
            with self.subTest(prompt):
                self.assertEqual(self.sent("generate", "--", prompt).json["prompt"], prompt)
                request = self.edited("a.png", "--", prompt)
                self.assertEqual((request.fields["prompt"], len(request.parts)), (prompt, 4))

    def test_each_way_for_a_prompt(self) -> None:
        self.put("bom.txt", "\ufeff日本 🦊\n".encode())
        self.put("lines.txt", b"a\n\nb\n\n")
        self.put("form.txt", b"<a fox>")
        table: list[tuple[list[str], str, str]] = [
            # dash-led ones go after two dashes, or an equals sign
            (["--quality", "low", "--", "-5 degrees, --sandbox"], "", "-5 degrees, --sandbox"),
            (["--prompt=--help"], "", "--help"),
            (["--", "--"], "", "--"),
            # from a file or standard input one newline and a BOM are cut
            (["-"], "\ufeffa fox\n", "a fox"),
            (["-", "--quality", "low"], " a\r\nfox\n\n", " a\r\nfox\n"),
            (["--quality", "low", "-"], "a fox\r\n", "a fox"),
            (["-"], ";from stdin", ";from stdin"),
            (["--prompt-file", "bom.txt"], "", "日本 🦊"),
            (["--prompt-file", "lines.txt"], "", "a\n\nb\n"),
            (["--prompt-file", "form.txt"], "", "<a fox>"),
            # from the option nothing is
            (["--prompt", "\ufeffa fox\n"], "", "\ufeffa fox\n"),
        ]
        for argv, stdin, prompt in table:
            with self.subTest(argv):
                found = self.sent("generate", *argv, stdin=stdin).json["prompt"]
                self.assertEqual(found, prompt)
                request = self.edited("--image", "a.png", *argv, stdin=stdin)
                self.assertEqual(request.fields["prompt"], prompt)
                self.assertEqual([part.body for part in request.uploads], [ONE])

    def test_the_prompt_counts_wherever_it_stands_among_the_options(self) -> None:
        for line in (
            "FOX --quality low -o a.webp",
            "--quality low FOX -o b.webp",
            "--quality=low -o c.webp FOX",
            "-o d.webp --force FOX --quality low --json",
            "--force --quality low -o e.webp -- FOX",
        ):
            with self.subTest(line):
                fields = {"prompt": "FOX", "quality": "low", "output_format": "webp"}
                body = self.sent("generate", *line.split()).json
                self.assertEqual(body, {"model": "gpt-image-2", **fields})

    def test_the_last_word_of_an_edit_is_the_prompt_and_all_before_it_are_images(self) -> None:
        for line, bodies in (
            ("a.png FOX", [ONE]),
            ("a.png b.png c.png FOX", [ONE, TWO, THREE]),
            ("b.png a.png b.png FOX", [TWO, ONE, TWO]),
            ("FOX --image a.png --image b.png", [ONE, TWO]),
            ("--image a.png FOX", [ONE]),
            ("FOX --input-image=a.png --image b.png", [ONE, TWO]),
            ("--image c.png a.png b.png FOX", [ONE, TWO, THREE]),
            ("a.png --quality low FOX", [ONE]),
            ("a.png --quality low b.png --force FOX -n 1", [ONE, TWO]),
            ("--prompt FOX a.png b.png", [ONE, TWO]),
            ("a.png --prompt FOX --image b.png", [ONE, TWO]),
            ("a.png -- b.png FOX", [ONE, TWO]),
        ):
            with self.subTest(line):
                request = self.edited(*line.split())
                self.assertEqual(request.fields["prompt"], "FOX")
                self.assertEqual([part.body for part in request.uploads], bodies)


# ---- Fields -----------------------------------------------------------------------------------

# What OpenAI's own package knows: each endpoint's fields with their values.
RECORD = json.loads((Path(__file__).parent / "data" / "sdk_fields.json").read_text("utf-8"))
SDK_FIELDS = RECORD["endpoints"]

# Fields that are no option with a value: shown on the wire by other tests.
OTHERWISE = {"prompt", "image", "mask", "markup"}
# What went with DALL-E, which only --param sends.
RETIRED_FIELDS = {"style"}
RETIRED_VALUES = {"quality": {"hd", "standard"}, "size": {"256x256", "512x512"}}
# Sources disagree whether edits take it.
DISPUTED = {"edits": {"moderation"}, "generations": set()}

# The option of every field, and a value of it on the command line and in JSON.
EXAMPLES: dict[str, tuple[str, str, Any]] = {
    "background": ("--background", "opaque", "opaque"),
    "complexity": ("--complexity", "medium", "medium"),
    "frame_count": ("--frame-count", "9", 9),
    "frame_duration_ms": ("--frame-duration-ms", "655350", 655350),
    "input_fidelity": ("--input-fidelity", "high", "high"),
    "model": ("--model", "gpt-image-2.6-flare", "gpt-image-2.6-flare"),
    "moderation": ("--moderation", "low", "low"),
    "n": ("--n", "2", 2),
    "output_compression": ("--compression", "80", 80),
    "output_format": ("--format", "jpg", "jpeg"),
    "partial_images": ("--partial-images", "3", 3),
    "quality": ("--quality", "xhigh", "xhigh"),
    "response_format": ("--response-format", "b64_json", "b64_json"),
    "safety_identifier": ("--safety-identifier", "007", "007"),
    "size": ("--size", "16:9@2K", "2048x1152"),
    "stream": ("--stream", "", True),
    "svg.model": ("--svg-model", "5", "5"),
    "svg.reasoning.effort": ("--svg-effort", "minimal", "minimal"),
    "user": ("--user", "true", "true"),
}


def optional_fields(endpoint: str) -> list[str]:
    """Return the fields that an endpoint has options for."""
    names = set(SDK_FIELDS[endpoint]) | DISPUTED[endpoint]
    return sorted(names - OTHERWISE - RETIRED_FIELDS)


def rows_of_values(endpoint: str) -> Iterator[dict[str, Any]]:
    """Yield values of many fields at once, until each value of the SDK's lists was among them."""
    columns = []
    for name in sorted(set(optional_fields(endpoint)) & set(SDK_FIELDS[endpoint]) - {"stream"}):
        values = set(SDK_FIELDS[endpoint][name]["values"]) - RETIRED_VALUES.get(name, set())
        columns.append([(name, value) for value in sorted(values)])
    for row in zip_longest(*columns):
        yield dict(pair for pair in row if pair)


def params(*pairs: str) -> list[str]:
    """Return --param options."""
    return [word for pair in pairs for word in ("--param", pair)]


class TestFields(RequestCase):
    """Every field of the API: its option, and its way over the wire."""

    def test_all_fields_at_once_arrive_with_their_types(self) -> None:
        for endpoint in STARTS:
            with self.subTest(endpoint):
                rows = {name: EXAMPLES[name] for name in optional_fields(endpoint)}
                argv = [word for row in rows.values() for word in row[:2] if word]
                values = {name: row[2] for name, row in rows.items()}
                self.assert_sends(endpoint, argv, values)

    def test_every_value_that_the_sdk_knows_is_taken(self) -> None:
        for endpoint in STARTS:
            for values in rows_of_values(endpoint):
                pairs = [(EXAMPLES[name][0], value) for name, value in values.items()]
                with self.subTest(endpoint, values=values):
                    self.assert_sends(endpoint, [word for pair in pairs for word in pair], values)

    def test_spellings(self) -> None:
        table: dict[str, dict[str, Any]] = {
            "-m my-own -s 1536x1024": {"model": "my-own", "size": "1536x1024"},
            "--size auto --quality auto": {"size": "auto", "quality": "auto"},
            "--size=Story@2k --n=1": {"size": "1152x2048", "n": 1},
            "-s 1920x1080 --nearest-size": {"size": "1920x1088"},
            "-n 2 -f webp --compression 0": {
                "n": 2,
                "output_format": "webp",
                "output_compression": 0,
            },
            "--partial-images 0": {"stream": True, "partial_images": 0},
        }
        for options, values in table.items():
            for endpoint in STARTS:
                with self.subTest(options, endpoint=endpoint):
                    self.assert_sends(endpoint, options.split(), values)

    def test_the_suffix_of_the_output_asks_for_the_format(self) -> None:
        for name, wanted in (
            ("a.jpg", "jpeg"),
            ("b.jpeg", "jpeg"),
            ("A.WEBP", "webp"),
            ("a.gif", "gif"),
            ("a.svg", "svg"),
            ("a.txt", None),
            ("my.fox/a", None),
        ):
            with self.subTest(name):
                body = self.sent("generate", "x", "-o", name).json
                self.assertEqual(body.get("output_format"), wanted)
        body = self.sent("generate", "x", "-o", "c.jpg", "-f", "webp").json
        self.assertEqual(body["output_format"], "webp")

    def test_param_values_are_json_where_they_parse_as_json(self) -> None:
        table: dict[str, Any] = {
            "word=low": "low",
            "whole=2": 2,
            "negative=-0.5": -0.5,
            "big=12345678901234567890": 12345678901234567890,
            "yes=true": True,
            "nothing=null": None,
            'digits="2"': "2",
            "list=[1, {}]": [1, {}],
            'object={"a": "é"}': {"a": "é"},
            "empty=": "",
            "equals=a=b": "a=b",
            "zeros=007": "007",
            "nan=NaN": "NaN",
            "huge=1e400": "1e400",
            "spaced= a fox ": " a fox ",
            "unicode=日本 🦊": "日本 🦊",
        }
        values = {pair.partition("=")[0]: value for pair, value in table.items()}
        self.assert_sends("generations", params(*table), values)

    def test_params_are_spelled_as_forms_spell_them(self) -> None:
        table: dict[str, list[tuple[str, str]]] = {
            "whole=2": [("whole", "2")],
            "half=0.5": [("half", "0.5")],
            "yes=true": [("yes", "true")],
            "text=@/etc/hostname": [("text", "@/etc/hostname")],
            "form=<a;type=text/html": [("form", "<a;type=text/html")],
            "quotes=q\"uo\\te,'": [("quotes", "q\"uo\\te,'")],
            'lines="a\\r\\nb"': [("lines", "a\r\nb")],
            "tags=[1, [true]]": [("tags[]", "1"), ("tags[][]", "true")],
            'object={"a": {"b": "é"}}': [("object[a][b]", "é")],
            "dot.ted.c=1": [("dot[ted][c]", "1")],
            "long=" + "x" * 5000: [("long", "x" * 5000)],
        }
        base = [("model", "gpt-image-2"), ("prompt", "x"), ("size", "auto")]
        parts = self.edited("a.png", "x", *params(*table)).parts
        found = [(part.name, part.body.decode()) for part in parts if part.filename is None]
        wanted = [*base, *(pair for pairs in table.values() for pair in pairs)]
        self.assertEqual(sorted(found), sorted(wanted))

    def test_params_nest_by_dots_override_options_and_are_not_checked(self) -> None:
        table: list[tuple[list[str], dict[str, Any]]] = [
            (params("a.b.c=1", "a.d=x"), {"a": {"b": {"c": 1}, "d": "x"}}),
            (
                params("svg.model=m", "output_format=svg"),
                {"svg.model": "m", "output_format": "svg"},
            ),
            (params("quality=ultra", "size=512x512"), {"quality": "ultra", "size": "512x512"}),
            (params("model=other"), {"model": "other"}),
            (["--quality", "low", *params("quality=high")], {"quality": "high"}),
            (["--svg-model", "m", *params("svg={}")], {"svg": {}}),
            (params("style=vivid", "quality=hd"), {"style": "vivid", "quality": "hd"}),
        ]
        for argv, values in table:
            with self.subTest(argv):
                self.assert_sends("generations", argv, values)

    def test_a_param_counts_as_the_number_of_pictures_too(self) -> None:
        run = self.check(self.run_tool("generate", "x", *params("n=2"), "-o", "fox.png"), 0)
        self.assertEqual([path.name for path in run.saved], ["fox-1.png", "fox-2.png"])

    def test_a_size_told_takes_the_place_of_an_edits_auto(self) -> None:
        for argv in (["-s", "1:1"], params("size=1024x1024"), ["--size=1024x1024"]):
            with self.subTest(argv):
                self.assertEqual(self.edited("a.png", "x", *argv).fields["size"], "1024x1024")
        self.configure(size="2K")
        self.assertEqual(self.edited("a.png", "x").fields["size"], "2048x2048")


# ---- Files ------------------------------------------------------------------------------------


class TestFiles(RequestCase):
    """The files of an edit: their fields, types, and bytes, but never their names."""

    def test_the_field_of_the_images(self) -> None:
        for option, images, field in (
            ("", "a.png", "image"),
            ("", "b.png a.png c.png", "image[]"),
            ("", "a.png a.png", "image[]"),
            ("--image-field auto", "a.png", "image"),
            ("--image-field image[]", "a.png", "image[]"),
            ("--image-field=image", "a.png b.png", "image"),
        ):
            with self.subTest(option, images=images):
                names = images.split()
                parts = self.uploads(*names, "blend", *option.split())
                self.assertEqual([part.name for part in parts], [field] * len(names))
                bodies = [(self.work / name).read_bytes() for name in names]
                self.assertEqual([part.body for part in parts], bodies)

    def test_sixteen_images_keep_their_order(self) -> None:
        pictures = [png(16, 16, rgb=(i, i, i)) for i in range(16)]
        names = [self.put(f"n{i:02}.png", data).name for i, data in enumerate(pictures)]
        parts = self.uploads(*names, "all of them", "--provider", "openai")
        self.assertEqual([part.body for part in parts], pictures)

    def test_the_media_type_comes_from_the_bytes_not_from_the_name(self) -> None:
        for media, data in (
            ("image/png", png(8, 8)),
            ("image/jpeg", jpeg(8, 8)),
            ("image/webp", webp(8, 8, "VP8")),
            ("image/webp", webp(8, 8, "VP8X")),
        ):
            for name in ("wrong.svg", "none"):
                with self.subTest(media, name=name):
                    (part,) = self.uploads(self.put(name, data), "x")
                    self.assertEqual((part.content_type, part.body), (media, data))

    def test_mask_and_markup_go_as_they_are(self) -> None:
        for name in ("mask", "markup"):
            with self.subTest(name):
                parts = self.uploads("a.png", "b.png", "x", f"--{name}", "clear.png")
                self.assertEqual([part.name for part in parts], ["image[]", "image[]", name])
                self.assertEqual((parts[2].content_type, parts[2].body), ("image/png", CLEAR))

    def test_the_mask_box_is_clear_and_all_else_is_opaque(self) -> None:
        self.put("photo.jpg", jpeg(64, 48))
        self.put("small.png", png(9, 9))
        boxes = {"10,20,30,15": (10, 20, 30, 15), "0,0,64,48": (0, 0, 64, 48)}
        for text, (left, top, width, height) in {**boxes, "63,47,1,1": (63, 47, 1, 1)}.items():
            with self.subTest(text):
                *_, mask = self.uploads("photo.jpg", "small.png", "x", "--mask-box", text)
                self.assertEqual((mask.name, mask.content_type), ("mask", "image/png"))
                drawn = read_png(mask.body)
                self.assertEqual((drawn.width, drawn.height), (64, 48))  # the first image's
                places = [(x, y) for y in range(48) for x in range(64)]
                clear = {place for place in places if drawn.pixel(*place)[-1] == 0}
                opaque = {place for place in places if drawn.pixel(*place)[-1] == 255}
                box = {(left + x, top + y) for x in range(width) for y in range(height)}
                self.assertEqual((clear, opaque), (box, set(places) - box))

    def test_names_are_no_syntax_and_stay_here(self) -> None:
        folder = self.work / 'od;d "folder", really'
        folder.mkdir()
        for name in (
            "kitten;type=text(html).png",
            "kitten;filename=evil,b.png",
            'kitten "quoted" one.png',
            "kitten\\back\\slash.png",
            "kitten 'single' $HOME `id` *.png",
            "kitten[1-3]{a,b}%41#?.png",
            "kätzchen 日本 🦊.png",
            "@kitten.png",
            "<kitten.png",
            "=kitten.png",
            os.fsdecode(b"kitten-\xe9\xff.png"),
        ):
            with contextlib.suppress(OSError):  # from a file system that takes only UTF-8
                (folder / name).write_bytes(CLEAR)
                for option in ("--image", "--mask", "--markup"):
                    with self.subTest(name, option=option):
                        self.assert_private(name, self.edited("c.png", "x", option, folder / name))

    def assert_private(self, name: str, request: Request) -> None:
        """Assert that a file is sent whole, and nothing of its name or of another's."""
        self.assertEqual([part.body for part in request.uploads], [THREE, CLEAR])
        for part in request.uploads:
            self.assertRegex(part.filename or "", r"^(image|mask|markup)(-\d+)?\.png$")
        rest = request.body.replace(THREE, b"").replace(CLEAR, b"")
        for local in (Path(name).stem, "really", str(self.work)):
            self.assertNotIn(os.fsencode(local), rest)

    def test_a_dash_led_name_and_a_link(self) -> None:
        self.put("-kitten.png", THREE)
        (self.work / "link").symlink_to("c.png")
        for argv in (
            ("--", "-kitten.png", "x"),
            ("./-kitten.png", "x"),
            ("x", "--image=-kitten.png"),
            ("link", "x"),
        ):
            with self.subTest(argv):
                self.assertEqual([part.body for part in self.uploads(*argv)], [THREE])

    def test_force_may_replace_the_picture_itself(self) -> None:
        request = self.edited("a.png", "x", "-o", "a.png", "--force")
        self.assertEqual(request.uploads[0].body, ONE)
        self.assertEqual((self.work / "a.png").read_bytes(), PICTURE)


# ---- Dry runs ---------------------------------------------------------------------------------


class TestDryRun(RequestCase):
    """--dry-run shows what would be sent; it sends and creates nothing."""

    generate = (
        *("generate", "a \"fox\"\n$HOME `id` 'x'", "-s", "story@2K", "-n", "2"),
        *("--param", "a.b=[1]", "-o", "new/fox.webp"),
    )
    edit = (
        *("edit", "a.png", "b.png", "a \"fox\"; $HOME `id` 'x'", "--mask-box", "1,2,3,4"),
        *("-f", "svg", "--svg-model", "m", "-o", "fox.svg"),
    )

    def dry_run(self, *argv: str) -> Run:
        """Run something with --dry-run, which leaves the world as it was."""
        before = self.api.connections, self.world()
        run = self.check(self.run_tool(*argv, "--dry-run"), 0)
        self.assertEqual((self.api.connections, self.world()), before)
        self.assertNotIn(KEY[5:-4], run.out + run.err)
        return run

    def test_the_document_is_what_is_then_really_sent(self) -> None:
        for argv, images in ((self.generate, []), (self.edit, ["a.png", "b.png"])):
            with self.subTest(argv[0]):
                run = self.dry_run(*argv, "--json")
                shown, request = run.json["dry_run"], self.sent(*argv)
                self.assertEqual((run.out.count("\n"), run.json["ok"]), (1, True))
                self.assertEqual(shown["endpoint"], self.api.origin + request.target)
                if images:
                    svg_model = shown["fields"].pop("svg")["model"]
                    self.assertEqual({**shown["fields"], "svg[model]": svg_model}, request.fields)
                else:
                    self.assertEqual(spelled(shown["fields"]), spelled(request.json))
                parts = [
                    {"field": part.name, "media_type": part.content_type, "bytes": len(part.body)}
                    for part in (request.uploads if images else [])
                ]
                paths = [file.pop("path") for file in shown["files"]]
                self.assertEqual(paths[:2], [str(self.work / name) for name in images])
                self.assertEqual(shown["files"], parts)
                self.assertEqual([p for p in shown["paths"] if not os.path.exists(p)], [])

    def test_the_text_names_endpoint_fields_files_and_paths(self) -> None:
        run = self.dry_run(*self.generate)
        for fact in ("/v1/images/generations", "gpt-image-2", "1152x2048", "webp", "estimate"):
            self.assertIn(fact, run.out)
        for number in (1, 2):
            self.assertIn(str(self.work / f"new/fox-{number}.webp"), run.out)
        run = self.dry_run("edit", "a.png", "x", "--mask", "clear.png", "-o", "-")
        for fact in ("/v1/images/edits", str(self.work / "a.png"), str(self.work / "clear.png")):
            self.assertIn(fact, run.out)

    def test_an_estimate_at_openais_prices(self) -> None:
        line = "generate x -s 1024x1024 --quality low --provider openai"
        estimate = self.planned(line)["dry_run"]["estimate"]
        self.assertEqual((estimate["currency"], estimate["estimated"]), ("USD", True))
        self.assertAlmostEqual(estimate["amount"], 0.006, delta=0.001)

    def test_the_verbose_curl_line_can_be_pasted(self) -> None:
        """The line, with the key from the environment, sends what the tool sends."""
        for argv in (self.generate, self.edit):
            with self.subTest(argv[0]):
                run = self.dry_run(*argv, "--verbose")
                line = re.search(r"(?ms)^(printf %s \S+ \| base64 -d \| )?curl .*", run.out)
                assert line, self.story(run)
                self.assertIn("$GPT_IMAGE2_API_KEY", line[0])
                subprocess.run(
                    ["sh", "-c", line[0]],
                    env=self.env,
                    cwd=self.work,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    check=True,
                )
                pasted, real = self.api.posts[-1], self.sent(*argv)
                self.assertEqual(pasted.target, real.target)
                self.assertEqual(pasted.headers["authorization"], real.headers["authorization"])
                if argv is self.generate:
                    self.assertEqual(pasted.headers["content-type"], "application/json")
                    self.assertEqual(pasted.json, real.json)
                else:
                    self.assertEqual(pasted.parts, real.parts)


# ---- Refusals and warnings --------------------------------------------------------------------

# A command line, and what the message says. Everywhere, whatever the server may think.
REFUSED: dict[str, str] = {
    "generate": "no prompt",
    "edit --quality low": "no prompt",
    "generate ''": "prompt.*empty",
    "generate ' \n\t'": "prompt.*empty",
    "generate \u3000": "prompt.*empty",
    "generate -": "prompt.*empty",  # of standard input
    "generate --prompt=": "prompt.*empty",
    "generate --prompt-file blank.txt": "prompt.*empty",
    "edit a.png ''": "prompt.*empty",
    "generate --prompt-file nul.txt": "nul",
    "generate --prompt-file latin.txt": "utf-8",
    f"generate {LATIN}": "utf-8",
    "generate --prompt-file huge.txt": "1,?048,?576",
    "generate --prompt-file missing.txt": "missing.txt",
    "generate --prompt-file folder": "folder.*directory",
    "generate two words": "prompt.*quotes",
    "generate 'a fox' --prompt 'a cat'": "prompt",
    "generate 'a fox' --prompt-file a.txt": "prompt",
    "generate --prompt a --prompt-file a.txt": "--prompt.*--prompt-file",
    # numbers: ASCII digits in a range, nothing else
    **{f"generate x --n={number}": rf"-n\b.*{re.escape(number)}.*1\D+10" for number in ("0", "11")},
    **{f"generate x --n={number}": r"-n\b.*1\D+10" for number in ("-1", "1_0", "３", "+3", "1.0")},
    "generate x -n": "-n.*(argument|value)",
    "generate x -f jpg --compression 101": "compression.*101",
    "generate x -f gif --frame-count 17": "frame-count.*17",
    "generate x -f gif --frame-duration-ms 655351": "frame-duration-ms.*655351",
    "generate x --partial-images 4": "partial-images.*4",
    "generate x --partial-images=-1": "partial-images.*-1",
    "generate x --timeout 0": "timeout.*0",
    "generate x --retries=-1": "retries.*-1",
    # words: the nearest, and the way past the list
    "generate x --quality hgh": "hgh.*high",
    "edit a.png x --quality LOW": "LOW.*low",
    "generate x -f pgn": "pgn.*png",
    "generate x --svg-effort maximum": "maximum.*max",
    "generate x --provider opnai": "opnai.*openai",
    "edit a.png x --image-field images": r"images.*image\[\]",
    "edit a.png x -s storry": "storry.*story",
    "generate x --size=": "size",
    "genrate x": "genrate.*generate",
    "generate x --qualty low": "--qualty.*--quality",
    "generate x --qual low": "--qual .*--quality",  # no abbreviations
    "generate x -ofox.png": "-ofox.png",  # and nothing glued together
    "generate '-old man'": "-old man.*--",
    "generate x --mask clear.png": "--mask ",
    "generate x --quality": "--quality",
    "generate x --bogus --json": "--bogus",
    # fields that no option knows
    "generate x --param quality": "KEY=VALUE",
    "generate x --param =low": "KEY=VALUE",
    "generate x --param a..b=1": "KEY=VALUE",
    "generate x --param 'a b=1'": "KEY=VALUE",
    "generate x --param a=1 --param a.b=2": "a.b",
    "edit a.png x --param 'a={\"b[c]\": 1}'": r"b\[c\]",
    f"generate x --user {LATIN}": "utf-8|unicode",
    "generate x --param 'user=\"\\ud800\"'": "utf-8|unicode",
    f"edit a.png x --param user={LATIN}": "utf-8|unicode",
    # what does not go together
    "generate x --background transparent -f jpeg": "transparent.*png",
    "generate x --background transparent -o new.jpg": "transparent.*png",
    "edit a.png x --background transparent -f jpg": "transparent.*png",
    "edit a.png x --mask clear.png --markup clear.png": "--mask.*--markup",
    "edit a.png x --mask clear.png --mask-box 0,0,1,1": "--mask.*--mask-box",
    # input files
    "edit a.png": "image",
    "edit --prompt x": "image",
    "edit missing.png x": r"missing\.png.*not exist",
    "edit a.png x --image missing.png": r"missing\.png.*not exist",
    "edit a.png x --mask missing.png": r"missing\.png.*not exist",
    "edit a.png x --markup missing.png": r"missing\.png.*not exist",
    "edit nowhere.png x": r"nowhere\.png.*not exist",
    "edit a.png empty.png x": r"empty\.png.*empty",
    "edit text.png x": r"text\.png.*not.*picture",
    "edit a.png x --mask folder": "folder.*folder",
    "edit 'new\nline.png' x": "control",
    "edit a.png x --mask-box 0,0,65,48": "mask-box.*64x48",
    "edit a.png x --mask-box 60,40,4,9": "mask-box.*64x48",
    "edit a.png x --mask-box 1,2,3": "mask-box",
    "edit a.png x --mask-box 0,0,0,5": "mask-box",
    "edit a.png x --mask-box=-1,0,5,5": "mask-box",
    "edit a.png x --mask-box 0,0,５,5": "mask-box",
}

# At OpenAI, which is certain to refuse them; anywhere else a warning.
CERTAIN_AT_OPENAI = {
    "generate --prompt-file long.txt": "32,?001.*32,?000",
    "generate x --background transparent -f gif": "transparent",
    "generate x --background transparent -f svg": "transparent",
    "generate x -f gif --stream": "gif.*stream",
    "generate x -f svg --stream": "svg.*stream",
    "generate x -f gif --partial-images 0": "gif.*stream",
    "generate x --compression 50": "compression.*",
    "generate x -f png --compression 50": "compression",
    "generate x -f gif --compression 50": "compression",
    "generate x --frame-count 3": "frame-count.*gif",
    "generate x -f webp --frame-duration-ms 200": "gif",
    "generate x --svg-effort low": "svg",
    "generate x -f png --svg-model m": "svg",
    "generate x -f svg -n 2": "svg",
    "generate x --response-format b64_json": "response_format|OpenAI refuses it",
    "generate x -m gpt-image-1.5 -s 2K": "2048x2048.*1024x1024",
    "edit a.png x -f gif --mask clear.png": "gif.*mask",
    "edit a.png x -f gif --mask-box 1,1,8,8": "gif.*mask",
    "edit a.png x --input-fidelity low -m gpt-image-2.5-sunburst": "input.fidelity",
    "edit a.png x --input-fidelity high -m gpt-image-2.6-flare": "input.fidelity",
    "edit a.png x --input-fidelity high": "input.fidelity",
    "edit a.png x --input-fidelity high -m gpt-image-1-mini": "low",
    "edit " + "a.png " * 17 + "x": "17.*16",
    "edit a.png x --mask a.png": r"a\.png.*(alpha|transparen)",
    "edit a.png x --mask a.jpg": r"a\.jpg.*(alpha|transparen)",
    "edit a.png x --markup a.png -m gpt-image-2.6-flare": r"a\.png.*(alpha|transparen)",
    "edit a.png x --mask other.png": r"other\.png.*48x64.*64x48",
    "edit a.gif x": r"a\.gif.*gif",
    "edit a.png a.svg x": r"a\.svg.*svg",
}

# What OpenAI only may refuse, with the one warning that goes with it.
UNCERTAIN = {
    "generate x --background transparent": "transparent.*preview",
    "generate x --quality xhigh": "xhigh",
    "generate x --quality max": "max",
    "generate x --complexity low": "complexity.*2.6",
    "generate x --complexity low -m gpt-image-2.5-flare": "complexity.*2.6",
    "generate x -m gpt-image-3 --quality max --complexity low": "not in the table",
    "edit a.png x --moderation low": "moderation",
    "edit a.png x --response-format url": "response_format",
    "edit a.png x --markup clear.png": "markup.*2.5",
}

KNOWN_TO_WORK = (
    "generate x --background transparent --quality xhigh -m gpt-image-2.5-flare -f webp",
    "generate x --quality max --complexity high -m gpt-image-2.6-flare --moderation low",
    "generate x -f gif --frame-count 2 --frame-duration-ms 40",
    "generate x -f svg --svg-model gpt-5.5 --svg-effort none -n 1",
    "generate x -f jpg --compression 1 --stream",
    "edit a.png x --markup clear.png -m gpt-image-2.5-flare -f jpg --compression 1",
    "edit a.png x --mask clear.png --background opaque -n 10",
    "edit " + "a.png " * 16 + "x",
)


class TestRules(RequestCase):
    """What is refused before anything is sent, and what is only warned of."""

    def setUp(self) -> None:
        super().setUp()
        for name, data in {
            "a.jpg": jpeg(64, 48),
            "a.gif": gif(64, 48),
            "a.svg": svg(64, 48),
            "other.png": png(48, 64, hole=(0, 0, 8, 8)),
            "empty.png": b"",
            "text.png": b"just words\n",
            "a.txt": b"a fox",
            "blank.txt": b" \n\n",
            "latin.txt": b"caf\xe9",
            "nul.txt": b"a\0b",
            "long.txt": b"x" * 32_001,
            "huge.txt": b"x" * (1 << 20) + b"x",
        }.items():
            self.put(name, data)
        (self.work / "folder").mkdir()
        (self.work / "nowhere.png").symlink_to("missing.png")

    def assert_refused(self, line: str, phrase: str, *options: str) -> None:
        """Assert exit code 2, a line like `phrase` and its document; nothing sent, nothing made."""
        before = self.world()
        command, *words = shlex.split(line)
        run = self.check(self.run_tool(command, "--json", *words, *options), 2)
        self.assertRegex(run.err, rf"(?i)\Agpt-image2: [^\n]*{phrase}[^\n]*\n\Z")
        self.assertEqual((self.world(), run.out.count("\n")), (before, 1))
        error = run.json["error"]
        self.assertEqual((error["exit_code"], error["maybe_billed"]), (2, False))
        self.assertIn(error["message"], run.err)
        self.no_request(self.api)

    def test_refused_everywhere(self) -> None:
        for line, phrase in REFUSED.items():
            with self.subTest(line):
                self.assert_refused(line, phrase)

    def test_a_refusal_without_json_leaves_stdout_empty(self) -> None:
        for line in ("generate ''", "generate x --bogus", "generate -n 0 -- --json"):
            with self.subTest(line):
                self.assertEqual(self.check(self.run_tool(*shlex.split(line)), 2).out, "")

    def test_refused_at_openai(self) -> None:
        for line, phrase in CERTAIN_AT_OPENAI.items():
            with self.subTest(line):
                self.assert_refused(line, phrase, "--quiet", "--provider", "openai")

    def test_the_same_is_a_warning_elsewhere(self) -> None:
        for line, phrase in CERTAIN_AT_OPENAI.items():
            with self.subTest(line):
                warnings = self.planned(line)["warnings"]
                self.assertRegex("\n".join(warnings), f"(?i){phrase}")

    def test_what_may_be_refused_goes_through_with_one_warning(self) -> None:
        for line, phrase in UNCERTAIN.items():
            with self.subTest(line):
                (warning,) = self.planned(f"{line} --provider openai")["warnings"]
                self.assertRegex(warning, phrase)

    def test_what_is_known_to_work_goes_without_a_word(self) -> None:
        for line in KNOWN_TO_WORK:
            with self.subTest(line):
                self.assertEqual(self.planned(f"{line} --provider openai")["warnings"], [])


class TestModels(RequestCase):
    """Which models a word is said of, before their last day and after it."""

    living = (
        *("gpt-image-2", "gpt-image-2-2026-04-21"),
        *("gpt-image-2.5-flare", "gpt-image-2.5-flare-2026-09-08"),
        *("gpt-image-2.5-sunburst", "gpt-image-2.5-sunburst-2026-09-08"),
        *("gpt-image-2.6-flare", "gpt-image-2.6-sunburst"),
    )
    ending = {
        "gpt-image-1.5": "2026-12-01",
        "gpt-image-1-mini": "2026-12-01",
        "chatgpt-image-latest": "2026-12-01",
        "gpt-image-1": "2026-10-23",
        "dall-e-2": "2026-05-12",
        "dall-e-3": "2026-05-12",
    }

    def warnings(self, model: str, provider: str = "openai", now: float = 1795600000) -> list[str]:
        """Return what is said of a model on a day, which is 2026-11-25 unless told."""
        with mock.patch("time.time", return_value=now):
            found = self.planned(f"generate x -m {model} --provider {provider}")["warnings"]
        return [str(warning) for warning in found]

    def test_the_models_of_the_sdk_are_all_known(self) -> None:
        for endpoint, fields in SDK_FIELDS.items():
            with self.subTest(endpoint):
                self.assertEqual(set(fields["model"]["values"]), {*self.living, *self.ending})

    def test_living_models_go_without_a_word(self) -> None:
        relays = [(f"gpt-image-2-{name}", "nodekey") for name in ("vip", "1k", "2k", "4k")]
        own = [("my-deployment", "azure")]  # which names its models itself
        for model, provider in [*((model, "openai") for model in self.living), *relays, *own]:
            with self.subTest(model):
                self.assertEqual(self.warnings(model, provider), [])

    def test_a_model_near_or_past_its_last_day_names_it_and_a_successor(self) -> None:
        successor = rf"\b({'|'.join(self.living)})\b"
        for provider in ("openai", "generic"):
            for model, day in self.ending.items():
                with self.subTest(model, provider=provider):
                    (warning,) = self.warnings(model, provider)
                    self.assertRegex(warning, rf"{model}\b.*{day}.*{successor}")
        last_day = 1796083200  # 2026-12-01
        for days, count in ((90, 0), (30, 1), (-1, 1)):
            with self.subTest(days):
                found = self.warnings("gpt-image-1.5", now=last_day - days * 86400)
                self.assertEqual(len(found), count)

    def test_a_model_that_is_not_in_the_table_names_the_nearest(self) -> None:
        (warning,) = self.warnings("gpt-image-2.6-flair")
        self.assertRegex(warning, "gpt-image-2.6-flair.*gpt-image-2.6-flare")
