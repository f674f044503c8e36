"""README.md, SKILL.md and CHANGELOG.md tell the truth: their examples run, their tables match.

Every call of the tool in a shell block is run by a real shell, as it stands, with --sandbox put in
(NOT_RUN says which are only parsed, and why). The help texts in README.md are generated, and so is
its first picture:

    python3 tests/test_documents.py --write
"""

from __future__ import annotations

import functools
import json
import os
import py_compile
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, NamedTuple
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpt_image2
from tests.pictures import png
from tests.support import ROOT, SCRIPT, Case, clean_environment, start

README, SKILL, CHANGELOG = (ROOT / name for name in ("README.md", "SKILL.md", "CHANGELOG.md"))
FIRST_COMMAND = 'python3 gpt_image2.py generate "a cat on a windowsill" --sandbox'

# Lines that are parsed by the real parser, but not run: a pattern, and why.
NOT_RUN = {
    r" --deferred": "it needs a server with a Batch API; test_deferred runs these calls",
    r" config --check$": "it asks the server of the settings, and tests touch no network",
    r" sandbox --port ": "it serves until it is stopped",
    r" size=512x512$": "local engines take it; the sandbox refuses it, as the API does",
    r" recover --last ": "nothing is left to recover where every call went well",
}
# Lines that may stand beside calls of the tool; everything else needs a block of its own.
HARMLESS = re.compile(r"export [A-Z_]+=\S+|# .*|")
CALL = re.compile(r"(?:^|\| ?)(?:[A-Z_0-9]+=\S+ )*(?:python3 \S*gpt_image2\.py|gpt-image2)(?= |$)")

# What the shell finds as python3 and gpt-image2: the tool with --sandbox, noting how it ended.
WRAPPER = """#!/bin/sh
case $0 in *python3) shift;; esac
case ${{1-}} in
    generate|edit|batch) command=$1; shift; set -- "$command" --sandbox "$@";;
esac
{python} {script} "$@"
code=$?
echo "$code $*" >> "$CALLS"
exit $code
"""


class Block(NamedTuple):
    """One fenced code block: where it stands, its language and its text."""

    file: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}\n{self.text}"


def blocks(path: Path, *languages: str) -> list[Block]:
    """Return the fenced code blocks of a document, those of some languages only if given."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(path.name, line, match[1], match[2]))
    return [block for block in found if not languages or block.language in languages]


def prose(path: Path) -> str:
    """Return a document without its fenced code blocks."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def section(path: Path, title: str) -> str:
    """Return what stands under a heading, up to the next one of any level."""
    text = prose(path)
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    if not match:
        raise AssertionError(f"{path.name} has no heading {title!r}")
    return match[1]


def rows(markdown: str) -> list[list[str]]:
    """Return the rows of the tables in a piece of Markdown, their headings left out."""
    found: list[list[str]] = []
    for line in markdown.splitlines():
        if re.fullmatch(r"\|[-| ]+\|", line):
            found.pop()
        elif line.startswith("|"):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def one_line(text: str) -> str:
    """Return text with its white space folded, as Markdown reads it."""
    return " ".join(text.split())


@functools.lru_cache(maxsize=None)
def help_text(command: str) -> str:
    """Return what `COMMAND --help` prints."""
    return printed([command, "--help"], clean_environment())


def printed(argv: list[str], env: dict[str, str]) -> str:
    """Return what a call of the tool prints; it must go well."""
    tool = start(SCRIPT, argv, env=env, cwd=ROOT)
    out, err = tool.communicate(timeout=60)
    assert tool.returncode == 0, err.decode()
    return out.decode()


OPTIONS_BLOCK = re.compile(r"(<!-- options:(\w+) -->\n)(.*?)(<!-- /options:\2 -->)", re.DOTALL)


def with_help_texts(text: str) -> str:
    """Return the README with the present help texts between its markers."""
    return OPTIONS_BLOCK.sub(
        lambda match: f"{match[1]}\n```text\n{help_text(match[2])}```\n\n{match[4]}", text
    )


