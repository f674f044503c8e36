"""The documents and --help tell the truth: their examples run, their tables match.

Every call of the tool in a shell block is read by a real shell, as it stands, and then made, with
--sandbox put in. The help texts in the documents are made by:

    python3 -m tests.test_documents
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any, Callable, Iterator

import gpt_image2
from tests.case import ROOT, SCRIPT, Case, Run
from tests.pictures import png
from tests.server import answer

README, SKILL, CHANGELOG = (ROOT / name for name in ("README.md", "SKILL.md", "CHANGELOG.md"))
DOCUMENTS = [README, SKILL, CHANGELOG, *sorted(ROOT.glob("docs/*.md"))]

# Lines that may stand beside calls of the tool; everything else needs a block of its own.
HARMLESS = re.compile(r"export [A-Z_]+=\S+|# .*|")
CALL = re.compile(
    r"(?:^|\| ?|\$\()(?:[A-Z_0-9]+=\S+ )*(?:python3 \S*gpt_image2\.py|gpt-image2)(?= |$)"
)
LOCAL_SERVER = "127.0.0.1:8080"
SERVES_FOR_EVER = ["sandbox", "--port"]

# What the shell finds as python3 and gpt-image2: it notes its arguments, variables and input.
NOTING_STUB = """#!/bin/sh
case $0 in *python3) shift;; esac
call="$CALLS/$(ls "$CALLS" | wc -l | tr -d ' ')"
mkdir "$call"
printf '%s\\0' "$@" >"$call/argv"
env | grep ^GPT_IMAGE2_ >"$call/env"
cat >"$call/stdin"
"""


def blocks(language: str) -> dict[str, str]:
    """Return the fenced code blocks of a language by their place."""
    found = {}
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found[f"{path.name}:{line}"] = match[1].replace("{baseDir}", ".")
    return found


def prose(path: Path) -> str:
    """Return a document without its fenced code blocks."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def tables(first: str) -> list[tuple[Path, list[list[str]]]]:
    """Return the tables whose heading begins with a word, as document and rows with heading."""
    found = []
    for path in DOCUMENTS:
        for table in re.findall(r"(?:^\|.*\|\n)+", prose(path), re.MULTILINE):
            cells = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
            if cells[0][0].strip("`") == first:
                found.append((path, [cells[0], *cells[2:]]))
    assert found, f"no table whose heading begins with {first}"
    return found


def one_line(text: str) -> str:
    """Return text with its white space folded, as Markdown reads it."""
    return " ".join(text.split())


OPTIONS_BLOCK = re.compile(r"(<!-- options:(\w+) -->\n)(.*?)(<!-- /options:\2 -->)", re.DOTALL)


def with_help_texts(text: str, help_text: Callable[[str], str]) -> str:
    """Return a document with the present help texts between its markers."""
    return OPTIONS_BLOCK.sub(
        lambda match: f"{match[1]}\n```text\n{help_text(match[2])}```\n\n{match[4]}", text
    )


class DocumentCase(Case):
    """A case that knows the help texts."""

    def help_text(self, *command: str) -> str:
        """Return what `COMMAND --help` prints."""
        run = self.check(self.run_tool(*command, "--help"), 0)
        self.assertEqual(run.err, "")
        return run.out

    def commands(self) -> list[str]:
        """Return the names of all commands, as the overview lists them."""
        listed = self.help_text().partition("\ncommands:\n")[2].partition("\n\n")[0]
        return re.findall(r"^  (\w+) +\S.*$", listed, re.MULTILINE)


