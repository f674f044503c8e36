"""Requests: from the command line to the bytes on the wire, and what is refused before that."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import threading
from pathlib import Path
from typing import Any
from unittest import mock

from tests.case import Argument, Case, Run
from tests.images import gif, jpeg, png, read_png, webp
from tests.server import KEY, Part, Reply, Request, answer

IMAGE = png(1024, 1024)
ONE, TWO, THREE = (png(64, 48, rgb=(shade, 0, 0)) for shade in (1, 2, 3))
CLEAR = png(64, 48, hole=(8, 8, 16, 16))  # fit for a mask of the others
LATIN = os.fsdecode(b"caf\xe9")  # an argument that is not UTF-8

STARTS = {"generations": ["generate", "a fox"], "edits": ["edit", "a.png", "a fox"]}

# Texts that mean something to a shell, to JSON, to curl's config or to its form syntax.
HOSTILE_TEXTS = (
    "naïve 日本語 🦊 e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u202eabc\u2028",
    'say "hi" \\"there\\" \\n \'x\' $HOME `id` %s {a,b}[1-3] @file <b> a=b;type=x',
    "  two\nlines\r\nand\ta tab\n",
    *("@/etc/passwd", "</etc/passwd", "<-", '"quoted"', "blue;filename=x,y;headers=@a"),
    '--boundary\r\nContent-Disposition: form-data; name="n"\r\n\r\n9',
)


def as_many_as_asked(request: Request) -> Reply:
    """Answer JSON or a form with as many images as it asks for."""
    is_json = request.headers["content-type"] == "application/json"
    fields = request.json if is_json else request.fields
    return answer(*[IMAGE] * int(fields.get("n", 1)))


def spelled(value: Any) -> str:
    """Return JSON as text, in which 1, 1.0, true and "1" are four different things."""
    return json.dumps(value, sort_keys=True)


def in_a_form(values: dict[str, Any]) -> dict[str, str]:
    """Return dotted names as a form spells them, and values as text."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    return {re.sub(r"\.(\w+)", r"[\1]", name): text for name, text in texts.items()}


class RequestCase(Case):
    """A case with images in the work folder, and a server that gives what it is asked for."""

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

    def uploads(self, *argv: Argument) -> list[Part]:
        """Return the files that an edit sends."""
        return self.sent("edit", *argv).uploads

    def assert_sends(self, endpoint: str, argv: list[str], values: dict[str, Any]) -> Request:
        """Assert that options add exactly these fields, as the endpoint spells them."""
        request = self.sent(*STARTS[endpoint], *argv)
        self.assertEqual((request.method, request.target), ("POST", f"/v1/images/{endpoint}"))
        values = {"model": "gpt-image-2", "prompt": "a fox", **values}
        if endpoint == "generations":
            self.assertEqual(spelled(request.json), spelled(values))
        else:
            wanted = in_a_form({"size": "auto", **values})
            self.assertEqual((request.fields, len(request.parts)), (wanted, len(wanted) + 1))
        return request

    def planned(self, line: str, code: int = 0) -> Any:
        """Return the document of a dry run."""
        return self.check(self.run_tool(*shlex.split(line), "--dry-run", "--json"), code).json

    def world(self) -> list[str]:
        """Return every file and folder of this test."""
        return sorted(map(str, self.tmp.rglob("*")))


class TestHead(RequestCase):
    """The request line, its headers, and where they may not go."""

    def test_a_bare_prompt_sends_its_few_fields_and_each_header_once(self) -> None:
        kinds = {"generations": r"application/json\Z", "edits": "multipart/form-data; boundary="}
        for endpoint, kind in kinds.items():
            with self.subTest(endpoint):
                request = self.assert_sends(endpoint, [], {})
                self.assertRegex(request.headers["content-type"], rf"\A{kind}")
                self.assertEqual(request.headers["authorization"], f"Bearer {KEY}")
                self.assertEqual(request.headers["host"], f"127.0.0.1:{self.api.port}")
                self.assertRegex(request.headers["user-agent"], r"^gpt-image-?2/\d")
                self.assertNotIn(", ", "".join(request.headers.values()), "a header came twice")
        self.assertEqual(self.api.connections, 2)

    def test_only_openai_gets_a_request_id_and_it_is_the_job_id(self) -> None:
        for provider in ("openai", "openai-hk", "nodekey", "azure", "generic"):
            for start in STARTS.values():
                with self.subTest(provider, start=start):
                    run = self.run_tool(*start, "--provider", provider, "--json")
                    job = self.check(run, 0).json["job_id"]
                    found = self.api.posts[-1].headers.get("x-client-request-id")
                    self.assertEqual(found, job if provider == "openai" else None)


