"""What the tests of batch share: a server that draws each prompt's own image, a clock, a case."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import re
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Union
from unittest import mock

from tests.case import Argument, Run, SystemCase
from tests.images import png
from tests.server import KEY, Reply, Request, answer, refusal

LOW = ("--quality", "low")
ONE = ("--concurrency", "1")
NOT_THIS = refusal(400, "moderation_blocked", "Not this.")
BAD_REQUEST = refusal(400, "invalid_value", "No such size.")
UNAUTHORIZED = refusal(401, "invalid_api_key", "Wrong key.")
NO_CREDIT = refusal(429, "insufficient_quota", "Pay first.", type="insufficient_quota")
SILENT = Reply(silent=True)
Order = Union[Reply, Callable[[], object]]


def sent_fields(request: Request) -> Any:
    """Return the fields of a POST, JSON or form."""
    plain = request.headers["content-type"] == "application/json"
    return request.json if plain else request.fields


def drawn(label: str) -> bytes:
    """Return the image of a label: no two have the same bytes."""
    red, green, blue = hashlib.sha256(label.encode()).digest()[:3]
    return png(16, 16, rgb=(red, green, blue))


class Painter:
    """Answers each POST with images of its prompt's own, unless told otherwise.

    They are drawn("a fox") and drawn("a fox, 2"); when "a fox" comes again, drawn("a fox again").
    """

    def __init__(self) -> None:
        self.orders: dict[str, list[Order]] = collections.defaultdict(list)
        self.seen: list[str] = []
        self.labels: dict[bytes, str] = {}
        self.lock = threading.Lock()

    def order(self, prompt: str, *orders: Order) -> None:
        """Give a prompt these replies first (an empty one is painted); a function may make one."""
        self.orders[prompt] += orders

    def hold(self, *prompts: str) -> threading.Event:
        """Let the next answer to each of these prompts wait for the Event that is returned."""
        release = threading.Event()
        for prompt in prompts:
            self.order(prompt, Reply(before=release))
        return release

    def __call__(self, request: Request) -> Reply:
        prompt = str(sent_fields(request)["prompt"])
        with self.lock:
            self.seen.append(prompt)
            again = " again" * (self.seen.count(prompt) - 1)
            order = self.orders[prompt].pop(0) if self.orders[prompt] else Reply()
        if not isinstance(order, Reply):
            made = order()
            order = made if isinstance(made, Reply) else Reply()
        if order._replace(before=None) != Reply():
            return order
        count = int(sent_fields(request).get("n", 1))
        labels = [prompt + again, *(f"{prompt}{again}, {at}" for at in range(2, count + 1))]
        self.labels.update((drawn(label), label) for label in labels)
        return answer(*map(drawn, labels))._replace(before=order.before)


@contextlib.contextmanager
def clock(asleep: Callable[[], object] = lambda: None) -> Iterator[Callable[[], float]]:
    """Let who sleeps call asleep() and wake at once, so much later; yield what tells the time."""
    now, pause = 1000.0, time.sleep

    def sleep(seconds: float) -> None:
        nonlocal now
        if seconds > 0.06:  # not those of subprocess while a process ends
            asleep()
        now += seconds
        pause(0.001)  # lets others work, as in the loop that waits for a curl

    with mock.patch("time.sleep", sleep), mock.patch("time.monotonic", lambda: now):
        yield lambda: now - 1000.0


class BatchCase(SystemCase):
    """A case with a Painter behind the base URL; jobs.jsonl is the batch unless said otherwise."""

    def setUp(self) -> None:
        super().setUp()
        self.painter = Painter()
        self.api = self.serve_base(otherwise=self.painter)
        self.folder = self.work / "jobs"
        self.journal = self.folder / "results.jsonl"

    def tearDown(self) -> None:
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
        """Run a batch that must be refused as wrong usage: nothing sent, nothing made."""
        before = (self.files(), len(self.api.posts))
        run = self.batch(*argv, code=2, **options)
        self.assertEqual((self.files(), len(self.api.posts)), before, self.story(run))
        return run

    def beside(self, prompt: str, *lines: str) -> list[Run]:
        """Run the tool with each of these words once a prompt has come; return those runs then."""
        runs: list[Run] = []
        tools = (self.start_tool(*line.split()) for line in lines)
        self.painter.order(prompt, lambda: runs.extend(map(self.finish, tools)))
        return runs

    def files(self) -> dict[str, bytes]:
        names = [name for name in self.listing() if not name.endswith(".lock")]
        return {name: (self.work / name).read_bytes() for name in names}

    def posted(self) -> list[str]:
        """Return the prompts that were POSTed, sorted."""
        return sorted(self.painter.seen)

    def post_of(self, prompt: str) -> Request:
        """Return the one POST of a prompt."""
        (post,) = [post for post in self.api.posts if sent_fields(post)["prompt"] == prompt]
        return post

    def painted(self, folder: Path | None = None) -> dict[str, str]:
        """Return the label of every image below a folder, by its relative path."""
        base = folder or self.folder
        names = [n for n in self.listing(base) if not re.search(r"\.(jsonl?|html|lock)$", n)]
        return {name: self.painter.labels.get((base / name).read_bytes(), "?") for name in names}

    def check_images(self, **expected: str) -> None:
        """Assert the images in the folder, by name without its .png."""
        self.assertEqual(self.painted(), {f"{name}.png": label for name, label in expected.items()})

    def lines(self, folder: Path | None = None) -> list[Any]:
        """Return the lines of a journal."""
        path = (folder or self.folder) / "results.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]

    def states(self) -> dict[str, str]:
        """Return the journal's last word on each job, by id."""
        return {line["id"]: line["state"] for line in self.lines()}

    def documents(self, run: Run) -> list[Any]:
        return [json.loads(line) for line in run.out.splitlines()]

    def summary(self, run: Run) -> dict[str, str]:
        """Return the table at the end of stderr."""
        heads, cells = [
            line.split() for line in run.err.splitlines() if re.search("saved +skip|^ +[0-9]", line)
        ][:2]
        return dict(zip(heads, cells))