class TestExamples(DocumentCase):
    """Each shell block is a script, run in a folder that holds the pictures it speaks of."""

    def new_world(self) -> None:
        """Make the work folder anew, with input files, and a home without settings or jobs."""
        for folder in (self.work, self.home, self.state, self.config):
            shutil.rmtree(folder)
            folder.mkdir()
        (self.home / ".config/fish/completions").mkdir(parents=True)
        (self.work / "fruit").mkdir()
        (self.work / "gpt_image2.py").symlink_to(SCRIPT)
        (self.work / "prompt.txt").write_text("a harbour at dawn\n")
        (self.work / "prompts.txt").write_text("a harbour at dawn\na harbour at night\n")
        (self.work / "jobs.jsonl").write_text(next(iter(blocks("jsonl").values())))
        for picture in ("room.png", "input.png", "fruit/apple.png", "fruit/pear.png"):
            (self.work / picture).write_bytes(png(1024, 768))
        (self.work / "mask.png").write_bytes(png(1024, 768, hole=(10, 10, 200, 200)))

    def calls(self, script: str) -> Iterator[tuple[list[str], dict[str, str], bytes]]:
        """Let the shell run a script, and yield the tool's arguments, variables and input."""
        folder = self.tmp / "calls"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        env = {**self.env, "CALLS": str(folder), "PATH": f"{self.stubs}:{self.env['PATH']}"}
        env.update(SLURM_ARRAY_TASK_ID="2", JOB_COMPLETION_INDEX="2")
        nothing = subprocess.DEVNULL
        said = subprocess.check_output(["sh", "-c", script], cwd=self.work, env=env, stdin=nothing)
        self.assertEqual(said, b"")
        for call in sorted(folder.iterdir(), key=lambda path: int(path.name)):
            words = (call / "argv").read_text().split("\0")[:-1]
            lines = (call / "env").read_text().splitlines()
            yield words, dict(line.split("=", 1) for line in lines), (call / "stdin").read_bytes()

    def leave_a_job(self) -> None:
        """Leave an answer that is cut after its only picture."""
        reply = answer(png(8, 8))
        api = self.serve(reply._replace(cut=len(reply.body) - 2))
        self.check(self.run_tool("generate", "a fox", "--base-url", api.base_url), 8)

    def call(self, words: list[str], env: dict[str, str], stdin: bytes) -> Run:
        """Make one call, where it can neither cost anything nor leave this machine."""
        if words[:2] == ["recover", "--last"]:
            self.leave_a_job()
        if any(LOCAL_SERVER in word for word in words):
            here = self.serve(answer(png(512, 512))).origin.partition("//")[2]
            words = [word.replace(LOCAL_SERVER, here) for word in words]
        elif "--deferred" in words:
            words = [*words, "--dry-run"]
        elif words[0] in ("generate", "edit", "batch") or "--check" in words:
            words = [words[0], "--sandbox", *words[1:]]
        return self.run_tool(*words, env=env, stdin=stdin)

    def check_block(self, text: str) -> int:
        """Run one shell block; return how many calls of the tool it holds."""
        lines = text.replace("\\\n", " ").splitlines()
        calls = [line for line in lines if CALL.search(line)]
        odd = [line for line in lines if line not in calls and not HARMLESS.fullmatch(line)]
        self.assertFalse(odd and calls, f"put into a block of its own: {odd}")
        if calls:
            self.new_world()
            made = list(self.calls("\n".join(lines)))
            self.assertEqual(len(made), len(calls))
            for words, env, stdin in made:
                if words[:2] == SERVES_FOR_EVER:
                    gpt_image2.parse_arguments(words)
                else:
                    self.check(self.call(words, env, stdin), 0)
        return len(calls)

    def setUp(self) -> None:
        super().setUp()
        self.stubs = self.new_folder("stubs")
        for program in ("python3", "gpt-image2"):
            (self.stubs / program).write_text(NOTING_STUB)
            (self.stubs / program).chmod(0o700)

    @unittest.skipUnless(shutil.which("sh"), "there is no sh here")
    def test_every_call_in_the_documents_works_as_it_stands(self) -> None:
        made = 0
        for place, text in blocks("sh").items():
            with self.subTest(f"{place}\n{text}"):
                made += self.check_block(text)
        self.assertGreater(made, 50)

    @unittest.skipUnless(shutil.which("sh"), "there is no sh here")
    def test_every_example_in_the_help_texts_works(self) -> None:
        for command in ("", *self.commands()):
            text = self.help_text(*command.split())
            shown = re.findall(r"^  (\S*.*gpt-image2 .*)$", text, re.MULTILINE)
            self.assertTrue(shown, command)
            for line in shown:
                with self.subTest(line):
                    self.assertEqual(self.check_block(line), 1)

    def test_programs_in_other_languages(self) -> None:
        (self.stubs / "python3").unlink()
        (self.stubs / "python3").symlink_to(sys.executable)
        self.env["PATH"] = f"{self.stubs}:{self.env['PATH']}"
        (self.work / "gpt_image2.py").symlink_to(SCRIPT)
        nothing = subprocess.DEVNULL
        for language, program in (("python", sys.executable), ("js", shutil.which("node"))):
            for place, text in blocks(language).items():
                with self.subTest(place):
                    if not program:
                        self.skipTest(f"there is nothing here that runs {language}")
                    api = self.serve(answer(png(640, 480)))
                    env = {**self.env, "GPT_IMAGE2_BASE_URL": api.base_url}
                    example = self.work / f"example.{language}"
                    example.write_text(text)
                    said = subprocess.check_output(
                        [program, example], cwd=self.work, env=env, stderr=nothing
                    )
                    path, *size = said.decode().rsplit(maxsplit=2)
                    self.assertEqual(size, ["640", "480"])
                    self.assertEqual(Path(path).read_bytes(), png(640, 480))

    def test_the_templates(self) -> None:
        (_, rows), *_ = tables("you use")
        self.assertEqual(len(rows), 6)
        for user, command, then in rows[1:]:
            with self.subTest(user):
                path = self.tmp / f"{user}.json"
                words = shlex.split(command.strip("`"))[1:]
                self.check(self.run_tool(*words, "--config", path), 0)
                written = json.loads(path.read_text())
                settings = written.get("profiles", {}).get(written.get("profile"), written)
                self.assertIn(f"export {settings['api_key_env']}=", then)

    def test_the_config_file_is_what_is_shown(self) -> None:
        for words in ([], ["--profile", "openai-hk"]):
            self.check(self.run_tool("config", "--init", *words), 0)
        written = json.loads((self.config / "gpt-image-2" / "config.json").read_text())
        self.assertIn(written, [json.loads(text) for text in blocks("json").values()])

    def test_a_picture_of_a_run_is_on_the_first_screen(self) -> None:
        first_screen = "".join(README.read_text(encoding="utf-8").splitlines()[:25])
        self.assertRegex(first_screen, r" generate .* --sandbox.*docs/terminal\.png")