class TestPrompts(RequestCase):
    """Every prompt arrives byte for byte, whichever way it comes."""

    def test_each_way_for_a_prompt(self) -> None:
        self.put("bom.txt", "\ufeff<日本 🦊>\n".encode())
        table: list[tuple[list[str], str, str]] = [
            # wherever it stands among the options
            (["--force", "FOX", "--quality", "low"], "", "FOX"),
            # dash-led ones go after two dashes, or an equals sign
            (["--quality", "low", "--", "-5 degrees, --sandbox"], "", "-5 degrees, --sandbox"),
            (["--prompt=--help"], "", "--help"),
            (["--", "--"], "", "--"),
            # from a file or standard input one newline and a BOM are cut
            (["-"], "\ufeff;a fox\n", ";a fox"),
            (["-", "--quality", "low"], " a\r\nfox\n\n", " a\r\nfox\n"),
            (["--quality", "low", "-"], "a fox\r\n", "a fox"),
            (["--prompt-file", "bom.txt"], "", "<日本 🦊>"),
            # from the option nothing is
            (["--prompt", "\ufeffa fox\n"], "", "\ufeffa fox\n"),
            *((["--", text], "", text) for text in HOSTILE_TEXTS),
        ]
        for argv, stdin, prompt in table:
            with self.subTest(argv):
                found = self.sent("generate", *argv, stdin=stdin).json
                quality = "low" if "--quality" in argv else None
                self.assertEqual((found["prompt"], found.get("quality")), (prompt, quality))
                request = self.sent("edit", "--image", "a.png", *argv, stdin=stdin)
                fields = ["model", "prompt", *(["quality"] if quality else []), "size"]
                self.assertEqual(sorted(part.name for part in request.parts), ["image", *fields])
                self.assertEqual(request.fields["prompt"], prompt)
                self.assertEqual([part.body for part in request.uploads], [ONE])

    def test_the_last_word_of_an_edit_is_the_prompt_and_all_before_it_are_images(self) -> None:
        for line, bodies in (
            ("FOX --input-image=a.png --image b.png", [ONE, TWO]),
            ("--image c.png a.png b.png FOX", [ONE, TWO, THREE]),
            ("a.png --quality low b.png --force FOX -n 1", [ONE, TWO]),
            ("a.png --prompt FOX --image b.png", [ONE, TWO]),
            ("a.png -- b.png FOX", [ONE, TWO]),
        ):
            with self.subTest(line):
                request = self.sent("edit", *line.split())
                self.assertEqual(request.fields["prompt"], "FOX")
                self.assertEqual([part.body for part in request.uploads], bodies)


# What OpenAI's own package knows: each endpoint's fields with their values.
SDK_RECORD = Path(__file__).parent / "data" / "sdk_fields.json"
SDK_FIELDS = json.loads(SDK_RECORD.read_text("utf-8"))["endpoints"]

# Fields that are no option with a value, and what went with DALL-E, which only --param sends.
OTHERWISE = {"prompt", "image", "mask", "markup", "style"}
RETIRED_VALUES = {"hd", "standard", "256x256", "512x512"}
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


def params(*pairs: str) -> list[str]:
    """Return --param options."""
    return [word for pair in pairs for word in ("--param", pair)]


