"""What the program promises about itself: one file, the standard library, Python 3.8."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig

from gpt_image2 import __version__, main
from tests.case import ROOT, SCRIPT, Case

TEXT = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(TEXT, feature_version=(3, 8))
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
    "types",  # loaded by re
    "typing",
}
WINDOWS_ONLY = {"msvcrt", "winreg"}


class TestSource(Case):
    """The text of the script."""

    def test_imports_the_standard_library_only_and_little_at_first(self) -> None:
        library = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib"))
        for node in ast.walk(TREE):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0, "a relative import")
                names = [node.module or ""]
            for name in {name.partition(".")[0] for name in names}:
                with self.subTest(name):
                    if node in TREE.body:
                        self.assertIn(name, LIGHT_IMPORTS)
                    if name not in WINDOWS_ONLY and name not in sys.builtin_module_names:
                        spec = importlib.util.find_spec(name)
                        assert spec, "no such module"
                        origin = spec.origin or ""
                        at_home = origin.startswith(library) and "-packages" not in origin
                        self.assertTrue(at_home or origin == "frozen", origin)

    def test_it_is_the_only_module(self) -> None:
        self.assertEqual([path.name for path in ROOT.glob("*.py")], [SCRIPT.name])

    def test_no_shell_ever(self) -> None:
        names = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
        names |= {node.arg or "" for node in ast.walk(TREE) if isinstance(node, ast.keyword)}
        self.assertIn("Popen", names)
        self.assertEqual(
            names & {"shell", "system", "popen", "getoutput", "getstatusoutput"}, set()
        )


class TestCopy(Case):
    """The single file, wherever it is copied and whatever it is called."""

    def test_a_link_to_a_copy_in_an_empty_folder(self) -> None:
        folder, link = self.new_folder("alone"), self.new_folder("bin") / "paint"
        shutil.copy(SCRIPT, folder)
        link.symlink_to(folder / SCRIPT.name)
        command = [sys.executable, "-I", str(link), "generate", "a fox", "--sandbox", "-o", "a.png"]
        said = subprocess.check_output(command, env=self.env, cwd=self.work, stderr=subprocess.PIPE)
        self.assertIn(f"Saved: {self.work / 'a.png'} (", said.decode())
        self.assertEqual(sorted(os.listdir(folder)), [SCRIPT.name])

    def test_it_can_be_executed_and_tells_its_version(self) -> None:
        self.assertTrue(os.access(SCRIPT, os.X_OK))
        self.assertTrue(TEXT.startswith("#!/usr/bin/env python3\n"))
        run = self.check(self.run_tool("--version"), 0)
        self.assertEqual((run.out, run.err), (f"gpt-image2 {__version__}\n", ""))
        self.assertRegex(__version__, r"\A\d+\.\d+\.\d+\Z")

    def test_main_is_the_console_script(self) -> None:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        self.assertIn('gpt-image2 = "gpt_image2:main"', project)
        self.assertTrue(callable(main))
