"""Settings: where each value comes from, which key goes to which host, and the config command."""

from __future__ import annotations

import json
import os
import re
import subprocess
from base64 import b64encode
from pathlib import Path
from typing import Any, Mapping, NamedTuple
from unittest import mock
from urllib.parse import quote

from tests.case import Case, Run, SystemCase
from tests.pictures import png
from tests.server import KEY, Api, Reply, Request, answer, models, page, refusal

OPENAI = "https://api.openai.com/v1"
PICTURE = png(8, 8)

FLAG_KEY = "sk-from-the-flag-0123456789"
ENV_KEY = "sk-from-the-environment-0123456789"
FILE_KEY = "sk-from-the-file-0123456789"
PROFILE_KEY = "sk-from-the-profile-0123456789"
OPENAI_KEY = "sk-from-openai-api-key-0123456789"
ODD_KEY = "sk-test/0123+4567=89&abc?def~ghi"  # every spelling of it differs


class SettingsCase(Case):
    """A case around the usual config file, that asks the tool what it would do."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.config / "gpt-image-2" / "config.json"

    def shown(self, *argv: str) -> dict[str, Any]:
        """Return every setting's value as `config --show` has it."""
        run = self.check(self.run_tool("config", "--show", "--json", *argv), 0)
        return {key: row["value"] for key, row in run.json["settings"].items()}

    def planned(self, *argv: str, env: Mapping[str, str] = {}) -> dict[str, Any]:
        """Return what `generate --dry-run` would send."""
        argv = ("generate", "a fox", "--dry-run", "--json", *argv)
        plan = self.check(self.run_tool(*argv, env=env), 0).json["dry_run"]
        assert isinstance(plan, dict)
        return plan

    def model(self, *argv: str) -> Any:
        """Return the model in force, by which tests tell config files apart."""
        return self.planned(*argv)["fields"]["model"]

    def refused(self, code: int, fact: str, *argv: str, env: Mapping[str, str] = {}) -> Run:
        """Assert that a call ends with one line that tells a fact, and leaves nothing."""
        run = self.check(self.run_tool("generate", "a fox", *argv, env=env), code)
        self.assertRegex(run.err, rf"\Agpt-image2: .*{re.escape(fact)}.*\n\Z")
        self.assertEqual((run.out, self.listing(), self.jobs()), ("", [], []))
        return run

    def serve_configured(self, **settings: Any) -> Api:
        """Start a server, and write the config file that leads to it."""
        api = self.serve(otherwise=answer(PICTURE))
        self.configure(**{"base_url": api.base_url, "api_key": KEY, **settings})
        return api

    def generate(self, *argv: str, env: Mapping[str, str] | None = None) -> Run:
        """Make a picture."""
        return self.check(self.run_tool("generate", "a fox", *argv, env=env), 0)


# ---- Where a value comes from -----------------------------------------------------------------


class Layers(NamedTuple):
    """A different value of one setting for each place that it may come from."""

    key: str
    default: Any
    environment: Any
    file: Any
    flag: Any = None  # None: there is no such option


SHOWN = (
    Layers(
        "base_url", OPENAI, "https://e.example/v1", "https://f.example/v1", "https://g.example/v1"
    ),
    Layers("provider", "openai", "azure", "nodekey", "openai-hk"),
    Layers("timeout", 600, 11, 12, 13),
    Layers("connect_timeout", 20, 21, 22, 23),
    Layers("retries", 2, 3, 4),
    Layers("auth_header", "Authorization: Bearer", "x-environment", "x-file"),
    Layers("image_field", "auto", "image", "image[]"),
    Layers("proxy", None, "http://e.example:1", "http://f.example:1"),
    Layers("cacert", None, "/environment.pem", "/file.pem"),
    Layers("allow_http", False, True, False),
    Layers("history", True, False, True),
)
ASKED = (
    Layers("model", "gpt-image-2", "gpt-image-2.5-flare", "gpt-image-2.6-flare", "my-model"),
    Layers("size", None, "1280x720", "720x1280", "1024x1024"),
    Layers("quality", None, "low", "medium", "high"),
    Layers("format", None, "webp", "jpeg", "png"),
    Layers("output_dir", ".", "from-environment", "from-file", "from-flag"),
)


class TestPrecedence(SettingsCase):
    """Flag over file over environment over default, key by key."""

    def values(self, *flags: str) -> dict[str, Any]:
        """Return the settings of SHOWN as they are shown, those of ASKED as they would be sent."""
        plan = self.planned(*flags)
        fields = plan["fields"]
        folder = os.path.relpath(os.path.dirname(plan["paths"][0]), self.work)
        asked = {name: fields.get(name) for name in ("model", "size", "quality")}
        asked.update(format=fields.get("output_format"), output_dir=folder)
        accepted = [word for row in SHOWN for word in flag_of(row) if word in flags]
        return {**self.shown(*accepted), **asked}

    def test_each_setting_from_each_place(self) -> None:
        table = (*SHOWN, *ASKED)
        for row in table:
            self.env[f"GPT_IMAGE2_{row.key.upper()}"] = str(row.environment)
        self.configure(**{row.key: row.file for row in table})
        by_flag = self.values(*(word for row in table for word in flag_of(row)))
        by_file = self.values()
        self.path.unlink()
        by_environment = self.values()
        self.env = {name: v for name, v in self.env.items() if not name.startswith("GPT_IMAGE2_")}
        by_default = self.values()
        for row in table:
            with self.subTest(row.key):
                self.assertEqual(by_flag[row.key], row.file if row.flag is None else row.flag)
                self.assertEqual(by_file[row.key], row.file)
                self.assertEqual(by_environment[row.key], row.environment)
                self.assertEqual(by_default[row.key], row.default)

    def test_each_key_for_itself(self) -> None:
        self.configure(quality="high")
        self.env.update(GPT_IMAGE2_QUALITY="low", GPT_IMAGE2_MODEL="gpt-image-2.5-flare")
        fields = self.planned("--size", "1K")["fields"]
        wanted = {"model": "gpt-image-2.5-flare", "quality": "high", "size": "1024x1024"}
        self.assertEqual({**fields, "prompt": None}, {**wanted, "prompt": None})

    def test_an_empty_variable_sets_nothing(self) -> None:
        self.env.update(GPT_IMAGE2_TIMEOUT="", GPT_IMAGE2_BASE_URL="", OPENAI_BASE_URL="")
        shown = self.shown()
        self.assertEqual((shown["timeout"], shown["base_url"]), (600, OPENAI))

    def test_a_wrong_value_is_refused_by_its_source(self) -> None:
        for variable, value in (
            ("GPT_IMAGE2_TIMEOUT", "1_0"),
            ("GPT_IMAGE2_HEADERS", "X-Team: foxes"),
            ("GPT_IMAGE2_QUALITY", "ultra"),
        ):
            with self.subTest(variable=variable, value=value):
                self.refused(3, variable, "--dry-run", env={variable: value})


