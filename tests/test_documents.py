"""The documents and --help tell the truth: their examples run, their tables match.

Every call of the tool in a shell block is read by a real shell, as it stands, and then made, with
--sandbox put in. The help texts in the documents are made by:

    python3 -m tests.test_documents
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any, Callable, Iterator
from unittest import mock

import gpt_image2
from tests.case import ROOT, SCRIPT, Case, Run
from tests.images import png
from tests.server import answer

README, SKILL, CHANGELOG = (ROOT / name for name in ("README.md", "SKILL.md", "CHANGELOG.md"))
DOCUMENTS = [README, SKILL, CHANGELOG, *sorted(ROOT.glob("docs/*.md"))]

# Lines that may stand beside calls of the tool; everything else needs a block of its own.
HARMLESS = re.compile(r"export [A-Z_]+=\S+|# .*|")
CALL = re.compile(
    r"(?:^|\| ?|\$\()(?:[A-Z_0-9]+=\S+ )*(?:python3 \S*gpt_image2\.py|gpt-image2)(?= |$)"
)
LOCAL_SERVER = "127.0.0.1:8080"
ROOM, MASK = png(1024, 768), png(1024, 768, hole=(10, 10, 200, 200))

# What the shell finds as python3 and gpt-image2: it notes its arguments, variables and input.
NOTING_STUB = """#!/bin/sh
case $0 in *python3) shift;; esac
call="$CALLS/$(ls "$CALLS" | wc -l | tr -d ' ')"
mkdir "$call"
printf '%s\\0' "$@" >"$call/argv"
env | grep ^GPT_IMAGE2_ >"$call/env"
cat >"$call/stdin"
"""


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(language: str) -> dict[str, str]:
    """Return the fenced code blocks of a language by their place."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = {}
    for path in DOCUMENTS:
        for number, text in enumerate(fence.findall(text_of(path)), 1):
            found[f"{language} {number} in {path.name}"] = text.replace("{baseDir}", ".")
    return found