class TestJson(DocumentCase):
    """The documents of --json, as they are shown."""

    def example(self, key: str) -> dict[str, Any]:
        """Return the JSON example that has a certain key."""
        examples: list[dict[str, Any]] = [json.loads(text) for text in blocks("json").values()]
        return next(example for example in examples if key in example)

    def test_it_has_the_fields_of_a_real_one(self) -> None:
        good = self.check(self.run_tool("generate", "a fox", "--sandbox", "--json"), 0).json
        bad = self.check(self.run_tool("generate", "a fox", "-s", "9x9", "--json"), 2).json
        example = self.example("schema")
        self.assertEqual((list(good), list(bad)), (list(example), list(example)))
        for _, rows in tables("field"):
            self.assertLessEqual({row[0].strip("`") for row in rows[1:]}, set(example))
        self.assertEqual(list(example["images"][0]), list(good["images"][0]))
        self.assertEqual(list(self.example("maybe_billed")), list(bad["error"]))
        self.serve_base(answer(png(8, 8)))
        paid = self.check(self.run_tool("generate", "a", "--json", "--provider", "openai"), 0).json
        self.assertEqual(list(example["cost"]), list(paid["cost"]))

    def test_the_dry_run_has_the_fields_that_are_listed(self) -> None:
        plan = self.check(self.run_tool("generate", "a fox", "--dry-run", "--json"), 0).json
        text = " ".join(one_line(prose(path)) for path in DOCUMENTS)
        sentence = re.search(r"the object `dry_run` with (.*?) instead", text)
        assert sentence
        self.assertEqual(set(re.findall("`(.+?)`", sentence[1])), set(plan["dry_run"]))


