"""Which key goes to which host, and that no key ever shows."""

from __future__ import annotations

import re
from base64 import b64encode
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence
from urllib.parse import quote

from tests.pictures import png
from tests.support import Api, Case, Reply, Run, answer, refusal

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
        [url] = re.findall('^url = "(.*)"$', self.config, re.MULTILINE)
        return str(url)

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


def echoes(key: str) -> list[str]:
    """Return a key as servers echo it: raw, URL-encoded, in base64 alone or as a whole header."""
    encoded = quote(key, safe="")
    lower_case = re.sub("%..", lambda match: match[0].lower(), encoded)
    return [key, encoded, lower_case, base64(key), base64(f"Bearer {key}")]


def spellings(key: str) -> list[str]:
    """Return what must not be seen: of base64 the middle, which no neighbour of the key changes."""
    *plain, alone, in_header = echoes(key)
    return [*plain, alone[4:-4], in_header[12:-4]]


def base64(text: str) -> str:
    """Return text in base64."""
    return b64encode(text.encode()).decode()


class TestRules(KeyCase):
    """The key and the host that curl is told, wherever in the world that is."""

    def setUp(self) -> None:
        super().setUp()
        self.curl = self.note_curl()

    def goes(
        self,
        key: str,
        url: str,
        *flags: str,
        config: Mapping[str, Any] = {},
        env: Mapping[str, str] = {},
    ) -> None:
        """Assert that a key is sent to a URL."""
        told, run = self.asked(flags, config, env)
        self.check(run, 7)
        assert told, run
        self.assertEqual((told.key, told.url), (key, f"{url}/images/generations"), run)
        self.assertNotIn(key, told.surroundings)
        self.assert_hidden(run, key)

    def stays(
        self,
        *flags: str,
        config: Mapping[str, Any] = {},
        env: Mapping[str, str] = {},
    ) -> None:
        """Assert that there is no key for the host, so that nothing is sent."""
        told, run = self.asked(flags, config, env)
        self.check(run, 3)
        self.assertIsNone(told, run)
        self.assert_hidden(run, FILE_KEY, PROFILE_KEY, OPENAI_KEY)

    def asked(
        self, flags: Sequence[str], config: Mapping[str, Any], env: Mapping[str, str]
    ) -> tuple[Told | None, Run]:
        """Run the tool, and return what it told curl."""
        self.configure(**config)
        run = self.run_tool("generate", "a fox", *flags, env=env)
        return self.told(self.curl), run

    def test_a_flags_key_goes_to_the_base_in_force(self) -> None:
        everything = {**IN_ENV, **PAIR}
        self.goes(FLAG_KEY, OPENAI, *FLAG)
        self.goes(FLAG_KEY, RELAY, *FLAG, config=RELAY_FILE, env=everything)
        self.goes(FLAG_KEY, OTHER, *FLAG, "--base-url", OTHER, config=RELAY_FILE, env=everything)

    def test_so_does_the_environments(self) -> None:
        self.goes(ENV_KEY, OPENAI, env={**IN_ENV, **IN_OPENAI})
        self.goes(ENV_KEY, RELAY, env={**IN_ENV, **PAIR})
        self.goes(ENV_KEY, RELAY, config={"base_url": RELAY}, env=IN_ENV)
        self.goes(ENV_KEY, OTHER, "--base-url", OTHER, config=RELAY_FILE, env=IN_ENV)

    def test_a_files_key_goes_to_the_files_base(self) -> None:
        self.goes(FILE_KEY, RELAY, config=RELAY_FILE, env={**IN_ENV, **IN_OPENAI})
        self.goes(FILE_KEY, OPENAI, config=IN_FILE)
        self.goes(FILE_KEY, HK, config={"provider": "openai-hk", **IN_FILE})

    def test_and_nowhere_else(self) -> None:
        self.stays("--base-url", OTHER, config=RELAY_FILE, env=IN_OPENAI)
        self.stays("--base-url", OTHER, config=IN_FILE)
        self.stays("--provider", "openai-hk", config=IN_FILE)
        self.stays(config=IN_FILE, env={"GPT_IMAGE2_BASE_URL": OTHER})
        self.stays(config=IN_FILE, env={"OPENAI_BASE_URL": OTHER})

    def test_what_counts_as_the_same_host(self) -> None:
        path = "https://relay.example/other/path"
        self.goes(FILE_KEY, path, "--base-url", path, config=RELAY_FILE)
        self.stays("--base-url", "relay.example:8443", config=RELAY_FILE)
        self.stays("--base-url", "relay.example.other.example", config=RELAY_FILE)
        self.stays("--base-url", "http://relay.example", "--allow-http", config=RELAY_FILE)

    def test_a_profiles_key_goes_to_the_profiles_base(self) -> None:
        own = {"base_url": OTHER, "api_key": PROFILE_KEY}
        profiles = {"own": own, "host": {"base_url": OTHER}, "key": {"api_key": PROFILE_KEY}}
        config = {**RELAY_FILE, "profiles": profiles}
        self.goes(FILE_KEY, RELAY, config=config)
        self.goes(PROFILE_KEY, OTHER, "--profile", "own", config=config)
        self.goes(PROFILE_KEY, RELAY, "--profile", "key", config=config)
        self.goes(ENV_KEY, OTHER, "--profile", "host", config=config, env=IN_ENV)
        self.stays("--profile", "host", config=config)
        self.stays("--profile", "own", "--base-url", OPENAI, config=config)

    def test_openai_api_key_and_openai_base_url_are_a_pair(self) -> None:
        self.goes(OPENAI_KEY, RELAY, env=PAIR)
        self.goes(OPENAI_KEY, RELAY, "--base-url", RELAY, env=PAIR)
        self.stays("--base-url", OTHER, env=PAIR)
        self.stays("--base-url", OPENAI, env=PAIR)
        self.stays(config={"base_url": OTHER}, env=PAIR)

    def test_openai_api_key_alone_belongs_to_openai(self) -> None:
        self.goes(OPENAI_KEY, OPENAI, env=IN_OPENAI)
        self.stays("--base-url", RELAY, env=IN_OPENAI)
        self.stays("--base-url", "api.openai.com.relay.example", env=IN_OPENAI)
        self.stays(config={"base_url": RELAY}, env=IN_OPENAI)
        self.stays(env={**IN_OPENAI, "GPT_IMAGE2_BASE_URL": RELAY})

    def test_without_a_key(self) -> None:
        self.stays()
        self.stays("--base-url", RELAY)

    def test_plain_http_gets_no_key(self) -> None:
        plain = "http://relay.example/v1"
        told, run = self.asked(["--base-url", plain, *FLAG], {}, {})
        self.check(run, 2)
        self.assertIsNone(told)
        self.assertIn("--allow-http", run.err)
        self.goes(FLAG_KEY, plain, "--base-url", plain, "--allow-http", *FLAG)
        self.goes(FILE_KEY, plain, config={"base_url": plain, "allow_http": True, **IN_FILE})
        self.goes(FLAG_KEY, "http://[::1]:9/v1", "--base-url", "[::1]:9", *FLAG)

    def test_the_sandbox_gets_none(self) -> None:
        marker = self.tmp / "command-ran"
        config = {"base_url": RELAY, "api_key_command": ["touch", str(marker)]}
        told, run = self.asked(["--sandbox"], config, {**IN_ENV, **PAIR})
        self.check(run, 7)
        assert told
        self.assertRegex(told.url, r"\Ahttp://127\.0\.0\.1:\d+/v1/images/generations\Z")
        self.assertNotIn("sk-from", told.config + told.surroundings)
        self.assertFalse(marker.exists())


