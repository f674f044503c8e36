"""--help is the manual: the same on every Python, complete, in order, and true.

tests/data/help.txt holds every help text. To renew it, and then read what changed:

    python3 tests/test_help.py --write
"""

from __future__ import annotations

import re
import shlex
import sys
import unittest
from pathlib import Path
from typing import Any, Iterator, NamedTuple
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpt_image2
from gpt_image2 import COMMANDS, SETTINGS, Args
from tests.support import ROOT, SCRIPT, Case, clean_environment, start

GOLDEN = ROOT / "tests" / "data" / "help.txt"
RENEW = "if that is meant: python3 tests/test_help.py --write"
COLUMNS = 80
# Groups of a command come in this order: what is wanted first, then how it is to be had.
LAST_GROUPS = ("output", "connection", "messages")


class Section(NamedTuple):
    """One group of a help text: its title and, for each option, what stands left and right."""

    title: str
    options: list[tuple[str, str]]


def printed(*words: str) -> str:
    """Return what a call that must go well prints; its stderr must be empty."""
    tool = start(SCRIPT, words, env=clean_environment(), cwd=ROOT)
    out, err = tool.communicate(timeout=60)
    assert (tool.returncode, err) == (0, b""), err.decode()
    return out.decode()


def golden() -> str:
    """Return every help text, each under a line with its command."""
    calls = [("--help",), *((command, "--help") for command in COMMANDS)]
    return "\n".join(f"#### {' '.join(words)}\n{printed(*words)}" for words in calls)


def texts() -> dict[str, str]:
    """Return the help texts in tests/data/help.txt by command; "" is the overview."""
    pieces = re.split(r"^#### (?:(\w+) )?--help\n", GOLDEN.read_text(encoding="utf-8"), flags=re.M)
    return dict(zip((name or "" for name in pieces[1::2]), pieces[2::2]))


def sections(text: str) -> list[Section]:
    """Return the groups of options in a help text, in order."""
    found = []
    for block in text.partition("\nexamples:\n")[0].split("\n\n"):
        title, *lines = block.splitlines()
        if re.fullmatch(r"[a-z]+:", title):
            found.append(Section(title[:-1], list(options("\n".join(lines)))))
    return found


def options(text: str) -> Iterator[tuple[str, str]]:
    """Yield (names and metavar, help) of the options in one group."""
    for entry in re.split(r"^  (?=-)", text, flags=re.MULTILINE)[1:]:
        left, _, right = re.sub(r"\s*\n {3,}", "  ", entry.strip()).partition("  ")
        yield left, " ".join(right.split())


def names_in(left: str) -> list[str]:
    """Return the option strings of the left column."""
    return re.findall(r"(?:^|, )(--?[a-z][a-z0-9-]*)", left)


def shown_examples(command: str) -> list[str]:
    """Return the lines of a command's examples, as its help shows them."""
    return texts()[command].partition("\nexamples:\n")[2].strip("\n").splitlines()


def examples(command: str) -> Iterator[tuple[str, str]]:
    """Yield (intent, command line) of a command's examples."""
    intent = ""
    for line in shown_examples(command):
        if line.startswith(" "):
            yield intent, line.strip().replace("gpt-image2 ", "", line.startswith("  gpt-image2"))
        else:
            intent = line


def example_words(line: str) -> list[str]:
    """Return the arguments of an example, as the shell passes them on."""
    inner = re.search(r"\$\(gpt-image2 (.*)\)", line)
    words = shlex.split(inner[1] if inner else line)
    return words[: words.index(">")] if ">" in words else words


def fully_parsed(words: list[str]) -> Args:
    """Return a command line as Args, its positional words looked at too."""
    args = gpt_image2.parse_arguments(words)
    wanted = {"sizes": (0, 9), "recover": (0, 9), "batch": (1, 1), "completion": (1, 1)}
    rest = args.words
    if args.command in ("generate", "edit"):
        with mock.patch("gpt_image2.read_prompt_file", return_value="a prompt"):
            _, rest = gpt_image2.read_prompt(args)
        wanted.update(edit=(1, 9))
    low, high = wanted.get(args.command, (0, 0))
    if not low <= len(rest) <= high:
        raise gpt_image2.Failure(f"{len(rest)} words too many, or too few")
    return args