def parsed(command_line: str) -> None:
    """Pass one shell line to the tool's own parser. Raises Failure for what it refuses."""
    words = shlex.split(command_line.partition(" | ")[0])
    start = next(
        i for i, word in enumerate(words) if re.search(r"gpt_image2\.py$|^gpt-image2$", word)
    )
    gpt_image2.parse_arguments(words[start + 1 :])


class TestShellExamples(Case):
    """Each shell block is a script, run in a folder that holds the pictures it speaks of."""

    compiled: Path  # the tool, compiled once for all calls

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.compiled = Path(folder.name, "tool.pyc")
        py_compile.compile(str(SCRIPT), str(cls.compiled), doraise=True)

    def world(self, name: str) -> tuple[Path, dict[str, str]]:
        """Return a work folder with input files, and an environment whose calls are noted."""
        home = self.tmp / name
        work, programs = home / "work", home / "bin"
        for folder in (work / "fruit", programs, home / "tmp"):
            folder.mkdir(parents=True)
        (work / "gpt_image2.py").symlink_to(SCRIPT)
        (work / "prompt.txt").write_text("a harbour at dawn\n")
        (work / "prompts.txt").write_text("a harbour at dawn\na harbour at night\n")
        (jobs,) = blocks(README, "jsonl")
        (work / "jobs.jsonl").write_text(jobs.text)
        for picture in ("room.png", "input.png", "fruit/apple.png", "fruit/pear.png"):
            (work / picture).write_bytes(png(1024, 768))
        (work / "mask.png").write_bytes(png(1024, 768, hole=(10, 10, 200, 200)))
        quoted = {"python": shlex.quote(sys.executable), "script": shlex.quote(str(self.compiled))}
        for program in ("python3", "gpt-image2"):
            (programs / program).write_text(WRAPPER.format(**quoted))
            (programs / program).chmod(0o700)
        (home / "calls").touch()
        env = {name: value for name, value in self.env.items() if not name.startswith("XDG_")}
        env.update(HOME=str(home), TMPDIR=str(home / "tmp"), CALLS=str(home / "calls"))
        env.update(SLURM_ARRAY_TASK_ID="2", JOB_COMPLETION_INDEX="2")
        env["PATH"] = f"{programs}:{env.get('PATH', '/usr/bin:/bin')}"
        return work, env

    def run_block(self, block: Block) -> str:
        """Run one shell block; return what went wrong, or nothing."""
        lines = block.text.replace("{baseDir}", ".").replace("\\\n", " ").splitlines()
        calls = [line for line in lines if CALL.search(line)]
        odd = [line for line in lines if line not in calls and not HARMLESS.fullmatch(line)]
        if odd and calls:
            return f"{block}\nput into a block of its own: {odd}"
        run = [line for line in calls if not any(re.search(why, line) for why in NOT_RUN)]
        for line in set(calls) - set(run):
            parsed(line)
        if not run:
            return ""
        work, env = self.world(f"{block.file}-{block.line}")
        script = "\n".join(line for line in lines if line in run or line not in calls)
        done = subprocess.run(
            ["sh", "-c", script],
            cwd=work,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
            check=False,
        )
        ended = Path(env["CALLS"]).read_text().splitlines()
        if len(ended) == len(run) and all(line.startswith("0 ") for line in ended):
            return ""
        return f"{block}\n{done.stdout.decode()}\nended: {ended}"

    @unittest.skipUnless(shutil.which("sh"), "there is no sh here")
    def test_every_call_works_as_it_stands(self) -> None:
        found = [*blocks(README, "sh"), *blocks(SKILL, "sh")]
        with ThreadPoolExecutor(4) as pool:
            failed = [fault for fault in pool.map(self.run_block, found) if fault]
        self.assertFalse(failed, "\n\n".join(failed))
        self.assertGreater(sum(len(CALL.findall(block.text)) for block in found), 10)

    def test_what_is_not_run_is_still_there(self) -> None:
        text = "\n".join(block.text for path in (README, SKILL) for block in blocks(path, "sh"))
        for pattern in NOT_RUN:
            self.assertRegex(text, re.compile(pattern, re.MULTILINE))

    def test_calls_in_tables_and_prose_parse(self) -> None:
        calls = re.findall(r"`((?:gpt-image2|config|recover|sizes|history) [^`]*)`", prose(README))
        calls += re.findall(r"`((?:gpt-image2|config|recover|sizes|history) [^`]*)`", prose(SKILL))
        self.assertGreater(len(calls), 5)
        for call in calls:
            with self.subTest(call):
                parsed(call if call.startswith("gpt-image2") else f"gpt-image2 {call}")

    def run_program(self, block: Block, program: str, suffix: str) -> None:
        """Run an example in another language and look at the picture it tells of."""
        work, env = self.world(suffix)
        example = work / f"example.{suffix}"
        example.write_text(block.text.replace("{baseDir}", "."))
        argv = [program, example.name]
        done = subprocess.run(
            argv, cwd=work, env=env, capture_output=True, timeout=120, check=False
        )
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        path, *size = done.stdout.decode().rsplit(maxsplit=2)
        self.assertEqual(size, ["1024", "1024"])
        self.assertEqual(Path(path).read_bytes()[:4], b"\x89PNG")

    @unittest.skipUnless(shutil.which("sh"), "there is no sh here")
    def test_the_python_example_runs(self) -> None:
        (block,) = blocks(SKILL, "python")
        self.run_program(block, sys.executable, "py")

    @unittest.skipUnless(shutil.which("sh") and shutil.which("node"), "there is no node here")
    def test_the_node_example_runs(self) -> None:
        (block,) = blocks(SKILL, "js")
        self.run_program(block, shutil.which("node") or "node", "js")

    def test_each_template_asks_for_the_variable_that_is_told(self) -> None:
        tables = rows(section(README, "Keys and relays"))
        starts = [row for row in tables if "config --init" in row[1]]
        self.assertEqual(len(starts), 5)
        for user, command, then in starts:
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
        path = self.config / "gpt-image-2" / "config.json"
        self.assertEqual(json.loads(path.read_text()), json.loads(blocks(README, "json")[0].text))

    def test_a_picture_of_a_run_is_on_the_first_screen(self) -> None:
        text = README.read_text(encoding="utf-8")
        self.assertLess(text.index(FIRST_COMMAND), text.index("docs/terminal.png"))
        self.assertLess(text[: text.index("docs/terminal.png")].count("\n"), 15)
        self.assertTrue((ROOT / "docs" / "terminal.png").read_bytes().startswith(b"\x89PNG"))
        self.check(self.run_tool(*shlex.split(FIRST_COMMAND)[2:]), 0)


