"""Settings: where each value comes from, what is refused, and what reaches the wire."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from gpt_image2 import parse_base_url
from tests.pictures import png
from tests.support import KEY, Api, Case, Run, answer

OPENAI = "https://api.openai.com/v1"


class SettingsCase(Case):
    """A case that asks the tool what it would do."""

    def shown(self, *argv: str) -> dict[str, Any]:
        """Return every setting's value as `config --show` has it."""
        run = self.check(self.run_tool("config", "--show", "--json", *argv), 0)
        return {key: row["value"] for key, row in run.json["settings"].items()}

    def planned(self, *argv: str) -> dict[str, Any]:
        """Return what `generate --dry-run` would send."""
        run = self.check(self.run_tool("generate", "a fox", "--dry-run", "--json", *argv), 0)
        plan = run.json["dry_run"]
        assert isinstance(plan, dict)
        return plan

    def write_json(self, path: Path, value: Any) -> Path:
        """Write a file that only its owner can read."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")
        path.chmod(0o600)
        return path


class Layers(NamedTuple):
    """A different value of one setting for each place that it may come from."""

    key: str
    default: Any
    environment: Any
    file: Any
    flag: Any = None  # None: there is no such option


SHOWN = (
    Layers("base_url", OPENAI, "https://e.example/v1", "https://f.example/v1", "https://g.example"),
    Layers("provider", "openai", "azure", "nodekey", "openai-hk"),
    Layers("timeout", 600, 11, 12, 13),
    Layers("connect_timeout", 20, 21, 22, 23),
    Layers("retries", 2, 3, 4),
    Layers("model", "gpt-image-2", "gpt-image-2.5-flare", "gpt-image-2.6-flare"),
    Layers("auth_header", "Authorization: Bearer", "x-environment", "x-file"),
    Layers("image_field", "auto", "image", "image[]"),
    Layers("proxy", None, "http://e.example:1", "http://f.example:1"),
    Layers("cacert", None, "/environment.pem", "/file.pem"),
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

    def fill(self, table: tuple[Layers, ...]) -> list[str]:
        """Set every key everywhere, and return the flags."""
        self.configure(**{row.key: row.file for row in table})
        for row in table:
            self.env[f"GPT_IMAGE2_{row.key.upper()}"] = str(row.environment)
        flags = [(f"--{row.key.replace('_', '-')}", row.flag) for row in table if row.flag]
        return [str(word) for pair in flags for word in pair]

    def test_settings_of_the_connection(self) -> None:
        flags = self.fill(SHOWN)
        by_flag, by_file = self.shown(*flags), self.shown()
        self.remove_config()
        by_environment = self.shown()
        self.empty_environment()
        by_default = self.shown()
        for row in SHOWN:
            flagged = "https://g.example/v1" if row.key == "base_url" else row.flag or row.file
            with self.subTest(row.key):
                self.assertEqual(by_flag[row.key], flagged)
                self.assertEqual(by_file[row.key], row.file)
                self.assertEqual(by_environment[row.key], row.environment)
                self.assertEqual(by_default[row.key], row.default)

    def test_settings_of_the_picture(self) -> None:
        flags = self.fill(ASKED)
        by_flag, by_file = self.asked(*flags), self.asked()
        self.remove_config()
        by_environment = self.asked()
        self.empty_environment()
        by_default = self.asked()
        for row in ASKED:
            with self.subTest(row.key):
                self.assertEqual(by_flag[row.key], row.flag)
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
        self.env.update(GPT_IMAGE2_TIMEOUT="", GPT_IMAGE2_BASE_URL="")
        shown = self.shown()
        self.assertEqual((shown["timeout"], shown["base_url"]), (600, OPENAI))

    def test_structured_values_come_from_the_environment_as_json(self) -> None:
        self.env.update(GPT_IMAGE2_HEADERS='{"X-Team": "foxes"}', GPT_IMAGE2_ALLOW_HTTP="1")
        shown = self.shown()
        self.assertEqual((shown["headers"], shown["allow_http"]), ({"X-Team": "foxes"}, True))

    def test_a_wrong_value_is_refused_by_its_source(self) -> None:
        for variable, value in (
            ("GPT_IMAGE2_TIMEOUT", "1_0"),
            ("GPT_IMAGE2_HEADERS", "X-Team: foxes"),
            ("GPT_IMAGE2_QUALITY", "ultra"),
        ):
            with self.subTest(variable=variable, value=value):
                run = self.run_tool("generate", "a fox", "--dry-run", env={variable: value})
                self.check(run, 3)
                self.assertIn(variable, run.err)

    def asked(self, *argv: str) -> dict[str, Any]:
        """Return the picture's settings as a dry run has them."""
        plan = self.planned(*argv)
        fields = plan["fields"]
        folder = os.path.relpath(os.path.dirname(plan["paths"][0]), self.work)
        names = ("model", "size", "quality")
        found = {name: fields.get(name) for name in names}
        return {**found, "format": fields.get("output_format"), "output_dir": folder}

    def remove_config(self) -> None:
        """Take the config file away."""
        (self.config / "gpt-image-2" / "config.json").unlink()

    def empty_environment(self) -> None:
        """Take the tool's variables away."""
        self.env = {name: v for name, v in self.env.items() if not name.startswith("GPT_IMAGE2_")}


