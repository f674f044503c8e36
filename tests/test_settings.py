"""Settings: where each value comes from, which key goes to which host, and the config command."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, Mapping, NamedTuple
from unittest import mock
from urllib.parse import quote

from tests.case import Run, SystemCase
from tests.images import png
from tests.server import KEY, Api, Reply, Request, answer, b64, models, page, refusal

OPENAI = "https://api.openai.com/v1"
HK = "https://api.openai-hk.com/v1"
NODEKEY = "https://nodekey.xinghanyun.cn/v1"
RELAY, PLAIN = "https://relay.example/v1", "http://relay.example/v1"
OTHER = "https://other.example/v1"
IMAGE = png(8, 8)

FLAG_KEY = "sk-from-the-flag-0123456789"
ENV_KEY = "sk-from-the-environment-0123456789"
FILE_KEY = "sk-from-the-file-0123456789"
PROFILE_KEY = "sk-from-the-profile-0123456789"
OPENAI_KEY = "sk-from-openai-api-key-0123456789"
ODD_KEY = 'sk-test/0123+4567=89&abc?d"f~ghi'  # every spelling of it differs


class SettingsCase(SystemCase):
    """A case around the usual config file, that asks the tool what it would do."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.config / "gpt-image-2" / "config.json"

    def config_tool(self, *argv: str, code: int = 0, env: Mapping[str, str] = {}) -> Run:
        return self.check(self.run_tool("config", *argv, env=env), code)

    def shown(self, *argv: str) -> dict[str, Any]:
        """Return every setting's value as `config --show` has it."""
        settings = self.config_tool("--show", "--json", *argv).json["settings"]
        return {key: row["value"] for key, row in settings.items()}

    def planned(self, *argv: str, env: Mapping[str, str] = {}) -> Any:
        """Return what `generate --dry-run` would send."""
        return self.generate("--dry-run", "--json", *argv, env=env).json["dry_run"]

    def model(self, *argv: str) -> Any:
        """Return the model in force, by which tests tell config files apart."""
        return self.shown(*argv)["model"]

    def refused(self, code: int, fact: str, *argv: str, env: Mapping[str, str] = {}) -> Run:
        """Assert that a call ends with one line that tells a fact, and leaves nothing."""
        run = self.generate(*argv, code=code, env=env)
        self.assertRegex(run.err, rf"\Agpt-image2: .*{re.escape(fact)}.*\n\Z")
        self.assertEqual((run.out, self.listing(), self.jobs()), ("", [], []))
        return run

    def serve_configured(self, **settings: Any) -> Api:
        """Start a server, and write the config file that leads to it."""
        api = self.serve(otherwise=answer(IMAGE))
        self.configure(**{"base_url": api.base_url, "api_key": KEY, **settings})
        return api

    def generate(self, *argv: str, code: int = 0, env: Mapping[str, str] = {}) -> Run:
        return self.check(self.run_tool("generate", "a fox", *argv, env=env), code)

    def assert_hidden(self, run: Run, *secrets: str) -> None:
        """Assert that a run printed no spelling of these."""
        for form in (form for secret in secrets for form in spellings(secret)):
            self.assertNotIn(form, run.out + run.err, f"\n{run}")


class Layers(NamedTuple):
    """A different value of one setting for each place that it may come from."""

    key: str
    default: Any
    environment: Any
    file: Any
    flag: Any = None  # None: there is no such option