def prose(path: Path) -> str:
    """Return a document without its fenced code blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL)


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


OPTIONS_BLOCK = re.compile(r"(<!-- options:(\w+) -->\n)(.*?)(<!-- /options:\2 -->)", re.DOTALL)


def with_help_texts(text: str, help_text: Callable[[str], str]) -> str:
    """Return a document with the present help texts between its markers."""
    return OPTIONS_BLOCK.sub(
        lambda match: f"{match[1]}\n```text\n{help_text(match[2])}```\n\n{match[4]}", text
    )


class DocumentCase(Case):
    """A case that knows the help texts."""

    def run_json(self, *argv: str, code: int = 0) -> Any:
        return self.check(self.run_tool(*argv, "--json"), code).json

    def help_text(self, *command: str) -> str:
        """Return what `COMMAND --help` prints."""
        run = self.check(self.run_tool(*command, "--help"), 0)
        self.assertEqual(run.err, "")
        return run.out

    def commands(self) -> list[str]:
        """Return the names of all commands, as the overview lists them."""
        listed = self.help_text().partition("\ncommands:\n")[2].partition("\n\n")[0]
        return re.findall(r"^  (\w+) +\S.*$", listed, re.MULTILINE)


@unittest.skipUnless(shutil.which("sh"), "there is no sh here")
class TestExamples(DocumentCase):
    """Each shell block is a script, run in a folder that holds the images it speaks of."""

    def setUp(self) -> None:
        super().setUp()
        self.stubs = self.new_folder("stubs")
        for program in ("python3", "gpt-image2"):
            (self.stubs / program).write_text(NOTING_STUB)
            (self.stubs / program).chmod(0o700)
        self.ran: list[Any] = []

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
        for image in ("room.png", "input.png", "fruit/apple.png", "fruit/pear.png"):
            (self.work / image).write_bytes(ROOM)
        (self.work / "mask.png").write_bytes(MASK)

    def calls(self, script: str) -> Iterator[tuple[list[str], dict[str, str], bytes]]:
        """Let the shell run a script, and yield the tool's arguments, variables and input."""
        folder = self.tmp / "calls"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        env = {**self.env, "CALLS": str(folder), "PATH": f"{self.stubs}:{self.env['PATH']}"}
        env.update(SLURM_ARRAY_TASK_ID="2", JOB_COMPLETION_INDEX="2")
        place: Any = {"cwd": self.work, "env": env, "stdin": subprocess.DEVNULL}
        self.assertEqual(subprocess.check_output(["sh", "-c", script], **place), b"")
        for call in sorted(folder.iterdir(), key=lambda path: int(path.name)):
            words = (call / "argv").read_text().split("\0")[:-1]
            lines = (call / "env").read_text().splitlines()
            yield words, dict(line.split("=", 1) for line in lines), (call / "stdin").read_bytes()

    def call(self, words: list[str], env: dict[str, str], stdin: bytes) -> Run:
        """Make one call, where it can neither cost anything nor leave this machine."""
        if words[:2] == ["recover", "--last"]:
            reply = answer(png(8, 8))  # cut after its only image: that leaves a job
            api = self.serve(reply._replace(cut=len(reply.body) - 2))
            self.check(self.run_tool("generate", "a fox", "--base-url", api.base_url), 8)
        if any(LOCAL_SERVER in word for word in words):
            here = self.serve(answer(png(512, 512))).origin.partition("//")[2]
            words = [word.replace(LOCAL_SERVER, here) for word in words]
        elif "--deferred" in words:
            words = [*words, "--dry-run"]
        elif words[0] in ("generate", "edit", "batch") or "--check" in words:
            words = [words[0], "--sandbox", *words[1:]]
        return self.run_tool(*words, env=env, stdin=stdin)

    def check_block(self, text: str) -> int:
        """Run one shell block, unless its calls have been made; return how many calls it holds."""
        lines = text.replace("\\\n", " ").splitlines()
        calls = [line for line in lines if CALL.search(line)]
        odd = [line for line in lines if line not in calls and not HARMLESS.fullmatch(line)]
        self.assertFalse(odd and calls, f"put into a block of its own: {odd}")
        if calls:
            self.new_world()
            made = list(self.calls("\n".join(lines)))
            self.assertEqual(len(made), len(calls))
            new = any(call not in self.ran for call in made)
            for words, env, stdin in made * new:
                self.ran.append((words, env, stdin))
                if words[:2] == ["sandbox", "--port"]:  # it serves for ever
                    gpt_image2.parse_arguments(words)
                else:
                    self.check(self.call(words, env, stdin), 0)
        return len(calls)

    def test_every_call_in_the_documents_and_the_help_texts_works_as_it_stands(self) -> None:
        scripts = blocks("sh")
        for command in ("", *self.commands()):
            text = self.help_text(*command.split())
            examples = re.findall(r"^  (\S*.*gpt-image2 .*)$", text, re.MULTILINE)
            self.assertTrue(examples, command)
            scripts.update((f"help {command}: {line}", line) for line in examples)
        paint = functools.lru_cache(maxsize=None)(gpt_image2.paint_placeholder)

        def paint_once(width: int, height: int, *_: Any) -> bytes:
            return paint(width, height, "any prompt")

        made = 0
        for place, text in scripts.items():
            painting = mock.patch("gpt_image2.paint_placeholder", paint_once)
            with self.subTest(f"{place}\n{text}"), painting:
                calls = self.check_block(text)
                self.assertTrue(calls or not place.startswith("help"))
                made += calls
        self.assertGreater(made, 70)

    def test_programs_in_other_languages(self) -> None:
        (self.work / "gpt_image2.py").symlink_to(SCRIPT)
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env['PATH']}"
        for language, program in (("python", sys.executable), ("js", shutil.which("node"))):
            for place, text in blocks(language).items():
                with self.subTest(place):
                    if not program:
                        self.skipTest(f"there is nothing here that runs {language}")
                    self.serve_base(answer(png(640, 480)))
                    example = self.work / f"example.{language}"
                    example.write_text(text)
                    options: Any = {"cwd": self.work, "env": self.env, "stderr": subprocess.DEVNULL}
                    said = subprocess.check_output([program, example], **options)
                    path, *size = said.decode().rsplit(maxsplit=2)
                    self.assertEqual(size, ["640", "480"])
                    self.assertEqual(Path(path).read_bytes(), png(640, 480))