class TestPlaces(SettingsCase):
    """Which config file is in force."""

    def model(self, *argv: str) -> Any:
        """Return the model in force, by which the tests tell the files apart."""
        return self.planned(*argv)["fields"]["model"]

    def test_the_first_of_four_places_that_exists(self) -> None:
        places = (
            self.config / "gpt-image-2" / "config.json",
            self.home / ".config" / "gpt-image-2" / "config.json",
            self.home / ".gpt-image-2-config.json",
            self.home / ".hermes" / "gpt-image-2-config.json",
        )
        for number, place in enumerate(places):
            self.write_json(place, {"model": f"place-{number}"})
        for number, place in enumerate(places):
            self.assertEqual(self.model(), f"place-{number}")
            place.unlink()
        self.assertEqual(self.model(), "gpt-image-2")

    def test_without_xdg_config_home(self) -> None:
        self.write_json(self.home / ".config/gpt-image-2/config.json", {"model": "at-home"})
        del self.env["XDG_CONFIG_HOME"]
        self.assertEqual(self.model(), "at-home")

    def test_flag_and_variable_choose_the_file(self) -> None:
        self.configure(model="usual")
        flagged = self.write_json(self.tmp / "flagged.json", {"model": "flagged"})
        named = self.write_json(self.tmp / "named.json", {"quality": "low"})
        self.env.update(GPT_IMAGE2_CONFIG=str(named), GPT_IMAGE2_MODEL="environment")
        self.assertEqual(self.model(), "environment")  # nothing of the usual file counts
        self.assertEqual(self.model("--config", str(flagged)), "flagged")

    def test_a_named_file_that_is_not_there(self) -> None:
        for argv, env in ((["--config", "no.json"], {}), ([], {"GPT_IMAGE2_CONFIG": "no.json"})):
            with self.subTest(argv=argv):
                run = self.run_tool("generate", "a fox", "--dry-run", *argv, env=env)
                self.assertIn("no.json", self.check(run, 3).err)


