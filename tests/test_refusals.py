"""Bad input: one line on stderr, the right exit code, nothing sent, nothing created."""

from __future__ import annotations

import os
import sys
import unittest
from typing import Any, Sequence

from tests.pictures import gif, jpeg, png, svg
from tests.support import KEY, Argument, Case, Reply, Request, Run, answer

LATIN = os.fsdecode(b"caf\xe9")  # an argument that is not UTF-8

Row = Sequence[Argument]


def as_many_as_asked(request: Request) -> Reply:
    """Answer a JSON or form request with n pictures."""
    is_json = request.headers["content-type"] == "application/json"
    fields = request.json if is_json else request.fields
    return answer(*[png(1024, 1024)] * int(fields.get("n", 1)))


class RefusalCase(Case):
    """A case with good and bad files in the work folder, and a server that must hear nothing."""

    def setUp(self) -> None:
        super().setUp()
        self.api = self.serve_base(otherwise=as_many_as_asked)
        files = {
            "a.png": png(64, 48),
            "a.jpg": jpeg(64, 48),
            "a.gif": gif(64, 48),
            "a.svg": svg(64, 48),
            "other.png": png(48, 64, hole=(0, 0, 8, 8)),
            "clear.png": png(64, 48, alpha=True),
            "empty.png": b"",
            "text.png": b"just words\n",
            "blank.txt": b" \n\n",
            "latin.txt": b"caf\xe9",
            "nul.txt": b"a\0b",
            "long.txt": b"x" * 32_001,
            "taken-2.png": b"taken",
        }
        for name, data in files.items():
            (self.work / name).write_bytes(data)
        (self.work / "folder").mkdir()
        (self.work / "nowhere.png").symlink_to("missing.png")

    def world(self) -> tuple[int, list[str]]:
        """Return what a refusal leaves as it is: the connections so far, the files and folders."""
        return self.api.connections, sorted(map(str, self.tmp.rglob("*")))

    def refused(self, code: int, *argv: Argument, **options: Any) -> Run:
        """Assert the exit code, one line on stderr, and that nothing was sent or created."""
        before = self.world()
        run = self.check(self.run_tool(*argv, **options), code)
        self.assertRegex(run.err, r"\A[^\n]+\n\Z", "not exactly one line")
        self.assertEqual(self.world(), before, "(connections, files)")
        return run

    def assert_refused(self, phrase: str, argv: Row, code: int = 2, **options: Any) -> Run:
        """Assert what a command line with --json gets: a line like `phrase`, and the document."""
        run = self.refused(code, argv[0], "--json", *argv[1:], **options)
        self.assertRegex(run.err, f"(?i){phrase}")
        self.assertEqual(run.out.count("\n"), 1, self.story(run))
        found = run.json
        self.assertEqual((found["schema"], found["ok"], found["images"]), (1, False, []))
        self.assertEqual(found["error"]["exit_code"], code)
        self.assertFalse(found["error"]["maybe_billed"])
        self.assertIn(found["error"]["message"], run.err)
        return run

    def assert_all_refused(self, table: dict[str, Sequence[Row]], **options: Any) -> None:
        """Assert that every command line of a table is refused with its phrase."""
        for phrase, rows in table.items():
            for argv in rows:
                with self.subTest(argv=argv):
                    self.assert_refused(phrase, argv, **options)