class TestJsonExamples(Case):
    def test_they_parse(self) -> None:
        for path in (README, SKILL):
            for block in blocks(path, "json"):
                with self.subTest(str(block)):
                    json.loads(block.text)

    def test_the_document_has_the_fields_of_a_real_one(self) -> None:
        config, example, error = (json.loads(block.text) for block in blocks(README, "json"))
        good = self.check(self.run_tool("generate", "a fox", "--sandbox", "--json"), 0).json
        bad = self.check(self.run_tool("generate", "a fox", "-s", "9x9", "--json"), 2).json
        self.assertEqual(list(example), list(good))
        self.assertEqual(list(example), list(bad))
        self.assertEqual(list(example["images"][0]), list(good["images"][0]))
        self.assertEqual(list(error), list(bad["error"]))
        self.assertEqual(list(example["cost"]), list(gpt_image2.Cost._fields))
        self.assertLessEqual(set(config), set(gpt_image2.SETTINGS))

    def test_the_dry_run_has_the_fields_that_are_listed(self) -> None:
        run = self.check(self.run_tool("generate", "a fox", "--dry-run", "--json"), 0)
        sentence = re.search(
            r"`--dry-run --json` has the object `dry_run` with (.*?) instead",
            one_line(prose(README)),
        )
        assert sentence
        self.assertEqual(set(re.findall("`(.+?)`", sentence[1])), set(run.json["dry_run"]))

    def test_the_table_of_fields_names_real_ones(self) -> None:
        example = json.loads(blocks(README, "json")[1].text)
        named = [row[0].strip("`") for row in rows(section(README, "For scripts")) if len(row) == 2]
        codes = {code for row in gpt_image2.OUR_CODES.values() for code in row}
        self.assertLessEqual(set(named) - codes, set(example))


