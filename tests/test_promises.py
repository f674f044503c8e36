"""What the program promises about itself: one file, the standard library, old Pythons and curls."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import unittest
from typing import Iterator, Union

from gpt_image2 import __version__, main
from tests.pictures import read_png
from tests.support import ROOT, SCRIPT, Case

TEXT = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(TEXT)

LONGEST_FUNCTION = 60
LIGHT_IMPORTS = {
    "_thread",
    "__future__",
    "binascii",
    "json",
    "os",
    "re",
    "stat",
    "sys",
    "time",
    "typing",
}
WINDOWS_ONLY = {"msvcrt", "winreg"}

# The options of curl 7.58 (January 2018) that are of use here, and nothing newer.
OLD_OPTIONS = """
    cacert capath compressed connect-timeout connect-to continue-at data
    data-binary data-raw dump-header fail form form-string get globoff header http1.1 insecure
    interface ipv4 ipv6 keepalive-time limit-rate location max-filesize max-redirs max-time netrc
    no-buffer no-keepalive noproxy output proto proto-default proto-redir proxy proxy-header
    proxy-user range referer request resolve retry show-error silent speed-limit speed-time stderr
    tcp-nodelay tls-max tlsv1.2 url user user-agent verbose write-out
"""

# The functions that make curl's config.
MAKERS_OF_PAIRS = {"fetch", "fetch_large", "download", "pasteable_command"}

BANNER = re.compile(r"^#{80}\n# (.+)\n#{80}$", re.MULTILINE)

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]


def functions(tree: ast.AST = TREE) -> Iterator[Function]:
    """Yield every function of the script."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def annotations_in(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the annotations in a piece of the script, which are never evaluated."""
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if getattr(node, name, None):
                yield getattr(node, name)