class BadUsage(RefusalCase):
    """Exit code 2, at every server."""

    def test_prompts(self) -> None:
        table: dict[str, Sequence[Row]] = {
            "no prompt": [("generate",), ("edit", "--quality", "low")],
            "prompt.*empty": [
                ("generate", ""),
                ("generate", " \n\t"),
                ("generate", "\u3000"),
                ("generate", "-"),
                ("generate", "--prompt="),
                ("generate", "--prompt-file", "blank.txt"),
                ("edit", "a.png", ""),
            ],
            "NUL": [("generate", "--prompt-file", "nul.txt")],
            "utf-8": [
                ("generate", "--prompt-file", "latin.txt"),
                ("generate", LATIN),
            ],
            "missing.txt": [("generate", "--prompt-file", "missing.txt")],
            "folder.*directory|folder": [("generate", "--prompt-file", "folder")],
            "one prompt|only one|prompt.*both": [
                ("generate", "two", "words"),
                ("generate", "a fox", "--prompt", "a cat"),
                ("generate", "a fox", "--prompt-file", "blank.txt"),
                ("generate", "--prompt", "a", "--prompt-file", "blank.txt"),
            ],
        }
        self.assert_all_refused(table)
        self.assert_refused("nul", ("generate", "-"), stdin="a\0fox")

    def test_sizes_name_the_rule_and_the_nearest_legal_size(self) -> None:
        rules = {
            "1920x1080": "16.*1920x1088",
            "512x512": "655,?360.*816x816",
            "3840x3840": "8,?294,?400.*2880x2880",
            "3856x2160": "3840.*3840x2160",
            "3072x1008": "3:1.*[0-9]+x[0-9]+",
        }
        for size, rule in rules.items():
            with self.subTest(size):
                self.assert_refused(f"{size}.*{rule}", ("generate", "a fox", "--size", size))
        for size in ("big", "1024", "16:0", "16:9@8K", "１024x1024", ""):
            with self.subTest(size):
                self.assert_refused("size", ("generate", "a fox", f"--size={size}"))
        self.assert_refused("storry.*story", ("edit", "a.png", "x", "-s", "storry"))

    def test_numbers(self) -> None:
        for number in ("0", "11", "-1", "1_0", "３", "+3", "1.0", ""):
            with self.subTest(number):
                run = self.assert_refused("-n", ("generate", "a fox", f"--n={number}"))
                self.assertIn(number, run.err)
                self.assertRegex(run.err, r"1\D+10")
        table: dict[str, Sequence[Row]] = {
            r"compression.*101": [("generate", "x", "-f", "jpg", "--compression", "101")],
            r"frame-count.*17": [("generate", "x", "-f", "gif", "--frame-count", "17")],
            r"partial-images.*4": [("generate", "x", "--partial-images", "4")],
            r"timeout.*0": [("generate", "x", "--timeout", "0")],
            r"retries.*-1": [("generate", "x", "--retries=-1")],
            r"-n.*(argument|value)": [("generate", "x", "-n")],
        }
        self.assert_all_refused(table)

    def test_words_that_are_not_in_the_list_name_the_nearest(self) -> None:
        table: dict[str, Sequence[Row]] = {
            "hgh.*high.*--param quality=hgh": [("generate", "x", "--quality", "hgh")],
            "LOW.*low": [("edit", "a.png", "x", "--quality", "LOW")],
            "pgn.*png.*--param": [("generate", "x", "-f", "pgn")],
            "transparant.*transparent": [("generate", "x", "--background", "transparant")],
            "none.*auto, low": [("generate", "x", "--moderation", "none")],
            "b64.*b64_json": [("generate", "x", "--response-format", "b64")],
            "mid.*medium": [("generate", "x", "--complexity", "mid")],
            "higher.*high": [("edit", "a.png", "x", "--input-fidelity", "higher")],
            "opnai.*(mean|near).*openai": [("generate", "x", "--provider", "opnai")],
            r"images.*image\[\]": [("edit", "a.png", "x", "--image-field", "images")],
            "genrate.*generate": [("genrate", "x")],
            "--qualty.*--quality": [("generate", "x", "--qualty", "low")],
            "--qual .*--quality": [("generate", "x", "--qual", "low")],
            "--siz .*--size": [("generate", "x", "--siz=auto")],
            "-ofox.png is not": [("generate", "x", "-ofox.png")],
            "-old man.*--": [("generate", "-old man")],
            "--mask ": [("generate", "x", "--mask", "clear.png")],
            "--quality": [("generate", "x", "--quality")],
        }
        self.assert_all_refused(table)

    def test_params(self) -> None:
        table: dict[str, Sequence[Row]] = {
            "KEY=VALUE": [
                ("generate", "x", "--param", "quality"),
                ("generate", "x", "--param", "=low"),
                ("generate", "x", "--param", "a..b=1"),
                ("generate", "x", "--param", "a b=1"),
            ],
            "a.b": [("generate", "x", "--param", "a=1", "--param", "a.b=2")],
        }
        self.assert_all_refused(table)

    def test_values_that_are_not_utf8(self) -> None:
        table: dict[str, Sequence[Row]] = {
            "utf-8|unicode": [
                ("generate", "x", "--user", LATIN),
                ("generate", "x", "--param", 'user="\\ud800"'),
                ("generate", "x", "--param", 'user={"\\ud800": 1}'),
                ("edit", "a.png", "x", "--param", f"user={LATIN}"),
                ("edit", "a.png", "x", "--param", 'a=["\\udcff"]'),
            ],
        }
        self.assert_all_refused(table)

    def test_what_does_not_go_together(self) -> None:
        table: dict[str, Sequence[Row]] = {
            "transparent.*png": [
                ("generate", "x", "--background", "transparent", "-f", "jpeg"),
                ("generate", "x", "--background", "transparent", "-o", "new.jpg"),
                ("edit", "a.png", "x", "--background", "transparent", "-f", "jpg"),
            ],
            "--mask.*--markup": [
                ("edit", "a.png", "x", "--mask", "clear.png", "--markup", "clear.png")
            ],
            "--mask.*--mask-box": [
                ("edit", "a.png", "x", "--mask", "clear.png", "--mask-box", "0,0,1,1")
            ],
            "-o -.*": [("generate", "x", "-o", "-", "-n", "2")],
            "-o -.*--json": [("generate", "x", "-o", "-")],
        }
        self.assert_all_refused(table)

    def test_input_pictures(self) -> None:
        table: dict[str, Sequence[Row]] = {
            r"missing\.png.*not exist": [
                ("edit", "missing.png", "x"),
                ("edit", "a.png", "x", "--image", "missing.png"),
                ("edit", "a.png", "x", "--mask", "missing.png"),
                ("edit", "a.png", "x", "--markup", "missing.png"),
            ],
            r"nowhere\.png.*not exist": [("edit", "nowhere.png", "x")],
            r"empty\.png.*empty": [
                ("edit", "a.png", "empty.png", "x"),
                ("edit", "a.png", "x", "--mask", "empty.png"),
            ],
            r"text\.png.*(not|no) .*(picture|image)": [("edit", "text.png", "x")],
            "folder.*folder": [
                ("edit", "folder", "x"),
                ("edit", "a.png", "x", "--mask", "folder"),
            ],
            "/dev/null.*regular": [("edit", "/dev/null", "x")],
            "(needs|no) an? image|no image": [("edit", "a.png"), ("edit", "--prompt", "x")],
        }
        self.assert_all_refused(table)

    def test_mask_boxes(self) -> None:
        table: dict[str, Sequence[Row]] = {
            "mask-box.*64x48": [
                ("edit", "a.png", "x", "--mask-box", "0,0,65,48"),
                ("edit", "a.png", "x", "--mask-box", "60,40,4,9"),
            ],
            "mask-box.*(X,Y|pixels)": [
                ("edit", "a.png", "x", "--mask-box", "1,2,3"),
                ("edit", "a.png", "x", "--mask-box", "0,0,0,5"),
                ("edit", "a.png", "x", "--mask-box=-1,0,5,5"),
                ("edit", "a.png", "x", "--mask-box", "0,0,５,5"),
            ],
        }
        self.assert_all_refused(table)

    def test_outputs(self) -> None:
        long = "x" * 300 + ".png"
        table: dict[str, Sequence[Row]] = {
            r"a\.png exists.*--force": [
                ("generate", "x", "-o", "a.png"),
                ("edit", "a.png", "x", "-o", "a.png"),
            ],
            r"taken-2\.png exists.*--force": [("generate", "x", "-n", "2", "-o", "taken.png")],
            r"nowhere\.png exists.*--force": [("generate", "x", "-o", "nowhere.png")],
            "/dev/null.*regular": [("generate", "x", "-o", "/dev/null", "--force")],
            r"a\.png.*not a directory": [
                ("generate", "x", "-o", "a.png/fox.png"),
                ("generate", "x", "-o", "a.png/"),
                ("generate", "x", "--output-dir", "a.png"),
            ],
            r"cannot write in .*nowhere\.png": [("generate", "x", "-o", "nowhere.png/fox.png")],
            "too long": [("generate", "x", "-o", long)],
            "empty": [("generate", "x", "-o", ""), ("generate", "x", "-o", " ")],
            "control": [
                ("generate", "x", "-o", "new\nline.png"),
                ("generate", "x", "-o", "bidi\u202etxt.png"),
                ("generate", "x", "--output-dir", "esc\x1b[31m"),
                ("edit", "new\nline.png", "x"),
                ("edit", "a.png", "x", "--mask", "bidi\u202etxt.png"),
            ],
        }
        self.assert_all_refused(table)

    @unittest.skipIf(sys.platform == "win32" or os.geteuid() == 0, "root may write anywhere")
    def test_an_output_in_a_read_only_folder(self) -> None:
        (self.work / "folder").chmod(0o500)
        self.assert_refused("folder.*permission", ("generate", "x", "-o", "folder/fox.png"))

    def test_base_urls(self) -> None:
        urls = {
            'https://example.com/"v1': "base",
            "https://example.com/{v1}": "base",
            "https://example.com/\x07v1": "base",
            "https://exämple.com/v1": "base",
            "https://user:secret-word@example.com/v1": "user:password",
            "ftp://example.com/v1": "base",
            "https://": "base",
            "https://example.com:99999/v1": "99999",
            "": "base|empty",
            "http://example.com/v1": "http://example.com/v1.*--allow-http",
        }
        for url, phrase in urls.items():
            with self.subTest(url):
                run = self.assert_refused(phrase, ("generate", "x", f"--base-url={url}"))
                self.assertNotIn("secret-word", run.err + run.out)
        env = {"GPT_IMAGE2_BASE_URL": "https://exa{mple}.com"}
        self.assert_refused("GPT_IMAGE2_BASE_URL", ("generate", "x"), env=env)

    def test_without_json_stdout_is_empty(self) -> None:
        for argv in (
            ["generate", ""],
            ["generate", "x", "--bogus"],
            ["edit", "missing.png", "x"],
        ):
            with self.subTest(argv):
                self.assertEqual(self.refused(2, *argv).out, "")

    def test_json_counts_before_two_dashes_only(self) -> None:
        self.assertEqual(self.refused(2, "generate", "-n", "0", "--", "--json").out, "")