class TestFields(RequestCase):
    """Every field of the API: its option, and its way over the wire."""

    def test_all_fields_at_once_arrive_with_their_types(self) -> None:
        for endpoint in STARTS:
            with self.subTest(endpoint):
                names = sorted((set(SDK_FIELDS[endpoint]) | DISPUTED[endpoint]) - OTHERWISE)
                argv = [word for name in names for word in EXAMPLES[name][:2] if word]
                values = {name: EXAMPLES[name][2] for name in names}
                if endpoint == "generations":
                    effort = values.pop("svg.reasoning.effort")
                    values["svg"] = {
                        "model": values.pop("svg.model"),
                        "reasoning": {"effort": effort},
                    }
                self.assert_sends(endpoint, argv, values)

    def test_every_value_that_the_sdk_knows_is_taken(self) -> None:
        for endpoint, start in STARTS.items():
            for name in set(SDK_FIELDS[endpoint]) - OTHERWISE - {"stream"}:
                for value in set(SDK_FIELDS[endpoint][name]["values"]) - RETIRED_VALUES:
                    with self.subTest(endpoint, name=name, value=value):
                        line = shlex.join([*start, EXAMPLES[name][0], value])
                        self.assertIn(f'"{value}"', spelled(self.planned(line)["dry_run"]))

    def test_spellings(self) -> None:
        table: dict[str, dict[str, Any]] = {
            "-m my-own -s 1536x1024": {"model": "my-own", "size": "1536x1024"},
            "--size=Story@2k --n=1": {"size": "1152x2048", "n": 1},
            "-s 1920x1080 --nearest-size": {"size": "1920x1088"},
            "-n 2 -f webp": {"n": 2, "output_format": "webp"},
            "-f jpg --compression 0": {"output_format": "jpeg", "output_compression": 0},
            "--partial-images 0": {"stream": True, "partial_images": 0},
            "--param size=1024x1024": {"size": "1024x1024"},  # in the place of an edit's auto
            "--force -o a.jpg": {"output_format": "jpeg"},
            "--force -o A.WEBP": {"output_format": "webp"},
            "--force -o a.jpg -f jpeg": {"output_format": "jpeg"},
            "--force -o a": {},
        }
        for options, values in table.items():
            for endpoint in STARTS:
                with self.subTest(options, endpoint=endpoint):
                    self.assert_sends(endpoint, options.split(), values)
        self.configure(size="2K")
        self.assert_sends("edits", [], {"size": "2048x2048"})

    def test_param_values_are_json_where_they_parse_as_json(self) -> None:
        parsed = ("2", "-0.5", "9" * 20, "true", "null", '"2"', "[1, {}]", '{"a": "é"}')
        as_text = ("low", "", "a=b", "007", "NaN", "1e400", " a fox ", "日本 🦊")
        values = {f"json{number}": json.loads(text) for number, text in enumerate(parsed)}
        values.update((f"text{number}", text) for number, text in enumerate(as_text))
        pairs = [f"{name}={text}" for name, text in zip(values, (*parsed, *as_text))]
        self.assert_sends("generations", params(*pairs), values)

    def test_params_are_spelled_as_forms_spell_them(self) -> None:
        table: dict[str, list[tuple[str, str]]] = {
            "yes=true": [("yes", "true")],
            "form=<a;type=text/html": [("form", "<a;type=text/html")],
            "text=@/etc/hostname": [("text", "@/etc/hostname")],
            "quotes=q\"uo\\te,'": [("quotes", "q\"uo\\te,'")],
            'lines="a\\r\\nb"': [("lines", "a\r\nb")],
            "tags=[1, [true]]": [("tags[]", "1"), ("tags[][]", "true")],
            'object={"a": {"b": "é"}}': [("object[a][b]", "é")],
            "dot.ted.c=1": [("dot[ted][c]", "1")],
        }
        base = [("model", "gpt-image-2"), ("prompt", "x"), ("size", "auto")]
        parts = self.sent("edit", "a.png", "x", *params(*table)).parts
        found = [(part.name, part.body.decode()) for part in parts if part.filename is None]
        wanted = [*base, *(pair for pairs in table.values() for pair in pairs)]
        self.assertEqual(sorted(found), sorted(wanted))

    def test_params_nest_by_dots_override_options_and_are_not_checked(self) -> None:
        table: list[tuple[list[str], dict[str, Any]]] = [
            (params("a.b.c=1", "a.d=x"), {"a": {"b": {"c": 1}, "d": "x"}}),
            (params("svg.model=m", "model=other"), {"svg": {"model": "m"}, "model": "other"}),
            (["--quality", "low", *params("quality=high")], {"quality": "high"}),
            (["--svg-model", "m", *params("svg={}")], {"svg": {}}),
            (params("style=vivid", "size=512x512"), {"style": "vivid", "size": "512x512"}),
        ]
        for argv, values in table:
            with self.subTest(argv):
                self.assert_sends("generations", argv, values)

    def test_a_model_that_is_a_param_decides_about_the_size(self) -> None:
        words = (
            "generate",
            "x",
            "--provider",
            "openai",
            "-s",
            "512x512",
            *params("model=dall-e-3"),
        )
        self.assertIn("not a size of this model", self.check(self.run_tool(*words), 2).err)

    def test_a_param_counts_as_the_number_of_images_too(self) -> None:
        run = self.check(self.run_tool("generate", "x", *params("n=2"), "-o", "fox.png"), 0)
        self.assertEqual([path.name for path in run.saved], ["fox-1.png", "fox-2.png"])