class TestGolden(Case):
    def test_every_byte(self) -> None:
        self.assertEqual(golden(), GOLDEN.read_text(encoding="utf-8"), RENEW)

    def test_the_terminal_changes_nothing(self) -> None:
        env = {"COLUMNS": "40", "LINES": "5", "FORCE_COLOR": "1", "LC_ALL": "C"}
        for words in (["generate", "--help"], ["generate", "-h"], ["generate", "x", "-h", "--no"]):
            run = self.check(self.run_tool(*words, env=env), 0)
            self.assertEqual((run.out, run.err), (texts()["generate"].rstrip("\n") + "\n", ""))

    def test_all_spellings_of_the_overview(self) -> None:
        for words in (["--help"], ["-h"], ["help"]):
            run = self.check(self.run_tool(*words), 0)
            self.assertEqual(run.out, texts()[""].rstrip("\n") + "\n")
        self.assertEqual(self.check(self.run_tool(), 2).out, texts()[""].rstrip("\n") + "\n")


class TestForm(unittest.TestCase):
    """The help texts as a person reads them."""

    def test_nothing_is_wider_than_a_terminal(self) -> None:
        for command, text in texts().items():
            wide = [line for line in text.splitlines() if len(line) > COLUMNS]
            self.assertEqual(wide, [], command)

    def test_no_line_ends_in_blanks(self) -> None:
        self.assertNotRegex(GOLDEN.read_text(encoding="utf-8"), re.compile(r"[ \t]$", re.M))

    def test_the_overview_names_every_command(self) -> None:
        found = re.findall(r"^  (\w+) +(\S.*)$", texts()[""].partition("commands:")[2], re.M)
        self.assertEqual(found, [(name, row.summary) for name, row in COMMANDS.items()])

    def test_each_begins_with_its_usage(self) -> None:
        for command, (_, syntax, summary, _) in COMMANDS.items():
            usage, blank, told, *_ = texts()[command].splitlines()
            self.assertEqual(usage, f"usage: gpt-image2 {command} {syntax}")
            self.assertEqual(blank, "")
            self.assertTrue(told.lower().startswith(f"{summary}.".lower()))

    def test_each_option_stands_in_one_group(self) -> None:
        for command in COMMANDS:
            shown = [
                name
                for section in sections(texts()[command])
                for left, _ in section.options
                for name in names_in(left)
            ]
            known = [name for row in gpt_image2.options_of(command) for name in row.names]
            with self.subTest(command):
                self.assertEqual(sorted(shown), sorted(known))
                self.assertEqual(len(set(known)), len(known))

    def test_each_option_has_a_help_text(self) -> None:
        for command in COMMANDS:
            for section in sections(texts()[command]):
                for left, right in section.options:
                    with self.subTest(f"{command} {left}"):
                        self.assertRegex(right, r"^\S.{3,}([^.]|\.{3})$")

    def test_metavars_tell_the_syntax(self) -> None:
        for command in COMMANDS:
            kinds = {n: row.kind for row in gpt_image2.options_of(command) for n in row.names}
            for section in sections(texts()[command]):
                for left, _ in section.options:
                    name = names_in(left)[-1]
                    metavar = left.partition(name)[2].strip()
                    with self.subTest(f"{command} {left}"):
                        self.assertEqual(bool(metavar), bool(kinds[name]))
                        self.assertRegex(metavar, r"^([A-Z][A-Z/=,]*|\d+\.\.\d+|[\w|\[\]-]+)?$")

    def test_groups_have_one_order(self) -> None:
        before: dict[tuple[str, str], str] = {}
        for command in COMMANDS:
            titles = [section.title for section in sections(texts()[command])]
            self.assertEqual(len(titles), len(set(titles)), command)
            for index, first in enumerate(titles):
                for second in titles[index + 1 :]:
                    before[first, second] = command
        turned = [pair for pair in before if (pair[1], pair[0]) in before]
        self.assertEqual(turned, [])
        for first, second in zip(LAST_GROUPS, LAST_GROUPS[1:]):
            self.assertIn((first, second), before)
        self.assertFalse([pair for pair in before if pair[0] == "messages"])


class TestExamples(unittest.TestCase):
    def test_each_command_has_some(self) -> None:
        self.assertEqual({row[0] for row in gpt_image2.EXAMPLES}, set(COMMANDS))
        for command in COMMANDS:
            with self.subTest(command):
                self.assertTrue(list(examples(command)))

    def test_each_is_led_by_its_intent(self) -> None:
        for command in COMMANDS:
            lines = shown_examples(command)
            for intent, line in zip(lines[::2], lines[1::2]):
                with self.subTest(line):
                    self.assertRegex(intent, r"^[a-z].+[^.]:$")
                    self.assertRegex(line, r"^  \S")
            self.assertEqual(len(lines) % 2, 0, command)

    def test_each_parses(self) -> None:
        for command in COMMANDS:
            for _, line in examples(command):
                with self.subTest(line):
                    self.assertEqual(fully_parsed(example_words(line)).command, command)

    def test_completions_are_for_the_shell_that_is_named(self) -> None:
        for intent, line in examples("completion"):
            for shell in re.findall("bash|zsh|fish", re.sub(r"\(.*?\)", "", intent)):
                with self.subTest(shell):
                    self.assertIn(f"completion {shell}", line)

    def test_that_of_the_overview_parses(self) -> None:
        lines = re.findall(r"^  gpt-image2 (.+)$", texts()[""], re.M)
        self.assertEqual([fully_parsed(shlex.split(line)).command for line in lines], ["generate"])

    def test_what_does_not_parse_is_seen(self) -> None:
        for line in (
            'generate "a fox" --seed 1',
            "generate",
            "edit --n 0 x y",
            "paint fox",
            "edit x",
            "history x",
        ):
            with self.subTest(line), self.assertRaises(gpt_image2.Failure):
                fully_parsed(example_words(line))