class TestProfiles(SettingsCase):
    """A profile lies over the top level."""

    def setUp(self) -> None:
        super().setUp()
        self.profiles = {"home": {"timeout": 11}, "work": {"timeout": 22, "retries": 0}}
        self.path = self.configure(timeout=99, retries=7, profiles=self.profiles)

    def test_flag_or_variable_or_file_choose_it(self) -> None:
        self.assertEqual(self.shown()["timeout"], 99)
        self.assertEqual(self.shown("--profile", "home")["timeout"], 11)
        self.env["GPT_IMAGE2_PROFILE"] = "work"
        self.assertEqual(self.shown()["timeout"], 22)
        self.assertEqual(self.shown("--profile", "home")["timeout"], 11)

    def test_the_file_chooses_before_the_variable(self) -> None:
        self.configure(profile="home", profiles=self.profiles)
        self.env["GPT_IMAGE2_PROFILE"] = "work"
        self.assertEqual(self.shown()["timeout"], 11)

    def test_what_a_profile_leaves_out_is_the_top_levels(self) -> None:
        shown = self.shown("--profile", "home")
        self.assertEqual((shown["timeout"], shown["retries"]), (11, 7))
        self.assertEqual(self.shown("--profile", "work")["retries"], 0)

    def test_an_unknown_profile(self) -> None:
        self.configure(profile="wrok", profiles=self.profiles)
        for argv in ([], ["--profile", "wrok"]):
            with self.subTest(argv=argv):
                run = self.check(self.run_tool("generate", "a fox", "--dry-run", *argv), 3)
                self.assertRegex(run.err, "wrok.*home, work.*did you mean work")

    def test_a_profile_without_a_file(self) -> None:
        self.path.unlink()
        run = self.check(self.run_tool("config", "--show", "--profile", "home"), 3)
        self.assertIn("home", run.err)


class TestFaultyFiles(SettingsCase):
    """What a config file can be that it should not be."""

    def refused(self, run: Run) -> None:
        """Assert exit 3 in one line that names the file."""
        self.check(run, 3)
        self.assertRegex(run.err, r"\Agpt-image2: .*config\.json.*\n\Z")
        self.assertEqual((run.out, self.listing()), ("", []))

    def test_files_that_hold_no_object(self) -> None:
        path = self.configure()
        contents = b'{"model": ', b"", b"[]", b"[" * 100_000
        for content in contents:
            with self.subTest(content[:20]):
                path.write_bytes(content)
                self.refused(self.run_tool("generate", "a fox", "--dry-run"))

    def test_a_file_that_cannot_be_read(self) -> None:
        path = self.configure()
        path.unlink()
        path.mkdir()
        self.refused(self.run_tool("generate", "a fox", "--dry-run"))

    def test_values_of_the_wrong_kind(self) -> None:
        for key, value in (
            ("base_url", 7),
            ("model", ["gpt-image-2"]),
            ("quality", "ultra"),
            ("timeout", "soon"),
            ("retries", -1),
            ("allow_http", "maybe"),
            ("headers", {"X-Team": "a\r\nX-Forged: b"}),
            ("auth_header", "a key\n"),
            ("api_key_command", 7),
            ("profiles", []),
        ):
            with self.subTest(key=key, value=value):
                self.configure(**{key: value})
                run = self.run_tool("generate", "a fox", "--dry-run")
                self.refused(run)
                self.assertIn(key, run.err)

    def test_an_unknown_key_is_a_warning_with_the_nearest(self) -> None:
        self.configure(qualty="low", profile="home", profiles={"home": {"basse_url": OPENAI}})
        run = self.check(self.run_tool("generate", "a fox", "--dry-run", "--json"), 0)
        for wrong, right in (("qualty", "quality"), ("basse_url", "base_url")):
            with self.subTest(wrong):
                told = [line for line in run.json["warnings"] if wrong in line]
                self.assertEqual(len(told), 1, run)
                self.assertIn(f"did you mean {right}?", told[0])
                self.assertIn(told[0], run.err)

    def test_the_chmod_line_of_the_warning_works(self) -> None:
        path = self.write_json(self.tmp / "it's mine.json", {"model": "gpt-image-2"})
        path.chmod(0o644)
        run = self.check(self.run_tool("config", "--show", "--config", path), 0)
        line = re.search(r"chmod 600 .*", run.err)
        assert line, run
        subprocess.run(["sh", "-c", line[0]], check=True, timeout=20)
        self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        again = self.check(self.run_tool("config", "--show", "--config", path), 0)
        self.assertEqual(again.err, "")