def flag_of(row: Layers) -> list[str]:
    """Return the option that sets a row's key, and its value, where there is one."""
    return [] if row.flag is None else [f"--{row.key.replace('_', '-')}", str(row.flag)]


class TestFiles(SettingsCase):
    """Which config file is in force, and what it can be that it should not be."""

    def write(self, path: Path, **settings: Any) -> Path:
        """Write a config file anywhere."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
        path.chmod(0o600)
        return path

    def test_the_first_of_four_places_that_exists(self) -> None:
        places = [
            self.config / "gpt-image-2" / "config.json",
            self.home / ".config" / "gpt-image-2" / "config.json",
            self.home / ".gpt-image-2-config.json",
            self.home / ".hermes" / "gpt-image-2-config.json",
        ]
        for number, place in enumerate(places):
            self.write(place, model=f"place-{number}")
        for number, place in enumerate(places):
            self.assertEqual(self.model(), f"place-{number}")
            if number == 1:  # what it is without XDG_CONFIG_HOME
                del self.env["XDG_CONFIG_HOME"]
                self.assertEqual(self.model(), "place-1")
            place.unlink()
        self.assertEqual(self.model(), "gpt-image-2")

    def test_flag_and_variable_choose_the_file(self) -> None:
        self.configure(model="usual")
        flagged = self.write(self.tmp / "flagged.json", model="flagged")
        named = self.write(self.tmp / "named.json", quality="low")
        self.env.update(GPT_IMAGE2_CONFIG=str(named), GPT_IMAGE2_MODEL="environment")
        self.assertEqual(self.model(), "environment")  # nothing of the usual file counts
        self.assertEqual(self.model("--config", str(flagged)), "flagged")
        self.refused(3, "no.json", "--config", "no.json")
        self.refused(3, "no.json", env={"GPT_IMAGE2_CONFIG": "no.json"})

    def test_a_profile_lies_over_the_top_level(self) -> None:
        profiles = {"home": {"timeout": 11}, "work": {"timeout": 22, "retries": 0}}
        top = {"timeout": 99, "retries": 7, "profiles": profiles}
        for chosen, flags, variable, wanted in (
            (None, [], None, (99, 7)),
            (None, ["--profile", "home"], None, (11, 7)),
            (None, [], "work", (22, 0)),
            (None, ["--profile", "home"], "work", (11, 7)),
            ("home", [], "work", (11, 7)),
            ("home", ["--profile", "work"], None, (22, 0)),
        ):
            with self.subTest(file=chosen, flags=flags, variable=variable):
                self.configure(profile=chosen, **top)
                self.env["GPT_IMAGE2_PROFILE"] = variable or ""
                shown = self.shown(*flags)
                self.assertEqual((shown["timeout"], shown["retries"]), wanted)

    def test_an_unknown_profile(self) -> None:
        profiles: dict[str, Any] = {"home": {}, "work": {}}
        for settings, argv in (
            ({"profile": "wrok", "profiles": profiles}, []),
            ({"profiles": profiles}, ["--profile", "wrok"]),
        ):
            with self.subTest(argv):
                self.configure(**settings)
                run = self.refused(3, "wrok", "--dry-run", *argv)
                self.assertRegex(run.err, "home, work.*did you mean work")
        self.path.unlink()
        self.refused(3, "home", "--dry-run", "--profile", "home")

    def test_files_that_hold_no_settings(self) -> None:
        for content in (b'{"model": ', b"", b"[]", b"\xff{}", b"[" * 100_000):
            with self.subTest(content[:20]):
                self.configure()
                self.path.write_bytes(content)
                self.refused(3, str(self.path), "--dry-run")
        self.path.unlink()
        self.path.mkdir()
        self.refused(3, str(self.path), "--dry-run")

    def test_values_of_the_wrong_kind(self) -> None:
        for key, value in (
            ("base_url", 7),
            ("model", ["gpt-image-2"]),
            ("quality", "ultra"),
            ("timeout", "soon"),
            ("timeout", True),
            ("retries", -1),
            ("allow_http", "maybe"),
            ("headers", {"X-Team": "a\r\nX-Forged: b"}),
            ("headers", {"X Team": "a"}),
            ("auth_header", "a key\n"),
            ("api_key_command", 7),
            ("profiles", []),
        ):
            with self.subTest(key=key, value=value):
                self.configure(**{key: value})
                self.assertIn(key, self.refused(3, str(self.path), "--dry-run").err)

    def test_an_unknown_key_is_a_warning_with_the_nearest(self) -> None:
        self.configure(qualty="low", profile="home", profiles={"home": {"basse_url": OPENAI}})
        run = self.check(self.run_tool("generate", "a fox", "--dry-run", "--json"), 0)
        for wrong, right in (("qualty", "quality"), ("basse_url", "base_url")):
            with self.subTest(wrong):
                [told] = [line for line in run.json["warnings"] if wrong in line]
                self.assertIn(f"did you mean {right}?", told)
                self.assertIn(told, run.err)

    def test_a_file_that_others_can_read_gets_a_line_that_mends_it(self) -> None:
        for mode in (0o640, 0o604):
            path = self.write(self.tmp / "it's mine.json", model="gpt-image-2")
            path.chmod(mode)
            run = self.check(self.run_tool("config", "--show", "--config", path), 0)
            line = re.search(r"chmod 600 .*", run.err)
            assert line, run
            subprocess.run(["sh", "-c", line[0]], check=True)
            self.assertEqual(path.stat().st_mode & 0o777, 0o600)
            again = self.check(self.run_tool("config", "--show", "--config", path), 0)
            self.assertEqual(again.err, "")


class TestBaseUrl(SettingsCase):
    """What a person types or pastes (test_units has every form), and what follows from it."""

    def test_where_the_request_goes(self) -> None:
        for given, base in (
            ("relay.example", "https://relay.example/v1"),
            ("HTTPS://Relay.Example:8443/v1///", "https://relay.example:8443/v1"),
            ("https://relay.example/v1/images/edits/", "https://relay.example/v1"),
            ("https://gate.example/a/b/openai", "https://gate.example/a/b/openai"),
            ("localhost:8080", "http://localhost:8080/v1"),
        ):
            for flags, env in ((["--base-url", given], {}), ([], {"GPT_IMAGE2_BASE_URL": given})):
                with self.subTest(given, flags=flags):
                    self.env.update(env)
                    endpoint = self.planned(*flags)["endpoint"]
                    self.assertEqual(endpoint, f"{base}/images/generations")

    def test_refusals_name_the_source_and_show_no_password(self) -> None:
        for given in (
            "https://user:hunter2@relay.example/v1",
            "user:hunter2@relay.example",
            "ftp://relay.example",
            "https://relay.example/{v1,v2}",
            'https://relay.example/"v1"',
            "https://relay.example/a b",
            "https://relay.example/\x1b[31m",
            "https://relay.example:99999",
        ):
            for source, flags, env in (
                ("--base-url", ["--base-url", given], {}),
                ("GPT_IMAGE2_BASE_URL", [], {"GPT_IMAGE2_BASE_URL": given}),
                ("OPENAI_BASE_URL", [], {"OPENAI_BASE_URL": given}),
            ):
                with self.subTest(given, source=source):
                    run = self.run_tool("generate", "a fox", *flags, env=env)
                    self.assertIn(run.code, [2] if flags else [2, 3], run)
                    self.assertRegex(run.err, rf"\Agpt-image2: {source}.*\n\Z")
                    self.assertNotRegex(run.err, "hunter2|\x1b")
        self.refused(2, "--base-url", "--base-url", "")
        self.configure(base_url="ftp://relay.example")
        self.refused(3, str(self.path))

    def test_the_provider_names_the_base(self) -> None:
        for provider, base in (
            ("openai", OPENAI),
            ("openai-hk", "https://api.openai-hk.com/v1"),
            ("nodekey", "https://nodekey.xinghanyun.cn/v1"),
        ):
            with self.subTest(provider):
                endpoint = self.planned("--provider", provider)["endpoint"]
                self.assertEqual(endpoint, f"{base}/images/generations")
        self.refused(3, "azure needs a base_url", "--provider", "azure")

    def test_the_host_names_the_provider(self) -> None:
        for base, provider in (
            ("api.openai.com", "openai"),
            ("api.openai-hk.com", "openai-hk"),
            ("nodekey.xinghanyun.cn", "nodekey"),
            ("https://r.openai.azure.com/openai/v1", "azure"),
            ("api.openai.com.relay.example", "generic"),
            ("notopenai.azure.com.example", "generic"),
        ):
            with self.subTest(base):
                self.assertEqual(self.shown("--base-url", base)["provider"], provider)


class TestOnTheWire(SettingsCase):
    """Settings that change what is sent, and through what."""

    def test_headers_and_user_agent(self) -> None:
        team = 'fox "red" \\ tail'
        agent = "Fox/1.0 (den)"
        in_file = self.serve_configured(headers={"X-Team": team}, user_agent=agent)
        self.generate()
        in_env = self.serve_configured()
        headers = json.dumps({"X-Team": team})
        self.generate(env={"GPT_IMAGE2_HEADERS": headers, "GPT_IMAGE2_USER_AGENT": agent})
        for api in (in_file, in_env):
            sent = api.posts[0].headers
            self.assertEqual((sent["x-team"], sent["user-agent"]), (team, agent))

    def test_the_header_that_carries_the_key(self) -> None:
        for settings, name, value in (
            ({}, "authorization", f"Bearer {KEY}"),
            ({"auth_header": "Authorization: Token"}, "authorization", f"Token {KEY}"),
            ({"auth_header": "api-key"}, "api-key", KEY),
            ({"provider": "azure", "model": "my-deployment"}, "api-key", KEY),
        ):
            with self.subTest(settings):
                api = self.serve_configured(**settings)
                self.generate()
                holders = [pair for pair in api.posts[0].headers.items() if KEY in pair[1]]
                self.assertEqual([(n.lower(), v) for n, v in holders], [(name, value)])

    def test_a_proxy_gets_the_request(self) -> None:
        proxy = self.serve(otherwise=answer(PICTURE))
        base = "http://relay.example/v1"
        self.configure(base_url=base, api_key=KEY, allow_http=True, proxy=proxy.origin)
        self.generate()
        self.configure(base_url=base, api_key=KEY, allow_http=True)
        self.generate(env={"http_proxy": proxy.origin})
        targets = [post.target for post in proxy.posts]
        self.assertEqual(targets, [f"{base}/images/generations"] * 2)

    def test_no_proxy_for_loopback(self) -> None:
        proxy = self.serve()
        api = self.serve_configured(proxy=proxy.origin)
        self.generate(env={"http_proxy": proxy.origin, "ALL_PROXY": proxy.origin})
        self.assertEqual(len(api.posts), 1)
        self.no_request(proxy)

    def test_a_ca_file_that_is_not_there(self) -> None:
        api = self.serve_configured(cacert="no.pem")
        self.refused(3, "no.pem")
        self.no_request(api)

    def test_image_field(self) -> None:
        for name in ("a.png", "b.png"):
            (self.work / name).write_bytes(PICTURE)
        for setting, flags, names in (
            ("auto", [], ["image[]", "image[]"]),
            ("image", [], ["image", "image"]),
            ("image", ["--image-field", "image[]"], ["image[]", "image[]"]),
        ):
            with self.subTest(setting=setting, flags=flags):
                api = self.serve_configured(image_field=setting)
                self.check(self.run_tool("edit", "a.png", "b.png", "a fox", *flags), 0)
                self.assertEqual([part.name for part in api.posts[0].uploads], names)


# ---- Keys -------------------------------------------------------------------------------------

RELAY = "https://relay.example/v1"
OTHER = "https://other.example/v1"
PLAIN = "http://relay.example/v1"
HK = "https://api.openai-hk.com/v1"

FLAG = f"--api-key {FLAG_KEY}"
IN_ENV = {"GPT_IMAGE2_API_KEY": ENV_KEY}
IN_OPENAI = {"OPENAI_API_KEY": OPENAI_KEY}
PAIR = {**IN_OPENAI, "OPENAI_BASE_URL": RELAY}
ALL_ENV = {**IN_ENV, **PAIR}
IN_FILE = {"api_key": FILE_KEY}
RELAY_FILE = {"base_url": RELAY, **IN_FILE}
PROFILES = {
    **RELAY_FILE,
    "profiles": {
        "own": {"base_url": OTHER, "api_key": PROFILE_KEY},
        "host": {"base_url": OTHER},
        "key": {"api_key": PROFILE_KEY},
    },
}


class Rule(NamedTuple):
    """A key that goes to a base URL; without one, the call is refused and nothing is sent."""

    key: str | None
    base: str = ""
    flags: str = ""
    config: Mapping[str, Any] = {}
    env: Mapping[str, str] = {}


RULES = (
    # A key from the command line or GPT_IMAGE2_API_KEY goes to the base URL in force.
    Rule(FLAG_KEY, OPENAI, FLAG),
    Rule(FLAG_KEY, RELAY, FLAG, RELAY_FILE, ALL_ENV),
    Rule(FLAG_KEY, OTHER, f"{FLAG} --base-url {OTHER}", RELAY_FILE, ALL_ENV),
    Rule(ENV_KEY, OPENAI, env={**IN_ENV, **IN_OPENAI}),
    Rule(ENV_KEY, RELAY, env=ALL_ENV),
    Rule(ENV_KEY, RELAY, config={"base_url": RELAY}, env=IN_ENV),
    Rule(ENV_KEY, OTHER, f"--base-url {OTHER}", RELAY_FILE, IN_ENV),
    # A file's goes to the file's base URL, whatever its path.
    Rule(FILE_KEY, RELAY, config=RELAY_FILE, env={**IN_ENV, **IN_OPENAI}),
    Rule(FILE_KEY, OPENAI, config=IN_FILE),
    Rule(FILE_KEY, HK, config={"provider": "openai-hk", **IN_FILE}),
    Rule(FILE_KEY, f"{RELAY}/x", f"--base-url {RELAY}/x", RELAY_FILE),
    # A profile's goes to the profile's.
    Rule(FILE_KEY, RELAY, config=PROFILES),
    Rule(PROFILE_KEY, OTHER, "--profile own", PROFILES),
    Rule(PROFILE_KEY, RELAY, "--profile key", PROFILES),
    Rule(ENV_KEY, OTHER, "--profile host", PROFILES, IN_ENV),
    # OPENAI_API_KEY and OPENAI_BASE_URL are a pair; the key alone belongs to OpenAI.
    Rule(OPENAI_KEY, RELAY, env=PAIR),
    Rule(OPENAI_KEY, RELAY, f"--base-url {RELAY}", env=PAIR),
    Rule(OPENAI_KEY, OPENAI, env=IN_OPENAI),
    # Over plain http it goes where that is allowed.
    Rule(FLAG_KEY, PLAIN, f"{FLAG} --base-url {PLAIN} --allow-http"),
    Rule(FILE_KEY, PLAIN, config={"base_url": PLAIN, "allow_http": True, **IN_FILE}),
    Rule(FLAG_KEY, "http://[::1]:9/v1", f"{FLAG} --base-url [::1]:9"),
    # And nowhere else.
    Rule(None),
    Rule(None, "", f"--base-url {RELAY}"),
    Rule(None, "", f"--base-url {OTHER}", RELAY_FILE, IN_OPENAI),
    Rule(None, "", f"--base-url {OTHER}", IN_FILE),
    Rule(None, "", "--provider openai-hk", IN_FILE),
    Rule(None, config=IN_FILE, env={"GPT_IMAGE2_BASE_URL": OTHER}),
    Rule(None, config=IN_FILE, env={"OPENAI_BASE_URL": OTHER}),
    Rule(None, "", "--base-url relay.example:8443", RELAY_FILE),
    Rule(None, "", "--base-url relay.example.other.example", RELAY_FILE),
    Rule(None, "", "--base-url http://relay.example:443 --allow-http", RELAY_FILE),
    Rule(None, "", "--profile host", PROFILES),
    Rule(None, "", f"--profile own --base-url {OPENAI}", PROFILES),
    Rule(None, "", f"--base-url {OTHER}", env=PAIR),
    Rule(None, "", f"--base-url {OPENAI}", env=PAIR),
    Rule(None, config={"base_url": OTHER}, env=PAIR),
    Rule(None, "", f"--base-url {RELAY}", env=IN_OPENAI),
    Rule(None, "", "--base-url api.openai.com.relay.example", env=IN_OPENAI),
    Rule(None, "", "--base-url http://api.openai.com --allow-http", env=IN_OPENAI),
    Rule(None, config={"base_url": RELAY}, env=IN_OPENAI),
    Rule(None, env={**IN_OPENAI, "GPT_IMAGE2_BASE_URL": RELAY}),
)

# It notes what it is told, and sends nothing.
NOTING_CURL = """#!/bin/sh
{ printf '%s\\n' "$@"; env; } >"$0.surroundings"
cat >"$0.config"
exit 7
"""


class KeyCase(SettingsCase):
    """A case that looks where keys go."""

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


class TestWhichKeyGoesWhere(KeyCase):
    """The key and the host that curl is told, wherever in the world that is."""

    def setUp(self) -> None:
        super().setUp()
        self.curl = self.new_folder("bin") / "curl"
        self.curl.write_text(NOTING_CURL)
        self.curl.chmod(0o755)
        self.env["PATH"] = f"{self.curl.parent}:{self.env['PATH']}"
        self.env["GPT_IMAGE2_RETRIES"] = "0"

    def told(self, rule: Rule, code: int) -> str:
        """Run the tool, and return the config that curl is given.

        No key may be printed, nor stand in the arguments or the variables of curl.
        """
        notes = [Path(f"{self.curl}.{name}") for name in ("config", "surroundings")]
        for note in notes:
            note.write_text("")
        self.configure(**rule.config)
        run = self.run_tool("generate", "a fox", *rule.flags.split(), env=rule.env)
        told, surroundings = (note.read_text() for note in notes)
        self.check(run, code)
        self.assertNotIn("sk-from", run.out + run.err + surroundings)
        self.assertEqual("PATH=" in surroundings, bool(told))
        return told

    def test_the_rules(self) -> None:
        for rule in RULES:
            with self.subTest(str(rule)):
                told = self.told(rule, 7 if rule.key else 3)
                self.assertEqual(re.findall(r"sk-from[\w-]*", told), [rule.key] * bool(rule.key))
                if rule.key:
                    self.assertIn(f'"Authorization: Bearer {rule.key}"', told)
                    self.assertIn(f'url = "{rule.base}/images/generations"\n', told)
                else:
                    self.assertEqual(told, "")

    def test_plain_http_gets_none(self) -> None:
        self.assertEqual(self.told(Rule(None, flags=f"{FLAG} --base-url {PLAIN}"), 2), "")

    def test_the_sandbox_gets_none(self) -> None:
        marker = self.tmp / "command-ran"
        config = {"base_url": RELAY, "api_key_command": ["touch", str(marker)]}
        told = self.told(Rule(None, flags="--sandbox", config=config, env=ALL_ENV), 7)
        self.assertIn('url = "http://127.0.0.1:', told)
        self.assertNotIn("sk-from", told)
        self.assertFalse(marker.exists())


class TestLoopback(KeyCase):
    """A server on this machine needs no key, and gets none that is not its own."""

    def setUp(self) -> None:
        super().setUp()
        self.api = self.serve(otherwise=answer(PICTURE))
        self.at_api = {"GPT_IMAGE2_BASE_URL": self.api.base_url}

    def test_which_it_gets(self) -> None:
        here, port_9 = self.api.base_url, "http://127.0.0.1:9/v1"
        for name, config, env, flags, key in (
            ("its file's", {"base_url": here, **IN_FILE}, {**IN_ENV, **IN_OPENAI}, [], FILE_KEY),
            ("the environment's", {}, {**self.at_api, **IN_ENV}, [], ENV_KEY),
            ("the pair's", {}, {**IN_OPENAI, "OPENAI_BASE_URL": here}, [], OPENAI_KEY),
            ("not OpenAI's", {}, {**self.at_api, **IN_OPENAI}, [], None),
            ("nor another pair's", IN_FILE, {**self.at_api, **PAIR}, [], None),
            ("nor another file's", RELAY_FILE, {}, ["--base-url", here], None),
            ("nor another port's", {"base_url": port_9, **IN_FILE}, {}, ["--base-url", here], None),
        ):
            with self.subTest(name):
                self.configure(**config)
                self.generate(*flags, env=env)
                self.assertEqual(self.bearer(self.api), key and f"Bearer {key}")

    def test_the_headers_of_a_profile_go_to_its_own_host(self) -> None:
        profile = {"base_url": self.api.base_url, "headers": {"X-Auth-Token": PROFILE_KEY}}
        self.configure(base_url=RELAY, profiles={"mine": profile})
        self.generate("--profile", "mine")
        self.assertEqual(self.api.posts[0].headers["x-auth-token"], PROFILE_KEY)
        other = self.serve(otherwise=answer(PICTURE))
        run = self.generate("--profile", "mine", "--base-url", other.base_url)
        self.assertNotIn(PROFILE_KEY, str(other))
        self.assertRegex(run.err, "warning: .*X-Auth-Token")


class TestSources(KeyCase):
    """A file's key: api_key_command, else api_key_env, else api_key."""

    def setUp(self) -> None:
        super().setUp()
        self.api = self.serve(otherwise=answer(PICTURE))

    def write(self, **settings: Any) -> None:
        """Write a config file for the server."""
        self.configure(**{"base_url": self.api.base_url, **settings})

    def sent(self, key: str, *argv: str, env: Mapping[str, str] | None = None) -> Run:
        """Assert that a key is sent."""
        run = self.generate(*argv, env=env)
        self.assertEqual(self.bearer(self.api), f"Bearer {key}")
        return run

    def test_command_before_variable_before_text(self) -> None:
        self.env["FOX_KEY"] = "sk-of-the-variable"
        settings: dict[str, Any] = {}
        for name, value, key in (
            ("api_key", FILE_KEY, FILE_KEY),
            ("api_key_env", "FOX_KEY", "sk-of-the-variable"),
            ("api_key_command", "echo sk-of-the-command", "sk-of-the-command"),
        ):
            settings[name] = value
            with self.subTest(key):
                self.write(**settings)
                self.sent(key)

    def test_the_command_runs_without_a_shell(self) -> None:
        text = "sk-$HOME;`id`|cat>made"
        for command in (f"echo '{text}'", ["echo", text]):
            with self.subTest(command):
                self.write(api_key_command=command)
                self.sent(text)
        self.assertFalse((self.work / "made").exists())

    def test_a_command_that_fails(self) -> None:
        for command in ("false", "true", "no-such-program", f"sh -c 'echo {FILE_KEY}; false'"):
            with self.subTest(command):
                self.write(api_key_command=command, api_key=PROFILE_KEY)
                self.assert_hidden(self.refused(3, "api_key_command"), FILE_KEY, PROFILE_KEY)
        self.no_request(self.api)

    def test_a_command_is_not_run_for_another_host(self) -> None:
        marker = self.tmp / "command-ran"
        self.configure(base_url=RELAY, api_key_command=["touch", str(marker)])
        self.generate("--base-url", self.api.base_url)
        self.assertFalse(marker.exists())

    def test_an_empty_variable_falls_through_with_a_warning(self) -> None:
        for env in ({}, {"FOX_KEY": ""}, {"FOX_KEY": " \n"}):
            with self.subTest(env):
                self.write(api_key_env="FOX_KEY", api_key=FILE_KEY)
                self.assertRegex(self.sent(FILE_KEY, env=env).err, "warning: .*FOX_KEY")
        self.write(api_key_env="FOX_KEY")
        self.assertIn("FOX_KEY", self.sent(ENV_KEY, env=IN_ENV).err)
        self.configure(base_url=RELAY, api_key_env="FOX_KEY")
        run = self.check(self.run_tool("generate", "a fox"), 3)
        self.assertIn("FOX_KEY", run.err.splitlines()[-1])

    def test_keys_are_undressed(self) -> None:
        for dress in (" '{}'\r\n", "Bearer {}", "bearer  {}", '\ufeff"Bearer {}"'):
            with self.subTest(dress):
                self.write(api_key=dress.format(FILE_KEY))
                self.sent(FILE_KEY)
                self.sent(FLAG_KEY, "--api-key", dress.format(FLAG_KEY))

    def test_what_can_be_no_key_is_refused_unseen(self) -> None:
        for key in ("sk-secret one-secret", "sk-secret\nsk-secret", "sk-secret\x07", "sk-secreté"):
            with self.subTest(key):
                self.write(api_key=key)
                self.assertNotIn("secret", self.refused(3, "the key from").err)
        for key in ("sk-...", "YOUR-KEY", "<your-key>", "${OPENAI_API_KEY}"):
            with self.subTest(key):
                self.configure(base_url=RELAY, api_key=key)
                self.refused(3, "placeholder")
        self.refused(2, "--api-key", "--api-key", "")
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
                run = self.check(self.run_tool("config", "--show"), 3)
                self.assert_hidden(run, ODD_KEY)

    def test_a_key_on_the_command_line_is_warned_of(self) -> None:
        run = self.sent(FLAG_KEY, "--base-url", self.api.base_url, *FLAG.split(), "--json")
        self.assertRegex(run.err, "warning: --api-key .*ps")
        self.assertRegex("\n".join(run.json["warnings"]), "--api-key")


