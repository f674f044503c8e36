"""What curl is told: its command line, its environment, and the lines of its config."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
from typing import Any, NamedTuple

from tests.case import Run, SystemCase
from tests.images import png
from tests.server import KEY, Api, Reply, answer, models, refusal

IMAGE = png(8, 8)
LARGE = png(800, 800, seed=1)  # 1.9 MB, for which curl would ask first

# A curl that notes what it is given, and then is the real one.
RECORDER = """#!/bin/sh
mkdir "{calls}/$$" && cd "{calls}/$$" || exit 2
printf '%s\\n' "$@" >argv
env >environment
cat >config
exec "{curl}" "$@" <config
"""

EVERY_CALL = [
    *[("silent", ""), ("show-error", ""), ("globoff", ""), ("http1.1", ""), ("noproxy", "*")],
    *[("proto", "=https,http"), ("connect-timeout", "3"), ("max-time", "77")],
    *[("keepalive-time", "30"), ("user-agent", "Fox/1.0")],
]
# All are in curl 7.58 (January 2018). Not among them: what reads another file of the user's, goes
# on to another place, sends again, or trusts more than it must.
ALLOWED = """
    silent show-error globoff http1.1 proto connect-timeout max-time keepalive-time noproxy proxy
    user-agent url write-out header cacert no-buffer data-binary form form-string output dump-header
    compressed fail speed-limit speed-time continue-at max-filesize resolve limit-rate