class TestFiles(RequestCase):
    """The files of an edit: their fields, types, and bytes, but never their names."""

    def test_the_field_of_the_images_which_keep_their_order(self) -> None:
        many = [self.put(f"n{i:02}.png", png(16, 16, rgb=(i, i, i))).name for i in range(16)]
        for option, images, field in (
            ("", "a.png", "image"),
            ("", "b.png a.png c.png", "image[]"),
            ("--image-field auto", "a.png a.png", "image[]"),
            ("--image-field image[]", "a.png", "image[]"),
            ("--image-field=image", "a.png b.png", "image"),
            ("--provider openai", " ".join(many), "image[]"),
        ):
            with self.subTest(option, images=images):
                names = images.split()
                parts = self.uploads(*names, "blend", *option.split())
                self.assertEqual([part.name for part in parts], [field] * len(names))
                bodies = [(self.work / name).read_bytes() for name in names]
                self.assertEqual([part.body for part in parts], bodies)

    def test_the_media_type_comes_from_the_bytes_not_from_the_name(self) -> None:
        webps = [("webp", webp(8, 8, flavour)) for flavour in ("VP8", "VP8X")]
        for kind, data in (("png", png(8, 8)), ("jpeg", jpeg(8, 8)), *webps):
            for name in ("wrong.svg", "none"):
                (part,) = self.uploads(self.put(name, data), "x")
                self.assertEqual((part.content_type, part.body), (f"image/{kind}", data))

    def test_images_from_pipes_are_kept_with_the_job(self) -> None:
        fifos = [self.work / name for name in ("one", "two")]
        for fifo, data in zip(fifos, (ONE, CLEAR)):
            os.mkfifo(fifo)
            threading.Thread(target=fifo.write_bytes, args=(data,), daemon=True).start()
        parts = self.uploads("one", "x", "--mask", "two")
        self.assertEqual([part.body for part in parts], [ONE, CLEAR])
        parts = self.sent("edit", "-", "b.png", "x", stdin=THREE).uploads
        self.assertEqual([part.body for part in parts], [THREE, TWO])
        self.check(self.run_tool("edit", "-", "x", stdin=b""), 2)
        (self.work / "jobs.jsonl").write_text('{"prompt": "x", "images": ["one"], "n": 1}')
        self.assertIn("one is a pipe", self.check(self.run_tool("batch", "jobs.jsonl"), 2).err)

    def test_a_photo_that_exif_turns_counts_as_shown(self) -> None:
        little = b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0%c\0\0\0\0\0\0\0"
        big = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0%c\0\0\0\0\0\0"
        for exif in (little, big):
            for value, (width, height) in ((1, (64, 48)), (6, (48, 64)), (8, (48, 64))):
                with self.subTest(exif, value=value):
                    self.put("photo.jpg", jpeg(64, 48, exif=exif % value))
                    run = self.run_tool("edit", "photo.jpg", "x", "--mask-box", "1,2,3,4")
                    self.assertEqual("rotated by its EXIF" in self.check(run, 0).err, value > 1)
                    mask = read_png(self.api.posts[-1].uploads[1].body)
                    self.assertEqual((mask.width, mask.height), (width, height))

    def test_the_mask_box_is_clear_and_all_else_is_opaque(self) -> None:
        self.put("photo.jpg", jpeg(64, 48))
        self.put("small.png", png(9, 9))
        for text in ("10,20,30,15", "0,0,64,48", "63,47,1,1"):
            with self.subTest(text):
                left, top, width, height = map(int, text.split(","))
                *_, mask = self.uploads("photo.jpg", "small.png", "x", "--mask-box", text)
                self.assertEqual((mask.name, mask.content_type), ("mask", "image/png"))
                drawn = read_png(mask.body)
                self.assertEqual((drawn.width, drawn.height), (64, 48))  # the first image's
                box = {(left + x, top + y) for x in range(width) for y in range(height)}
                alpha = {(x, y): drawn.pixel(x, y)[-1] for y in range(48) for x in range(64)}
                clear = {at for at, value in alpha.items() if value == 0}
                self.assertTrue(clear == box and set(alpha.values()) <= {0, 255})

    def test_names_are_no_syntax_and_stay_here(self) -> None:
        folder = self.work / 'od;d "folder", really'
        folder.mkdir()
        for name in (
            *("kitten;type=text(html).png", "kitten;filename=evil,b.png", "@kitten.png"),
            *('kitten "quoted" one.png', "kitten\\back\\slash.png", "kätzchen 日本 🦊.png"),
            *("kitten 'single' $HOME `id` *.png", "kitten[1-3]{a,b}%41#?.png", "<kitten.png"),
            os.fsdecode(b"kitten-\xe9\xff.png"),
        ):
            with contextlib.suppress(OSError):  # from a file system that takes only UTF-8
                (folder / name).write_bytes(CLEAR)
                for option in ("--image", "--mask", "--markup"):
                    with self.subTest(name, option=option):
                        request = self.sent("edit", "c.png", "x", option, folder / name)
                        fields = ["image[]"] * 2 if option == "--image" else ["image", option[2:]]
                        self.assertEqual([part.name for part in request.uploads], fields)
                        sent = [(part.content_type, part.body) for part in request.uploads]
                        self.assertEqual(sent, [("image/png", THREE), ("image/png", CLEAR)])
                        rest = request.body.replace(THREE, b"").replace(CLEAR, b"")
                        for local in (Path(name).stem, "really", str(self.work)):
                            self.assertNotIn(os.fsencode(local), rest)

    def test_a_dash_led_name_and_a_link(self) -> None:
        self.put("-kitten.png", THREE)
        (self.work / "link").symlink_to("c.png")
        for line in ("-- -kitten.png x", "./-kitten.png x", "x --image=-kitten.png", "link x"):
            with self.subTest(line):
                self.assertEqual([part.body for part in self.uploads(*line.split())], [THREE])