def batch_default(path: str) -> str:
    """Return the folder of a batch whose jobs file is in the current folder."""
    args = Args()
    args.words = [path]
    settings = mock.Mock(sandbox=False, table={"output_dir": mock.Mock(source="default")})
    return gpt_image2.batch_folder(args, settings)


class TestDefaults(unittest.TestCase):
    """What a help text calls a default is the real one."""

    # What the help says after "default", by command (empty: all that have the option) and option.
    REAL: dict[tuple[str, str], Any] = {
        ("", "--model"): gpt_image2.DEFAULT_MODEL,
        ("", "--timeout"): SETTINGS["timeout"][1],
        ("", "--connect-timeout"): SETTINGS["connect_timeout"][1],
        ("", "--retries"): SETTINGS["retries"][1],
        ("", "--concurrency"): Args.concurrency,
        ("", "--older-than"): f"{Args.older_than // 86400}d",
        ("", "--port"): {0: "a free one"}[Args.port],
        ("", "--format"): "what the -o suffix says",
        ("", "--size"): {None: "server's"}[SETTINGS["size"][1]],
        ("", "--quality"): {None: "server's"}[SETTINGS["quality"][1]],
        ("", "--n"): "1",  # these four are the API's own (SDK)
        ("", "--compression"): "100",
        ("", "--background"): "auto",
        ("", "--moderation"): "auto",
        ("", "--image-field"): SETTINGS["image_field"][1],
        ("", "--provider"): "by host",
        ("", "--base-url"): "OpenAI",
        ("", "--config"): None,
        ("", "--rpm"): "any",
        ("", "--since"): "all",
        ("", "--limit"): "all",
        ("", "--output-dir"): {".": "current"}[SETTINGS["output_dir"][1]],
        ("batch", "--output-dir"): "JOBS without its suffix",
    }

    def test_each(self) -> None:
        seen = set()
        for command in COMMANDS:
            for section in sections(texts()[command]):
                for left, right in section.options:
                    told = re.search(r"\bdefault:? ([^);]+)", right)
                    name = names_in(left)[-1]
                    key = (command, name) if (command, name) in self.REAL else ("", name)
                    with self.subTest(f"{command} {left}"):
                        self.assertEqual("default" in right, key in self.REAL, "REAL lacks it")
                        if told:
                            seen.add(key)
                            self.assertEqual(told[1], str(self.REAL[key]))
                        seen |= {key} & {("", "--config")}  # it says where to look it up
        self.assertEqual(seen, set(self.REAL))

    def test_the_folder_of_a_batch(self) -> None:
        self.assertEqual(batch_default("jobs.jsonl"), str(Path.cwd() / "jobs"))

    def test_the_format_is_what_the_suffix_says(self) -> None:
        for name, wanted in (("fox.webp", "webp"), ("fox.jpg", "jpeg"), ("fox.PNG", "png")):
            args = Args()
            args.__dict__.update(command="generate", output=name)
            given = gpt_image2.chosen_options(args, gpt_image2.Settings({}))
            self.assertEqual(given["output_format"], wanted, name)

    def test_ranges_are_the_real_ones(self) -> None:
        for command in COMMANDS:
            for section in sections(texts()[command]):
                for left, _ in section.options:
                    match = re.search(r" (\d+)\.\.(\d+)$", left)
                    if match:
                        self.check_range(command, names_in(left)[-1], int(match[1]), int(match[2]))

    def check_range(self, command: str, name: str, low: int, high: int) -> None:
        """Assert that an option takes its ends, and nothing beyond them."""
        for value, good in ((low, True), (high, True), (low - 1, False), (high + 1, False)):
            with self.subTest(f"{command} {name}={value}"):
                try:
                    gpt_image2.parse_arguments([command, "x", f"{name}={value}"])
                    taken = True
                except gpt_image2.Failure:
                    taken = False
                self.assertEqual(taken, good)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        GOLDEN.write_text(golden(), encoding="utf-8")
    else:
        unittest.main()