class TestLoopback(KeyCase):
    """A server on this machine needs no key, and gets none that is not its own."""

    def setUp(self) -> None:
        super().setUp()
        self.api = self.serve(otherwise=answer(png(8, 8)))
        self.at_api = {"GPT_IMAGE2_BASE_URL": self.api.base_url}

    def test_its_own_keys(self) -> None:
        self.configure(base_url=self.api.base_url, api_key=FILE_KEY)
        self.generate(env={**IN_ENV, **IN_OPENAI})
        self.assertEqual(self.bearer(self.api), f"Bearer {FILE_KEY}")
        self.configure()
        self.generate(env={**self.at_api, **IN_ENV})
        self.assertEqual(self.bearer(self.api), f"Bearer {ENV_KEY}")
        self.generate(env={**IN_OPENAI, "OPENAI_BASE_URL": self.api.base_url})
        self.assertEqual(self.bearer(self.api), f"Bearer {OPENAI_KEY}")

    def test_no_other(self) -> None:
        self.generate(env={**self.at_api, **IN_OPENAI})
        self.assertIsNone(self.bearer(self.api))
        self.configure(api_key=FILE_KEY)
        self.generate(env={**self.at_api, **PAIR})
        self.assertIsNone(self.bearer(self.api))
        self.configure(**RELAY_FILE)
        self.generate("--base-url", self.api.base_url)
        self.assertIsNone(self.bearer(self.api))

    def test_not_even_another_ports(self) -> None:
        neighbour = self.serve(otherwise=answer(png(8, 8)))
        headers = {"X-Auth-Token": PROFILE_KEY, "X-Team": "foxes"}
        self.configure(base_url=neighbour.base_url, api_key=FILE_KEY, headers=headers)
        self.generate("--base-url", self.api.base_url)
        self.assertIsNone(self.bearer(self.api))
        self.assertNotIn(PROFILE_KEY, str(self.api))
        self.no_request(neighbour)