class TestDryRun(RequestCase):
    """--dry-run shows what would be sent; it sends and creates nothing."""

    generate = (
        *("generate", "a \"fox\"\n$HOME `id` \\'x'\x1b[1m", "-s", "story@2K", "-n", "2"),
        *("--param", "a.b=[1]", "-o", "new/fox.webp"),
    )
    edit = (
        *("edit", "a.png", "b.png", "é \"fox\"; $MY_WORD 'x'\x1b[1m\r\n", "--mask-box", "1,2,3,4"),
        *("-f", "svg", "--svg-model", "m", "-o", "fox.svg"),
    )

    def dry_run(self, *argv: str) -> Run:
        """Run something with --dry-run, which leaves the world as it was."""
        before = self.api.connections, self.world()
        run = self.check(self.run_tool(*argv, "--dry-run"), 0)
        self.assertEqual((self.api.connections, self.world()), before)
        self.assertNotIn(KEY[5:-4], run.out + run.err)
        self.assertTrue((run.out + run.err).replace("\n", "").isprintable(), run)
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

    def test_the_verbose_curl_line_can_be_pasted(self) -> None:
        """It sends what the tool sends, with the key from the variable that holds it."""
        for argv, name, variable in (
            (self.generate, "new/fox-2.webp", "GPT_IMAGE2_API_KEY"),
            (self.edit, "fox.svg", "MY_WORD"),
        ):
            with self.subTest(argv[0]):
                self.configure(base_url=self.api.base_url, api_key_env=variable)
                self.env[variable] = self.env.pop("GPT_IMAGE2_API_KEY")
                run = self.dry_run(*argv, "--verbose")
                for fact in ("/v1/images/", "gpt-image-2", "estimate", str(self.work / name)):
                    self.assertIn(fact, run.out.partition("mkdir")[0])
                line = re.search(r"(?ms)^mkdir .*", run.out)
                assert line, self.story(run)
                self.assertIn(f'"Authorization: Bearer ${variable}"', line[0])
                command = ["sh", "-c", f"({line[0]}) >/dev/null"]
                subprocess.run(command, env=self.env, cwd=self.work, check=True)
                pasted, real = self.api.posts[-1], self.sent(*argv)
                for name in ("target", "json" if argv is self.generate else "parts"):
                    self.assertEqual(getattr(pasted, name), getattr(real, name))
                for name in ("authorization", "content-type"):  # less the boundary of a form
                    found, wanted = pasted.headers[name], real.headers[name]
                    self.assertEqual(found.partition(";")[0], wanted.partition(";")[0])