class TestBaseUrl(SettingsCase):
    """What a person types or pastes, and what is made of it."""

    def test_normal_forms(self) -> None:
        for given, base in (
            ("relay.example", "https://relay.example/v1"),
            ("relay.example:8443", "https://relay.example:8443/v1"),
            ("HTTPS://Relay.Example/V1/", "https://relay.example/V1"),
            ("https://relay.example///", "https://relay.example/v1"),
            ("https://relay.example/v1///", "https://relay.example/v1"),
            ("https://relay.example/v1/images/generations", "https://relay.example/v1"),
            ("https://relay.example/v1/images/edits/", "https://relay.example/v1"),
            ("https://relay.example/images/edits", "https://relay.example/v1"),
            ("https://relay.example/v1/models", "https://relay.example/v1"),
            ("https://r.openai.azure.com/openai/v1", "https://r.openai.azure.com/openai/v1"),
            ("https://gate.example/v1/a/b/openai", "https://gate.example/v1/a/b/openai"),
            ("localhost:8080", "http://localhost:8080/v1"),
            ("127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1"),
            ("[::1]:8080", "http://[::1]:8080/v1"),
            ("https://localhost:8080", "https://localhost:8080/v1"),
        ):
            with self.subTest(given):
                self.assertEqual(parse_base_url(given).url, base)

    def test_refusals(self) -> None:
        for given in (
            "https://user:hunter2@relay.example/v1",
            "user:hunter2@relay.example",
            "https://hunter2@relay.example",
            "ftp://relay.example",
            "file:///etc/passwd",
            "https://",
            "https://:8080",
            "https://relay.example:99999",
            'https://relay.example/"v1"',
            "https://relay.example/{v1,v2}",
            "https://relay.example/[1-3]",
            "https://relay.example/v1?key=hunter2",
            "https://relay.example/v1#top",
            "https://relay.example/a b",
            "https://relay.example/a\nurl = https://b.example",
            "https://relay.example/\x1b[31m",
            "https://relay.exämple/v1",
            "https://relay.example\\@b.example",
            "",
        ):
            with self.subTest(given):
                with self.assertRaises(ValueError) as caught:
                    parse_base_url(given)
                self.assertNotIn("hunter2", str(caught.exception))

    def test_in_a_dry_run(self) -> None:
        endpoint = self.planned("--base-url", "Relay.example/v1/images/edits/")["endpoint"]
        self.assertEqual(endpoint, "https://relay.example/v1/images/generations")

    def test_a_refused_flag(self) -> None:
        for given in ("https://user:hunter2@relay.example/v1", "https://relay.example/{a}", ""):
            with self.subTest(given):
                run = self.run_tool("generate", "a fox", "--dry-run", "--base-url", given)
                self.check(run, 2)
                self.assertRegex(run.err, r"\Agpt-image2: .*--base-url.*\n\Z")
                self.assertNotIn("hunter2", run.out + run.err)

    def test_a_refusal_names_the_source(self) -> None:
        path = self.configure(base_url="ftp://relay.example")
        run = self.run_tool("generate", "a fox", "--dry-run")
        self.assertIn(run.code, (2, 3), run)
        self.assertIn(str(path), run.err)

    def test_the_provider_names_the_base(self) -> None:
        for provider, base in (
            ("openai", OPENAI),
            ("openai-hk", "https://api.openai-hk.com/v1"),
            ("nodekey", "https://nodekey.xinghanyun.cn/v1"),
        ):
            with self.subTest(provider):
                endpoint = self.planned("--provider", provider)["endpoint"]
                self.assertEqual(endpoint, f"{base}/images/generations")

    def test_the_host_names_the_provider(self) -> None:
        for base, provider in (
            ("api.openai.com", "openai"),
            ("api.openai-hk.com", "openai-hk"),
            ("nodekey.xinghanyun.cn", "nodekey"),
            ("https://r.openai.azure.com/openai/v1", "azure"),
            ("api.openai.com.relay.example", "generic"),
        ):
            with self.subTest(base):
                self.assertEqual(self.shown("--base-url", base)["provider"], provider)