class TestSources(KeyCase):
    """A file's key: api_key_command, else api_key_env, else api_key."""

    def setUp(self) -> None:
        super().setUp()
        self.api = self.serve(otherwise=answer(png(8, 8)))

    def write(self, **settings: Any) -> None:
        """Write a config file for the server."""
        self.configure(**{"base_url": self.api.base_url, **settings})

    def refused(self, pattern: str, *argv: str) -> Run:
        """Assert exit 3 in one line that matches, with nothing sent."""
        run = self.check(self.run_tool("generate", "a fox", *argv), 3)
        self.assertRegex(run.err, rf"\Agpt-image2: .*{pattern}.*\n\Z")
        self.no_request(self.api)
        return run

    def test_command_before_variable_before_text(self) -> None:
        self.env["FOX_KEY"] = "sk-of-the-variable"
        settings = {"api_key_command": "echo sk-of-the-command", "api_key_env": "FOX_KEY"}
        for key in ("sk-of-the-command", "sk-of-the-variable", FILE_KEY):
            self.write(**settings, api_key=FILE_KEY)
            self.generate()
            self.assertEqual(self.bearer(self.api), f"Bearer {key}")
            if settings:
                del settings[next(iter(settings))]

    def test_the_command_runs_without_a_shell(self) -> None:
        text = "sk-$HOME;`id`|cat>made"
        for command in (f"echo '{text}'", ["echo", text], "echo " + text.replace("`", "'`'")):
            with self.subTest(command):
                self.write(api_key_command=command)
                self.generate()
                self.assertEqual(self.bearer(self.api), f"Bearer {text}")
        self.assertFalse((self.work / "made").exists())

    def test_a_command_that_fails(self) -> None:
        for command in (
            "false",
            "true",
            "no-such-program",
            ["sh", "-c", f"echo {FILE_KEY}; false"],
        ):
            with self.subTest(command):
                self.write(api_key_command=command, api_key=PROFILE_KEY)
                self.assert_hidden(self.refused("api_key_command"), FILE_KEY, PROFILE_KEY)

    def test_a_command_is_not_run_for_another_host(self) -> None:
        marker = self.tmp / "command-ran"
        self.configure(base_url=RELAY, api_key_command=["touch", str(marker)])
        self.generate("--base-url", self.api.base_url)
        self.assertFalse(marker.exists())

    def test_an_empty_variable_falls_through_with_a_warning(self) -> None:
        for env in ({}, {"FOX_KEY": ""}, {"FOX_KEY": " \n"}):
            with self.subTest(env):
                self.write(api_key_env="FOX_KEY", api_key=FILE_KEY)
                run = self.generate(env=env)
                self.assertRegex(run.err, "warning: .*FOX_KEY")
                self.assertEqual(self.bearer(self.api), f"Bearer {FILE_KEY}")
        self.write(api_key_env="FOX_KEY")
        self.assertIn("FOX_KEY", self.generate(env=IN_ENV).err)
        self.assertEqual(self.bearer(self.api), f"Bearer {ENV_KEY}")

    def test_keys_are_undressed(self) -> None:
        dresses = (" '{}'\r\n", "Bearer {}", "bearer  {}", '\ufeff"Bearer {}"')
        for dress in dresses:
            with self.subTest(dress):
                self.generate("--base-url", self.api.base_url, "--api-key", dress.format(FLAG_KEY))
                self.assertEqual(self.bearer(self.api), f"Bearer {FLAG_KEY}")

    def test_keys_that_cannot_be_one_are_refused_unseen(self) -> None:
        for key in ("sk-secret one-secret", "sk-secret\nsk-secret", "sk-secret\x07", "sk-secreté"):
            with self.subTest(key):
                self.write(api_key=key)
                self.assertNotIn("secret", self.refused("the key from").err)

    def test_placeholders_are_refused(self) -> None:
        for key in (
            "sk-...",
            "YOUR-KEY",
            "<your-key>",
            "${OPENAI_API_KEY}",
        ):
            with self.subTest(key):
                self.write(api_key=key)
                self.refused("placeholder")

    def test_an_empty_flag_is_refused(self) -> None:
        run = self.run_tool("generate", "a fox", "--base-url", self.api.base_url, "--api-key", "")
        self.assertIn("--api-key", self.check(run, 2).err)
        self.no_request(self.api)

    def test_a_key_in_the_wrong_place_is_not_shown(self) -> None:
        for setting in (
            {"api_key_env": ODD_KEY},
            {"auth_header": f"Authorization: Bearer {ODD_KEY}"},
            {"headers": f"Authorization: Bearer {ODD_KEY}"},
            {"api_key_command": ODD_KEY},
            {"api_key": [ODD_KEY]},
        ):
            with self.subTest(setting):
                self.write(**setting)
                run = self.run_tool("config", "--show")
                self.assertNotIn("Traceback", run.err)
                self.assert_hidden(run, ODD_KEY)

    def test_a_key_on_the_command_line_is_warned_of(self) -> None:
        run = self.generate("--base-url", self.api.base_url, *FLAG, "--json")
        self.assertRegex(run.err, "warning: --api-key .*ps")
        self.assertRegex("\n".join(run.json["warnings"]), "--api-key")