"""


class Call(NamedTuple):
    """One process of curl: its arguments, its environment, and its options in order."""

    argv: list[str]
    environment: str
    options: list[tuple[str, str]]


def read_config(text: str) -> list[tuple[str, str]]:
    """Return the options of a config and their values; every line must be one."""
    options = []
    for line in text.splitlines():
        match = re.fullmatch(r'([a-z0-9.-]+)(?: = (?:"((?:[^"\\]|\\["\\])*)"|([0-9]+)))?', line)
        assert match, line
        options.append((match[1], re.sub(r"\\(.)", r"\1", match[2] or match[3] or "")))
    return options


class TestLines(SystemCase):
    """The options of every kind of call, as a curl of ours notes them."""

    def setUp(self) -> None:
        super().setUp()
        self.calls_folder, programs = self.new_folder("calls"), self.new_folder("bin")
        recorder, curl = programs / "curl", shutil.which("curl")
        recorder.write_text(RECORDER.format(calls=self.calls_folder, curl=curl))
        recorder.chmod(0o755)
        self.env["PATH"] = f"{programs}{os.pathsep}{self.env['PATH']}"
        self.configure(timeout=77, connect_timeout=3, user_agent="Fox/1.0")
        (self.work / "a.png").write_bytes(IMAGE)

    def calls(self, *argv: str, **options: Any) -> list[Call]:
        """Run the tool, and return the calls of curl that have a config."""
        self.check(self.run_tool(*argv, **options), 0)
        found = []
        for folder in sorted(self.calls_folder.iterdir()):
            texts = [(folder / name).read_text() for name in ("argv", "environment", "config")]
            found.append(Call(texts[0].split("\n")[:-1], texts[1], read_config(texts[2])))
            shutil.rmtree(folder)
        return [call for call in found if call.options]

    def check_call(self, call: Call, *more: tuple[str, str]) -> None:
        """Assert what every call must say, and that nothing else than this is said."""
        self.assertEqual(call.argv, ["-q", "-K", "-"])
        self.assertEqual([o for o in [*EVERY_CALL, *more] if o not in call.options], [])
        self.assertLessEqual({name for name, _ in call.options}, set(ALLOWED.split()))

    def test_a_paid_post(self) -> None:
        self.serve_base(otherwise=answer(IMAGE))
        body = {"generate": "data-binary", "edit": "form"}
        for argv in (("generate", "a fox"), ("edit", "a.png", "a fox", "--param", "a=b")):
            with self.subTest(argv[0]):
                (call,) = self.calls(*argv)
                self.check_call(call, ("no-buffer", ""), ("header", "Expect:"))
                options = dict(call.options)
                job, name = os.path.split(options["output"])
                self.assertEqual(os.path.dirname(job), str(self.state / "gpt-image-2" / "jobs"))
                self.assertEqual(options["dump-header"], f"{job}/headers.txt")
                self.assertEqual(name, "response.json")
                self.assertTrue(options[body[argv[0]]])
                # the prompt, which others could read in ps, goes by a file
                self.assertNotIn("a fox", str(call.options))

    def test_a_download_and_a_check(self) -> None:
        api = self.serve_base()
        open_link, shut_link = api.put("/a.png", IMAGE), f"{api.origin}/b.png"
        api.files["/b.png"] = [refusal(401, None, "No."), Reply(body=IMAGE)]
        api.files["/v1/models"] = models("gpt-image-2")
        api.script += [answer(open_link), answer(shut_link)]
        for command, url, with_key in (
            ("generate fox", open_link, [False]),
            ("generate fox", shut_link, [False, True]),
            ("config --check", f"{api.base_url}/models", [True]),
        ):
            with self.subTest(url):
                calls = [c for c in self.calls(*command.split()) if ("url", url) in c.options]
                self.assertEqual(sorted(KEY in str(call.options) for call in calls), with_key)
                for call in calls:
                    self.check_call(call)

    def test_no_key_in_arguments_or_environment(self) -> None:
        """Wherever it comes from, and whatever else is secret there."""
        api = self.serve(otherwise=answer(IMAGE))
        others = {"OPENAI_API_KEY": "sk-other-key", "SSLKEYLOGFILE": f"{self.tmp}/tls"}
        for way, settings, env in (
            ("variable", {"api_key_env": "MY_OWN_WORD"}, {"MY_OWN_WORD": KEY}),
            ("within", {"api_key": KEY}, {"NOTES": f"mine is {KEY}."}),
            ("command", {"api_key_command": ["echo", KEY]}, {}),
            ("headers", {"headers": {"X-Team-Token": KEY}, "api_key": KEY}, {}),
        ):
            with self.subTest(way):
                self.configure(base_url=api.base_url, **settings)
                (call,) = self.calls("generate", "a fox", env={**others, **env})
                self.assertEqual(api.posts[-1].headers["authorization"], f"Bearer {KEY}")
                self.assertEqual(call.argv, ["-q", "-K", "-"])
                self.assertNotRegex(call.environment, f"{KEY}|sk-other|API_KEY|SSLKEYLOG")
                self.assertRegex(call.environment, r"(?m)^LC_ALL=C$")


class TestAround(SystemCase):
    """What curl must not take from elsewhere, and where it must not go."""

    def generate(self, code: int = 0) -> Run:
        return self.check(self.run_tool("generate", "a fox"), code)

    def test_the_users_curlrc_is_not_read(self) -> None:
        api = self.serve_base(otherwise=answer(IMAGE))
        del self.env["XDG_CONFIG_HOME"]
        for variable in ("HOME", "XDG_CONFIG_HOME", "CURL_HOME"):  # each goes before the last
            with self.subTest(variable):
                folder = self.new_folder(variable)
                for name in (".curlrc", "curlrc"):
                    (folder / name).write_text('header = "X-Spy: 1"\n')
                self.env[variable] = str(folder)
                self.generate()
                self.assertNotIn("x-spy", api.posts[-1].headers)

    def test_a_post_follows_no_redirect(self) -> None:
        api, other = self.serve_base(), self.serve(otherwise=answer(IMAGE))
        for status in (301, 302, 303, 307, 308):
            for where in (f"{other.base_url}/images/generations", "/v1/elsewhere"):
                with self.subTest(status, where=where):
                    api.script.append(Reply(status, headers=[("Location", where)]))
                    requests = len(api.requests)
                    self.assertIn(where, self.generate(1).err)
                    self.assertEqual(len(api.requests), requests + 1)
                    self.no_request(other)

    def test_a_state_folder_with_any_name_and_a_large_image(self) -> None:
        api = self.serve_base(otherwise=answer(IMAGE))
        (self.work / "a.png").write_bytes(LARGE)
        state = self.new_folder("st\"a\\te' ;type=x,日本 {a}[1-3]")
        self.env["XDG_STATE_HOME"] = str(state)
        self.generate()
        self.check(self.run_tool("edit", "a.png", "x", "--mask-box", "1,1,2,2"), 0)
        self.assertEqual(self.listing(state), ["gpt-image-2/history.jsonl", "gpt-image-2/lock"])
        names = [part.name for part in api.posts[1].parts]  # curl leaves out a file it can't read
        self.assertEqual(names, ["model", "prompt", "size", "image", "mask"])
        self.assertEqual(api.posts[1].uploads[0].body, LARGE)
        self.assertNotIn("expect", api.posts[1].headers)

    def test_a_servers_own_certificate(self) -> None:
        """It counts once `cacert` names it, for the request and for the image's link."""
        own = self.certificate()
        api = TlsApi(answer("/a.png"))
        api.context.load_cert_chain(own)
        self.addCleanup(api.close)
        api.put("/a.png", IMAGE)
        settings = {"base_url": f"https://localhost:{api.port}/v1", "api_key": KEY}
        self.configure(**settings)
        self.assertEqual((self.generate(7).saved, api.requests), ([], []))
        self.configure(**settings, cacert=str(own))
        (path,) = self.generate().saved
        self.assertEqual((path.read_bytes(), len(api.posts), len(api.gets)), (IMAGE, 1, 1))


class TlsApi(Api):
    """The same server behind TLS."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def _serve(self, connection: socket.socket) -> None:
        try:
            super()._serve(self.context.wrap_socket(connection, server_side=True))
        except OSError:  # the client doesn't trust us
            connection.close()

    def _drain(self, *_: object) -> None:
        """Nothing: after the answer comes TLS's goodbye, which is no request."""