def rows(line: str, phrase: str, *words: str) -> dict[str, str]:
    """Return a row of a table below for each of these words in the place of {}."""
    return {line.replace("{}", word): phrase for word in words}


# A command line, and what the message says. Everywhere, whatever the server may think.
REFUSED: dict[str, str] = {
    **rows("{}", "no prompt", "generate", "edit --quality low"),
    # the dash is standard input, with nothing in it
    **rows("generate {}", "prompt.*empty", "''", "' \n\t\u3000'", "-", "--prompt="),
    "edit a.png ''": "prompt.*empty",
    "generate --prompt-file nul.txt": "nul",
    **rows("generate {}", "utf-8", "--prompt-file latin.txt", LATIN),
    "generate --prompt-file huge.txt": "1,?048,?576",
    "generate --prompt-file missing.txt": "missing.txt",
    "generate two words": "prompt.*quotes",
    **rows("generate 'a fox' {}", "prompt", "--prompt 'a cat'", "--prompt-file a.txt"),
    # numbers: ASCII digits in a range, nothing else
    **rows("generate x --n={}", r"-n\b.*1\D+10", "0", "11", "-1", "1_0", "３", "+3", "1.0"),
    "generate x -f jpg --compression 101": "compression.*101",
    **rows("generate x --frame-{}", "frame-.*(17|655351)", "count 17", "duration-ms 655351"),
    **rows("generate x --partial-images={}", "partial-images.*(4|-1)", "4", "-1"),
    **rows("generate x --{}", "(timeout.*0|retries.*-1)", "timeout=0", "retries=-1"),
    "generate x --quality hgh": "hgh.*high",
    "generate x -f pgn": "pgn.*png",
    **rows(
        "generate x -o fox.{}",
        "(bmp|pgn|heic).*not a known image format.*png, jpg",
        "bmp",
        "pgn",
        "HEIC",
    ),
    **rows("generate x -o a.jpg -f {}", "-o a.jpg and --format (png|svg)", "png", "svg"),
    "edit a.png x --image-field images": r"images.*image\[\]",
    "genrate x": "genrate.*generate",
    **rows("generate x {} low", "--qual(ty)? .*--quality", "--qualty", "--qual"),
    "generate x -ofox.png": "-ofox.png",
    "generate '-old man'": "-old man.*--",
    "generate x --mask clear.png": "--mask ",
    **rows("generate x --param {}", "KEY=VALUE", "quality", "=low", "a..b=1", "'a b=1'"),
    "generate x --param a=1 --param a.b=2": "a.b",
    "edit a.png x --param 'a={\"b[c]\": 1}'": r"b\[c\]",
    **rows("generate x {}", "utf-8|unicode", f"--user {LATIN}", "--param 'user=\"\\ud800\"'"),
    **rows("generate x --background transparent {}", "transparent.*png", "-f jpeg", "-o new.jpg"),
    **rows("edit a.png x --mask a.png {}", "--mask.*--ma", "--markup a.png", "--mask-box 0,0,1,1"),
    **rows("edit {}", "image", "'a fox'", "--prompt x"),
    "edit a.png": r"prompt is missing after a\.png",
    **rows("edit {} x", "link.*download it first", "https://x.test/a.png", "file:///a.png"),
    **rows("edit {} x", "cut.*end is missing", "cut.png", "cut.jpg", "a.png cut.png"),
    **rows("edit {} x", r"\w+ing\.png.*not exist", "missing.png", "a.png --image missing.png"),
    **rows("edit a.png x --{} missing.png", r"missing\.png.*not exist", "mask", "markup"),
    "edit nowhere.png x": r"nowhere\.png.*not exist",
    "edit a.png empty.png x": r"empty\.png.*empty",
    "edit text.png x": r"text\.png.*not.*image",
    "edit 'new\nline.png' x": "control",
    **rows("edit a.png x --mask-box {}", "mask-box.*64x48", "0,0,65,48", "60,40,4,9"),
    **rows("edit a.png x --mask-box={}", "mask-box", "1,2,3", "0,0,0,5", "-1,0,5,5", "0,0,５,5"),
}