class TestTables(DocumentCase):
    """Each table, wherever it stands, says what the tool does."""

    def test_help_texts(self) -> None:
        shown = []
        for path in DOCUMENTS:
            for block in OPTIONS_BLOCK.finditer(path.read_text(encoding="utf-8")):
                shown.append(block[2])
                renewed = with_help_texts(block[0], self.help_text)
                self.assertEqual(block[0], renewed, "run: python3 -m tests.test_documents")
        self.assertLessEqual({"generate", "edit", "batch"}, set(shown))

    def test_exit_codes(self) -> None:
        found = tables("exit")
        self.assertLessEqual({README, SKILL}, {path for path, _ in found})
        for path, rows in found:
            with self.subTest(path.name):
                told = [int(word) for row in rows[1:] for word in row[0].split()]
                self.assertEqual(told, [*range(11), 129, 130, 143])

    def test_error_codes(self) -> None:
        real = {code: exit_ for exit_, row in gpt_image2.OUR_CODES.items() for code in row}
        real["interrupted"] = 129  # the first of 129, 130, 143
        for _, rows in tables("error.code"):
            told = {row[0].strip("`"): int(row[1].split(",")[0]) for row in rows[1:]}
            self.assertEqual(told, real)

    def test_sizes(self) -> None:
        real = self.check(self.run_tool("sizes", "--json"), 0).json["sizes"]
        for _, rows in tables("ratio"):
            self.assertEqual([dict(zip(rows[0], row)) for row in rows[1:]], real)
        for row in real:
            self.assertRegex(one_line(prose(SKILL)), rf"\b{row['name']}\b")

    def test_settings(self) -> None:
        shown = self.check(self.run_tool("config", "--show", "--json"), 0).json["settings"]
        for _, rows in tables("setting"):
            told = {row[0].strip("`"): row[1].strip("`") for row in rows[1:]}
            self.assertEqual(set(told) | {"api_key_env", "api_key_command"}, set(told))
            self.assertLessEqual(set(shown), set(told))
            for name, row in shown.items():
                if isinstance(row["value"], (int, bool)):
                    self.assertEqual(told[name], json.dumps(row["value"]), name)

    def test_estimates(self) -> None:
        for path, rows in tables("quality"):
            sizes = [re.search(r"\d+x\d+", title) for title in rows[0]]
            for row in rows[1:]:
                for size, cell in zip(sizes, row):
                    if size:
                        argv = ["a cat on a windowsill", "-s", size[0], "--quality", row[0]]
                        run = self.check(self.run_tool("generate", *argv, "--dry-run"), 0)
                        exact = re.findall(r"^estimate: about \$(\S+)$", run.out, re.MULTILINE)
                        digits = len(cell.partition(".")[2])
                        with self.subTest(f"{path.name}: {size[0]} {row[0]}"):
                            self.assertEqual([cell], [f"${float(e):.{digits}f}" for e in exact])

    def test_options_in_the_text_exist(self) -> None:
        option = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
        known = {"--version", "--help"}
        for command in self.commands():
            known |= set(option.findall(self.help_text(command)))
        for path in DOCUMENTS:
            quoted = " ".join(re.findall("`[^`]+`", prose(path)))
            with self.subTest(path.name):
                self.assertLessEqual(set(option.findall(quoted)), known)

    def test_links_lead_somewhere(self) -> None:
        for path in DOCUMENTS:
            targets = re.findall(r'(?:\]\(|(?:src|href)=")([^)"\s]+)', prose(path))
            for target in (target for target in targets if "://" not in target):
                with self.subTest(f"{path.name}: {target}"):
                    name, _, anchor = target.partition("#")
                    page = path.parent / name if name else path
                    self.assertTrue(page.exists())
                    if anchor:
                        titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
                        slugs = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
                        self.assertIn(anchor, [slug.replace(" ", "-") for slug in slugs])