class TestTables(DocumentCase):
    """Each table and each JSON document, wherever it stands, says what the tool does."""

    def test_the_templates(self) -> None:
        (_, rows), *_ = tables("you use")
        self.assertEqual(len(rows), 6)
        for user, command, then in rows[1:]:
            words = shlex.split(command.strip("`"))[1:]
            run = self.check(self.run_tool(*words, "--config", self.tmp / f"{user}.json"), 0)
            [export] = re.findall(r"export \w+=", run.err)
            self.assertIn(export, then)

    def test_the_json_examples(self) -> None:
        examples: list[dict[str, Any]] = [json.loads(text) for text in blocks("json").values()]
        config = self.config / "gpt-image-2" / "config.json"
        for words in ([], ["--profile", "openai-hk"]):
            self.check(self.run_tool("config", "--init", *words), 0)
        self.assertIn(json.loads(text_of(config)), examples)
        config.unlink()
        example = next(example for example in examples if "schema" in example)
        error = next(example for example in examples if "maybe_billed" in example)
        good = self.run_json("generate", "a fox", "--sandbox", "-s", "portrait")
        bad = self.run_json("generate", "a fox", "-s", "9x9", code=2)
        self.assertEqual((list(good), list(bad)), (list(example), list(example)))
        self.assertEqual(list(error), list(bad["error"]))
        self.assertEqual(list(example["images"][0]), list(good["images"][0]))
        for _, rows in tables("field"):
            self.assertLessEqual({row[0].strip("`") for row in rows[1:]}, set(example))
        self.serve_base(answer(png(8, 8)))
        paid = self.run_json("generate", "a", "--provider", "openai")
        self.assertEqual(list(example["cost"]), list(paid["cost"]))

    def test_help_texts(self) -> None:
        shown = [match[1] for match in OPTIONS_BLOCK.findall(text_of(ROOT / "docs/options.md"))]
        self.assertEqual(shown, self.commands())
        for path in DOCUMENTS:
            renewed = with_help_texts(text_of(path), self.help_text)
            self.assertEqual(text_of(path), renewed, "run: python3 -m tests.test_documents")

    def test_exit_and_error_codes(self) -> None:
        found = tables("exit")
        self.assertLessEqual({README, SKILL}, {path for path, _ in found})
        for path, rows in found:
            codes = [int(word) for row in rows[1:] for word in row[0].split()]
            self.assertEqual(codes, [*range(11), 129, 130, 143], path.name)
        real = {code: exit_ for exit_, row in gpt_image2.OUR_CODES.items() for code in row}
        real["interrupted"] = 129  # the first of 129, 130, 143
        for _, rows in tables("error.code"):
            told = {row[0].strip("`"): int(row[1].split(",")[0]) for row in rows[1:]}
            self.assertEqual(told, real)

    def test_sizes(self) -> None:
        real = self.run_json("sizes")["sizes"]
        for _, rows in tables("ratio"):
            self.assertEqual([dict(zip(rows[0], row)) for row in rows[1:]], real)

    def test_settings(self) -> None:
        shown = self.run_json("config", "--show")["settings"]
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
                for size, cell in ((size[0], cell) for size, cell in zip(sizes, row) if size):
                    argv = ["a cat on a windowsill", "-s", size, "--quality", row[0], "--dry-run"]
                    estimate = self.run_json("generate", *argv)["dry_run"]["estimate"]
                    digits = len(cell.partition(".")[2])
                    self.assertEqual(cell, f"${estimate['amount']:.{digits}f}", path.name)

    def test_options_in_the_text_exist(self) -> None:
        option = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
        known = {"--version", "--help"}
        for command in self.commands():
            known |= set(option.findall(self.help_text(command)))
        for path in DOCUMENTS:
            quoted = " ".join(re.findall("`[^`]+`", prose(path)))
            self.assertEqual(set(option.findall(quoted)) - known, set(), path.name)

    def test_links_lead_somewhere(self) -> None:
        for path in DOCUMENTS:
            for target in re.findall(r'(?:\]\(|(?:src|href)=")([^)"#\s]+)', prose(path)):
                if "://" not in target:
                    self.assertTrue((path.parent / target).exists(), f"{path.name}: {target}")


class TestHelp(DocumentCase):
    """--help is the manual: whole, on stdout, as wide as a terminal, and true."""

    def test_all_ways_to_ask(self) -> None:
        overview = self.help_text()
        for words in (["-h"], ["help"]):
            self.assertEqual(self.check(self.run_tool(*words), 0).out, overview)
        self.assertEqual(self.check(self.run_tool(), 2).out, overview)
        narrow = {"COLUMNS": "40", "LINES": "5", "FORCE_COLOR": "1", "LC_ALL": "C"}
        for words in (["generate", "-h"], ["generate", "x", "-h", "--no"]):
            run = self.check(self.run_tool(*words, env=narrow), 0)
            self.assertEqual((run.out, run.err), (self.help_text("generate"), ""))


class TestSkill(unittest.TestCase):
    """The Agent Skills format, as far as a test without its validator can see; what else leads."""

    def test_the_newest_version(self) -> None:
        titles = re.findall(r"^## (\S+)", text_of(CHANGELOG), re.MULTILINE)
        released = [title for title in titles if title != "Unreleased"]
        self.assertEqual(released[0], gpt_image2.__version__)

    def test_front_matter_and_the_place_of_the_script(self) -> None:
        match = re.match(r"---\n(.*?)\n---\n", text_of(SKILL), re.DOTALL)
        assert match
        scripts = re.findall(r"\S*gpt_image2\.py", text_of(SKILL))
        self.assertEqual([name for name in scripts if "{baseDir}/gpt_image2.py" not in name], [])
        values = dict(re.findall(r"^(\w+):(?: *>-)?(.*(?:\n  .*)*)", match[1], re.MULTILINE))
        keys = "name description license compatibility metadata"
        self.assertEqual(" ".join(values), keys)
        for key, longest in (("description", 1024), ("compatibility", 500)):
            self.assertTrue(0 < len(" ".join(values[key].split())) <= longest)
        self.assertNotRegex(match[1], r"[{}\[\]\t]")  # block style only
        self.assertNotRegex(values["metadata"], r"(?m)^ +env:")  # would hide it where it is unset


if __name__ == "__main__":
    for document in DOCUMENTS:
        renewed = with_help_texts(text_of(document), lambda name: gpt_image2.help_text(name) + "\n")
        document.write_text(renewed, encoding="utf-8")
