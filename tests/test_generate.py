"""generate, from the command line to the bytes on the wire and the files on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import threading
import time
import unittest
from pathlib import Path
from typing import Any, NamedTuple

from tests.pictures import gif, jpeg, png, svg, webp
from tests.support import (
    KEY,
    OPENAI_USAGE,
    Argument,
    Case,
    Reply,
    Request,
    Run,
    answer,
    refusal,
)

PICTURE = png(1024, 1024)
LARGE = png(62, 64, seed=7)  # 11.75 KB, which is 12
GENERATED = r"\d{4}-\d{2}-\d{2}-[0-9a-f]{8}"


def as_many_as_asked(request: Request) -> Reply:
    """Answer with n pictures, each unlike the others."""
    count = request.json.get("n", 1)
    return answer(*(png(1024, 1024, rgb=(i, i, i)) for i in range(count)))


def spelled(value: Any) -> str:
    """Return JSON as text, so that 1, 1.0, true and "1" are four different things."""
    return json.dumps(value, sort_keys=True)


def saved_line(path: Path) -> str:
    """Return what is said of a saved file."""
    return f"Saved: {path} ({max(1, round(path.stat().st_size / 1024))} KB)\n"


class GenerateCase(Case):
    """A case whose server gives every request what it asks for."""

    def setUp(self) -> None:
        super().setUp()
        self.api = self.serve_base(otherwise=as_many_as_asked)

    def generate(self, *argv: Argument, **options: Any) -> Run:
        """Run generate, which must succeed."""
        return self.check(self.run_tool("generate", *argv, **options), 0)

    def body_of(self, *argv: Argument, **options: Any) -> Any:
        """Return the JSON that a command line sends."""
        self.generate(*argv, **options)
        return self.api.posts[-1].json

    def assert_sends(self, fields: dict[str, Any], *argv: Argument, **options: Any) -> None:
        """Assert that "a fox" with these options sends these fields beside model and prompt."""
        expected = {"model": "gpt-image-2", "prompt": "a fox", **fields}
        self.assertEqual(spelled(self.body_of("a fox", *argv, **options)), spelled(expected))

    def everything(self) -> list[str]:
        """Return every file and folder of this test's world."""
        return sorted(str(path.relative_to(self.tmp)) for path in self.tmp.rglob("*"))