class TestHelp(DocumentCase):
    """--help is the manual: whole, on stdout, as wide as a terminal, and true."""

    def rows(self, command: str) -> Iterator[tuple[str, str]]:
        """Yield each option in a help text: its names and syntax, and what is said of it."""
        for block in self.help_text(command).partition("\nexamples:\n")[0].split("\n\n"):
            if re.match(r"[a-z]+:\n  -", block):
                for entry in re.split(r"^  (?=-)", block, flags=re.MULTILINE)[1:]:
                    left, _, right = re.sub(r"\s*\n {3,}", "  ", entry.strip()).partition("  ")
                    yield left, right.strip()

    def test_all_ways_to_ask(self) -> None:
        overview = self.help_text()
        for words in (["-h"], ["help"]):
            self.assertEqual(self.check(self.run_tool(*words), 0).out, overview)
        self.assertEqual(self.check(self.run_tool(), 2).out, overview)
        narrow = {"COLUMNS": "40", "LINES": "5", "FORCE_COLOR": "1", "LC_ALL": "C"}
        for words in (["generate", "-h"], ["generate", "x", "-h", "--no"]):
            run = self.check(self.run_tool(*words, env=narrow), 0)
            self.assertEqual((run.out, run.err), (self.help_text("generate"), ""))

    def test_form(self) -> None:
        self.assertEqual(len(self.commands()), 9)
        for command in self.commands():
            with self.subTest(command):
                text = self.help_text(command)
                self.assertRegex(text, rf"\Ausage: gpt-image2 {command}\b")
                self.assertEqual(re.findall(r"(?m)^.{81,}$|^.*[ \t]$", text), [])
                rows = list(self.rows(command))
                names = re.findall(r"(?<!\S)--?[a-z][\w-]*", " ".join(left for left, _ in rows))
                self.assertEqual(sorted(set(names)), sorted(names))
                self.assertEqual([left for left, right in rows if len(right) < 4], [])

    def test_ranges_and_defaults_are_the_real_ones(self) -> None:
        shown = self.check(self.run_tool("config", "--show", "--json"), 0).json["settings"]
        seen = []
        for command in self.commands():
            for left, right in self.rows(command):
                name = re.findall(r"--[a-z-]+", left)[-1]
                row = shown.get(name[2:].replace("-", "_"))
                default = re.search(r"\bdefault (\d[^ )]*|gpt-\S+)", right)
                syntax = re.search(r" (\d+)\.\.(\d+)$", left)
                with self.subTest(f"{command} {name}"):
                    if default and row:
                        seen.append(name)
                        self.assertEqual(default[1], str(row["value"]))
                    if syntax:
                        seen.append(name)
                        low, high = int(syntax[1]), int(syntax[2])
                        for value in (low, high):
                            gpt_image2.parse_arguments([command, f"{name}={value}"])
                        for value in (low - 1, high + 1):
                            with self.assertRaises(gpt_image2.Failure):
                                gpt_image2.parse_arguments([command, f"{name}={value}"])
        wanted = {"--timeout", "--connect-timeout", "--retries", "--model", "--n", "--concurrency"}
        self.assertLessEqual(wanted, set(seen))


class TestSkill(unittest.TestCase):
    """The Agent Skills format, as far as a test without its validator can see; the changelog."""

    def test_front_matter(self) -> None:
        text = SKILL.read_text(encoding="utf-8")
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        assert match
        values = dict(re.findall(r"^(\w+):(?: *>-)?(.*(?:\n  .*)*)", match[1], re.MULTILINE))
        keys = ["name", "description", "license", "compatibility", "metadata"]
        self.assertEqual(list(values), keys)
        self.assertEqual(values["name"].strip(), "gpt-image-2")
        self.assertTrue(0 < len(one_line(values["description"])) <= 1024)
        self.assertTrue(0 < len(one_line(values["compatibility"])) <= 500)
        self.assertNotRegex(match[1], r"[{}\[\]\t]")  # block style only
        self.assertRegex(values["metadata"], r"requires:\n +bins:\n +- python3\n +- curl\n")
        self.assertRegex(values["metadata"], r"(?m)^    primaryEnv: GPT_IMAGE2_API_KEY$")
        self.assertNotRegex(values["metadata"], r"(?m)^ +env:")  # would hide it where it is unset

    def test_every_call_names_the_script_by_its_folder(self) -> None:
        found = re.findall(r"\S*gpt_image2\.py", SKILL.read_text(encoding="utf-8"))
        self.assertGreater(len(found), 10)
        self.assertEqual([name for name in found if "{baseDir}/gpt_image2.py" not in name], [])

    def test_the_newest_entry_of_the_changelog_is_this_version(self) -> None:
        titles = re.findall(r"^## (\S+)", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)
        released = [title for title in titles if title != "Unreleased"]
        self.assertEqual(released[0], gpt_image2.__version__)


def help_text(command: str) -> str:
    """Return what `COMMAND --help` prints, when this module runs as a program."""
    return subprocess.check_output([sys.executable, SCRIPT, command, "--help"], text=True)


if __name__ == "__main__":
    for document in DOCUMENTS:
        renewed = with_help_texts(document.read_text(encoding="utf-8"), help_text)
        document.write_text(renewed, encoding="utf-8")