class TestOnTheWire(Case):
    """Settings that change what is sent."""

    def serve_configured(self, **settings: Any) -> Api:
        """Start a server, and write the config file that leads to it."""
        api = self.serve(answer(png(8, 8)))
        self.configure(**{"base_url": api.base_url, "api_key": KEY, **settings})
        return api

    def generate(self, *argv: str) -> None:
        """Make a picture."""
        self.check(self.run_tool("generate", "a fox", *argv), 0)

    def test_headers_and_user_agent(self) -> None:
        team = 'fox "red" \\ tail'
        api = self.serve_configured(headers={"X-Team": team}, user_agent="Fox/1.0 (den)")
        self.generate()
        headers = api.posts[0].headers
        self.assertEqual((headers["x-team"], headers["user-agent"]), (team, "Fox/1.0 (den)"))

    def test_auth_headers(self) -> None:
        for setting, name, value in (
            ("Authorization: Token", "authorization", f"Token {KEY}"),
            ("api-key", "api-key", KEY),
        ):
            with self.subTest(setting):
                api = self.serve_configured(auth_header=setting)
                self.generate()
                headers = api.posts[0].headers
                self.assertEqual(headers[name], value)
                self.assertEqual([n for n, v in headers.items() if KEY in v], [name])

    def test_azure_takes_the_key_in_its_own_header(self) -> None:
        api = self.serve_configured(provider="azure", model="my-deployment")
        self.generate()
        self.assertEqual(api.posts[0].headers["api-key"], KEY)
        self.assertNotIn("authorization", api.posts[0].headers)

    def test_a_proxy_gets_the_request(self) -> None:
        proxy = self.serve(answer(png(8, 8)))
        base = "http://relay.example/v1"
        self.configure(base_url=base, api_key=KEY, allow_http=True, proxy=proxy.origin)
        self.generate()
        self.assertEqual(proxy.posts[0].target, f"{base}/images/generations")

    def test_no_proxy_for_loopback(self) -> None:
        proxy = self.serve()
        api = self.serve_configured(proxy=proxy.origin)
        self.env.update(http_proxy=proxy.origin, ALL_PROXY=proxy.origin)
        self.generate()
        self.assertEqual(len(api.posts), 1)
        self.no_request(proxy)

    def test_a_ca_file_that_is_not_there(self) -> None:
        api = self.serve(answer(png(8, 8)), strict=False)
        self.configure(base_url=api.base_url, cacert="no.pem")
        run = self.check(self.run_tool("generate", "a fox"), 3)
        self.assertIn("no.pem", run.err)
        self.no_request(api)

    def test_image_field(self) -> None:
        for name in ("a.png", "b.png"):
            (self.work / name).write_bytes(png(8, 8))
        for setting, flag, files, names in (
            ("auto", None, 1, ["image"]),
            ("auto", None, 2, ["image[]", "image[]"]),
            ("image", None, 2, ["image", "image"]),
            ("image[]", "image", 1, ["image"]),
        ):
            with self.subTest(setting=setting, flag=flag, files=files):
                api = self.serve_configured(image_field=setting)
                flags = ["--image-field", flag] if flag else []
                images = ["a.png", "b.png"][:files]
                self.check(self.run_tool("edit", *images, "a fox", *flags), 0)
                self.assertEqual([part.name for part in api.posts[0].uploads], names)

    def test_output_dir(self) -> None:
        self.serve_configured(output_dir="pictures")
        self.generate()
        [saved] = self.listing()
        self.assertRegex(saved, r"\Apictures/\d{4}-\d\d-\d\d-[0-9a-f]{8}\.png\Z")