class Wire(GenerateCase):
    """What goes over the line."""

    def test_a_bare_prompt_sends_model_and_prompt_and_nothing_else(self) -> None:
        self.assert_sends({})
        request = self.api.posts[0]
        self.assertEqual((request.method, request.target), ("POST", "/v1/images/generations"))
        self.assertEqual(request.headers["content-type"], "application/json")
        self.assertEqual(request.headers["authorization"], f"Bearer {KEY}")
        self.assertEqual(request.headers["host"], f"127.0.0.1:{self.api.port}")
        self.assertRegex(request.headers["user-agent"], r"^gpt-image-?2/\d")
        self.assertNotIn("expect", request.headers)
        names = [name.lower() for name, _ in request.header_list]
        self.assertEqual(len(names), len(set(names)), "a header came twice")
        self.assertEqual(self.api.connections, 1)

    def test_only_openai_gets_a_request_id_and_it_is_the_job_id(self) -> None:
        self.generate("a fox")
        self.assertNotIn("x-client-request-id", self.api.posts[0].headers)
        run = self.generate("a fox", "--json", "--provider", "openai")
        self.assertEqual(self.api.posts[1].headers["x-client-request-id"], run.json["job_id"])

    def test_options_arrive_as_the_api_spells_them(self) -> None:
        table: list[tuple[str, dict[str, Any]]] = [
            ("-m gpt-image-2.6-flare", {"model": "gpt-image-2.6-flare"}),
            ("--model my-own", {"model": "my-own"}),
            ("-s 1536x1024", {"size": "1536x1024"}),
            ("--size auto --quality auto", {"size": "auto", "quality": "auto"}),
            ("--size=story@2K", {"size": "1152x2048"}),
            ("-s 1920x1080 --nearest-size", {"size": "1920x1088"}),
            ("--quality low -n 2", {"quality": "low", "n": 2}),
            ("--n=1 --moderation low", {"n": 1, "moderation": "low"}),
            ("-f jpg --compression 0", {"output_format": "jpeg", "output_compression": 0}),
            (
                "--format webp --compression 100",
                {"output_format": "webp", "output_compression": 100},
            ),
            (
                "--background transparent --format png",
                {"background": "transparent", "output_format": "png"},
            ),
            (
                "-m gpt-image-2.6-flare --complexity high --quality max",
                {"model": "gpt-image-2.6-flare", "complexity": "high", "quality": "max"},
            ),
            (
                "-f gif --frame-count 9 --frame-duration-ms 200",
                {"output_format": "gif", "frame_count": 9, "frame_duration_ms": 200},
            ),
            (
                "-f svg --svg-model gpt-5.5 --svg-effort xhigh",
                {
                    "output_format": "svg",
                    "svg": {"model": "gpt-5.5", "reasoning": {"effort": "xhigh"}},
                },
            ),
            ("--stream", {"stream": True}),
            ("--partial-images 0", {"stream": True, "partial_images": 0}),
            (
                "--safety-identifier u-1 --user 42 --response-format b64_json",
                {"safety_identifier": "u-1", "user": "42", "response_format": "b64_json"},
            ),
        ]
        for options, fields in table:
            with self.subTest(options):
                self.assert_sends(fields, *options.split())

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
            "spaced= a fox ": " a fox ",
            "unicode=日本 🦊": "日本 🦊",
        }
        argv = [word for pair in table for word in ("--param", pair)]
        self.assert_sends({pair.partition("=")[0]: value for pair, value in table.items()}, *argv)

    def test_no_param_makes_the_body_invalid_json(self) -> None:
        run = self.run_tool("generate", "a fox", "--param", "huge=1e400")
        self.assertIn(run.code, (0, 2), self.story(run))
        for request in self.api.posts:
            self.assertNotIn(b"Infinity", request.body)

    def test_param_nests_by_dots_overrides_options_and_is_not_checked(self) -> None:
        table: list[tuple[list[str], dict[str, Any]]] = [
            (["a.b.c=1", "a.d=x"], {"a": {"b": {"c": 1}, "d": "x"}}),
            (["svg.model=m", "output_format=svg"], {"svg": {"model": "m"}, "output_format": "svg"}),
            (["quality=ultra", "size=512x512"], {"quality": "ultra", "size": "512x512"}),
            (["model=other"], {"model": "other"}),
        ]
        for pairs, fields in table:
            with self.subTest(pairs):
                self.assert_sends(fields, *(word for pair in pairs for word in ("--param", pair)))
        self.assert_sends({"quality": "high"}, "--quality", "low", "--param", "quality=high")

    def test_a_param_counts_as_the_number_of_pictures_too(self) -> None:
        run = self.generate("a fox", "--param", "n=2", "-o", "fox.png")
        self.assertEqual([path.name for path in run.saved], ["fox-1.png", "fox-2.png"])

    def test_the_config_file_fills_in_and_flags_beat_it(self) -> None:
        self.configure(model="gpt-image-2.6-flare", size="story@2K", quality="low", format="webp")
        fields = {"model": "gpt-image-2.6-flare", "size": "1152x2048", "quality": "low"}
        self.assert_sends({**fields, "output_format": "webp"})
        flags = ["-m", "gpt-image-2", "-s", "1:1", "--quality", "high", "-f", "jpg"]
        self.assert_sends({"size": "1024x1024", "quality": "high", "output_format": "jpeg"}, *flags)
        self.assertEqual(self.body_of("x", "-o", "fox.png")["output_format"], "png")

    def test_the_environment_fills_in_what_neither_flag_nor_file_says(self) -> None:
        self.configure(quality="medium")
        env = {"GPT_IMAGE2_QUALITY": "low", "GPT_IMAGE2_SIZE": "2K", "GPT_IMAGE2_FORMAT": "webp"}
        fields = {"quality": "medium", "size": "2048x2048", "output_format": "webp"}
        self.assert_sends(fields, env=env)


