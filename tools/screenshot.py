#!/usr/bin/env python3
"""Take the README's two images: a run in a real kitty on a virtual screen, and a batch's gallery.

    python3 tools/screenshot.py             # docs/terminal.png and docs/gallery.png
    python3 tools/screenshot.py FOLDER      # into another folder; gallery-dark.png too

Needs Debian's kitty, xvfb, imagemagick (`import`) and chromium; OpenGL may be in software.
"""

from __future__ import annotations

import argparse
import json
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
JOBS = (
    {"id": "fox", "prompt": "a red fox in snow, its long tail wrapped around it", "size": "1K"},
    {"id": "window", "prompt": "a cat on a windowsill", "size": "widescreen"},
    {"id": "poster", "prompt": "a jazz festival poster", "size": "portrait@2K"},
    {"id": "logo", "prompt": "a logo for a bakery", "n": 2},
    {"id": "market", "prompt": "a street market at night, after rain", "size": "photo"},
)
# What a real server may answer and the sandbox does not; added to the journal by hand.
REFUSED = {
    "id": "crowd",
    "prompt": "an image that the content policy does not allow",
    "identity": "0000000000000000-1",
    "state": "refused",
    "number": len(JOBS) + 1,
    "images": [],
    "error": {"exit_code": 5, "message": "HTTP 400 moderation_blocked: Your request was rejected"},
}
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


def gallery(target: Path, home: Path, dark: bool) -> None:
    """Run a batch in the sandbox and save what a browser shows of its gallery."""
    jobs = home / "jobs.jsonl"
    jobs.write_text("".join(json.dumps(job) + "\n" for job in JOBS))
    call = [sys.executable, str(ROOT / "gpt_image2.py"), "batch", "jobs.jsonl", "--sandbox"]
    env = {**os.environ, "HOME": str(home), "XDG_STATE_HOME": str(home)}
    subprocess.run(call, cwd=home, env=env, check=True)
    journal = home / "jobs-sandbox" / "results.jsonl"
    line = json.loads(journal.read_text().splitlines()[-1])
    with journal.open("a") as file:
        file.write(json.dumps({**line, **REFUSED}) + "\n")
    subprocess.run(call, cwd=home, env=env, check=True)  # which writes the page again
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    browser += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    page = (journal.parent / "index.html").as_uri()
    subprocess.run([*browser, "--window-size=1100,860", f"--screenshot={target}", page], check=True)


def main() -> None:
    """Take the images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    docs = ROOT / "docs"
    parser.add_argument("folder", type=Path, nargs="?", default=docs, help="default: docs/")
    folder = parser.parse_args().folder.resolve()
    for name in ("terminal", "gallery") + (() if folder == docs else ("gallery-dark",)):
        with tempfile.TemporaryDirectory(prefix="gpt-image-2-") as home:
            if name == "terminal":
                screenshot(folder / "terminal.png", Path(home))
            else:
                gallery(folder / f"{name}.png", Path(home), dark=name != "gallery")


if __name__ == "__main__":
    main()