class TestNeverShown(KeyCase):
    """The key is in no output and in no file, whatever the server does with it."""

    def assert_gone(self) -> None:
        """Assert that no file but the config holds the key."""
        config = self.config / "gpt-image-2" / "config.json"
        forms = [form.encode() for form in spellings(ODD_KEY)]
        files = [path for path in self.tmp.rglob("*") if path.is_file() and path != config]
        self.assertTrue(files)
        holders = [path for path in files if any(form in path.read_bytes() for form in forms)]
        self.assertEqual(holders, [])

    def test_by_no_command(self) -> None:
        api = self.serve(answer(png(8, 8)))
        proxy = f"http://fox:{FLAG_KEY}@proxy.example"
        headers = {"X-Auth-Token": PROFILE_KEY}
        self.configure(base_url=api.base_url, api_key=ODD_KEY, headers=headers, proxy=proxy)
        secrets = (ODD_KEY, PROFILE_KEY, FLAG_KEY)
        for words in (
            "generate fox --verbose",
            "generate fox --dry-run --verbose",
            "generate fox --dry-run --verbose --json",
            "config --show",
            "config --check --verbose",
        ):
            with self.subTest(words):
                self.assert_hidden(self.check(self.run_tool(*words.split()), 0), *secrets)
        self.assertEqual(api.posts[0].headers["authorization"], f"Bearer {ODD_KEY}")
        self.assert_gone()

    def test_by_no_server_that_echoes_it(self) -> None:
        echo = " ".join(echoes(ODD_KEY))
        header = [("X-Request-Id", ODD_KEY), ("X-Echo", echo)]
        for code, reply in (
            (4, refusal(401, "invalid_api_key", f"Incorrect API key: {echo}", headers=header)),
            (1, refusal(400, echo, echo, type=echo, param=echo)),
            (8, refusal(500, "server_error", echo, headers=header)),
            (8, answer(echo=echo)),
            (8, Reply(200, echo.encode())),
            (1, Reply(302, headers=[("Location", f"https://relay.example/?key={ODD_KEY}")])),
            (8, answer(png(8, 8), echo=echo)._replace(cut=300)),
        ):
            with self.subTest(code=code, reply=reply):
                api = self.serve(reply)
                self.configure(base_url=api.base_url, api_key=ODD_KEY)
                run = self.run_tool("generate", "a fox", "--new", "--json", "--verbose")
                self.assert_hidden(self.check(run, code), ODD_KEY)
        self.assert_gone()