class Prompts(GenerateCase):
    """Every prompt arrives byte for byte, whichever way it comes."""

    def assert_prompt(self, prompt: str, *argv: Argument, **options: Any) -> None:
        self.assertEqual(self.body_of(*argv, **options)["prompt"], prompt)

    def test_any_text_survives_as_the_argument(self) -> None:
        prompts = [
            "naïve 日本語 🦊 e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u202eabc\u2028",
            'say "hi" \\"there\\" \\n \'x\' $HOME `id` %s {a,b}[1-3] @file <b> a=b;type=x',
            "  two\nlines\r\nand\ta tab\n",
            "@/etc/passwd",
        ]
        for prompt in prompts:
            with self.subTest(prompt):
                self.assert_prompt(prompt, prompt)

    def test_dash_led_prompts_go_after_two_dashes_or_an_equals_sign(self) -> None:
        self.assert_prompt(
            "-5 degrees, --sandbox", "--quality", "low", "--", "-5 degrees, --sandbox"
        )
        self.assert_prompt("--help", "--prompt=--help")
        self.assert_prompt("--", "--", "--")

    def test_from_standard_input_one_newline_and_a_bom_are_cut(self) -> None:
        self.assert_prompt("a fox", "-", stdin="\ufeffa fox\n")
        self.assert_prompt(" a\r\nfox\n", "-", "--quality", "low", stdin=" a\r\nfox\n\n")
        self.assert_prompt("a fox", "--quality", "low", "-", stdin="a fox\r\n")

    def test_from_a_file_one_newline_and_a_bom_are_cut(self) -> None:
        for text, prompt in [
            ("\ufeff日本 🦊\n", "日本 🦊"),
            ("a\n\nb\n\n", "a\n\nb\n"),
            ("x", "x"),
        ]:
            with self.subTest(text):
                (self.work / "prompt.txt").write_bytes(text.encode())
                self.assert_prompt(prompt, "--prompt-file", "prompt.txt")

    def test_from_the_option_nothing_is_cut(self) -> None:
        self.assert_prompt("\ufeffa fox\n", "--prompt", "\ufeffa fox\n")

    def test_the_prompt_counts_wherever_it_stands_among_the_options(self) -> None:
        for line in [
            "FOX --quality low -o a.png",
            "--quality low FOX -o b.png",
            "--quality=low -o c.png FOX",
            "-o d.png --force FOX --quality low --json",
            "--force --quality low -o e.png -- FOX",
        ]:
            with self.subTest(line):
                fields = {"prompt": "FOX", "quality": "low", "output_format": "png"}
                body = self.body_of(*line.split())
                self.assertEqual(body, {"model": "gpt-image-2", **fields})
        self.assertEqual(self.listing(), ["a.png", "b.png", "c.png", "d.png", "e.png"])


