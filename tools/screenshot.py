#!/usr/bin/env python3
"""Take the README's picture of a run: a real kitty on a virtual screen.

    python3 tools/screenshot.py             # docs/terminal.png
    python3 tools/screenshot.py other.png

Needs Debian's kitty, xvfb and imagemagick (`import`); OpenGL may be in software.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISPLAY = ":93"  # a free one
SHOWN = 'generate "a cat on a windowsill" --sandbox -s photo --preview'
SETTINGS = """font_size 12
remember_window_size no
initial_window_width 92c
initial_window_height 27c
window_padding_width 8
enable_audio_bell no
update_check_interval 0
cursor_blink_interval 0
"""
# What the terminal shows: the command as it is typed, and what the tool says.
SESSION = """cd {home}/work
clear
printf '$ gpt-image2 %s\\n' {shown}
{program} {call} 2>&1
printf '$ '
touch {home}/done
sleep 60
"""


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    """Wait until a file is there, as long as a process lives."""
    end = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"{path.name} did not come about")
        time.sleep(0.05)


def screenshot(target: Path, home: Path) -> None:
    """Run the session in kitty on a virtual screen and save what is seen."""
    (home / "work").mkdir()
    (home / "kitty.conf").write_text(SETTINGS)
    program = shlex.join([sys.executable, str(ROOT / "gpt_image2.py")])
    text = SESSION.format(home=home, shown=shlex.quote(SHOWN), call=SHOWN, program=program)
    (home / "session.sh").write_text(text)
    argv = ["kitty", "--config", str(home / "kitty.conf"), "sh", str(home / "session.sh")]
    env = {**os.environ, "HOME": str(home), "DISPLAY": DISPLAY, "LIBGL_ALWAYS_SOFTWARE": "1"}
    env.update(TMPDIR=str(home), XDG_CONFIG_HOME=str(home), XDG_STATE_HOME=str(home))
    screen = subprocess.Popen(["Xvfb", DISPLAY, "-screen", "0", "960x600x24"])
    try:
        wait_for(Path(f"/tmp/.X11-unix/X{DISPLAY[1:]}"), screen)
        terminal = subprocess.Popen(argv, env=env)
        try:
            wait_for(home / "done", terminal)
            time.sleep(2)  # nothing tells when the screen has been drawn
            window = ["import", "-window", "root", str(target)]
            subprocess.run(window, env=env, check=True)
        finally:
            terminal.terminate()
            terminal.wait()
    finally:
        screen.terminate()
        screen.wait()


def main() -> None:
    """Take one picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    target = ROOT / "docs" / "terminal.png"
    parser.add_argument("target", type=Path, nargs="?", default=target, help="docs/terminal.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpt-image-2-") as home:
        screenshot(args.target.resolve(), Path(home))


if __name__ == "__main__":
    main()
