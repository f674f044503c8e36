"""`config`: a file is written, shown and checked, and nothing is spent."""

from __future__ import annotations

import json
import socket
import subprocess
from typing import Any, Mapping

from tests.support import KEY, Case, Reply, Run, models, page, refusal

OPENAI = {"base_url": "https://api.openai.com/v1", "api_key_env": "OPENAI_API_KEY"}


class ConfigCase(Case):
    """A case around the usual config file."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.config / "gpt-image-2" / "config.json"

    def config_tool(self, *argv: str, code: int = 0, env: Mapping[str, str] | None = None) -> Run:
        """Run `config`."""
        return self.check(self.run_tool("config", *argv, env=env), code)

    def written(self) -> Any:
        """Return what the config file holds."""
        return json.loads(self.path.read_text(encoding="utf-8"))


class TestInit(ConfigCase):
    """`config --init` writes a file that works, and never harms one."""

    def planned(self, variable: str, *argv: str) -> dict[str, Any]:
        """Return what a dry run would send, with a key in that variable."""
        run = self.run_tool("generate", "a fox", "--dry-run", "--json", *argv, env={variable: KEY})
        plan = self.check(run, 0).json["dry_run"]
        assert isinstance(plan, dict)
        return plan

    def test_a_key_in_place_of_its_variables_name_is_refused_and_not_shown(self) -> None:
        for name in (KEY, "1 X"):
            run = self.config_tool("--init", "--api-key-env", name, code=2)
            self.assertIn("--api-key-env: it is not the name of an environment variable", run.err)
            self.assertNotIn(name, run.err)
        self.assertEqual(self.listing(self.config), [])

    def test_without_a_profile_it_is_openai(self) -> None:
        run = self.config_tool("--init")
        self.assertIn(str(self.path), run.out)
        self.assertEqual(self.written(), OPENAI)

    def test_only_the_owner_can_read_it(self) -> None:
        self.config_tool("--init")
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)

    def test_each_template_works(self) -> None:
        for profile, base, variable, header in (
            ("openai", "https://api.openai.com/v1", "OPENAI_API_KEY", "Authorization"),
            ("openai-hk", "https://api.openai-hk.com/v1", "OPENAI_HK_API_KEY", "Authorization"),
            ("nodekey", "https://nodekey.xinghanyun.cn/v1", "NODEKEY_API_KEY", "Authorization"),
            (
                "azure",
                "https://YOUR-RESOURCE.openai.azure.com/openai/v1",
                "AZURE_OPENAI_API_KEY",
                "api-key",
            ),
        ):
            with self.subTest(profile):
                self.config_tool("--init", "--profile", profile)
                plan = self.planned(variable)
                self.assertEqual(plan["endpoint"].lower(), f"{base}/images/generations".lower())
                self.assertEqual(list(plan["headers"]), [header])
                self.path.unlink()

    def test_openai_hk_is_cheap_at_first(self) -> None:
        self.config_tool("--init", "--profile", "openai-hk")
        fields = self.planned("OPENAI_HK_API_KEY")["fields"]
        self.assertEqual((fields["size"], fields["quality"]), ("1024x1024", "low"))

    def test_a_relay_of_ones_own(self) -> None:
        relay = ["--base-url", "relay.example", "--api-key-env", "FOX_KEY"]
        self.config_tool("--init", *relay)
        plan = self.planned("FOX_KEY")
        self.assertEqual(plan["endpoint"], "https://relay.example/v1/images/generations")
        self.assertIn("Authorization", plan["headers"])

    def test_an_existing_file_needs_force(self) -> None:
        self.configure(model="mine")
        run = self.config_tool("--init", code=2)
        self.assertRegex(run.err, r"config\.json exists; .*--force")
        self.assertEqual(self.written(), {"model": "mine"})
        self.config_tool("--init", "--force")
        self.assertEqual(self.written(), OPENAI)

    def test_a_profile_is_added_and_nothing_else_touched(self) -> None:
        home = {"base_url": "https://home.example/v1", "api_key": KEY}
        before = {"model": "mine", "odd": "€", "profile": "home", "profiles": {"home": home}}
        self.configure(**before)
        self.config_tool("--init", "--profile", "nodekey")
        after = self.written()
        added = after["profiles"].pop("nodekey")
        self.assertEqual(after, before)
        self.assertEqual(added["base_url"], "https://nodekey.xinghanyun.cn/v1")
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)
        plan = self.planned("NODEKEY_API_KEY", "--profile", "nodekey")
        self.assertIn("Authorization", plan["headers"])

    def test_an_existing_profile_needs_force(self) -> None:
        before = {"profiles": {"nodekey": {"base_url": "https://home.example/v1"}}}
        self.configure(**before)
        self.assertIn("--force", self.config_tool("--init", "--profile", "nodekey", code=2).err)
        self.assertEqual(self.written(), before)
        self.config_tool("--init", "--profile", "nodekey", "--force")
        self.assertNotEqual(self.written(), before)

    def test_a_broken_file_is_left_alone(self) -> None:
        self.configure()
        self.path.write_text('{"model": ')
        self.config_tool("--init", "--profile", "nodekey", code=3)
        self.assertEqual(self.path.read_text(), '{"model": ')

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

    def test_what_it_refuses(self) -> None:
        for argv in (
            ["--init", "--profile", "no-such"],
            ["--init", "--base-url", "https://user:hunter2@relay.example"],
            ["--init", "--show"],
            [],
        ):
            with self.subTest(argv):
                self.assertNotIn("hunter2", self.config_tool(*argv, code=2).err)
                self.assertFalse(self.path.exists())


class TestShow(ConfigCase):
    """`config --show` tells each value, where it came from and what it hides."""

    def setUp(self) -> None:
        super().setUp()
        self.configure(model="of-the-file", api_key=KEY, headers={"X-Auth": "hunter2"})
        self.env.update(GPT_IMAGE2_MODEL="of-the-environment", GPT_IMAGE2_RETRIES="7")

    def test_as_text(self) -> None:
        out = self.config_tool("--show", "--timeout", "77").out
        self.assertRegex(out, rf"(?m)^model\b.*of-the-file.*{self.path}")
        self.assertRegex(out, r"(?m)^retries\b.*7.*GPT_IMAGE2_RETRIES")
        self.assertRegex(out, r"(?m)^timeout\b.*77.*--timeout")
        self.assertRegex(out, r"(?m)^connect_timeout\b.*20.*default")
        self.assertIn(f"GPT_IMAGE2_MODEL ignored: set in {self.path}", out)

    def test_as_json(self) -> None:
        run = self.config_tool("--show", "--json", "--timeout", "77")
        rows = run.json["settings"]
        self.assertEqual(run.json["config_file"], str(self.path))
        for key, value, source in (
            ("model", "of-the-file", str(self.path)),
            ("retries", 7, "GPT_IMAGE2_RETRIES"),
            ("timeout", 77, "--timeout"),
            ("connect_timeout", 20, "default"),
        ):
            with self.subTest(key):
                self.assertEqual((rows[key]["value"], rows[key]["source"]), (value, source))
        self.assertEqual(rows["model"]["hides"], ["GPT_IMAGE2_MODEL"])
        self.assertEqual(rows["retries"]["hides"], [])

    def test_keys_are_masked(self) -> None:
        for argv in ([], ["--json"]):
            with self.subTest(argv):
                run = self.config_tool("--show", *argv)
                self.assertIn("X-Auth", run.out)
                self.assertIn(KEY[-4:], run.out)
                for secret in (KEY, KEY[3:-4], "hunter2"):
                    self.assertNotIn(secret, run.out + run.err)

    def test_the_profile_in_force(self) -> None:
        self.configure(profile="home", timeout=1, profiles={"home": {"timeout": 2}})
        rows = self.config_tool("--show", "--json").json["settings"]
        self.assertEqual((rows["profile"]["value"], rows["timeout"]["value"]), ("home", 2))
        self.assertIn("home", rows["timeout"]["source"])
        self.assertEqual(rows["timeout"]["hides"], [str(self.path)])

    def test_without_a_file(self) -> None:
        self.path.unlink()
        self.assertIn("https://api.openai.com/v1", self.config_tool("--show").out)


class TestCheck(ConfigCase):
    """`config --check` looks at everything that a call needs, and spends nothing."""

    def check_against(self, reply: Reply, code: int, *argv: str) -> Run:
        """Run it against a server that answers GET /v1/models so; it asks once, with the key."""
        api = self.serve()
        api.put("/v1/models", reply)
        self.configure(base_url=api.base_url, api_key=KEY)
        run = self.config_tool("--check", *argv, code=code)
        self.assertEqual([(r.method, r.target) for r in api.requests], [("GET", "/v1/models")])
        self.assertEqual(api.gets[0].headers["authorization"], f"Bearer {KEY}")
        self.assertNotIn(KEY, run.out + run.err)
        self.assertEqual((self.listing(), self.jobs()), ([], []))
        return run

    def test_all_is_well(self) -> None:
        out = self.check_against(models("gpt-image-2"), 0).out
        curl = subprocess.run(["curl", "--version"], stdout=subprocess.PIPE, check=True).stdout
        for fact in (curl.decode().split()[1], str(self.path), str(self.state), "200"):
            self.assertIn(fact, out)

    def test_as_json(self) -> None:
        run = self.check_against(models("gpt-image-2"), 0, "--json")
        self.assertTrue(run.json["ok"])
        self.assertIn(str(self.state), json.dumps(run.json))
        run = self.check_against(refusal(401, "invalid_api_key", "No."), 4, "--json")
        self.assertEqual((run.json["ok"], run.json["error"]["exit_code"]), (False, 4))

    def test_what_the_server_may_answer(self) -> None:
        for reply, code, pattern in (
            (refusal(401, "invalid_api_key", "Incorrect API key."), 4, "401.*Incorrect API key"),
            (refusal(403, None, "Your organization must be verified."), 4, "must be verified"),
            (page(404, "Not Found"), 0, "404.*reachable"),
            (page(405, "Method Not Allowed"), 0, "405.*reachable"),
            (Reply(301, headers=[("Location", "https://relay.example/v1")]), 1, "relay.example"),
        ):
            with self.subTest(reply.status):
                run = self.check_against(reply, code)
                self.assertRegex(run.out + run.err, pattern)

    def test_a_gateway_that_fails(self) -> None:
        api = self.serve()
        api.put("/v1/models", page(502, "Bad Gateway"))
        run = self.run_tool("config", "--check", "--base-url", api.base_url)
        self.assertNotEqual(run.code, 0)
        self.assertIn("502", run.out + run.err)
        self.assertNotIn("billed", run.out + run.err)

    def test_nobody_there(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            base = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
            self.config_tool("--check", "--base-url", base, code=7)

    def test_no_key(self) -> None:
        self.configure(**OPENAI)
        run = self.config_tool("--check", code=3)
        self.assertIn("OPENAI_API_KEY", run.out + run.err)

    def test_no_curl(self) -> None:
        run = self.config_tool("--check", code=3, env={"PATH": str(self._folder("bin"))})
        self.assertRegex(run.out + run.err, "curl is not installed")

    def test_a_file_that_others_can_read(self) -> None:
        api = self.serve()
        api.put("/v1/models", models())
        self.configure(base_url=api.base_url).chmod(0o644)
        run = self.config_tool("--check")
        self.assertIn(f"chmod 600 {self.path}", run.out + run.err)