# At OpenAI, which is certain to refuse them; anywhere else a warning.
CERTAIN_AT_OPENAI = {
    "generate --prompt-file long.txt": "32,?001.*32,?000",
    **rows("generate x --background transparent -f {}", "transparent", "gif", "svg"),
    **rows("generate x -f {}", "(gif|svg).*stream", "gif --partial-images 0", "svg --stream"),
    **rows("generate x {}--compression 50", "compression", "", "-f png ", "-f gif "),
    **rows("generate x {}", "gif", "--frame-count 3", "-f webp --frame-duration-ms 200"),
    **rows("generate x {}", "svg", "--svg-effort low", "-f png --svg-model m", "-f svg -n 2"),
    "generate x --response-format b64_json": "response_format|OpenAI refuses it",
    "generate x -m gpt-image-1.5 -s 2K": "2048x2048.*1024x1024",
    **rows("edit a.png x -f gif {}", "gif.*mask", "--mask clear.png", "--mask-box 1,1,8,8"),
    "edit a.png x --input-fidelity high": "input.fidelity",
    "edit a.png x --input-fidelity low -m gpt-image-2.6-flare": "input.fidelity",
    "edit a.png x --input-fidelity high -m gpt-image-1-mini": "low",
    "edit a.png x --mask a.png": r"a\.png.*(alpha|transparen)",
    "edit a.png x --markup a.png -m gpt-image-2.6-flare": r"a\.png.*(alpha|transparen)",
    "edit a.png x --mask other.png": r"other\.png.*48x64.*64x48",
    "edit a.gif x": r"a\.gif.*gif",
    "edit a.heic x": r"a\.heic is HEIC; the API takes png, jpeg and webp.*converts",
    "edit a.tiff x": r"a\.tiff is TIFF;",
}

# What OpenAI only may refuse, with the one warning that goes with it; what it takes has none.
UNCERTAIN = {
    "generate x --background transparent": "transparency is a preview",
    **rows("generate x --quality {}", "xhigh|max", "xhigh", "max"),
    **rows("generate x --complexity low{}", "complexity.*2.6", "", " -m gpt-image-2.5-flare"),
    "generate x -m gpt-image-3 --quality max --complexity low": "unknown to this version",
    "generate x -m gpt-image-2.6-flair": "gpt-image-2.6-flair.*gpt-image-2.6-flare",
    "edit a.png x --moderation low": "moderation",
    "edit a.png x --response-format url": "--response-format",
    "edit a.png x --markup clear.png": "markup.*2.5",
    "generate x --background transparent --quality xhigh -m gpt-image-2.5-flare -f webp": "",
    "generate x -f gif --frame-count 2 --frame-duration-ms 40": "",
    "generate x -f svg --svg-model gpt-5.5 --svg-effort none -n 1": "",
    "edit a.png x --markup clear.png -m gpt-image-2.5-flare -f jpg --compression 1": "",
}