SHOWN = (
    Layers("base_url", OPENAI, *(f"https://{place}.example/v1" for place in "efg")),
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
    """Flag over file over environment over default, key by key, and what --show tells of it."""

    def values(self, by_flag: bool = False) -> dict[str, Any]:
        """Return the settings of SHOWN as they are shown, those of ASKED as they would be sent."""
        rows = [row for row in (*SHOWN, *ASKED) if by_flag and row.flag]
        flags = {row: f"--{row.key.replace('_', '-')}={row.flag}" for row in rows}
        shown = self.shown(*[flags[row] for row in SHOWN if row in flags])
        plan = self.planned(*flags.values())
        fields = plan["fields"]
        folder = os.path.relpath(os.path.dirname(plan["paths"][0]), self.work)
        asked = {name: fields.get(name) for name in ("model", "size", "quality")}
        return {**shown, **asked, "format": fields.get("output_format"), "output_dir": folder}

    def test_each_setting_from_each_place(self) -> None:
        table = (*SHOWN, *ASKED)
        variables = {f"GPT_IMAGE2_{row.key.upper()}": str(row.environment) for row in table}
        variables["OPENAI_BASE_URL"] = "https://o.example/v1"
        self.env.update(variables)
        self.configure(**{row.key: row.file for row in table})
        found = [self.values(by_flag=True), self.values()]
        self.path.unlink()
        found.append(self.values())
        self.env.update(dict.fromkeys(variables, ""))  # an empty one sets nothing
        found.append(self.values())
        for row in table:
            with self.subTest(row.key):
                due = [row.flag or row.file, row.file, row.environment, row.default]
                self.assertEqual([values[row.key] for values in found], due)

    def test_values_and_sources(self) -> None:
        secrets = {"headers": {"X-Pass": "hunter1"}, "proxy": "http://fox:hunter2@proxy.example"}
        profiles = {"home": {"connect_timeout": 5, **IN_FILE}}
        top = {"model": "of-the-file", "connect_timeout": 6, "profile": "home", **secrets}
        self.configure(profiles=profiles, **top)
        self.env.update(GPT_IMAGE2_MODEL="of-the-environment", GPT_IMAGE2_RETRIES="7")
        run = self.config_tool("--show", "--json", "--timeout", "77")
        text, rows = self.config_tool("--show").out, run.json["settings"]
        path, home = str(self.path), f"{self.path} (profile home)"
        for key, value, source, hidden in (
            ("model", "of-the-file", path, ["GPT_IMAGE2_MODEL"]),
            ("connect_timeout", 5, home, [path]),
            ("retries", 7, "GPT_IMAGE2_RETRIES", []),
            ("timeout", 77, "--timeout", []),
        ):
            with self.subTest(key):
                self.assertEqual(rows[key], {"value": value, "source": source, "hides": hidden})
        for source in (path, home, "GPT_IMAGE2_MODEL", "GPT_IMAGE2_RETRIES"):
            self.assertIn(source, text)
        for out in (run.out, text):
            self.assertRegex(out, rf"(?s)of-the-file.*X-Pass.*proxy\.example.*{FILE_KEY[-4:]}")
            self.assertNotRegex(out, f"{FILE_KEY[3:-4]}|hunter")

    def test_a_proxys_login_in_every_spelling(self) -> None:
        for lead, login in (
            *(("", "fox:hunter2"), ("", "hunter2"), ("socks5h://", "hunter2")),
            *(("HTTP://", "fox:hunter2//hunter@3:"), ("", "fox://hunter2/")),
        ):
            with self.subTest(lead + login):
                self.configure(proxy=f"{lead}{login}@proxy.example:1", api_key=KEY)
                for argv in (["config", "--show"], ["generate", "fox", "--dry-run", "--verbose"]):
                    run = self.check(self.run_tool(*argv), 0)
                    self.assertIn("****@proxy.example:1", run.out)
                    self.assertNotIn("hunter", run.out + run.err)
        for proxy in ("foo://fox:hunter2@proxy.example", "hunter2@[", "http://hun'ter2:hunter2@["):
            self.configure(base_url=RELAY, proxy=proxy, api_key=KEY, retries=0)  # curl quotes it
            self.assertNotIn("ter2", self.generate(code=7).err)
        self.configure(proxy="http://fox:hunter2\n@proxy.example")
        self.assertNotIn("hunter", self.refused(3, "proxy").err)


class TestFiles(SettingsCase):
    """Which config file is in force, and what it can be that it should not be."""

    def write(self, path: Path, **settings: str) -> Path:
        """Write a config file anywhere."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
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
            place.unlink()

    def test_flag_and_variable_choose_the_file(self) -> None:
        self.configure(model="usual")
        flagged = self.write(self.tmp / "flagged.json", model="flagged")
        named = self.write(self.tmp / "named.json", quality="low")
        self.env.update(GPT_IMAGE2_CONFIG=str(named), GPT_IMAGE2_MODEL="environment")
        self.assertEqual(self.model(), "environment")  # nothing of the usual file counts
        self.assertEqual(self.model("--config", str(flagged)), "flagged")
        self.refused(3, "no.json", "--config", "no.json")

    def test_a_profile_lies_over_the_top_level(self) -> None:
        profiles = {"home": {"timeout": 11}, "work": {"timeout": 22, "retries": 0}}
        top = {"timeout": 99, "retries": 7, "profiles": profiles}
        self.configure(**top)
        run = self.refused(3, "wrok", "--dry-run", "--profile", "wrok")
        self.assertRegex(run.err, "home, work.*did you mean work")
        for chosen, flag, variable, wanted in (
            (None, "", "", (99, 7)),
            (None, "", "work", (22, 0)),
            (None, "home", "work", (11, 7)),
            ("home", "", "work", (11, 7)),
            ("home", "work", "", (22, 0)),
        ):
            with self.subTest(file=chosen, flag=flag, variable=variable):
                self.configure(profile=chosen, **top)
                self.env["GPT_IMAGE2_PROFILE"] = variable
                shown = self.shown(*["--profile", flag] * bool(flag))
                self.assertEqual((shown["timeout"], shown["retries"]), wanted)

    def test_files_that_hold_no_settings(self) -> None:
        for content in (b'{"model": ', b"", b"[]", b"\xff{}", b"[" * 100_000):
            with self.subTest(content[:20]):
                self.configure().write_bytes(content)
                self.refused(3, str(self.path), "--dry-run")
                self.config_tool("--init", "--profile", "nodekey", code=3)
                self.assertEqual(self.path.read_bytes(), content)

    def test_values_of_the_wrong_kind(self) -> None:
        """Each is refused by its key and its source."""
        for key, value in (
            *(("base_url", 7), ("quality", "ultra"), ("profiles", []), ("api_key_command", 7)),
            *(("timeout", "soon"), ("timeout", True), ("retries", -1), ("allow_http", "maybe")),
            *(("headers", {"X-Team": "a\r\nX-Forged: b"}), ("auth_header", "a key\n")),
        ):
            with self.subTest(key=key, value=value):
                self.configure(**{key: value})
                self.assertIn(key, self.refused(3, str(self.path), "--dry-run").err)
        self.path.unlink()
        for key, text in (("GPT_IMAGE2_TIMEOUT", "1_0"), ("GPT_IMAGE2_HEADERS", "X-Team: foxes")):
            self.refused(3, key, "--dry-run", env={key: text})

    def test_an_unknown_key_is_a_warning_with_the_nearest(self) -> None:
        self.configure(qualty="low", profile="home", profiles={"home": {"basse_url": OPENAI}})
        run = self.generate("--dry-run")
        for pattern in ("qualty.*did you mean quality", "basse_url.*did you mean base_url"):
            self.assertRegex(run.err, f"warning: .*{pattern}")

    def test_a_file_that_others_can_read_gets_a_line_that_mends_it(self) -> None:
        path = self.write(self.tmp / "it's mine.json", model="gpt-image-2")
        path.chmod(0o604)
        said = self.config_tool("--show", "--config", str(path)).err
        subprocess.run(["sh", "-c", said[said.index("chmod 600") :]], check=True)
        self.assertEqual(path.stat().st_mode & 0o777, 0o600)


class TestOnTheWire(SettingsCase):
    """Settings that change what is sent, and through what."""

    def test_base_urls(self) -> None:
        """Refusals name the source and show no password; the host tells the provider."""
        for source in ("--base-url", "GPT_IMAGE2_BASE_URL", "OPENAI_BASE_URL"):
            for given in ("https://u:hunter2@a.example", "https://a/\x1b[31m"):
                with self.subTest(source, given=given):
                    flags = [source, given] if source == "--base-url" else []
                    run = self.refused(2, source, *flags, env={source: given})
                    self.assertNotRegex(run.err, "hunter2|\x1b")
        self.refused(2, "--base-url", "--base-url", "")
        self.refused(3, "azure needs a base_url", "--provider", "azure")
        hosts = {"openai-hk": HK, "nodekey": NODEKEY, "azure": "https://r.openai.azure.com/openai"}
        for provider, base in hosts.items():
            self.assertEqual(self.shown("--base-url", base)["provider"], provider)

    def test_headers_and_image_field(self) -> None:
        (self.work / "a.png").write_bytes(IMAGE)
        team = 'fox "red" \\ tail'
        env = {"GPT_IMAGE2_HEADERS": json.dumps({"X-Team": team})}
        api = self.serve_configured(image_field="image", auth_header="X: Token")
        self.check(self.run_tool("edit", "a.png", "a.png", "a fox", env=env), 0)
        sent, names = api.posts[0].headers, [part.name for part in api.posts[0].uploads]
        self.assertEqual((sent["x-team"], names), (team, ["image"] * 2))
        self.assertEqual([pair for pair in sent.items() if KEY in pair[1]], [("x", f"Token {KEY}")])

    def test_a_proxy_gets_the_request(self) -> None:
        proxy = self.serve(otherwise=answer(IMAGE))
        variables = dict.fromkeys(("http_proxy", "ALL_PROXY"), proxy.origin)
        for settings, env in (({"proxy": proxy.origin}, {}), ({}, variables)):
            self.configure(base_url=PLAIN, api_key=KEY, allow_http=True, **settings)
            self.generate(env=env)
        endpoint = f"{PLAIN}/images/generations"
        self.assertEqual([post.target for post in proxy.posts], [endpoint] * 2)


HERE = "http://localhost:8080/v1"
FLAG = f"--api-key {FLAG_KEY}"
IN_ENV = {"GPT_IMAGE2_API_KEY": ENV_KEY}
IN_OPENAI = {"OPENAI_API_KEY": OPENAI_KEY}
PAIR = {**IN_OPENAI, "OPENAI_BASE_URL": RELAY}
ALL_ENV = {**IN_ENV, **PAIR}
AT_HERE = {"GPT_IMAGE2_BASE_URL": HERE}
IN_FILE = {"api_key": FILE_KEY}
RELAY_FILE = {"base_url": RELAY, **IN_FILE}
COMMAND = {"base_url": RELAY, "api_key_command": ["touch", "command-ran"]}
HOST, OWN_KEY = {"base_url": OTHER}, {"api_key": PROFILE_KEY}
PROFILES = {**RELAY_FILE, "profiles": {"own": {**HOST, **OWN_KEY}, "host": HOST, "key": OWN_KEY}}


class Rule(NamedTuple):
    """A key, or none (""), that goes to a base URL; None: nothing is sent, the call is refused."""

    key: str | None
    base: str = ""
    flags: str = ""
    config: Mapping[str, Any] = {}
    env: Mapping[str, str] = {}


RULES = (
    # A key from the command line or GPT_IMAGE2_API_KEY goes to the base URL in force.
    Rule(FLAG_KEY, OTHER, f"{FLAG} --base-url {OTHER}", RELAY_FILE, ALL_ENV),
    Rule(ENV_KEY, RELAY, env=ALL_ENV),
    Rule(ENV_KEY, OTHER, f"--base-url {OTHER}", RELAY_FILE, IN_ENV),
    # A file's goes to the file's base URL, whatever its path.
    Rule(FILE_KEY, RELAY, config=RELAY_FILE, env={**IN_ENV, **IN_OPENAI}),
    Rule(FILE_KEY, OPENAI, config=IN_FILE),
    Rule(FILE_KEY, HK, config={"provider": "openai-hk", **IN_FILE}),
    Rule(FILE_KEY, f"{RELAY}/x", f"--base-url {RELAY}/x", RELAY_FILE),
    # A profile's goes to the profile's.
    Rule(PROFILE_KEY, OTHER, "--profile own", PROFILES),
    Rule(PROFILE_KEY, RELAY, "--profile key", PROFILES),
    # OPENAI_API_KEY and OPENAI_BASE_URL are a pair; the key alone belongs to OpenAI.
    Rule(OPENAI_KEY, RELAY, env=PAIR),
    Rule(OPENAI_KEY, OPENAI, env=IN_OPENAI),
    Rule(OPENAI_KEY, OPENAI, "--base-url https://API.openai.com./v1", env=IN_OPENAI),
    # Over plain http it goes where that is allowed.
    Rule(FLAG_KEY, PLAIN, f"{FLAG} --base-url {PLAIN} --allow-http"),
    # A server on this machine needs none, and gets none that is not its own.
    Rule(FILE_KEY, HERE, config={"base_url": HERE, **IN_FILE}, env={**IN_ENV, **IN_OPENAI}),
    Rule(ENV_KEY, HERE, env={**AT_HERE, **IN_ENV}),
    Rule("", HERE, config=IN_FILE, env={**AT_HERE, **PAIR}),
    Rule("", HERE, f"--base-url {HERE}", COMMAND),
    # And nowhere else.
    Rule(None, "", f"--base-url {OTHER}", RELAY_FILE, IN_OPENAI),
    Rule(None, "", "--provider openai-hk", IN_FILE),
    Rule(None, config=IN_FILE, env={"GPT_IMAGE2_BASE_URL": OTHER}),
    Rule(None, "", "--base-url relay.example:8443", RELAY_FILE),
    Rule(None, "", "--base-url http://relay.example:443 --allow-http", RELAY_FILE),
    Rule(None, "", "--profile host", PROFILES),
    Rule(None, "", f"--base-url {OTHER}", env=PAIR),
    Rule(None, "", f"--base-url {RELAY}", env=IN_OPENAI),
    Rule(None, "", "--base-url api.openai.com.relay.example", env=IN_OPENAI),
    Rule(None, "", "--base-url http://api.openai.com --allow-http", env=IN_OPENAI),
)

# It notes what it is told, and sends nothing.
NOTING_CURL = """#!/bin/sh
cat >"$0.config"
exit 7
"""


def echoes(key: str) -> list[str]:
    """Return a key as servers echo it: raw, URL-encoded, in base64 alone or as a whole header."""
    encoded = quote(key, safe="")
    lower_case = re.sub("%..", lambda match: match[0].lower(), encoded)
    return [
        key,
        json.dumps(key)[1:-1],
        encoded,
        lower_case,
        b64(key.encode()),
        b64(f"Bearer {key}".encode()),
    ]


def spellings(key: str) -> list[str]:
    """Return what must not be seen: of base64 the middle, which no neighbour of the key changes."""
    *plain, alone, in_header = echoes(key)
    return [*plain, alone[4:-4], in_header[12:-4]]


class TestWhichKeyGoesWhere(SettingsCase):
    """The key and the host that curl is told, wherever in the world that is."""

    def setUp(self) -> None:
        super().setUp()
        self.curl = self.new_folder("bin") / "curl"
        self.curl.write_text(NOTING_CURL)
        self.curl.chmod(0o755)
        self.env["PATH"] = f"{self.curl.parent}:{self.env['PATH']}"
        self.env["GPT_IMAGE2_RETRIES"] = "0"

    def told(self, rule: Rule, code: int) -> str:
        """Run the tool, which prints no key, and return the config that curl is given."""
        note = Path(f"{self.curl}.config")
        note.write_text("")
        self.configure(**rule.config)
        run = self.run_tool("generate", "a fox", *rule.flags.split(), env=rule.env)
        self.assertNotIn("sk-from", self.check(run, code).out + run.err)
        return note.read_text()

    def test_the_rules(self) -> None:
        for rule in RULES:
            with self.subTest(str(rule)):
                told = self.told(rule, 3 if rule.key is None else 7)
                due = [f"Authorization: Bearer {rule.key}"] * bool(rule.key)
                self.assertEqual(re.findall(r"[^\"]*sk-from[\w-]*|Authorization", told), due)
                urls = [] if rule.key is None else [f"{rule.base}/images/generations"]
                self.assertEqual(re.findall('(?m)^url = "(.*)"$', told), urls)
        for plain in (PLAIN, "http://127.0.0.256", "http://127.300", "http://localhost.a."):
            self.assertEqual(self.told(Rule(None, flags=f"{FLAG} --base-url {plain}"), 2), "")
        told = self.told(Rule(None, flags="--sandbox", config=COMMAND, env=ALL_ENV), 7)
        self.assertIn('url = "http://127.0.0.1:', told)
        self.assertNotIn("sk-from", told)
        self.assertEqual(self.listing(), [])


class TestSources(SettingsCase):
    """A file's key: api_key_command, else api_key_env, else api_key. And its headers."""

    def setUp(self) -> None:
        super().setUp()
        self.api = self.serve(otherwise=answer(IMAGE))

    def sent(self, key: str, *argv: str, env: Mapping[str, str] = {}) -> Run:
        """Assert that a key is sent."""
        run = self.generate(*argv, env=env)
        self.assertEqual(self.api.posts[-1].headers["authorization"], f"Bearer {key}")
        return run

    def test_the_headers_of_a_profile_go_to_its_own_host(self) -> None:
        headers = {"X-Auth-Token": PROFILE_KEY, "X-Session": "foxes"}
        profile = {"base_url": self.api.base_url, "headers": headers}
        self.configure(base_url=RELAY, profiles={"mine": profile})
        self.generate("--profile", "mine")
        self.assertEqual(self.api.posts[0].headers["x-auth-token"], PROFILE_KEY)
        other = self.serve(otherwise=answer(IMAGE))
        run = self.generate("--profile", "mine", "--base-url", other.base_url)
        self.assertNotRegex(str(other), f"{PROFILE_KEY}|foxes")
        self.assertRegex(run.err, "warning: .*X-Auth-Token, X-Session")
        shown = self.planned("--profile", "mine")["headers"]
        self.assertEqual(shown, dict.fromkeys(headers, "****"))

    def test_command_before_variable_before_text(self) -> None:
        """The command runs without a shell; a key is undressed."""
        named = {"api_key": FILE_KEY, "api_key_env": "FOX_KEY"}
        odd = "sk-$HOME;`id`|cat>made"
        for settings, key in (
            (named, "sk-of-the-variable"),
            ({**named, "api_key_command": "echo sk-of-the-command"}, "sk-of-the-command"),
            ({"api_key_command": f"echo '{odd}'"}, odd),
            ({"api_key_command": ["echo", odd]}, odd),
        ):
            with self.subTest(settings):
                self.configure(base_url=self.api.base_url, **settings)
                self.sent(key, env={"FOX_KEY": "sk-of-the-variable"})
        self.assertEqual([name for name in self.listing() if "made" in name], [])
        for dress in ("{}", " '{}'\r\n", "Bearer {}", "bearer  {}", '\ufeff"Bearer {}"'):
            with self.subTest(dress):
                self.configure(base_url=self.api.base_url, api_key=dress.format(FILE_KEY))
                self.sent(FILE_KEY)
                run = self.sent(FLAG_KEY, "--api-key", dress.format(FLAG_KEY))
                self.assertRegex(run.err, "warning: --api-key .*ps")

    def test_an_empty_variable_falls_through_with_a_warning(self) -> None:
        self.configure(base_url=self.api.base_url, api_key_env="FOX_KEY", api_key=FILE_KEY)
        for env in ({}, {"FOX_KEY": " \n"}):
            self.assertRegex(self.sent(FILE_KEY, env=env).err, "warning: .*FOX_KEY")
        self.configure(base_url=RELAY, api_key_env="FOX_KEY")
        self.assertRegex(self.generate(code=3).err, r"\A.*FOX_KEY.*export FOX_KEY=YOUR-KEY\n\Z")
        source = self.planned(env={"FOX_KEY": FILE_KEY})["key_source"]
        self.assertEqual(source, f"$FOX_KEY, named in {self.path}")
        self.configure(base_url=self.api.base_url, api_key_env="FOX_KEY")
        self.assertNotIn("FOX_KEY", self.generate().err, "none is needed here")

    def test_what_can_be_no_key_and_a_key_in_the_wrong_place_are_refused_unseen(self) -> None:
        header = f"Authorization: Bearer {ODD_KEY}"
        commands = ("false", "true", "no-such-program", f"sh -c 'echo {FILE_KEY}; false'", ODD_KEY)
        keys = (f"{ODD_KEY} one", f"{ODD_KEY}\nsk-b", f"{ODD_KEY}\a", f"{ODD_KEY}é", [ODD_KEY])
        for name, values in (
            *(("api_key_command", commands), ("api_key", keys), ("api_key_env", [ODD_KEY])),
            *(
                ("auth_header", [header, ODD_KEY, FILE_KEY, f"X: {FILE_KEY}"]),
                ("headers", [header]),
            ),
        ):
            for value in values:
                with self.subTest(name, value=value):
                    settings = {"api_key": PROFILE_KEY, name: value}
                    self.configure(base_url=self.api.base_url, **settings)
                    run = self.refused(3, "key" if "key" in name else name)
                    self.assert_hidden(run, ODD_KEY, FILE_KEY, PROFILE_KEY)
        for key in ("sk-...", "YOUR-KEY", "<your-key>", "${OPENAI_API_KEY}"):
            self.configure(base_url=RELAY, api_key=key)
            self.refused(3, "placeholder")
            self.configure(base_url=HERE, api_key=key)  # which needs none
            self.generate("--dry-run")
        self.refused(2, "--api-key", "--api-key", "")
        self.no_request(self.api)


class TestNeverShown(SettingsCase):
    """The key is in no output and in no file, whatever the server does with it."""

    def holders(self) -> list[Path]:
        """Return the files, other than the config, that hold the key in any spelling."""
        found = {path for form in spellings(ODD_KEY) for path in self.files_with(form)}
        return sorted(found - {self.path})

    def test_by_no_command_nor_by_a_file_while_the_request_is_under_way(self) -> None:
        def reply(request: Request) -> Reply:
            self.assertEqual(request.headers["authorization"], f"Bearer {ODD_KEY}")
            self.assertEqual((len(self.jobs()), self.holders()), (1, []))
            return answer(IMAGE)

        def begin(*args: Any, **options: Any) -> Any:
            self.assertEqual(self.holders(), [])
            return popen(*args, **options)

        api, popen = self.serve(reply, reply), subprocess.Popen
        (self.work / "a.png").write_bytes(IMAGE)
        headers = {"X-Auth-Token": PROFILE_KEY}
        proxy = f"http://fox:{FLAG_KEY}@proxy.example"
        self.configure(base_url=api.base_url, api_key=ODD_KEY, headers=headers, proxy=proxy)
        for words in (
            *("generate fox --verbose", "edit a.png fox --verbose", "config --check --verbose"),
            *(f"generate fox --dry-run --verbose {flag}" for flag in ("", "--json")),
            *("config --show", "config --show --json"),
        ):
            # curl's own input has no name
            with self.subTest(words), mock.patch("subprocess.Popen", begin):
                run = self.check(self.run_tool(*words.split()), 0)
                self.assert_hidden(run, ODD_KEY, PROFILE_KEY, FLAG_KEY)
        self.assertEqual((len(api.posts), self.holders()), (2, []))

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
            (8, answer(IMAGE, echo=echo)._replace(cut=300)),
            (0, answer(IMAGE, echo=echo, revised_prompt=echo)),
        ):
            with self.subTest(code=code, reply=reply):
                api = self.serve(reply)
                self.configure(base_url=api.base_url, api_key=ODD_KEY)
                argv = ["--new", "--json", "--verbose", "--sidecar"]
                self.assert_hidden(self.generate(*argv, code=code), ODD_KEY)
                self.assertEqual(self.holders(), [])
        self.assert_hidden(self.check(self.run_tool("recover"), 0), ODD_KEY)

    def test_our_own_names_are_no_echoes(self) -> None:
        """A folder called like the key is printed, and noted, as it is."""
        for key in ("lm-studio", FILE_KEY):
            with self.subTest(key):
                api = self.serve(answer(IMAGE), answer(IMAGE), refusal(400, None, f"no: {key}."))
                self.configure(base_url=api.base_url, api_key=key)
                path = self.generate("-o", f"{key}/a.png", "--sidecar").saved[0]
                self.assertEqual(path, self.work / key / "a.png")
                note = json.loads(Path(f"{path}.json").read_text())
                last = self.check(self.run_tool("history", "--json"), 0).json["entries"][-1]
                self.assertEqual((note["paths"], last["paths"]), ([str(path)], [str(path)]))
                run = self.generate("-o", f"{key}/b.png", "--new", "--json")
                self.assertEqual(run.json["images"][0]["path"], str(self.work / key / "b.png"))
                told = f"no: {key if len(key) < 16 else '****'}."
                self.assertIn(told[:-1], self.generate("--new", code=1).err)

    def test_by_no_link_of_an_answer(self) -> None:
        for link in (f"ftp://{ODD_KEY}/a.png", f"http://{ODD_KEY[:6]}{FILE_KEY}.invalid/a.png"):
            with self.subTest(link):
                api = self.serve(answer(link))
                self.configure(base_url=api.base_url, api_key=FILE_KEY)
                headers = {"X-Odd": ODD_KEY}
                self.configure(base_url=api.base_url, api_key=FILE_KEY, headers=headers)
                self.assert_hidden(self.generate("--new", code=10), ODD_KEY, FILE_KEY)