class TestNeverShown(KeyCase, SystemCase):
    """The key is in no output and in no file, whatever the server does with it."""

    def holders(self) -> list[Path]:
        """Return the files, other than the config, that hold the key in any spelling."""
        found = {path for form in spellings(ODD_KEY) for path in self.files_with(form)}
        return sorted(found - {self.path})

    def test_by_no_command(self) -> None:
        api = self.serve(answer(PICTURE))
        headers = {"X-Auth-Token": PROFILE_KEY}
        proxy = f"http://fox:{FLAG_KEY}@proxy.example"
        self.configure(base_url=api.base_url, api_key=ODD_KEY, headers=headers, proxy=proxy)
        for words in (
            "generate fox --verbose",
            "generate fox --dry-run --verbose",
            "generate fox --dry-run --verbose --json",
            "config --show",
            "config --show --json",
            "config --check --verbose",
        ):
            with self.subTest(words):
                run = self.check(self.run_tool(*words.split()), 0)
                self.assert_hidden(run, ODD_KEY, PROFILE_KEY, FLAG_KEY)
        self.assertEqual(self.bearer(api), f"Bearer {ODD_KEY}")
        self.assertEqual(self.holders(), [])

    def test_by_no_file_even_while_the_request_is_under_way(self) -> None:
        def reply(request: Request) -> Reply:
            self.assertEqual(request.headers["authorization"], f"Bearer {ODD_KEY}")
            self.assertEqual(len(self.jobs()), 1)
            self.assertEqual(self.holders(), [])
            return answer(PICTURE)

        def begin(*args: Any, **options: Any) -> Any:
            self.assertEqual(self.holders(), [])
            return popen(*args, **options)

        api, popen = self.serve(reply, reply), subprocess.Popen
        self.configure(base_url=api.base_url, api_key=ODD_KEY)
        (self.work / "a.png").write_bytes(PICTURE)
        with mock.patch("subprocess.Popen", begin):  # curl's own input has no name
            self.generate()
            self.check(self.run_tool("edit", "a.png", "a fox"), 0)

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
            (8, answer(PICTURE, echo=echo)._replace(cut=300)),
            (0, answer(PICTURE, echo=echo, revised_prompt=echo)),
        ):
            with self.subTest(code=code, reply=reply):
                api = self.serve(reply)
                self.configure(base_url=api.base_url, api_key=ODD_KEY)
                argv = ["--new", "--json", "--verbose", "--sidecar"]
                run = self.check(self.run_tool("generate", "a fox", *argv), code)
                self.assert_hidden(run, ODD_KEY)
                self.assertEqual(self.holders(), [])
        self.assert_hidden(self.check(self.run_tool("recover"), 0), ODD_KEY)