class TestRules(RequestCase):
    """What is refused before anything is sent, and what is only warned of."""

    def setUp(self) -> None:
        super().setUp()
        for name, data in (
            *(("cut.png", png(64, 48)[:-9]), ("cut.jpg", jpeg(64, 48)[:-2])),
            *(("a.heic", b"\0\0\0\x10ftypheic" + bytes(4)), ("a.tiff", b"II*\0" + bytes(99))),
            *(("a.gif", gif(64, 48)), ("other.png", png(48, 64, hole=(0, 0, 8, 8)))),
            *(("text.png", b"just words\n"), ("a.txt", b"a fox"), ("empty.png", b"")),
            *(("latin.txt", b"caf\xe9"), ("nul.txt", b"a\0b"), ("long.txt", b"x" * 32_001)),
            ("huge.txt", b"x" * (1 << 20) + b"x"),
        ):
            self.put(name, data)
        (self.work / "folder").mkdir()
        (self.work / "nowhere.png").symlink_to("missing.png")

    def assert_refused(self, line: str, phrase: str, *options: str) -> None:
        """Assert exit code 2, a line like `phrase` and its document; nothing sent, nothing made."""
        before = self.world()
        command, *words = shlex.split(line)
        run = self.check(self.run_tool(command, "--json", *words, *options), 2)
        self.assertRegex(run.err, rf"(?i)\Agpt-image2: [^\n]*({phrase})[^\n]*\n\Z")
        self.assertEqual((self.world(), run.out.count("\n")), (before, 1))
        error = run.json["error"]
        self.assertEqual((error["exit_code"], error["maybe_billed"]), (2, False))
        self.assertIn(error["message"], run.err)
        self.no_request(self.api)

    def test_seventeen_images_are_too_many_at_openai_only(self) -> None:
        line = "edit " + "a.png " * 17 + "x"
        self.assertEqual(self.planned(f"{line} --provider openai-hk")["warnings"], [])
        self.assert_refused(line, "17.*16", "--provider", "openai")

    def test_a_home_is_found_wherever_the_tilde_stands(self) -> None:
        (self.home / "a.png").write_bytes(ONE)
        (self.home / "p.txt").write_bytes(b"a fox")
        line = "--image=~/a.png --mask=~/a.png --prompt-file=~/p.txt --output-dir=~/out"
        self.planned(f"edit '~/a.png' {line}")
        self.check(self.run_tool("generate", "--prompt=x", "--output-dir=~/out"), 0)
        self.env["GPT_IMAGE2_OUTPUT_DIR"] = "~/out"
        self.check(self.run_tool("generate", "x", "-o=~/b.png".replace("-o=", "--output=")), 0)
        self.check(self.run_tool("generate", "x"), 0)
        self.assertEqual(len(list((self.home / "out").iterdir())), 2)
        self.assertTrue((self.home / "b.png").exists())
        self.check(self.run_tool("batch", "~/p.txt"), 0)
        self.assertFalse((self.work / "~").exists())

    def test_nodekey_takes_any_number_and_no_image_means_one(self) -> None:
        for asked, sent in ((0, 1), (11, 11), (64, 64)):
            found = self.planned(f"generate x -n {asked} --provider nodekey")["dry_run"]["fields"]
            self.assertEqual(found["n"], sent)

    def test_refused_everywhere(self) -> None:
        for line, phrase in REFUSED.items():
            with self.subTest(line):
                self.assert_refused(line, phrase)
        for line in ("generate ''", "generate x --bogus", "generate -n 0 -- --json"):
            with self.subTest("no JSON", line=line):
                self.assertEqual(self.check(self.run_tool(*shlex.split(line)), 2).out, "")

    def test_refused_at_openai_and_a_warning_elsewhere(self) -> None:
        for line, phrase in CERTAIN_AT_OPENAI.items():
            with self.subTest(line):
                self.assertRegex("\n".join(self.planned(line)["warnings"]), f"(?i){phrase}")
                self.assert_refused(line, phrase, "--quiet", "--provider", "openai")

    def test_what_openai_may_refuse_goes_through_with_one_warning(self) -> None:
        for line, phrase in UNCERTAIN.items():
            with self.subTest(line):
                warnings = self.planned(f"{line} --provider openai")["warnings"]
                self.assertEqual(len(warnings), bool(phrase))
                self.assertRegex("".join(warnings), phrase or r"\A\Z")


class TestModels(RequestCase):
    """Which models a word is said of, before their last day and after it."""

    ending = {
        **rows("{}", "2026-12-01", "gpt-image-1.5", "gpt-image-1-mini", "chatgpt-image-latest"),
        "gpt-image-1": "2026-10-23",
        **rows("dall-e-{}", "2026-05-12", "2", "3"),
    }
    known = {name for fields in SDK_FIELDS.values() for name in fields["model"]["values"]}
    living = sorted(known - set(ending))

    def warnings(self, model: str, provider: str = "openai", now: float = 1795600000) -> list[str]:
        """Return what is said of a model on a day, which is 2026-11-25 unless told."""
        with mock.patch("time.time", return_value=now):
            found = self.planned(f"generate x -m {model} --provider {provider}")["warnings"]
        return [str(warning) for warning in found]

    def test_living_models_go_without_a_word(self) -> None:
        self.assertIn("gpt-image-2", self.living)
        others = {"gpt-image-2-vip": "nodekey", "gpt-image-2-4k": "nodekey"}
        others["my-deployment"] = "azure"  # which names its models itself
        for model, provider in {**dict.fromkeys(self.living, "openai"), **others}.items():
            with self.subTest(model):
                self.assertEqual(self.warnings(model, provider), [])

    def test_a_model_near_or_past_its_last_day_names_it_and_a_successor(self) -> None:
        successor = rf"\b({'|'.join(self.living)})\b"
        for provider in ("openai", "generic"):
            for model, day in self.ending.items():
                with self.subTest(model, provider=provider):
                    (warning,) = self.warnings(model, provider)
                    self.assertRegex(warning, rf"{model}\b.*{day}.*{successor}")
        for days, count in ((90, 0), (30, 1), (-1, 1)):  # to 2026-12-01
            found = self.warnings("gpt-image-1.5", now=1796083200 - days * 86400)
            self.assertEqual(len(found), count, days)
