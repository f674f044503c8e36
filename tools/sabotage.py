#!/usr/bin/env python3
"""Break gpt_image2.py in one place at a time and see whether the tests notice.

    python3 tools/sabotage.py               # all of tools/sabotages.txt; exit 1 if one passes
    python3 tools/sabotage.py redirect key  # those whose name has one of the words
    python3 tools/sabotage.py --check       # only look whether each still fits the program

Each runs in a copy of the tree: first the test modules that should notice it, up to the first
failure; then, if they don't, the whole suite. Two run at a time.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("sabotages.txt")
LIMIT = 600  # seconds; a run that hangs has noticed


class Sabotage(NamedTuple):
    """One change: what it breaks, the modules that should notice, the lines before and after."""

    name: str
    modules: list[str]
    old: str
    new: str


def read_table(text: str) -> list[Sabotage]:
    """Return the sabotages of a table: a head `name | modules`, then lines of `-old` and `+new`."""
    found: list[Sabotage] = []
    for head, lines in re.findall(r"^([^-+#\n].*)\n((?:[-+].*\n?)+)", text, re.M):
        name, _, modules = head.partition(" | ")
        old, new = (re.findall(rf"^{mark}(.*)", lines, re.M) for mark in ("-", r"\+"))
        words = [f"tests.{word}" for word in modules.split()]
        found.append(Sabotage(name, words, "\n".join(old), "\n".join(new)))
    return found


def sabotaged(program: str, sabotage: Sabotage) -> str:
    """Return the program with the change. Raises ValueError unless its place is there once."""
    times = program.count(sabotage.old)
    if times != 1 or not sabotage.old:
        raise ValueError(f"{sabotage.name}: its lines stand {times} times in the program")
    broken = program.replace(sabotage.old, sabotage.new)
    compile(broken, sabotage.name, "exec")
    return broken


def noticed(sabotage: Sabotage, program: str) -> str:
    """Return which tests noticed a sabotage: its modules, the suite, or none ("")."""
    with tempfile.TemporaryDirectory(prefix="gpt-image2-sabotage-") as folder:
        tree = Path(folder, "tree")
        ignored = shutil.ignore_patterns(".git", "__pycache__", "build", "dist", ".*_cache")
        shutil.copytree(ROOT, tree, ignore=ignored)
        (tree / "gpt_image2.py").write_text(sabotaged(program, sabotage), encoding="utf-8")
        for modules in (sabotage.modules, []):
            if not passes(tree, modules):
                return " ".join(modules) or "the whole suite"
    return ""


def passes(tree: Path, modules: list[str]) -> bool:
    """Return whether test modules pass in a tree (none: all of them)."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "unittest", "-f", *modules],
            cwd=tree,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> int:
    """Run the sabotages and print which were not noticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="parts of names")
    parser.add_argument("--check", action="store_true", help="run nothing")
    args = parser.parse_args()
    program = (ROOT / "gpt_image2.py").read_text(encoding="utf-8")
    chosen = [
        sabotage
        for sabotage in read_table(TABLE.read_text(encoding="utf-8"))
        if not args.words or any(word in sabotage.name for word in args.words)
    ]
    for sabotage in chosen:
        sabotaged(program, sabotage)
    if args.check:
        print(f"{len(chosen)} sabotages fit the program")
        return 0
    started, missed = time.monotonic(), 0
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda sabotage: noticed(sabotage, program), chosen)
        for sabotage, by in zip(chosen, results):
            missed += not by
            print(f"{by or 'NOT NOTICED':40} {sabotage.name}", flush=True)
    print(f"{len(chosen)} sabotages, {missed} not noticed, {time.monotonic() - started:.0f} s")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