# ---- The config command -----------------------------------------------------------------------


class ConfigCase(SettingsCase):
    """A case that runs `config`."""

    def config_tool(self, *argv: str, code: int = 0, env: Mapping[str, str] | None = None) -> Run:
        """Run `config`."""
        return self.check(self.run_tool("config", *argv, env=env), code)

    def written(self) -> Any:
        """Return what the config file holds, which only its owner may read."""
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)
        return json.loads(self.path.read_text(encoding="utf-8"))


class TestInit(ConfigCase):
    """`config --init` writes a file that works, and never harms one."""

    def test_each_template_works(self) -> None:
        azure = "https://your-resource.openai.azure.com/openai/v1"
        for profile, base, variable, header in (
            (None, OPENAI, "OPENAI_API_KEY", "Authorization"),
            ("openai", OPENAI, "OPENAI_API_KEY", "Authorization"),
            ("openai-hk", HK, "OPENAI_HK_API_KEY", "Authorization"),
            ("nodekey", "https://nodekey.xinghanyun.cn/v1", "NODEKEY_API_KEY", "Authorization"),
            ("azure", azure, "AZURE_OPENAI_API_KEY", "api-key"),
        ):
            with self.subTest(profile):
                run = self.config_tool("--init", *(["--profile", profile] if profile else []))
                self.assertIn(str(self.path), run.out)
                self.assertIn(f"export {variable}=", run.err)
                self.written()
                plan = self.planned(env={variable: KEY})
                self.assertEqual(plan["endpoint"].lower(), f"{base}/images/generations")
                self.assertEqual(list(plan["headers"]), [header])
                if profile == "openai-hk":  # cheap at first
                    told = (plan["fields"]["size"], plan["fields"]["quality"])
                    self.assertEqual(told, ("1024x1024", "low"))
                self.path.unlink()

    def test_a_relay_of_ones_own(self) -> None:
        relay = ["--base-url", "relay.example"]
        for argv, variable in (
            ([*relay, "--api-key-env", "FOX_KEY"], "FOX_KEY"),
            ([*relay, "--profile", "my-relay"], "MY_RELAY_API_KEY"),
        ):
            with self.subTest(argv):
                self.config_tool("--init", *argv)
                plan = self.planned(env={variable: KEY})
                self.assertEqual(plan["endpoint"], f"{RELAY}/images/generations")
                self.assertIn("Authorization", plan["headers"])
                self.path.unlink()

    def test_an_existing_file_or_profile_needs_force(self) -> None:
        before = {"model": "mine", "profiles": {"nodekey": {"base_url": "https://home.example/v1"}}}
        for argv in (["--init"], ["--init", "--profile", "nodekey"]):
            with self.subTest(argv):
                self.configure(**before)
                self.assertIn("--force", self.config_tool(*argv, code=2).err)
                self.assertEqual(self.written(), before)
                self.config_tool(*argv, "--force")
                self.assertNotEqual(self.written(), before)

    def test_a_profile_is_added_and_nothing_else_touched(self) -> None:
        home = {"base_url": "https://home.example/v1", "api_key": KEY}
        before = {"model": "mine", "odd": "€", "profile": "home", "profiles": {"home": home}}
        self.configure(**before)
        run = self.config_tool("--init", "--profile", "nodekey")
        self.assertIn("config --check --profile nodekey", run.err)
        after = self.written()
        added = after["profiles"].pop("nodekey")
        self.assertEqual((after, list(after)), (before, list(before)))
        self.assertEqual(added["base_url"], "https://nodekey.xinghanyun.cn/v1")

    def test_a_broken_file_is_left_alone(self) -> None:
        self.configure()
        self.path.write_text('{"model": ')
        self.config_tool("--init", "--profile", "nodekey", code=3)
        self.assertEqual(self.path.read_text(), '{"model": ')
        self.assertEqual(self.listing(self.config), ["gpt-image-2/config.json"])

    def test_a_link_stays_a_link(self) -> None:
        real = self.tmp / "dotfiles.json"
        real.write_text("{}")
        self.path.parent.mkdir()
        self.path.symlink_to(real)
        self.config_tool("--init", "--profile", "nodekey")
        self.assertTrue(self.path.is_symlink())
        self.assertIn("nodekey", real.read_text())

    def test_under_another_name(self) -> None:
        self.config_tool("--init", "--config", "new/mine.json")
        self.assertEqual(self.listing(), ["new/mine.json"])
        self.assertFalse(self.path.exists())

    def test_what_it_refuses_unseen(self) -> None:
        for argv in (
            ["--init", "--profile", "no-such"],
            ["--init", "--base-url", "https://user:sk-hunter2@relay.example"],
            ["--init", "--api-key-env", "sk-hunter2"],
            ["--init", "--api-key-env", "1 X"],
            ["--init", "--show"],
        ):
            with self.subTest(argv):
                self.assertNotIn("hunter2", self.config_tool(*argv, code=2).err)
                self.assertFalse(self.path.exists())