class TestInit(SettingsCase):
    """`config --init` writes a file that works, and never harms one."""

    def written(self) -> Any:
        """Return what the config file holds, which only its owner may read."""
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)
        return json.loads(self.path.read_text(encoding="utf-8"))

    def test_each_template_works_and_a_relay_of_ones_own(self) -> None:
        azure = "https://your-resource.openai.azure.com/openai/v1"
        for words, base, variable, header in (
            ("", OPENAI, "OPENAI_API_KEY", "Authorization"),
            ("--profile nodekey", NODEKEY, "NODEKEY_API_KEY", "Authorization"),
            ("--profile azure", azure, "AZURE_OPENAI_API_KEY", "api-key"),
            ("--base-url relay.example --api-key-env FOX_KEY", RELAY, "FOX_KEY", "Authorization"),
            ("--base-url relay.example --profile r-1", RELAY, "R_1_API_KEY", "Authorization"),
        ):
            with self.subTest(words):
                run = self.config_tool("--init", *words.split())
                self.assertIn(str(self.path), run.out)
                self.assertIn(f"export {variable}=", run.err)
                self.written()
                plan = self.planned(env={variable: KEY})
                self.assertEqual(plan["endpoint"].lower(), f"{base}/images/generations")
                self.assertEqual(list(plan["headers"]), [header])
                self.path.unlink()

    def test_a_relay_of_the_environment_keeps_its_key(self) -> None:
        """A file comes before the variables, so it must not send their key to OpenAI."""
        hk, named = {"GPT_IMAGE2_BASE_URL": HK}, {"GPT_IMAGE2_BASE_URL": OTHER, **IN_ENV}
        for env, flags, base, variable in (
            (PAIR, "", RELAY, "OPENAI_API_KEY"),
            (PAIR, "--profile openai", RELAY, "OPENAI_API_KEY"),
            (PAIR, f"--base-url {OTHER}", OTHER, "GPT_IMAGE2_API_KEY"),
            (PAIR, "--profile nodekey", NODEKEY, "NODEKEY_API_KEY"),
            ({**PAIR, **named}, "", OTHER, "GPT_IMAGE2_API_KEY"),
            (named, "--profile mine", OTHER, "GPT_IMAGE2_API_KEY"),
            (hk, "", HK, "OPENAI_HK_API_KEY"),
            (IN_OPENAI, "", OPENAI, "OPENAI_API_KEY"),
        ):
            with self.subTest(flags, env=env):
                run = self.config_tool("--init", *flags.split(), env=env)
                taken = base in env.values()
                self.assertEqual(f"BASE_URL is set, so base_url is {base}" in run.err, taken)
                plan = self.planned(env={**env, variable: KEY})
                self.assertEqual(plan["endpoint"], f"{base}/images/generations")
                self.assertIn(f'"api_key_env": "{variable}"', json.dumps(self.written()))
                self.path.unlink()
        self.assertIn(
            "BASE_URL", self.config_tool("--init", env={"OPENAI_BASE_URL": "a b"}, code=2).err
        )

    def test_an_existing_file_or_profile_needs_force(self) -> None:
        before = {"model": "mine", "profiles": {"nodekey": HOST}}
        for argv in (["--init"], ["--init", "--profile", "nodekey"]):
            with self.subTest(argv):
                self.configure(**before)
                self.assertIn("--force", self.config_tool(*argv, code=2).err)
                self.assertEqual(self.written(), before)
                self.config_tool(*argv, "--force")
                self.assertNotEqual(self.written(), before)
        self.configure(profiles={"nodekey": HOST}, profile="nodekey")
        self.config_tool("--init", "--force")
        kept = {"profiles": {"nodekey": HOST}, "profile": "nodekey"}
        self.assertEqual(self.written(), {**self.written(), **kept}, "no profile is lost")
        mine: Any = {"base_url": RELAY, "prices": {"out": 30}, "api_key": "sk-of-the-relay"}
        for url, stays in ((RELAY, mine), (OTHER, {"prices": {"out": 30}})):
            self.configure(profiles={"mine": mine})
            self.config_tool("--init", "--profile", "mine", "--base-url", url, "--force")
            profile = {**stays, "base_url": url, "api_key_env": "MINE_API_KEY"}
            self.assertEqual(self.written()["profiles"]["mine"], profile)
        for broken in ("{bad", "[]", '{"profiles": []}'):
            self.path.write_text(broken, encoding="utf-8")
            self.assertIn("--force", self.config_tool("--init", code=2).err)
            self.config_tool("--init", "--force")
            self.assertNotIn("profiles", self.written())

    def test_a_profile_is_added_and_nothing_else_touched(self) -> None:
        """A config file that is a link to somebody's dotfiles stays one."""
        before = {"model": "mine", "odd": "€", "profile": "home", "profiles": {"home": HOST}}
        self.path.symlink_to(self.configure(**before).replace(self.tmp / "dotfiles.json"))
        self.config_tool("--init", "--profile", "nodekey")
        after = self.written()
        added = after["profiles"].pop("nodekey")
        self.assertEqual((after, list(after)), (before, list(before)))
        self.assertEqual(added["base_url"], NODEKEY)
        self.assertTrue(self.path.is_symlink())

    def test_what_is_to_be_done_next(self) -> None:
        run = self.config_tool("--init", "--profile", "azure", "--config", "a b.json")
        self.assertIn("replace YOUR-RESOURCE and YOUR-DEPLOYMENT in /", run.err)
        self.assertIn("then gpt-image2 config --check --config '", run.err)

    def test_use_makes_a_profile_the_default_one(self) -> None:
        self.assertIn("no profile 'home'", self.config_tool("--use", "home", code=3).err)
        self.configure(model="mine", profiles={"home": HOST, "work": HOST})
        self.assertIn("home, work", self.config_tool("--use", "wrok", code=3).err)
        self.config_tool("--use", "work")
        self.assertEqual((self.written()["profile"], self.written()["model"]), ("work", "mine"))
        self.assertIn("(profile work)", self.config_tool().out)

    def test_show_leaves_out_what_nobody_set(self) -> None:
        self.configure(model="mine")
        self.assertEqual(self.config_tool().out, self.config_tool("--show").out)
        self.assertIn("model = mine", self.config_tool("--show").out)
        self.assertNotIn("timeout", self.config_tool("--show").out)
        self.assertIn("timeout = 600", self.config_tool("--show", "--all").out)

    def test_quotes_that_docker_leaves_are_taken_off_every_variable(self) -> None:
        for mark in "\"'":
            self.env.update(
                GPT_IMAGE2_TIMEOUT=f"{mark}77{mark}", GPT_IMAGE2_MODEL=f" {mark}m{mark}"
            )
            self.env.update(GPT_IMAGE2_HEADERS='{"A": "b"}', GPT_IMAGE2_CONFIG="")
            shown = self.config_tool("--show").out
            self.assertIn("timeout = 77 ", shown)
            self.assertIn("model = m ", shown)
            self.assertIn('headers = {"A": ', shown)

    def test_what_it_refuses_unseen(self) -> None:
        for words in (
            *("--profile no-such", "--base-url https://user:sk-hunter2@relay.example", "--check"),
            *("--api-key-env sk-hunter2", "--api-key-env 1X"),
        ):
            with self.subTest(words):
                run = self.config_tool("--init", *words.split(), code=2)
                self.assertNotIn("hunter2", run.err)
                self.assertFalse(self.path.exists())