class TestTables(unittest.TestCase):
    def test_help_texts(self) -> None:
        text = README.read_text(encoding="utf-8")
        self.assertEqual(
            [match[2] for match in OPTIONS_BLOCK.finditer(text)], ["generate", "batch", "edit"]
        )
        self.assertEqual(
            with_help_texts(text), text, "run: python3 tests/test_documents.py --write"
        )

    def test_exit_codes(self) -> None:
        real = {value for name, value in vars(gpt_image2).items() if name.startswith("EXIT_")}
        for path in (README, SKILL):
            with self.subTest(path.name):
                cells = [row[0] for row in rows(section(path, "Exit codes"))]
                told = [int(word) for cell in cells for word in cell.split()]
                self.assertEqual(told, [*sorted(real), 129, 130, 143])

    def test_error_codes(self) -> None:
        table = [row for row in rows(section(README, "For scripts")) if row[-1][:1].isdigit()]
        told = {row[0].strip("`"): int(row[1].split(",")[0]) for row in table}
        real = {code: exit_ for exit_, row in gpt_image2.OUR_CODES.items() for code in row}
        real["interrupted"] = 129  # the first of 129, 130, 143
        self.assertEqual(told, real)
        source = SCRIPT.read_text(encoding="utf-8")
        raised = set(re.findall(r'\bcode="(\w+)"', source)) - set(gpt_image2.API_ERRORS)
        self.assertLessEqual(raised, set(real))

    def test_error_codes_of_the_api(self) -> None:
        quoted = re.search(
            r"the API's own code where it sent one \((.*?)\)", one_line(prose(README))
        )
        assert quoted
        self.assertLessEqual(set(re.findall("`(.+?)`", quoted[1])), set(gpt_image2.API_ERRORS))

    def test_sizes(self) -> None:
        real = [[row[0], row[1], *map(gpt_image2.size_text, row[2:])] for row in gpt_image2.SIZES]
        self.assertEqual(rows(section(README, "Sizes")), real)
        skill = one_line(prose(SKILL))
        for row in gpt_image2.SIZES:
            self.assertRegex(skill, rf"\b{row[1]}\b")

    def test_settings(self) -> None:
        told = [row[0].strip("`") for row in rows(section(README, "Settings"))]
        self.assertEqual(sorted(told), sorted(gpt_image2.SETTINGS))
        for name, default in (
            (row[0].strip("`"), row[1]) for row in rows(section(README, "Settings"))
        ):
            real = gpt_image2.SETTINGS[name][1]
            if isinstance(real, (int, bool)):
                self.assertEqual(default, json.dumps(real), name)

    def test_config_places(self) -> None:
        home = str(Path.home())
        with mock.patch.dict(os.environ, XDG_CONFIG_HOME="$XDG_CONFIG_HOME"):
            places = gpt_image2.config_places()
        for place in places:
            name = f"`{place.replace(home, '~').replace(chr(92), '/')}`"
            self.assertIn(name, section(README, "Settings"))

    def test_estimates(self) -> None:
        for quality, *cells in rows(section(README, "Cost and time")):
            for size, cell in zip(("1024x1024", "1536x1024", "3840x2160"), cells):
                with self.subTest(f"{size} {quality}"):
                    self.assertEqual(cell, estimate(size, quality))
        for row in rows(section(SKILL, "Before spending")):
            exact = float(estimate("1024x1024", row[0]).strip("$"))
            self.assertEqual(row[2], f"${exact:.3f}")

    def test_options_in_the_text_exist(self) -> None:
        helps = "".join(help_text(command) for command in gpt_image2.COMMANDS)
        known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", helps)) | {"--version", "--help"}
        for path in (README, SKILL, CHANGELOG):
            text = prose(path)
            quoted = " ".join(re.findall("`[^`]+`", text))
            with self.subTest(path.name):
                self.assertLessEqual(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", quoted)), known)


@functools.lru_cache(maxsize=None)
def estimate(size: str, quality: str) -> str:
    """Return what --dry-run estimates for the README's cat."""
    argv = ["generate", "a cat on a windowsill", "-s", size, "--quality", quality, "--dry-run"]
    env = {**clean_environment(), "XDG_CONFIG_HOME": "/nonexistent", "HOME": "/nonexistent"}
    out = printed(argv, env)
    found = re.search(r"^estimate: about (\S+)$", out, re.MULTILINE)
    assert found, out
    return found[1]


class TestLinks(unittest.TestCase):
    def test_links_lead_somewhere(self) -> None:
        for path in (README, SKILL, CHANGELOG):
            anchors = {slug(title) for title in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)}
            for target in links(prose(path)):
                with self.subTest(f"{path.name}: {target}"):
                    if target.startswith("#"):
                        self.assertIn(target[1:], anchors)
                    elif "://" not in target:
                        self.assertTrue((ROOT / target).exists())