class BadSettings(RefusalCase):
    """Exit code 3: the config, the key, curl."""

    def config_file(self, text: bytes) -> str:
        """Write a file for --config, and return its path."""
        path = self.work / "config.json"
        path.write_bytes(text)
        path.chmod(0o600)
        return str(path)

    def test_broken_configs(self) -> None:
        for text in (b"{", b"", b"[]", b"null", b'{"a": "caf\xe9"}', b"[" * 100_000):
            with self.subTest(text[:20]):
                argv = ("generate", "x", "--config", self.config_file(text))
                self.assert_refused(r"config\.json", argv, code=3)

    def test_config_values_of_the_wrong_kind(self) -> None:
        for text in (
            b'{"timeout": "soon"}',
            b'{"retries": -1}',
            b'{"headers": []}',
            b'{"provider": "opnai"}',
            b'{"quality": "hgh"}',
            b'{"model": 5}',
            b'{"profiles": []}',
        ):
            with self.subTest(text):
                argv = ("generate", "x", "--config", self.config_file(text))
                name = text.split(b'"')[1].decode()
                self.assert_refused(name, argv, code=3)

    def test_configs_that_cannot_be_read(self) -> None:
        for name in ("missing.json", "folder"):
            with self.subTest(name):
                self.assert_refused(name, ("generate", "x", "--config", name), code=3)
                self.assert_refused(
                    name, ("generate", "x"), code=3, env={"GPT_IMAGE2_CONFIG": name}
                )

    @unittest.skipIf(sys.platform == "win32" or os.geteuid() == 0, "root may read anything")
    def test_a_config_without_the_right_to_read_it(self) -> None:
        path = self.config_file(b"{}")
        os.chmod(path, 0)
        self.assert_refused("permission", ("generate", "x", "--config", path), code=3)

    def test_no_key(self) -> None:
        env: dict[str, str | None] = {"GPT_IMAGE2_API_KEY": None, "GPT_IMAGE2_BASE_URL": None}
        self.assert_refused("OPENAI_API_KEY", ("generate", "x"), code=3, env=env)
        argv = ("generate", "x", "--base-url", "https://relay.invalid/v1")
        env = {"GPT_IMAGE2_API_KEY": None, "OPENAI_API_KEY": KEY}  # OpenAI's is not the relay's
        self.assert_refused("key", argv, code=3, env=env)

    def test_unusable_keys_are_refused_without_an_echo(self) -> None:
        for key in ("sk-secret word", "sk-secret\nword", "sk-sécret-word", "sk-secret\x07word"):
            with self.subTest(key):
                env = {"GPT_IMAGE2_API_KEY": key}
                run = self.assert_refused("key", ("generate", "x"), code=3, env=env)
                self.assertNotRegex(run.err + run.out, "cret")
        for key in ("sk-...", "your-api-key", "<key>"):
            with self.subTest(key):
                env = {"GPT_IMAGE2_API_KEY": key}
                self.assert_refused("key.*placeholder", ("generate", "x"), code=3, env=env)

    def test_a_key_command_that_fails(self) -> None:
        for command in ('["false"]', '["true"]', '["no-such-program-here"]', '"  "'):
            with self.subTest(command):
                text = f'{{"base_url": "{self.api.base_url}", "api_key_command": {command}}}'
                argv = ("generate", "x", "--config", self.config_file(text.encode()))
                env = {"GPT_IMAGE2_API_KEY": None, "GPT_IMAGE2_BASE_URL": None}
                self.assert_refused("api_key_command", argv, code=3, env=env)

    def test_no_curl(self) -> None:
        folder = str(self.work / "folder")
        for path in (folder, ""):
            argv = ("edit", "a.png", "x", "-o", "new/fox.png")
            self.assert_refused("curl", argv, code=3, env={"PATH": path})