class TestCheck(SettingsCase):
    """`config --check` looks at everything that a call needs, and spends nothing."""

    def against(self, reply: Reply, code: int, *argv: str) -> Run:
        """Run it against a server that answers GET /v1/models so; it asks once, with the key."""
        api = self.serve_configured()
        api.put("/v1/models", reply)
        run = self.config_tool("--check", *argv, code=code)
        self.assertEqual([(r.method, r.target) for r in api.requests], [("GET", "/v1/models")])
        self.assertEqual(api.gets[0].headers["authorization"], f"Bearer {KEY}")
        self.assertNotRegex(run.out + run.err, f"{KEY}|be billed")
        for fact in (str(self.path), str(self.state), KEY[-4:]):
            self.assertIn(fact, run.out)
        self.assertEqual((self.listing(), self.jobs()), ([], []))
        return run

    def test_what_the_server_may_answer(self) -> None:
        refused = refusal(401, "invalid_api_key", f"Incorrect API key: {KEY}.")
        for reply, code, pattern in (
            (models("gpt-image-2"), 0, "200"),
            (refused, 4, "401.*Incorrect API key"),
            (refusal(403, None, "Your organization must be verified."), 4, "must be verified"),
            (page(404, "Not Found"), 0, "404.*reachable"),
            (Reply(301, headers=[("Location", f"{OTHER}/{KEY}")]), 1, "other.example"),
            (page(502, "Bad Gateway"), 1, "502"),
        ):
            with self.subTest(reply.status):
                run = self.against(reply, code)
                self.assertRegex(run.out + run.err, pattern)
        good = self.against(models("gpt-image-2"), 0, "--json").json
        bad = self.against(refused, 4, "--json").json
        self.assertEqual((good["ok"], good["error"]), (True, None))
        self.assertEqual((bad["ok"], bad["error"]["exit_code"]), (False, 4))

    def test_what_is_missing_here(self) -> None:
        template = {"base_url": "https://YOUR-RESOURCE.openai.azure.com", **IN_FILE}
        for name, config, env, fact in (
            ("the key", {"api_key_env": "OPENAI_API_KEY"}, {}, "OPENAI_API_KEY"),
            ("curl", IN_FILE, {"PATH": str(self.new_folder("bin"))}, "curl is not installed"),
            ("the CA file", {**IN_FILE, "cacert": "no.pem"}, {}, "no.pem"),
            ("the template's resource", template, {}, "your resource into base_url"),
        ):
            with self.subTest(name):
                self.configure(**config)
                run = self.config_tool("--check", code=3, env=env)
                self.assertIn(fact, run.out + run.err)
        self.check(self.run_tool("generate", "a fox", "--sandbox"), 0)  # needs no resource
        self.config_tool("--check", "--base-url", f"localhost:{self.closed_port()}", code=7)