class Output(GenerateCase):
    """Where pictures go, and what is said about them."""

    def test_the_suffix_of_the_output_decides_the_format(self) -> None:
        for name, wanted in [
            ("a.png", "png"),
            ("a.jpg", "jpeg"),
            ("b.jpeg", "jpeg"),
            ("A.WEBP", "webp"),
            ("a.gif", "gif"),
            ("a.svg", "svg"),
            ("a.txt", None),
            ("my.fox/a", None),
        ]:
            with self.subTest(name):
                run = self.generate("a fox", "-o", name)
                self.assertEqual(self.api.posts[-1].json.get("output_format"), wanted)
                self.assertEqual(run.out, saved_line(self.work / name))

    def test_a_format_option_beats_the_suffix_and_the_name_stays_with_a_warning(self) -> None:
        self.api.script.append(answer(webp(1024, 1024)))
        run = self.generate("a fox", "-o", "fox.png", "-f", "webp")
        self.assertEqual(self.api.posts[0].json["output_format"], "webp")
        self.assertEqual(run.out, saved_line(self.work / "fox.png"))
        self.assertEqual((self.work / "fox.png").read_bytes(), webp(1024, 1024))
        self.assertRegex(run.err, "warning.*webp")

    def test_one_saved_line_a_picture_with_its_size(self) -> None:
        self.api.script.append(answer(LARGE, PICTURE))
        run = self.generate("a fox", "-n", "2", "-o", "fox.png")
        one, two = self.work / "fox-1.png", self.work / "fox-2.png"
        self.assertEqual((one.read_bytes(), two.read_bytes()), (LARGE, PICTURE))
        self.assertEqual(run.out, saved_line(one) + saved_line(two))
        self.assertIn("(12 KB)", run.out)

    def test_several_pictures_are_numbered_before_the_suffix(self) -> None:
        run = self.generate("a fox", "-n", "10", "-o", "my.fox.png")
        names = [f"my.fox-{i}.png" for i in range(1, 11)]
        self.assertEqual(run.saved, [self.work / name for name in names])
        self.assertEqual(self.listing(), sorted(names))
        colours = [path.read_bytes() for path in run.saved]
        self.assertEqual(colours, [png(1024, 1024, rgb=(i, i, i)) for i in range(10)])

    def test_more_pictures_than_asked_for_are_all_saved(self) -> None:
        self.api.script.append(answer(PICTURE, LARGE))
        run = self.generate("a fox", "-o", "fox.png")
        self.assertEqual([path.read_bytes() for path in run.saved], [PICTURE, LARGE])
        self.assertEqual(run.saved[0].name, "fox.png")

    def test_generated_names_have_the_day_and_the_suffix_of_the_real_bytes(self) -> None:
        kinds = {
            "png": PICTURE,
            "jpg": jpeg(1024, 1024),
            "webp": webp(1024, 1024),
            "gif": gif(1024, 1024),
            "svg": svg(1024, 1024),
        }
        for suffix, picture in kinds.items():
            with self.subTest(suffix):
                self.api.script.append(answer(picture))
                days = {time.strftime("%Y-%m-%d")}
                path = self.generate("a fox").saved[0]
                days.add(time.strftime("%Y-%m-%d"))
                self.assertEqual(path.parent, self.work)
                self.assertRegex(path.name, rf"^{GENERATED}\.{suffix}$")
                self.assertIn(path.name[:10], days)
                self.assertEqual(path.read_bytes(), picture)

    def test_folders_take_generated_names_and_missing_ones_are_made(self) -> None:
        (self.work / "here").mkdir()
        table: list[tuple[str, list[str]]] = [
            ("here", ["-o", "here"]),
            ("new/pics", ["-o", "new/pics/"]),
            ("with space", ["--output-dir", "with space"]),
            ("naïve 🦊", ["--output-dir", str(self.work / "naïve 🦊")]),
        ]
        for folder, argv in table:
            with self.subTest(argv):
                path = self.generate("a fox", *argv).saved[0]
                self.assertEqual(path.parent, self.work / folder)
                self.assertRegex(path.name, rf"^{GENERATED}\.png$")

    def test_the_folder_of_an_output_name_is_made(self) -> None:
        run = self.generate("a fox", "-o", "a/b/fox.png")
        self.assertEqual(run.saved, [self.work / "a/b/fox.png"])

    def test_the_setting_output_dir_is_for_generated_names(self) -> None:
        self.configure(output_dir=str(self.work / "set"))
        self.assertEqual(self.generate("a fox").saved[0].parent, self.work / "set")
        run = self.generate("a fox", "-o", "fox.png")
        self.assertEqual(run.saved, [self.work / "fox.png"])

    def test_a_dash_puts_the_bytes_on_stdout_and_the_saved_line_on_stderr(self) -> None:
        self.api.script.append(answer(LARGE))
        run = self.generate("a fox", "-o", "-")
        self.assertEqual(run.raw_out, LARGE)
        self.assertRegex(run.err, r"(?m)^Saved: .*\(12 KB\)$")
        self.assertEqual((self.listing(), self.jobs()), ([], []))

    def test_force_replaces_a_file_once_the_new_one_is_there(self) -> None:
        old = self.work / "fox.png"
        old.write_bytes(b"old")
        self.api.script.append(refusal(400, "invalid_value", "No."))
        self.check(self.run_tool("generate", "a fox", "-o", "fox.png", "--force"), 1)
        self.assertEqual(old.read_bytes(), b"old")
        run = self.generate("a fox", "-o", "fox.png", "--force")
        self.assertEqual((run.saved, self.listing()), ([old], ["fox.png"]))
        self.assertEqual(old.read_bytes(), png(1024, 1024, rgb=(0, 0, 0)))

    def test_pictures_get_the_rights_that_the_umask_leaves(self) -> None:
        self.plain = True
        self.addCleanup(os.umask, os.umask(0o027))
        path = self.generate("a fox").saved[0]
        self.assertEqual(path.stat().st_mode & 0o777, 0o640)

    def test_stderr_tells_of_the_request_the_job_and_the_answer(self) -> None:
        run = self.generate("a fox", "-s", "1024x1024", "--quality", "low")
        url = f"{self.api.base_url}/images/generations"
        self.assertIn(f"POST {url} gpt-image-2 1024x1024 low\n", run.err)
        self.assertRegex(run.err, r"(?m)^Job: \S+$")
        self.assertRegex(run.err, r"(?m)^HTTP 200 in \d+\.\d s$")
        self.assertRegex(run.err, r"(?m)^281 tokens")
        self.assertEqual(self.jobs(), [])

    def test_quiet_leaves_stderr_empty(self) -> None:
        run = self.generate("a fox", "--quiet")
        self.assertEqual((run.err, len(run.saved)), ("", 1))