def links(markdown: str) -> Iterator[str]:
    """Yield the targets of links and pictures."""
    yield from re.findall(r"\]\(([^)\s]+)\)", markdown)
    yield from re.findall(r'(?:src|href)="([^"]+)"', markdown)


def slug(title: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


class TestSkill(unittest.TestCase):
    """The Agent Skills format, as far as a test without its validator can see."""

    def front_matter(self) -> str:
        text = SKILL.read_text(encoding="utf-8")
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        assert match
        return match[1]

    def value(self, key: str) -> str:
        match = re.search(rf"^{key}:(.*(?:\n  .*)*)", self.front_matter(), re.MULTILINE)
        assert match
        return one_line(re.sub(r"^ *>-", "", match[1]))

    def test_keys(self) -> None:
        keys = re.findall(r"^(\S+?):", self.front_matter(), re.MULTILINE)
        self.assertEqual(keys, ["name", "description", "license", "compatibility", "metadata"])
        self.assertEqual(self.value("name"), "gpt-image-2")
        self.assertTrue(0 < len(self.value("description")) <= 1024)
        self.assertTrue(0 < len(self.value("compatibility")) <= 500)

    def test_block_style_only(self) -> None:
        self.assertNotRegex(self.front_matter(), r"[{}\[\]]")
        self.assertNotIn("\t", self.front_matter())

    def test_openclaw(self) -> None:
        metadata = self.front_matter().partition("metadata:\n")[2]
        self.assertRegex(metadata, r"requires:\n +bins:\n +- python3\n +- curl\n")
        self.assertRegex(metadata, r"(?m)^    primaryEnv: GPT_IMAGE2_API_KEY$")
        self.assertRegex(metadata, r"(?m)^    emoji: ")
        self.assertNotRegex(metadata, r"(?m)^ +env:")  # it would hide the skill where it is unset

    def test_length(self) -> None:
        lines = SKILL.read_text(encoding="utf-8").splitlines()
        self.assertLess(len(lines), 300)

    def test_every_call_names_the_script_by_its_folder(self) -> None:
        for block in blocks(SKILL):
            for found in re.findall(r"\S*gpt_image2\.py", block.text):
                self.assertIn("{baseDir}/gpt_image2.py", found)


class TestChangelog(unittest.TestCase):
    def test_the_newest_entry_is_this_version(self) -> None:
        versions = re.findall(r"^## (\S+)", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)
        self.assertEqual(versions[0], gpt_image2.__version__)


def write() -> None:
    """Bring what is generated up to date: the README's help texts."""
    text = README.read_text(encoding="utf-8")
    README.write_text(with_help_texts(text), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        unittest.main()
