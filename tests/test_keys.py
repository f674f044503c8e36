"""Which key goes to which host, and that no key ever shows."""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence
from urllib.parse import quote

from tests.pictures import png
from tests.support import Api, Case, Reply, Run, answer, page, refusal

OPENAI = "https://api.openai.com/v1"
RELAY = "https://relay.example/v1"
OTHER = "https://other.example/v1"
HK = "https://api.openai-hk.com/v1"

FLAG_KEY = "sk-from-the-flag-0123456789"
ENV_KEY = "sk-from-the-environment-0123456789"
FILE_KEY = "sk-from-the-file-0123456789"
PROFILE_KEY = "sk-from-the-profile-0123456789"
OPENAI_KEY = "sk-from-openai-api-key-0123456789"
ODD_KEY = "sk-test/0123+4567=89&abc?def~ghi"  # every spelling of it differs

FLAG = ("--api-key", FLAG_KEY)
IN_ENV = {"GPT_IMAGE2_API_KEY": ENV_KEY}
IN_OPENAI = {"OPENAI_API_KEY": OPENAI_KEY}
PAIR = {**IN_OPENAI, "OPENAI_BASE_URL": RELAY}
IN_FILE = {"api_key": FILE_KEY}
RELAY_FILE = {"base_url": RELAY, **IN_FILE}

NOTING_CURL = """#!/bin/sh
# Notes what it is told, and sends nothing.
{ printf '%s\\n' "$@"; env; } >"$0.surroundings"
cat >"$0.config"
exit 7
"""


class Told(NamedTuple):
    """What curl was told: its config, and its arguments and environment."""

    config: str
    surroundings: str

    @property
    def url(self) -> str:
        """Where it was to go."""
        return re.findall('^url = "(.*)"$', self.config, re.MULTILINE)[0]

    @property
    def key(self) -> str | None:
        """The key that it was to bring."""
        found = re.findall('^header = "Authorization: Bearer (.*)"$', self.config, re.MULTILINE)
        return found[0] if found else None


class KeyCase(Case):
    """A case with a curl that can be asked what it was told."""

    def note_curl(self) -> Path:
        """Put a curl first on PATH that notes what it is told instead of sending it."""
        curl = self._folder("bin") / "curl"
        curl.write_text(NOTING_CURL)
        curl.chmod(0o755)
        self.env["PATH"] = f"{curl.parent}:{self.env['PATH']}"
        self.env["GPT_IMAGE2_RETRIES"] = "0"
        return curl

    def told(self, curl: Path) -> Told | None:
        """Return what the noting curl was told since it was last asked."""
        notes = [Path(f"{curl}.{name}") for name in ("config", "surroundings")]
        if not notes[0].exists():
            return None
        config, surroundings = (note.read_text() for note in notes)
        for note in notes:
            note.unlink()
        return Told(config, surroundings)

    def generate(self, *argv: str, env: Mapping[str, str] | None = None) -> Run:
        """Make a picture."""
        return self.check(self.run_tool("generate", "a fox", *argv, env=env), 0)

    def bearer(self, api: Api) -> str | None:
        """Return the key that the last POST brought."""
        return api.posts[-1].headers.get("authorization")

    def assert_hidden(self, run: Run, *secrets: str) -> None:
        """Assert that a run printed no spelling of these."""
        for secret in secrets:
            for form in spellings(secret):
                self.assertNotIn(form, run.out + run.err, f"\n{run}")


def spellings(key: str) -> list[str]:
    """Return a key raw, URL-encoded, and in base64, alone and behind "Bearer "."""
    encoded = [b64encode(text.encode()).decode()[12:-4] for text in (key, f"Bearer {key}")]
    return [key, quote(key, safe=""), *encoded]


class Rule(NamedTuple):
    """One case of the rules: what is set where, where that leads, and the key that goes along."""

    name: str
    key: str | None
    url: str
    config: Mapping[str, Any] = {}
    env: Mapping[str, str] = {}
    flags: Sequence[str] = ()


RULES = (
    Rule("a flag's key goes to OpenAI", FLAG_KEY, OPENAI, flags=FLAG),
    Rule(
        "a flag's key goes to a flag's base", FLAG_KEY, OTHER, flags=(*FLAG, "--base-url", OTHER)
    ),
    Rule("a flag's key goes to the file's base, before its", FLAG_KEY, RELAY, RELAY_FILE, {}, FLAG),
    Rule("the environment's key goes to the file's base", ENV_KEY, RELAY, {"base_url": RELAY}, IN_ENV),
    Rule("... and to a flag's", ENV_KEY, OTHER, {}, IN_ENV, ["--base-url", OTHER]),
    Rule("... and to OPENAI_BASE_URL", ENV_KEY, RELAY, {}, {**IN_ENV, "OPENAI_BASE_URL": RELAY}),
    Rule("the file's key comes before the environment's", FILE_KEY, RELAY, RELAY_FILE, IN_ENV),
    Rule("the environment's key comes before OPENAI_API_KEY", ENV_KEY, OPENAI, {}, {**IN_ENV, **IN_OPENAI}),
    Rule("the file's key goes to OpenAI where the file has no base", FILE_KEY, OPENAI, IN_FILE),
    Rule("... not to a flag's base", None, OTHER, IN_FILE, {}, ["--base-url", OTHER]),
    Rule("... not to the environment's", None, OTHER, IN_FILE, {"GPT_IMAGE2_BASE_URL": OTHER}),
    Rule("... not to OPENAI_BASE_URL", None, OTHER, IN_FILE, {"OPENAI_BASE_URL": OTHER}),
    Rule("... not to a flag's provider", None, HK, IN_FILE, {}, ["--provider", "openai-hk"]),
    Rule("... but to the file's own provider", FILE_KEY, HK, {"provider": "openai-hk", **IN_FILE}),
    Rule("the file's key stays when a flag changes the host", None, OTHER, RELAY_FILE, {}, ["--base-url", OTHER]),
    Rule("... and the environment's goes instead", ENV_KEY, OTHER, RELAY_FILE, IN_ENV, ["--base-url", OTHER]),
    Rule("... a port is another host", None, RELAY, RELAY_FILE, {}, ["--base-url", "https://relay.example:8443"]),
    Rule("... plain http is another", None, RELAY, RELAY_FILE, {}, ["--base-url", "http://relay.example", "--allow-http"]),
    Rule("... a longer name is another", None, RELAY, RELAY_FILE, {}, ["--base-url", "relay.example.evil.example"]),
    Rule("another path is the same host", FILE_KEY, "https://relay.example/openai", RELAY_FILE, {}, ["--base-url", "https://Relay.example:443/openai"]),
)