class OnlyCertainAtOpenai(RefusalCase):
    """What OpenAI is known to refuse is refused there, and a warning anywhere else."""

    rows: dict[str, Row] = {
        "32,?001.*32,?000": ("generate", "--prompt-file", "long.txt"),
        "compression.*png": ("generate", "x", "--compression", "50", "-f", "png"),
        "compression": ("generate", "x", "--compression", "50"),
        "2048x2048.*1536x1024": ("generate", "x", "-m", "gpt-image-1", "-s", "2048x2048"),
        "17.*16": ("edit", *["a.png"] * 17, "x"),
        r"a\.png.*alpha": ("edit", "a.png", "x", "--mask", "a.png"),
        r"a\.jpg.*alpha": ("edit", "a.png", "x", "--mask", "a.jpg"),
        r"other\.png.*48x64.*64x48": ("edit", "a.png", "x", "--mask", "other.png"),
        r"a\.gif.*gif": ("edit", "a.gif", "x"),
        r"a\.svg.*svg": ("edit", "a.png", "a.svg", "x"),
        "input.fidelity": ("edit", "a.png", "x", "--input-fidelity", "high"),
        "frame-count.*gif": ("generate", "x", "--frame-count", "3"),
        "svg.*(one|1)": ("generate", "x", "-f", "svg", "-n", "2"),
        "gif.*mask": ("edit", "a.png", "x", "-f", "gif", "--mask", "clear.png"),
        "response_format": ("generate", "x", "--response-format", "b64_json"),
    }

    def test_refused_at_openai(self) -> None:
        for phrase, argv in self.rows.items():
            with self.subTest(argv=argv[-4:]):
                self.assert_refused(phrase, (*argv, "--quiet", "--provider", "openai"))

    def test_a_warning_elsewhere(self) -> None:
        for phrase, argv in self.rows.items():
            with self.subTest(argv=argv[-4:]):
                sent = len(self.api.posts)
                run = self.check(self.run_tool(*argv, "--json"), 0)
                self.assertRegex("\n".join(run.json["warnings"]), f"(?i){phrase}")
                self.assertRegex(run.err, f"(?i)warning: .*{phrase}")
                self.assertEqual(len(self.api.posts), sent + 1)