class Document(GenerateCase):
    """The one JSON document of --json."""

    def test_the_whole_document(self) -> None:
        reply = answer(PICTURE, revised_prompt="a red fox\n🦊")
        self.api.script.append(reply._replace(headers=[*reply.headers, ("x-request-id", "req_7")]))
        run = self.generate("a fox", "-o", "fox.png", "--json", "--provider", "openai")
        self.assertEqual(run.out.count("\n"), 1)
        found = run.json
        elapsed, job_id = found.pop("elapsed_s"), found.pop("job_id")
        cost = found.pop("cost")
        image = {
            "path": str(self.work / "fox.png"),
            "bytes": len(PICTURE),
            "format": "png",
            "width": 1024,
            "height": 1024,
            "sha256": hashlib.sha256(PICTURE).hexdigest(),
            "revised_prompt": "a red fox\n🦊",
        }
        expected = {
            "schema": 1,
            "ok": True,
            "command": "generate",
            "model": "gpt-image-2",
            "images": [image],
            "partials": [],
            "usage": OPENAI_USAGE,
            "http_status": 200,
            "request_id": "req_7",
            "attempts": 1,
            "warnings": [],
            "recover_id": None,
            "resumed": False,
            "sandbox": False,
            "error": None,
        }
        self.assertEqual(found, expected)
        self.assertIsInstance(elapsed, (int, float))
        self.assertIn(f"Job: {job_id}\n", run.err)
        self.assertAlmostEqual(cost.pop("amount"), 0.00828)
        self.assertEqual(cost, {"currency": "USD", "estimated": False})

    def test_several_pictures_and_no_price(self) -> None:
        found = self.generate("a fox", "--json", "-n", "2", "-o", "fox.png").json
        paths = [image["path"] for image in found["images"]]
        self.assertEqual(paths, [str(self.work / f"fox-{i}.png") for i in (1, 2)])
        self.assertEqual((found["ok"], found["cost"]), (True, None))

    def test_a_size_other_than_asked_is_a_warning(self) -> None:
        self.api.script.append(answer(png(640, 480)))
        run = self.generate("a fox", "-s", "1024x1024", "--json")
        self.assertRegex(" ".join(run.json["warnings"]), "640x480.*1024x1024|1024x1024.*640x480")
        self.assertIn("640x480", run.err)


class DryRun(GenerateCase):
    """--dry-run shows what would be sent; it sends and creates nothing."""

    argv = (
        *("generate", "a \"fox\"\n$HOME `id` 'x'", "-s", "story@2K", "-n", "2"),
        *("--param", "a.b=[1]", "-o", "new/fox.webp"),
    )

    def test_the_document_is_what_is_then_really_sent(self) -> None:
        before = self.everything()
        run = self.check(self.run_tool(*self.argv, "--dry-run", "--json"), 0)
        self.assertEqual(self.everything(), before)
        self.no_request(self.api)
        self.assertEqual((run.out.count("\n"), run.json["ok"]), (1, True))
        shown = run.json["dry_run"]
        sent = self.check(self.run_tool(*self.argv), 0)
        request = self.api.posts[0]
        self.assertEqual(shown["endpoint"], self.api.origin + request.target)
        self.assertEqual(spelled(shown["fields"]), spelled(request.json))
        self.assertEqual((shown["files"], shown["paths"]), ([], [str(path) for path in sent.saved]))
        self.assertIn("estimate", shown)

    def test_the_text_names_endpoint_fields_and_paths_and_hides_the_key(self) -> None:
        before = self.everything()
        run = self.check(self.run_tool(*self.argv, "--dry-run"), 0)
        self.assertEqual(self.everything(), before)
        self.no_request(self.api)
        for text in (
            f"{self.api.base_url}/images/generations",
            "gpt-image-2",
            "1152x2048",
            "webp",
            str(self.work / "new/fox-1.webp"),
            str(self.work / "new/fox-2.webp"),
            "estimate",
        ):
            self.assertIn(text, run.out)
        self.assertNotIn(KEY[5:-4], run.out + run.err)

    def test_an_estimate_at_openais_prices(self) -> None:
        argv = ["a fox", "-s", "1024x1024", "--quality", "low", "--provider", "openai"]
        estimate = self.generate(*argv, "--dry-run", "--json").json["dry_run"]["estimate"]
        self.assertEqual((estimate["currency"], estimate["estimated"]), ("USD", True))
        self.assertAlmostEqual(estimate["amount"], 0.006, delta=0.001)

    def test_the_text_is_on_stdout_even_where_the_picture_would_be(self) -> None:
        run = self.generate("a fox", "-o", "-", "--dry-run")
        self.assertIn(f"{self.api.base_url}/images/generations", run.out)
        self.no_request(self.api)

    def test_the_verbose_curl_line_can_be_pasted(self) -> None:
        """The line, with the key from the environment, sends what the tool sends."""
        run = self.check(self.run_tool(*self.argv, "--dry-run", "--verbose"), 0)
        self.assertNotIn(KEY[5:-4], run.out + run.err)
        line = re.search(r"(?ms)^curl .*", run.out)
        assert line, self.story(run)
        self.assertIn("$GPT_IMAGE2_API_KEY", line[0])
        subprocess.run(
            ["sh", "-c", line[0]],
            env=self.env,
            cwd=self.work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=True,
        )
        self.check(self.run_tool(*self.argv), 0)
        pasted, real = self.api.posts
        self.assertEqual((pasted.target, pasted.json), (real.target, real.json))
        for name in ("authorization", "content-type"):
            self.assertEqual(pasted.headers[name], real.headers[name])


