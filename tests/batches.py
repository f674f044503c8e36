"""What the tests of batch share: a server that draws each prompt's own picture, and a case."""

from __future__ import annotations

import collections
import hashlib
import json
import re
import threading
import time
from pathlib import Path
from typing import Any, Mapping

from tests.faults import Stage
from tests.pictures import png
from tests.support import Argument, Reply, Request, Run, answer, refusal

POLICY = "moderation_blocked"
LOW = ("--quality", "low")
BAD_REQUEST = refusal(400, "invalid_value", "No such size.")
UNAUTHORIZED = refusal(401, "invalid_api_key", "Wrong key.")


def prompt_of(request: Request) -> str:
    """Return the prompt of a POST, JSON or form."""
    if request.headers["content-type"] == "application/json":
        return str(request.json["prompt"])
    return request.fields["prompt"]


def asked(request: Request) -> int:
    """Return how many pictures a POST asks for."""
    json_body = request.headers["content-type"] == "application/json"
    fields = request.json if json_body else request.fields
    return int(fields.get("n", 1))


def drawn(label: str) -> bytes:
    """Return the picture of a label: no two have the same bytes."""
    red, green, blue = hashlib.sha256(label.encode()).digest()[:3]
    return png(16, 16, rgb=(red, green, blue))


class Painter:
    """Answers each POST with pictures of its prompt's own, unless told otherwise.

    The first picture of "a fox" is drawn("a fox"), the second of one answer drawn("a fox, 2"); what
    is painted when the prompt comes again is another "take": drawn("a fox again").
    """

    def __init__(self) -> None:
        self.orders: dict[str, list[Reply]] = collections.defaultdict(list)
        self.seen: list[str] = []
        self.times: list[float] = []
        self.labels: dict[bytes, str] = {}
        self.under_way = 0
        self.most = 0
        self.lock = threading.Lock()

    def order(self, prompt: str, *replies: Reply) -> None:
        """Give a prompt these replies first; a 200 without a body or chunks is painted."""
        self.orders[prompt] += replies

    def hold(self, *prompts: str) -> threading.Event:
        """Let the next answer to each of these prompts wait for the Event that is returned."""
        release = threading.Event()
        for prompt in prompts:
            self.order(prompt, Reply(before=release))
        return release

    def __call__(self, request: Request) -> Reply:
        prompt = prompt_of(request)
        with self.lock:
            self.times.append(time.monotonic())
            self.seen.append(prompt)
            again = " again" * (self.seen.count(prompt) - 1)
            reply = self.orders[prompt].pop(0) if self.orders[prompt] else Reply()
            broken = reply.silent or reply.reset
            if reply.status == 200 and not (reply.body or reply.chunks or broken):
                count = asked(request)
                labels = [f"{prompt}{again}"]
                labels += [f"{prompt}{again}, {number}" for number in range(2, count + 1)]
                self.labels.update((drawn(label), label) for label in labels)
                painted = answer(*map(drawn, labels))
                reply = painted._replace(before=reply.before, cut=reply.cut)
        return reply


class BatchCase(Stage):
    """A case with a Painter behind the base URL; jobs.jsonl is the batch unless said otherwise."""

    def setUp(self) -> None:
        super().setUp()
        self.painter = Painter()
        self.api = self.serve_base(otherwise=self.painter)
        self.folder = self.work / "jobs"

    def tearDown(self) -> None:
        from tests.support import KEY

        self.assertEqual(self.files_with(KEY), [], "the key is in a file")

    def write(self, *lines: Mapping[str, Any] | str, name: str = "jobs.jsonl") -> Path:
        """Write a jobs file; a mapping is a line of JSON, a string stands as it is."""
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path = self.work / name
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return path

    def prompts(self, *prompts: str, **more: Any) -> Path:
        """Write a jobs file with these prompts; `more` stands in each line."""
        return self.write(*({"prompt": prompt, **more} for prompt in prompts))

    def batch(self, *argv: Argument, code: int = 0, file: Argument = "jobs.jsonl", **o: Any) -> Run:
        """Run the batch, and assert its exit code and that stdout has nothing but its lines."""
        run = self.check(self.run_tool("batch", file, *argv, **o), code)
        if "--json" not in argv and "--dry-run" not in argv:
            for line in run.out.splitlines():
                self.assertRegex(line, r"^Saved: /.* \(\d+ KB\)$", self.story(run))
        return run

    def refused(self, *argv: Argument, **options: Any) -> Run:
        """Run a batch that must be refused as wrong usage: exit 2, nothing sent, nothing made."""
        before, posts = self.files(), len(self.api.posts)
        run = self.batch(*argv, code=2, **options)
        self.assertEqual(len(self.api.posts), posts, self.story(run))
        self.assertEqual(self.files(), before)
        return run

    def files(self) -> dict[str, bytes]:
        """Return all files in the work folder but locks."""
        names = [name for name in self.listing() if not name.endswith(".lock")]
        return {name: (self.work / name).read_bytes() for name in names}

    def posted(self) -> list[str]:
        """Return the prompts that were POSTed, in alphabetical order."""
        return sorted(self.painter.seen)

    def post_of(self, prompt: str) -> Request:
        """Return the one POST of a prompt."""
        (request,) = [post for post in self.api.posts if prompt_of(post) == prompt]
        return request

    def painted(self, folder: Path | None = None) -> dict[str, str]:
        """Return the label of every picture below a folder, by its relative path."""
        base = folder or self.folder
        names = [
            name for name in self.listing(base) if not re.search(r"\.(jsonl?|html|lock)$", name)
        ]
        return {name: self.painter.labels.get((base / name).read_bytes(), "?") for name in names}

    def check_pictures(self, **expected: str) -> None:
        """Assert the pictures in the folder, by name without its .png."""
        names = {f"{name.lstrip('_')}.png": label for name, label in expected.items()}
        self.assertEqual(self.painted(), names)

    def lines(self, folder: Path | None = None, name: str = "results.jsonl") -> list[Any]:
        """Return the lines of a journal."""
        text = ((folder or self.folder) / name).read_text(encoding="ascii")
        return [json.loads(line) for line in text.splitlines()]

    def states(self, name: str = "results.jsonl") -> dict[str, str]:
        """Return the journal's last word on each job, by id."""
        return {line["id"]: line["state"] for line in self.lines(name=name)}

    def documents(self, run: Run) -> list[Any]:
        """Return the JSON documents of a run."""
        return [json.loads(line) for line in run.out.splitlines()]

    def summary(self, run: Run) -> Any:
        """Return the table at the end of stderr, as numbers where they are such."""
        heads, cells = [
            line.split() for line in run.err.splitlines() if re.search("saved +skip|^ +[0-9]", line)
        ][:2]
        return dict(zip(heads, cells))