def called_name(call: ast.Call) -> str:
    """Return the last word of what is called: `Popen` for subprocess.Popen(...)."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def calls(name: str) -> list[ast.Call]:
    """Return the calls of a function of this name."""
    found = [node for node in ast.walk(TREE) if isinstance(node, ast.Call)]
    return [call for call in found if called_name(call) == name]


class TestSource(unittest.TestCase):
    """The text of the script."""

    def imports(self) -> set[str]:
        """Return the top-level names of all imported modules."""
        names = set()
        for node in ast.walk(TREE):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0, "a relative import")
                names.add(node.module or "")
        return {name.partition(".")[0] for name in names}

    def test_imports_the_standard_library_only(self) -> None:
        library = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib"))
        known = {*WINDOWS_ONLY, *sys.builtin_module_names}
        for name in sorted(self.imports() - known):
            with self.subTest(name):
                spec = importlib.util.find_spec(name)
                assert spec, "no such module"
                origin = spec.origin or ""
                at_home = origin.startswith(library) and "-packages" not in origin
                self.assertTrue(at_home or origin == "frozen", origin)

    def test_starts_with_few_imports(self) -> None:
        for node in TREE.body:
            if isinstance(node, ast.Import):
                self.assertLessEqual({alias.name for alias in node.names}, LIGHT_IMPORTS)
            if isinstance(node, ast.ImportFrom):
                self.assertIn(node.module, LIGHT_IMPORTS)

    def test_is_the_only_module(self) -> None:
        found = {path.name for path in ROOT.glob("*.py")}
        packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
        self.assertEqual((found, packages), ({SCRIPT.name}, {"tests"}))

    def test_parses_as_python_3_8(self) -> None:
        ast.parse(TEXT, feature_version=(3, 8))

    def test_no_function_is_long(self) -> None:
        for node in functions():
            with self.subTest(node.name):
                assert node.end_lineno
                self.assertLessEqual(node.end_lineno - node.lineno + 1, LONGEST_FUNCTION)

    def test_every_class_and_long_function_says_what_it_is(self) -> None:
        classes = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
        long = [node for node in functions() if (node.end_lineno or 0) - node.lineno > 30]
        silent = [node.name for node in [*classes, *long] if not ast.get_docstring(node)]
        self.assertEqual(silent, [])

    def test_each_section_uses_the_ones_above_it(self) -> None:
        starts = [TEXT[: match.start()].count("\n") for match in BANNER.finditer(TEXT)]
        section = {node: sum(node.lineno > start for start in starts) for node in TREE.body}
        place = {
            node.name: section[node]
            for node in TREE.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        for node in TREE.body:
            if getattr(node, "name", "") == "Job":
                continue
            told = {id(name) for note in annotations_in(node) for name in ast.walk(note)}
            names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
            own = {name.id for name in names if isinstance(name.ctx, ast.Store)}
            own |= {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
            own |= {inner.name for inner in functions(node) if inner is not node}
            used = {name.id for name in names if id(name) not in told} - own
            later = {name for name in used if place.get(name, 0) > section[node]}
            self.assertEqual(later, set(), f"line {node.lineno}")

    def test_the_banners_are_the_map(self) -> None:
        banners = BANNER.findall(TEXT)
        docstring = ast.get_docstring(TREE) or ""
        named = " ".join(docstring.split("\n\n")[-1].split()).partition(": ")[2]
        self.assertEqual(re.split(", ", named.rstrip(".")), banners)


class TestCurl(unittest.TestCase):
    """The one door to curl."""

    def options(self) -> set[str]:
        """Return the options in curl's config: the first of each pair that is made of literals."""
        found = set()
        for node in ast.walk(TREE):
            if isinstance(node, ast.FunctionDef) and (
                node.name in MAKERS_OF_PAIRS or node.name.endswith("_pairs")
            ):
                for pair in ast.walk(node):
                    if isinstance(pair, ast.For) and isinstance(pair.iter, ast.Tuple):
                        found |= {str(getattr(word, "value", "")) for word in pair.iter.elts}
                    elif isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
                        found.add(str(getattr(pair.elts[0], "value", "")))
        return {name for name in found if re.fullmatch("[a-z][a-z0-9-]*", name)}

    def test_its_options_are_old(self) -> None:
        options = self.options()
        self.assertLessEqual({"url", "header", "max-time", "silent"}, options)
        self.assertEqual(options - set(OLD_OPTIONS.split()), set())

    def test_it_is_started_in_one_place(self) -> None:
        self.assertEqual(len(calls("Popen")), 1)
        for name in ("system", "popen", "spawnv", "execv", "execvp", "check_output", "check_call"):
            self.assertEqual(calls(name), [], name)

    def test_no_shell_ever(self) -> None:
        keywords = [node for node in ast.walk(TREE) if isinstance(node, ast.keyword)]
        self.assertEqual([node.arg for node in keywords if node.arg == "shell"], [])


class TestCopy(Case):
    """The single file, wherever it is copied and whatever it is called."""

    def test_a_link_to_a_copy_in_an_empty_folder(self) -> None:
        folder, link = self._folder("alone"), self._folder("bin") / "paint"
        shutil.copy(SCRIPT, folder)
        link.symlink_to(folder / SCRIPT.name)
        command = [sys.executable, "-I", str(link), "generate", "a fox", "--sandbox", "-o", "a.png"]
        done = subprocess.run(
            command, capture_output=True, env=self.env, cwd=self.work, check=True, timeout=60
        )
        self.assertIn(f"Saved: {self.work / 'a.png'} (", done.stdout.decode())
        self.assertEqual(read_png((self.work / "a.png").read_bytes()).width, 1024)

    def test_it_can_be_executed(self) -> None:
        self.assertTrue(os.access(SCRIPT, os.X_OK))
        self.assertTrue(TEXT.startswith("#!/usr/bin/env python3\n"))

    def test_version(self) -> None:
        run = self.check(self.run_tool("--version"), 0)
        self.assertEqual((run.out, run.err), (f"gpt-image2 {__version__}\n", ""))
        self.assertRegex(__version__, r"\A\d+\.\d+\.\d+\Z")
        changes = ROOT / "CHANGELOG.md"
        if changes.exists():
            self.assertIn(__version__, changes.read_text(encoding="utf-8"))

    def test_main_is_the_console_script(self) -> None:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        self.assertIn('gpt-image2 = "gpt_image2:main"', project)
        self.assertTrue(callable(main))
