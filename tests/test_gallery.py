"""index.html: what a browser finds in it, whatever stands in prompts, names and errors."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.batches import LOW, BatchCase
from tests.images import jpeg
from tests.server import answer, refusal


class Page(HTMLParser):
    """Reads a page as a browser would: its tags, and the texts of its head and of each figure."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts = [""]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.open += [tag] if tag not in ("meta", "img") else []
        self.texts += [""] if tag == "figure" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> in the wrong place"

    def handle_data(self, data: str) -> None:
        self.texts[-1] += f"{data}\n"

    def values(self, name: str) -> list[str]:
        return [values[name] for _, values in self.tags if name in values]


class Galleries(BatchCase):
    """The page of a batch."""

    def page(self, folder: Path | None = None) -> Page:
        """Return the page; it has no script, needs nothing from elsewhere, and no link is dead."""
        base = folder or self.folder
        page = Page((base / "index.html").read_text(encoding="utf-8"))
        words = "html meta title style header h1 p a main figure img div figcaption span small"
        self.assertLessEqual({tag for tag, _ in page.tags}, set(words.split()))
        self.assertFalse([n for _, values in page.tags for n in values if n.startswith("on")])
        self.assertNotRegex(page.texts[0], r"url\(|@import")
        self.assertEqual(page.open, [])
        for link in page.values("href") + page.values("src"):
            if link.startswith("#"):
                self.assertIn(unquote(link[1:]), page.values("id"))
            else:
                self.assertNotRegex(link, "^[a-z]+:|^//|[?#]")
                self.assertTrue((base / unquote(link)).is_file(), link)
        return page

    def check_shown(self, *names: str, folder: Path | None = None) -> Page:
        page = self.page(folder)
        self.assertEqual(list(map(unquote, page.values("src"))), list(names))
        return page

    def test_images_with_prompt_size_cost_and_seconds(self) -> None:
        self.write({"prompt": "a fox"}, {"prompt": "two", "n": 2, "id": "pair"})
        self.batch("--provider", "openai", *LOW)
        page = self.check_shown("0001.png", "pair-1.png", "pair-2.png")
        self.assertEqual(page.values("alt"), ["a fox", "two", "two"])
        self.assertRegex(page.texts[1], r"(?s)a fox.*0001 · 16x16 · \$0\.0083 · [0-9.]+ s")
        self.assertRegex(page.texts[0], r"(?s)jobs.*2 of 2 jobs saved")

    def test_failures_with_their_reason(self) -> None:
        self.prompts("fine", "bad", "lost")
        self.painter.order("bad", refusal(400, "x", "No <b>such</b> size."))
        self.painter.order("lost", refusal(500, "server_error", "Oops."))
        self.batch(code=9)
        page = self.check_shown("0001.png")
        self.assertRegex(page.texts[2], r"(?s)refused.*No <b>such</b> size.*bad.*0002")
        self.assertRegex(page.texts[3], r"(?s)unknown.*Oops.*lost.*0003")
        self.assertIn("1 of 3 jobs saved", page.texts[0])

    def test_everything_from_outside_is_escaped(self) -> None:
        nasty = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'&amp;{title}{{}}\n\x01🦊"
        name = "a&amp; 'c' #1 100% {x} ä"
        self.write({"prompt": nasty, "id": name}, name="<i>x&amp;.jsonl")
        self.batch(file="<i>x&amp;.jsonl")
        folder = self.work / "<i>x&amp;"
        page = self.check_shown(f"{name}.png", folder=folder)
        self.assertEqual(page.values("alt"), [nasty])
        self.assertIn(f"{nasty}\n{name} · ", page.texts[1])
        self.assertIn("<i>x&amp;", page.texts[0])

    def test_images_elsewhere_and_of_another_kind(self) -> None:
        self.painter.order("d", answer(jpeg(8, 8)))
        places = ("sub/x y.png", str(self.tmp / "far.png"), "../beside.png")
        self.write(*({"prompt": "a", "output": place} for place in places), {"prompt": "d"})
        self.batch()
        self.check_shown("sub/x y.png", "../../far.png", "../beside.png", "0004.jpg")

    def test_all_runs_and_shards_in_the_order_of_the_numbers(self) -> None:
        self.prompts("a", "b", "c")
        self.batch("--shard", "2/2")
        self.batch("--shard", "1/2")
        self.batch("--shard", "1/2", "--redo", "0001")
        self.prompts("c")
        (self.folder / "index.html").unlink()
        self.batch("--shard", "1/2")  # saves nothing; what is no longer in the file stays
        self.check_shown("0001-2.png", "0002.png", "0003.png")

    def test_while_the_batch_runs(self) -> None:
        self.hurry(40)
        release = self.painter.hold("b", "c")
        self.prompts("a", "b", "c", "d")
        tool = self.start_tool("batch", "jobs.jsonl", "--concurrency", "2")
        self.hear(tool, "batch: 1 done, 0 failed, 3 left")
        self.assertIn("under way", self.check_shown("0001.png").texts[2])
        release.set()
        self.check(self.finish(tool), 0)

    def test_a_journal_that_lies_breaks_nothing(self) -> None:
        self.prompts("a")
        self.batch()
        odd: list[dict[str, Any]] = [
            {"state": "saved", "images": [7, {"path": 5}], "cost": 5, "fields": [1]},
            {"state": ["x"], "prompt": {"a": 1}, "error": "x", "number": "9"},
            {"state": "failed", "error": {"message": ["x"]}, "id": {"a": "<b>"}},
        ]
        with self.journal.open("a", encoding="ascii") as file:
            for number, line in enumerate(odd):
                file.write(json.dumps({"identity": f"odd-{number}", **line}) + "\n")
        self.batch()
        page = (self.folder / "index.html").read_text(encoding="utf-8")
        self.assertRegex(page, 'src="0001.png"')
        self.assertNotIn("<b>", page)
