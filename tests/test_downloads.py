"""Pictures that come as links: fetched without the key, tried again, and from no private place.

The base URL of most tests is on 127.0.0.1, and so are their pictures: what counts as private there
is any other private address. Where loopback itself is to be private, the base is an invented host
behind a proxy, which is the test's server.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Sequence

from tests.pictures import png
from tests.support import (
    KEY,
    Api,
    Case,
    Child,
    Reply,
    Run,
    Script,
    answer,
    file_reply,
    page,
    ranged,
    refusal,
)

PICTURE = png(100, 70, seed=1)
OTHER = png(8, 8)
DENIED = refusal(401, "invalid_api_key", "Sign in.")

COUNTING_CURL = """#!{python}
import os, sys
with open({log!r}, "a") as file:
    file.write("curl\\n")
path = os.environ["PATH"].partition(os.pathsep)[2]
os.execvpe("curl", ["curl", *sys.argv[1:]], {{**os.environ, "PATH": path}})
"""


class DownloadCase(Case):
    """A case whose server answers one POST with links to pictures."""

    def ask(self, *urls: str, files: dict[str, Script | list[Script]] | None = None) -> Run:
        """Generate and let the answer hold these links; `files` are served beside it."""
        return self.finish(self.start(*urls, files=files))

    def start(self, *urls: str, files: dict[str, Script | list[Script]] | None = None) -> Child:
        """Start what `ask` runs."""
        self.api = self.serve_base(answer(*urls))
        self.api.files.update(files or {})
        number = str(len(urls))
        return self.start_tool("generate", "a fox", "-n", number, "--connect-timeout", "2")

    def check_saved(self, run: Run, *pictures: bytes) -> None:
        """Assert success with these pictures."""
        self.check(run, 0)
        self.assertEqual([path.read_bytes() for path in run.saved], list(pictures), run)

    def check_kept(self, run: Run) -> Path:
        """Assert that nothing could be saved and the answer is kept; return its folder."""
        self.check(run, 10)
        self.assertEqual((run.saved, self.listing()), ([], []))
        match = re.search(r"^Recover: .* recover (\S+)\n\Z", run.err, re.MULTILINE)
        assert match, run
        (job,) = [job for job in self.jobs() if job.name == match.group(1)]
        self.assertTrue((job / "response.json").stat().st_size)
        return job

    def count_curls(self) -> Path:
        """Let every curl that is started leave a line in a file, and return that file."""
        log, folder = self.tmp / "curls", self.tmp / "bin"
        folder.mkdir()
        curl = folder / "curl"
        curl.write_text(COUNTING_CURL.format(python=sys.executable, log=str(log)))
        curl.chmod(0o755)
        self.env["PATH"] = os.pathsep.join([str(folder), self.env["PATH"]])
        return log

    def check_keyless(self, *servers: Api) -> None:
        """Assert that no GET of these servers carried the key, in whatever form."""
        for request in (request for api in servers for request in api.gets):
            self.assertNotIn("authorization", request.headers)
            self.assertNotIn(KEY, str(request))


class TestFetching(DownloadCase):
    """What a server may do to a download, and what comes of it."""

    def test_a_download_carries_no_key(self) -> None:
        host = self.serve()
        self.configure(headers={"X-Team": "secret-team"})
        run = self.ask(host.put("/a.png", PICTURE), "/b.png", files={"/b.png": file_reply(OTHER)})
        self.check_saved(run, PICTURE, OTHER)
        self.assertEqual(self.api.posts[0].headers["authorization"], f"Bearer {KEY}")
        self.check_keyless(host, self.api)
        for api in (host, self.api):
            self.assertNotIn("secret-team", str(api.gets[0]))
        self.assertEqual(self.jobs(), [])

    def test_what_is_tried_again(self) -> None:
        whole = file_reply(PICTURE)
        cut = len(PICTURE) // 2
        cases: dict[str, tuple[list[Script], list[str | None]]] = {
            "cut": ([ranged(PICTURE, cut=cut), ranged(PICTURE)], [None, f"bytes={cut}-"]),
            "cut, and Range ignored": (
                [whole._replace(cut=cut), whole, whole],
                [None, f"bytes={cut}-", None],
            ),
            "server error": ([page(500, "Oops"), whole], [None, None]),
            "not there in time": ([Reply(429), whole], [None, None]),
            "no answer": ([Reply(silent=True), whole], [None, None]),
        }
        self.hurry(5)
        running = [
            (self.start("/a.png", files={"/a.png": list(replies)}), self.api)
            for replies, _ in cases.values()
        ]
        for (name, (_, ranges)), (tool, api) in zip(cases.items(), running):
            with self.subTest(name):
                self.check_saved(self.finish(tool), PICTURE)
                self.assertEqual([get.headers.get("range") for get in api.gets], ranges)
                self.assertEqual(len(api.posts), 1)

    def test_a_link_that_stays_dead_keeps_the_answer_for_recover(self) -> None:
        for status in (404, 403, 410):
            with self.subTest(status):
                run = self.ask("/a.png", files={"/a.png": Reply(status)})
                job = self.check_kept(run)
                self.assertIn(f"HTTP {status}", run.err)
                again = self.run_tool("recover", job.name)
                self.check(again, 10)
                self.assertTrue(job.exists())
                self.api.put("/a.png", PICTURE)
                run = self.check(self.run_tool("recover", job.name, "-o", f"{status}.png"), 0)
                self.assertEqual(run.saved[0].read_bytes(), PICTURE)
                self.assertEqual((len(self.api.posts), self.jobs()), (1, []))
                run.saved[0].unlink()

    def test_one_dead_link_stops_no_other(self) -> None:
        files: dict[str, Script | list[Script]] = {"/b.png": file_reply(OTHER)}
        run = self.check(self.ask("/a.png", "/b.png", files=files), 9)
        self.assertEqual([path.read_bytes() for path in run.saved], [OTHER])
        self.api.put("/a.png", PICTURE)
        run = self.check(self.run_tool("recover", "--last", "--output-dir", "later"), 0)
        self.assertIn(PICTURE, [path.read_bytes() for path in run.saved])
        self.assertEqual(self.jobs(), [])

    def test_what_is_no_picture_is_kept_raw_and_fetched_anew(self) -> None:
        login = page(200, "Sign in to download").body
        cases = {
            "a login page": file_reply(login),
            "a login page named PNG": file_reply(login, "image/png"),
            "a drawing in a page": file_reply(b"<html><svg></svg></html>"),
            "an error": file_reply(b'{"error": "expired"}'),
            "a cut picture": file_reply(PICTURE[:-10]),
        }
        running = [self.start("/a.png", files={"/a.png": reply}) for reply in cases.values()]
        jobs = [self.check_kept(run) for run in [self.finish(tool) for tool in running]]
        for (name, reply), api, job in zip(cases.items(), self.servers, jobs):
            with self.subTest(name):
                kept = [path.read_bytes() for path in job.iterdir() if path.is_file()]
                self.assertIn(reply.body, kept)
                api.put("/a.png", ranged(PICTURE))
                self.check_saved(self.run_tool("recover", job.name), PICTURE)

    def test_an_empty_file_is_no_picture(self) -> None:
        self.check_kept(self.ask("/a.png", files={"/a.png": file_reply(b"")}))

    def test_a_file_too_large_is_refused_at_its_announcement(self) -> None:
        huge = file_reply(PICTURE)._replace(content_length=200_000_000, cut=len(PICTURE))
        run = self.ask("/a.png", files={"/a.png": huge})
        self.check_kept(run)
        self.assertEqual(len(self.api.gets), 1)
        self.assertIn("larger", run.err)


class TestRedirects(DownloadCase):
    """At most three, each one checked."""

    def chain(self, count: int) -> dict[str, Script | list[Script]]:
        """Return a picture behind so many redirects, from /0 on."""
        hops: dict[str, Script | list[Script]] = {
            f"/{i}": Reply(302, headers=[("Location", f"/{i + 1}")]) for i in range(count)
        }
        return {**hops, f"/{count}": file_reply(PICTURE)}

    def test_three_are_followed(self) -> None:
        self.check_saved(self.ask("/0", files=self.chain(3)), PICTURE)
        self.assertEqual([get.target for get in self.api.gets], ["/0", "/1", "/2", "/3"])

    def test_a_fourth_is_not(self) -> None:
        self.check_kept(self.ask("/0", files=self.chain(4)))
        self.assertNotIn("/4", [get.target for get in self.api.gets])

    def test_every_kind_of_redirect(self) -> None:
        host = self.serve()
        url = host.put("/a.png", PICTURE)
        links = {str(status): Reply(status, b"moved") for status in (301, 302, 303, 307, 308)}
        files: dict[str, Script | list[Script]] = {
            f"/{name}": reply._replace(headers=[("Location", url)]) for name, reply in links.items()
        }
        self.check_saved(self.ask(*files, files=files), *[PICTURE] * len(links))
        self.check_keyless(host, self.api)

    def test_a_redirect_to_a_private_place_is_refused(self) -> None:
        curls = self.count_curls()
        targets = ("http://10.0.0.1/", "http://[::ffff:10.0.0.1]/", "file:///etc/hostname")
        files: dict[str, Script | list[Script]] = {
            f"/{number}": Reply(302, headers=[("Location", target)])
            for number, target in enumerate(targets)
        }
        self.check_kept(self.ask(*files, files=files))
        self.assertEqual(len(self.api.gets), len(targets))
        self.assertEqual(len(curls.read_text().split()), 1 + len(targets))


class TestKey(DownloadCase):
    """The one case in which a download gets the key."""

    def test_a_401_from_the_base_is_tried_once_with_the_key(self) -> None:
        for status in (401, 403):
            with self.subTest(status):
                files: dict[str, Script | list[Script]] = {
                    "/a.png": [DENIED._replace(status=status), file_reply(PICTURE)]
                }
                self.check_saved(self.ask("/a.png", files=files), PICTURE)
                keys = [get.headers.get("authorization") for get in self.api.gets]
                self.assertEqual(keys, [None, f"Bearer {KEY}"])

    def test_only_once(self) -> None:
        self.check_kept(self.ask("/a.png", files={"/a.png": [DENIED, DENIED]}))
        self.assertEqual(len(self.api.gets), 2)

    def test_no_other_port_gets_the_key(self) -> None:
        host = self.serve()
        self.check_kept(self.ask(host.put("/a.png", DENIED)))
        self.assertEqual(len(host.gets), 1)
        self.check_keyless(host)

    def test_no_other_spelling_of_the_host_gets_the_key(self) -> None:
        api = self.serve_base()
        api.put("/a.png", DENIED)
        for host in ("localhost", "127.1", "2130706433"):
            with self.subTest(host):
                api.script.append(answer(f"http://{host}:{api.port}/a.png"))
                self.check(self.run_tool("generate", host), 10)
        self.check_keyless(api)

    def test_a_redirect_gets_no_key(self) -> None:
        host = self.serve()
        moved = Reply(302, headers=[("Location", host.put("/a.png", DENIED))])
        self.check_kept(self.ask("/a.png", files={"/a.png": moved}))
        self.check_keyless(host, self.api)

    def test_a_redirect_is_not_followed_with_the_key(self) -> None:
        host = self.serve()
        moved = Reply(302, headers=[("Location", host.put("/a.png", PICTURE))])
        self.check_kept(self.ask("/a.png", files={"/a.png": [DENIED, moved]}))
        self.no_request(host)


class TestPlaces(DownloadCase):
    """Where a link may lead."""

    def refused(self, links: Sequence[str]) -> None:
        """Assert that each link of one answer is refused, and no curl started for it."""
        self.api.script.append(answer(*links))
        curls = self.count_curls()
        run = self.check(self.run_tool("generate", "a fox"), 10)
        for number, link in enumerate(links, 1):
            with self.subTest(link):
                self.assertIn(f"picture {number}: ", run.err)
        self.assertEqual(curls.read_text().splitlines(), ["curl"], run)

    def test_private_addresses_in_every_spelling(self) -> None:
        self.api = self.serve_base()
        places = ["10.0.0.1", "169.254.169.254", "192.168.0.1:8080", "224.0.0.1", "0.0.0.0"]
        places += ["[::ffff:10.0.0.1]", "[64:ff9b::a00:1]", "[fd00:ec2::254]", "[fe80::1]"]
        places += ["167772161", "0xa9fea9fe", "0251.0376.0251.0376", "10.1", "012.0.0.1"]
        places += ["198.18.0.1", "10.0.0.1."]
        self.refused([f"http://{place}/a.png" for place in places])

    def test_what_is_no_http(self) -> None:
        self.api = self.serve_base()
        links = ["file:///etc/hostname", "ftp://8.8.8.8/a.png", "gopher://8.8.8.8/1", "dict://x/"]
        links += ["FILE:///etc/hostname", "http://user:pw@8.8.8.8/a.png", "//@8.8.8.8/a.png"]
        links += ["http://[::1/a.png", "http://8.8.8.8:99999/a.png", "https://"]
        self.refused(links)

    def behind_proxy(self) -> Api:
        """Start a server that is also the proxy of an invented, public base."""
        self.api = api = self.serve_base()
        self.env.update(
            GPT_IMAGE2_BASE_URL="http://images.example/v1", GPT_IMAGE2_ALLOW_HTTP="true"
        )
        self.env.update(http_proxy=api.origin)
        return api

    def test_loopback_is_private_to_a_base_elsewhere(self) -> None:
        port = self.behind_proxy().port
        hosts = ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"]
        hosts += ["%31%32%37.0.0.1", "127%2e1", "１２７.0.0.1", "127.0.0.1.", "localhost"]
        self.refused([f"http://{host}:{port}/a.png" for host in hosts])

    def test_a_redirect_to_loopback_is_refused_to_a_base_elsewhere(self) -> None:
        api = self.behind_proxy()
        api.script.append(answer("http://images.example/a.png"))
        secret = api.put("/secret.png", PICTURE)
        api.files["http://images.example/a.png"] = Reply(302, headers=[("Location", secret)])
        self.check_kept(self.run_tool("generate", "a fox"))
        self.assertEqual(len(api.gets), 1)

    def test_names_are_the_proxys_business(self) -> None:
        api = self.behind_proxy()
        link = "http://cdn.example/a.png"
        api.files[link] = file_reply(PICTURE)
        api.script.append(answer(link))
        self.check_saved(self.run_tool("generate", "a fox"), PICTURE)
        self.check_keyless(api)

    def test_allow_private(self) -> None:
        api = self.behind_proxy()
        link = api.put("/a.png", PICTURE)
        api.script.append(answer(link))
        self.check_saved(self.run_tool("generate", "a fox", "--allow-private"), PICTURE)

    def test_allow_private_in_recover(self) -> None:
        api = self.behind_proxy()
        api.script.append(answer(api.put("/a.png", PICTURE)))
        run = self.run_tool("generate", "a fox")
        job = self.check_kept(run)
        self.assertIn("--allow-private", run.err)
        self.check_saved(self.run_tool("recover", job.name, "--allow-private"), PICTURE)

    def test_every_spelling_of_loopback_is_the_base(self) -> None:
        api = self.serve_base()
        api.put("/a.png", PICTURE)
        hosts = ("localhost", "LOCALHOST", "127.1", "127.0.0.1")
        api.script.append(answer(*[f"http://{host}:{api.port}/a.png" for host in hosts]))
        run = self.run_tool("generate", "a fox", "-n", str(len(hosts)))
        self.check_saved(run, *[PICTURE] * len(hosts))