class Child(NamedTuple):
    """What /proc says of a process."""

    argv: bytes
    environment: bytes
    stdin: str


@unittest.skipUnless(Path("/proc/self/environ").exists(), "this system has no /proc")
class WhileCurlRuns(Case):
    """What others on the machine can see while the server thinks."""

    prompt = "a fox that nobody else may read"

    def curls(self) -> list[Child]:
        """Return the curl processes of this test, which know its HOME."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes()
                argv = (folder / "cmdline").read_bytes()
                stdin = os.readlink(folder / "fd/0")
            except OSError:
                continue  # gone, or another user's
            mine = os.fsencode(f"HOME={self.home}") in environment.split(b"\0")
            if mine and argv.split(b"\0")[0].endswith(b"curl"):
                found.append(Child(argv, environment, stdin))
        return found

    def test_curl_shows_neither_key_nor_prompt(self) -> None:
        ways: list[tuple[str, dict[str, str], dict[str, str]]] = [
            ("environment", {}, {"GPT_IMAGE2_API_KEY": KEY, "OPENAI_API_KEY": "sk-other-key"}),
            ("config", {"api_key_env": "MY_OWN_WORD"}, {"MY_OWN_WORD": KEY}),
        ]
        for way, settings, env in ways:
            with self.subTest(way):
                gate = threading.Event()
                api = self.serve(answer(PICTURE)._replace(before=gate))
                self.configure(base_url=api.base_url, **settings)
                tool = self.start_tool("generate", self.prompt, env=env)
                request = api.wait_for_request()
                self.assertEqual(request.headers["authorization"], f"Bearer {KEY}")
                (curl,) = self.curls()
                for secret in (KEY, "sk-other-key", self.prompt):
                    self.assertNotIn(secret.encode(), curl.argv + curl.environment)
                self.assertTrue(curl.stdin.endswith("(deleted)"), curl.stdin)
                gate.set()
                self.check(self.finish(tool), 0)

    def test_the_job_folder_is_private_and_holds_no_key(self) -> None:
        self.plain = True
        self.addCleanup(os.umask, os.umask(0))
        gate = threading.Event()
        api = self.serve_base(answer(PICTURE)._replace(before=gate))
        tool = self.start_tool("generate", self.prompt)
        api.wait_for_request()
        (job,) = self.jobs()
        self.assertEqual(job.stat().st_mode & 0o777, 0o700)
        self.assertIn("body.json", self.listing(job))
        for path in [job / name for name in self.listing(job)]:
            with self.subTest(path.name):
                self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        for path in [self.tmp / name for name in self.listing(self.tmp)]:
            self.assertNotIn(KEY.encode(), path.read_bytes(), path)
        gate.set()
        self.check(self.finish(tool), 0)
        self.assertEqual(self.jobs(), [])