class TestShow(ConfigCase):
    """`config --show` tells each value, where it came from and what it hides."""

    def setUp(self) -> None:
        super().setUp()
        secrets = {"headers": {"X-Auth": "hunter1"}, "proxy": "http://fox:hunter2@proxy.example"}
        self.configure(model="of-the-file", api_key=KEY, **secrets)
        self.env.update(GPT_IMAGE2_MODEL="of-the-environment", GPT_IMAGE2_RETRIES="7")

    def test_values_and_sources(self) -> None:
        run = self.config_tool("--show", "--json", "--timeout", "77")
        text = self.config_tool("--show", "--timeout", "77").out
        rows = run.json["settings"]
        self.assertEqual(run.json["config_file"], str(self.path))
        for key, value, source in (
            ("model", "of-the-file", str(self.path)),
            ("retries", 7, "GPT_IMAGE2_RETRIES"),
            ("timeout", 77, "--timeout"),
        ):
            with self.subTest(key):
                self.assertEqual((rows[key]["value"], rows[key]["source"]), (value, source))
                self.assertRegex(text, rf"(?m)^{key}\b.*\b{value}.*{source}")
        self.assertIn(str(self.path), rows["api_key"]["source"])
        self.assertEqual(rows["model"]["hides"], ["GPT_IMAGE2_MODEL"])
        self.assertEqual(rows["retries"]["hides"], [])
        self.assertIn(f"GPT_IMAGE2_MODEL ignored: set in {self.path}", text)

    def test_keys_are_masked(self) -> None:
        for argv in ([], ["--json"]):
            with self.subTest(argv):
                run = self.config_tool("--show", *argv)
                self.assertIn("X-Auth", run.out)
                self.assertIn(KEY[-4:], run.out)
                self.assertIn("proxy.example", run.out)
                self.assertNotRegex(run.out + run.err, f"{KEY[3:-4]}|hunter")

    def test_the_profile_in_force(self) -> None:
        self.configure(profile="home", timeout=1, profiles={"home": {"timeout": 2}})
        rows = self.config_tool("--show", "--json").json["settings"]
        self.assertEqual((rows["profile"]["value"], rows["timeout"]["value"]), ("home", 2))
        self.assertIn("home", rows["timeout"]["source"])
        self.assertEqual(rows["timeout"]["hides"], [str(self.path)])


