"""edit, from the command line to the multipart parts on the wire."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.pictures import jpeg, png, read_png, webp
from tests.support import Argument, Case, Part, Reply, Request, Run, answer

PICTURE = png(1024, 1024)
ONE, TWO, THREE = (png(64, 48, rgb=(shade, 0, 0)) for shade in (1, 2, 3))
CLEAR = png(64, 48, hole=(8, 8, 16, 16))  # fit for a mask of the others


def as_many_as_asked(request: Request) -> Reply:
    """Answer with n pictures."""
    return answer(*[PICTURE] * int(request.fields.get("n", 1)))


class EditCase(Case):
    """A case with four pictures in the work folder, and a server for them."""

    def setUp(self) -> None:
        super().setUp()
        self.api = self.serve_base(otherwise=as_many_as_asked)
        pictures = {"a.png": ONE, "b.png": TWO, "c.png": THREE, "clear.png": CLEAR}
        for name, data in pictures.items():
            self.put(name, data)

    def put(self, name: Argument, data: bytes) -> Path:
        """Write a file of the work folder, and return its path."""
        path = self.work / name
        path.write_bytes(data)
        return path

    def edit(self, *argv: Argument, **options: Any) -> Run:
        """Run edit, which must succeed."""
        return self.check(self.run_tool("edit", *argv, **options), 0)

    def sent(self, *argv: Argument, **options: Any) -> Request:
        """Return the request that a command line sends."""
        self.edit(*argv, **options)
        return self.api.posts[-1]

    def uploads(self, *argv: Argument, **options: Any) -> list[Part]:
        """Return the files that a command line sends."""
        return self.sent(*argv, **options).uploads

    def fields(self, *argv: Argument, **options: Any) -> list[tuple[str, str]]:
        """Return the plain fields that a command line sends, sorted."""
        parts = self.sent(*argv, **options).parts
        return sorted((part.name, part.text) for part in parts if part.filename is None)


class Wire(EditCase):
    """The parts of the request."""

    def test_one_image_and_a_prompt(self) -> None:
        request = self.sent("a.png", "make it blue")
        self.assertEqual((request.method, request.target), ("POST", "/v1/images/edits"))
        self.assertEqual(request.headers["authorization"], f"Bearer {self.api.key}")
        self.assertNotIn("expect", request.headers)
        fields = {"model": "gpt-image-2", "prompt": "make it blue", "size": "auto"}
        self.assertEqual(request.fields, fields)
        self.assertEqual(len(request.parts), 4)
        (image,) = request.uploads
        self.assertEqual((image.name, image.content_type), ("image", "image/png"))
        self.assertEqual(image.body, ONE)
        for part in request.parts:
            if part.filename is None:
                self.assertIn(part.content_type, (None, "text/plain"))

    def test_several_images_go_in_order_as_image_brackets(self) -> None:
        parts = self.uploads("b.png", "a.png", "c.png", "blend")
        self.assertEqual([part.name for part in parts], ["image[]"] * 3)
        self.assertEqual([part.body for part in parts], [TWO, ONE, THREE])

    def test_the_name_of_the_image_field_can_be_set(self) -> None:
        table = [
            ("auto", ["a.png"], ["image"]),
            ("image[]", ["a.png"], ["image[]"]),
            ("image", ["a.png", "b.png"], ["image", "image"]),
        ]
        for name, images, wanted in table:
            with self.subTest(name):
                parts = self.uploads(*images, "blend", "--image-field", name)
                self.assertEqual([part.name for part in parts], wanted)
        self.configure(image_field="image[]")
        self.assertEqual(self.uploads("a.png", "x")[0].name, "image[]")
        self.assertEqual(self.uploads("a.png", "x", "--image-field=image")[0].name, "image")

    def test_sixteen_images(self) -> None:
        pictures = [png(16, 16, rgb=(i, i, i)) for i in range(16)]
        names = [f"n{i:02}.png" for i in range(16)]
        for name, data in zip(names, pictures):
            self.put(name, data)
        parts = self.uploads(*names, "all of them", "--provider", "openai")
        self.assertEqual([part.body for part in parts], pictures)

    def test_the_same_image_twice_goes_twice(self) -> None:
        parts = self.uploads("a.png", "a.png", "twins")
        self.assertEqual([(part.name, part.body) for part in parts], [("image[]", ONE)] * 2)

    def test_the_media_type_comes_from_the_bytes_not_from_the_name(self) -> None:
        table = {
            "image/png": png(8, 8),
            "image/jpeg": jpeg(8, 8),
            "image/webp": webp(8, 8, "VP8"),
        }
        for media, data in [*table.items(), ("image/webp", webp(8, 8, "VP8X"))]:
            for name in ("wrong.svg", "none"):
                with self.subTest(media=media, name=name):
                    (part,) = self.uploads(self.put(name, data), "x")
                    self.assertEqual((part.content_type, part.body), (media, data))

    def test_a_size_told_takes_the_place_of_auto(self) -> None:
        for argv in (["-s", "1:1"], ["--param", "size=1024x1024"], ["--size=1024x1024"]):
            with self.subTest(argv):
                self.assertEqual(self.sent("a.png", "x", *argv).fields["size"], "1024x1024")
        self.configure(size="2K")
        self.assertEqual(self.sent("a.png", "x").fields["size"], "2048x2048")

    def test_options_are_spelled_as_forms_spell_them(self) -> None:
        table: list[tuple[str, dict[str, str]]] = [
            (
                "--quality low -n 2 -f jpg --compression 50 --partial-images 3",
                {
                    "stream": "true",
                    "partial_images": "3",
                    "quality": "low",
                    "n": "2",
                    "output_format": "jpeg",
                    "output_compression": "50",
                },
            ),
            (
                "-f svg --svg-model gpt-5.5 --svg-effort low",
                {
                    "output_format": "svg",
                    "svg[model]": "gpt-5.5",
                    "svg[reasoning][effort]": "low",
                },
            ),
            (
                "-m gpt-image-1.5 --input-fidelity high --background transparent",
                {"model": "gpt-image-1.5", "input_fidelity": "high", "background": "transparent"},
            ),
            (
                "--user u --safety-identifier s --moderation low --response-format url",
                {
                    "user": "u",
                    "safety_identifier": "s",
                    "moderation": "low",
                    "response_format": "url",
                },
            ),
            (
                "-f gif --frame-count 3 --frame-duration-ms 200 --complexity low",
                {
                    "output_format": "gif",
                    "frame_count": "3",
                    "frame_duration_ms": "200",
                    "complexity": "low",
                },
            ),
        ]
        base = {"model": "gpt-image-2", "prompt": "x", "size": "auto"}
        for options, fields in table:
            with self.subTest(options):
                expected = sorted({**base, **fields}.items())
                self.assertEqual(self.fields("a.png", "x", *options.split()), expected)

    def test_params_are_spelled_as_forms_spell_them(self) -> None:
        table: dict[str, list[tuple[str, str]]] = {
            "whole=2": [("whole", "2")],
            "half=0.5": [("half", "0.5")],
            "yes=true": [("yes", "true")],
            "text=@/etc/hostname": [("text", "@/etc/hostname")],
            "form=<a;type=text/html": [("form", "<a;type=text/html")],
            'lines="a\\r\\nb"': [("lines", "a\r\nb")],
            "tags=[1, [true]]": [("tags[]", "1"), ("tags[][]", "true")],
            'object={"a": {"b": "é"}}': [("object[a][b]", "é")],
            "dot.ted.c=1": [("dot[ted][c]", "1")],
            "long=" + "x" * 5000: [("long", "x" * 5000)],
        }
        argv = [word for pair in table for word in ("--param", pair)]
        base = [("model", "gpt-image-2"), ("prompt", "x"), ("size", "auto")]
        expected = sorted([*base, *(pair for pairs in table.values() for pair in pairs)])
        self.assertEqual(self.fields("a.png", "x", *argv), expected)

    def test_text_options_are_never_form_syntax(self) -> None:
        secret = self.put("secret.txt", b"not for the server")
        for text in (f"@{secret}", f"<{secret}", "a;type=text/html", 'q"uo\\te,', '"'):
            with self.subTest(text):
                self.assertEqual(self.sent("a.png", "x", "--user", text).fields["user"], text)


class Masks(EditCase):
    """mask, mask box and markup."""

    def test_mask_and_markup_go_as_they_are(self) -> None:
        for name in ("mask", "markup"):
            with self.subTest(name):
                parts = self.uploads("a.png", "b.png", "x", f"--{name}", "clear.png")
                self.assertEqual([part.name for part in parts], ["image[]", "image[]", name])
                self.assertEqual(parts[2].content_type, "image/png")
                self.assertEqual(parts[2].body, CLEAR)

    def test_the_mask_box_is_clear_and_all_else_is_opaque(self) -> None:
        boxes = {
            "10,20,30,15": (10, 20, 30, 15),
            "0,0,64,48": (0, 0, 64, 48),
            "63,47,1,1": (63, 47, 1, 1),
        }
        for text, (left, top, width, height) in boxes.items():
            with self.subTest(text):
                image, mask = self.uploads("a.png", "x", "--mask-box", text)
                self.assertEqual((image.body, mask.name), (ONE, "mask"))
                self.assertEqual(mask.content_type, "image/png")
                drawn = read_png(mask.body)
                self.assertEqual((drawn.width, drawn.height), (64, 48))
                self.assertIn(drawn.mode, ("LA", "RGBA"))
                clear = {(x, y) for y in range(48) for x in range(64) if not drawn.pixel(x, y)[-1]}
                opaque = sum(drawn.pixel(x, y)[-1] == 255 for y in range(48) for x in range(64))
                xs, ys = range(left, left + width), range(top, top + height)
                self.assertEqual(clear, {(x, y) for y in ys for x in xs})
                self.assertEqual(len(clear) + opaque, 64 * 48)

    def test_the_mask_box_is_drawn_for_the_first_image(self) -> None:
        self.put("photo.jpg", jpeg(40, 30))
        parts = self.uploads("photo.jpg", "a.png", "x", "--mask-box", "1,2,3,4")
        drawn = read_png(parts[-1].body)
        self.assertEqual((drawn.width, drawn.height), (40, 30))


class Prompts(EditCase):
    """Every prompt arrives byte for byte: nothing in it is form syntax."""

    def test_any_text_survives(self) -> None:
        secret = self.put("secret.txt", b"not for the server")
        for prompt in [
            "blue;type=text/html",
            "blue;filename=x,y;headers=@a",
            f"@{secret}",
            f"<{secret}",
            "<-",
            'a=b; c="d" \'e\' \\ \\n \\" $HOME `id`',
            '"quoted"',
            "two\nlines\r\nand\ta tab\n",
            '--boundary\r\nContent-Disposition: form-data; name="n"\r\n\r\n9',
            "naïve 日本語 🦊 e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467",
            "  spaces  ",
        ]:
            with self.subTest(prompt):
                request = self.sent("a.png", "--", prompt)
                self.assertEqual(request.fields["prompt"], prompt)
                self.assertEqual(len(request.parts), 4)

    def test_each_way_for_a_prompt(self) -> None:
        self.put("prompt.txt", "\ufeff<a fox 🦊>\n\n".encode())
        table: list[tuple[list[str], str]] = [
            (["a.png", "--", "--mask is a word"], "--mask is a word"),
            (["--", "a.png", "-5 degrees"], "-5 degrees"),
            (["a.png", "--prompt=--help"], "--help"),
            (["a.png", "--prompt", "a fox\n"], "a fox\n"),
            (["a.png", "--prompt-file", "prompt.txt"], "<a fox 🦊>\n"),
            (["a.png", "-", "--quality", "low"], ";from stdin"),
        ]
        for argv, prompt in table:
            with self.subTest(argv):
                request = self.sent(*argv, stdin=";from stdin\n")
                self.assertEqual(request.fields["prompt"], prompt)
                self.assertEqual([part.body for part in request.uploads], [ONE])


class CommandLine(EditCase):
    """Which words are pictures, and which is the prompt."""

    def test_the_last_word_is_the_prompt_and_all_before_it_are_images(self) -> None:
        table: list[tuple[list[str], list[bytes]]] = [
            (["a.png", "PROMPT"], [ONE]),
            (["a.png", "b.png", "c.png", "PROMPT"], [ONE, TWO, THREE]),
            (["PROMPT", "--image", "a.png", "--image", "b.png"], [ONE, TWO]),
            (["--image", "a.png", "PROMPT"], [ONE]),
            (["PROMPT", "--input-image=a.png", "--image", "b.png"], [ONE, TWO]),
            (["--image", "c.png", "a.png", "b.png", "PROMPT"], [ONE, TWO, THREE]),
            (["a.png", "--quality", "low", "PROMPT"], [ONE]),
            (["a.png", "--quality", "low", "b.png", "--force", "PROMPT", "-n", "1"], [ONE, TWO]),
            (["--prompt", "PROMPT", "a.png", "b.png"], [ONE, TWO]),
            (["a.png", "--prompt", "PROMPT", "--image", "b.png"], [ONE, TWO]),
            (["a.png", "--", "b.png", "PROMPT"], [ONE, TWO]),
        ]
        for argv, bodies in table:
            with self.subTest(argv):
                request = self.sent(*argv)
                self.assertEqual(request.fields["prompt"], "PROMPT")
                self.assertEqual([part.body for part in request.uploads], bodies)

    def test_every_picture_of_a_folder(self) -> None:
        """What the shell makes of `edit *.png "one basket"`."""
        names = sorted(path.name for path in self.work.glob("*.png"))
        parts = self.uploads(*names, "one basket")
        self.assertEqual([part.body for part in parts], [ONE, TWO, THREE, CLEAR])

    def test_output_follows_the_same_rules_as_generate(self) -> None:
        run = self.edit("a.png", "x", "-n", "2", "-o", "out/fox.webp")
        paths = [self.work / "out/fox-1.webp", self.work / "out/fox-2.webp"]
        self.assertEqual(run.saved, paths)
        self.assertEqual(self.api.posts[0].fields["output_format"], "webp")
        self.assertEqual(paths[0].read_bytes(), PICTURE)
        self.assertEqual(self.jobs(), [])

    def test_force_may_replace_the_picture_itself(self) -> None:
        run = self.edit("a.png", "x", "-o", "a.png", "--force")
        self.assertEqual(self.api.posts[0].uploads[0].body, ONE)
        self.assertEqual(run.saved[0].read_bytes(), PICTURE)

    def test_the_document_says_edit(self) -> None:
        found = self.edit("a.png", "x", "--json", "-o", "fox.png").json
        self.assertEqual((found["ok"], found["command"]), (True, "edit"))
        self.assertEqual(found["images"][0]["path"], str(self.work / "fox.png"))

    def test_a_dry_run_shows_what_is_then_sent(self) -> None:
        argv = ["edit", "a.png", "b.png", "x", "--mask-box", "1,2,3,4", "-f", "svg"]
        argv += ["--svg-model", "m", "-o", "fox.svg"]
        before = self.listing(self.tmp)
        shown = self.check(self.run_tool(*argv, "--dry-run", "--json"), 0).json["dry_run"]
        self.assertEqual(self.listing(self.tmp), before)
        self.no_request(self.api)
        self.check(self.run_tool(*argv), 0)
        request = self.api.posts[0]
        self.assertEqual(shown["endpoint"], self.api.origin + request.target)
        svg_model = shown["fields"].pop("svg")
        self.assertEqual({**shown["fields"], "svg[model]": svg_model["model"]}, request.fields)
        files = [(file["field"], file["media_type"], file["bytes"]) for file in shown["files"]]
        parts = [(part.name, part.content_type, len(part.body)) for part in request.uploads]
        self.assertEqual(files, parts)
        paths = [file["path"] for file in shown["files"]]
        self.assertEqual(paths[:2], [str(self.work / "a.png"), str(self.work / "b.png")])

    def test_the_text_of_a_dry_run_names_every_file(self) -> None:
        run = self.edit("a.png", "x", "--mask", "clear.png", "--dry-run")
        for text in ("/images/edits", str(self.work / "a.png"), str(self.work / "clear.png")):
            self.assertIn(text, run.out)
        self.no_request(self.api)


class FileNames(EditCase):
    """Any name that a file can have; none of them leaves the machine."""

    def assert_uploaded(self, name: str, *argv: Argument) -> None:
        """Assert that a file of this name is sent whole, under another name."""
        request = self.sent(*argv)
        self.assertIn(THREE, [part.body for part in request.uploads])
        local = os.fsencode(Path(name).stem)
        sent = [os.fsencode(part.filename or "") for part in request.uploads]
        for file_name in sent:
            self.assertRegex(file_name.decode(), r"^(image|mask|markup)(-\d+)?\.png$")
        self.assertNotIn(local, request.body.replace(THREE, b""))
        self.assertNotIn(os.fsencode(self.work), request.body)

    def test_names_with_form_syntax_quotes_and_unicode(self) -> None:
        for name in [
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
        ]:
            with self.subTest(name):
                self.put(name, THREE)
                self.assert_uploaded(name, name, "x")

    def test_a_dash_led_name(self) -> None:
        self.put("-kitten.png", THREE)
        self.assert_uploaded("-kitten.png", "--", "-kitten.png", "x")
        self.assert_uploaded("-kitten.png", "./-kitten.png", "x")
        self.assert_uploaded("-kitten.png", "x", "--image=-kitten.png")

    def test_a_name_that_is_not_utf8(self) -> None:
        name = os.fsdecode(b"kitten-\xe9\xff.png")
        try:
            self.put(name, THREE)
        except OSError:
            self.skipTest("this file system takes only UTF-8 names")
        self.assert_uploaded(name, name, "x")

    def test_masks_and_markups_too(self) -> None:
        self.put('kitten;"a,b\\c.png', CLEAR)
        for option in ("--mask", "--markup"):
            with self.subTest(option):
                request = self.sent("a.png", "x", option, 'kitten;"a,b\\c.png')
                self.assertEqual(request.uploads[1].body, CLEAR)
                self.assertNotIn(b"kitten", request.body)

    def test_a_link_and_a_folder_with_odd_names(self) -> None:
        folder = self.work / 'od;d "folder", really'
        folder.mkdir()
        (folder / "kitten.png").symlink_to(self.work / "c.png")
        self.assert_uploaded("kitten", folder / "kitten.png", "x")