class TestCheck(ConfigCase, SystemCase):
    """`config --check` looks at everything that a call needs, and spends nothing."""

    def against(self, reply: Reply, code: int, *argv: str) -> Run:
        """Run it against a server that answers GET /v1/models so; it asks once, with the key."""
        api = self.serve()
        api.put("/v1/models", reply)
        self.configure(base_url=api.base_url, api_key=KEY)
        run = self.config_tool("--check", *argv, code=code)
        self.assertEqual([(r.method, r.target) for r in api.requests], [("GET", "/v1/models")])
        self.assertEqual(api.gets[0].headers["authorization"], f"Bearer {KEY}")
        self.assertNotRegex(run.out + run.err, f"{KEY}|be billed")
        self.assertEqual((self.listing(), self.jobs()), ([], []))
        return run

    def test_all_is_well(self) -> None:
        out = self.against(models("gpt-image-2"), 0).out
        curl = subprocess.run(["curl", "--version"], stdout=subprocess.PIPE, check=True).stdout
        for fact in (curl.decode().split()[1], str(self.path), str(self.state), "200", KEY[-4:]):
            self.assertIn(fact, out)

    def test_as_json(self) -> None:
        good = self.against(models("gpt-image-2"), 0, "--json").json
        self.assertEqual((good["ok"], good["error"]), (True, None))
        self.assertIn(str(self.state), json.dumps(good))
        bad = self.against(refusal(401, "invalid_api_key", "No."), 4, "--json").json
        self.assertEqual((bad["ok"], bad["error"]["exit_code"]), (False, 4))

    def test_what_the_server_may_answer(self) -> None:
        for reply, code, pattern in (
            (refusal(401, "invalid_api_key", "Incorrect API key."), 4, "401.*Incorrect API key"),
            (refusal(403, None, "Your organization must be verified."), 4, "must be verified"),
            (page(404, "Not Found"), 0, "404.*reachable"),
            (page(405, "Method Not Allowed"), 0, "405.*reachable"),
            (Reply(301, headers=[("Location", OTHER)]), 1, "other.example"),
            (page(502, "Bad Gateway"), 1, "502"),
        ):
            with self.subTest(reply.status):
                run = self.against(reply, code)
                self.assertRegex(run.out + run.err, pattern)

    def test_what_is_missing_here(self) -> None:
        template = {"base_url": "https://YOUR-RESOURCE.openai.azure.com", **IN_FILE}
        for name, config, env, fact in (
            ("the key", {"api_key_env": "OPENAI_API_KEY"}, {}, "OPENAI_API_KEY"),
            ("curl", IN_FILE, {"PATH": str(self.new_folder("bin"))}, "curl is not installed"),
            ("the template's resource", template, {}, "put your resource"),
        ):
            with self.subTest(name):
                self.configure(**config)
                run = self.config_tool("--check", code=3, env=env)
                self.assertIn(fact, run.out + run.err)

    def test_nobody_there(self) -> None:
        self.config_tool("--check", "--base-url", f"localhost:{self.closed_port()}", code=7)
