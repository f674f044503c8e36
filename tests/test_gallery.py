"""index.html: what a browser finds in it, whatever stands in prompts, names and errors."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from tests.batches import LOW, BatchCase, drawn
from tests.pictures import jpeg
from tests.support import Reply, answer, refusal

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Figure(NamedTuple):
    """One card of the page."""

    links: list[str]
    pictures: list[dict[str, str]]
    text: str


class Page(HTMLParser):
    """Reads a page as a browser would, and keeps its figures, its tags and all its addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.figures: list[Figure] = []
        self.texts: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.handlers += [name for name in values if name.startswith("on")]
        addresses = [values[name] for name in ("href", "src", "srcset", "action") if name in values]
        self.addresses += addresses
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figure":
            self.figures.append(Figure([], [], ""))
        self.ids += [values["id"]] if "id" in values else []
        if tag == "a" and self.figures:
            self.figures[-1].links.append(values["href"])
        if tag == "img":
            self.figures[-1].pictures.append(values)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.open, f"</{tag}> without <{tag}>"
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data, data
        elif "figure" in self.open:
            self.figures[-1] = self.figures[-1]._replace(text=self.figures[-1].text + data + "\n")
        else:
            self.texts.append(data)


class GalleryCase(BatchCase):
    """A case that reads the page of a batch."""

    def page(self, folder: Path | None = None) -> Page:
        """Return the page; nothing in it is a script or comes from elsewhere, and every link leads
        to a file.
        """
        base = folder or self.folder
        text = (base / "index.html").read_text(encoding="utf-8")
        page = Page(text)
        self.assertTrue(text.startswith("<!DOCTYPE html>"), text[:80])
        self.assertFalse(page.open, "left open")
        self.assertFalse({"script", "iframe", "object", "link", "b"} & set(page.tags), page.tags)
        self.assertEqual(page.handlers, [])
        for address in page.addresses:
            if address.startswith("#"):
                self.assertIn(address[1:], page.ids)
                continue
            parts = urlsplit(address)
            self.assertEqual((parts.scheme, parts.netloc, parts.query, parts.fragment), ("",) * 4)
            self.assertTrue((base / unquote(parts.path)).is_file(), address)
        return page

    def shown(self, page: Page) -> list[str]:
        """Return the file names of all pictures, in the order of the page."""
        addresses = [picture["src"] for figure in page.figures for picture in figure.pictures]
        return [unquote(address) for address in addresses]


class Content(GalleryCase):
    """What is shown of each job."""

    def test_pictures_with_prompt_size_cost_and_seconds(self) -> None:
        self.write({"prompt": "a fox"}, {"prompt": "two", "n": 2, "id": "pair"})
        self.batch("--provider", "openai", *LOW)
        page = self.page()
        self.assertEqual(self.shown(page), ["0001.png", "pair-1.png", "pair-2.png"])
        first = page.figures[0]
        self.assertEqual(first.pictures[0]["loading"], "lazy")
        self.assertEqual(first.pictures[0]["alt"], "a fox")
        self.assertEqual(first.links, ["0001.png"])
        self.assertRegex(first.text, r"(?s)a fox.*0001 · 16x16 · \$0\.0083 · [0-9.]+ s")
        self.assertIn("2 of 2 jobs saved", "".join(page.texts))
        self.assertIn("jobs", "".join(page.texts))

    def test_failures_with_their_reason(self) -> None:
        self.prompts("fine", "bad", "lost")
        self.painter.order("bad", refusal(400, "x", "No <b>such</b> size."))
        self.painter.order("lost", refusal(500, "server_error", "Oops."))
        self.batch(code=9)
        page = self.page()
        self.assertEqual(len(page.figures), 3)
        self.assertEqual(page.figures[1].pictures, [])
        self.assertRegex(page.figures[1].text, r"(?s)refused.*No <b>such</b> size.*bad.*0002")
        self.assertRegex(page.figures[2].text, r"(?s)unknown.*Oops.*lost.*0003")
        self.assertIn("1 of 3 jobs saved", "".join(page.texts))
        self.assertEqual([a for a in page.addresses if a[0] == "#"], ["#0002", "#0003"])
        self.batch("--redo", "failed", code=9)
        self.assertEqual(self.shown(self.page()), ["0001.png", "0002.png"])

    def test_everything_from_outside_is_escaped(self) -> None:
        nasty = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'&amp;{title}{{}}"
        name = "a&b 'c' #1 100% {x} \u00e4"
        self.write(
            {"prompt": nasty, "id": name}, {"prompt": f"{nasty} 2", "output": f"{name}+.png"}
        )
        self.write({"prompt": nasty, "id": name}, name="<i>x&amp;.jsonl")
        self.write(
            {"prompt": nasty, "id": name}, {"prompt": f"{nasty} 2", "output": f"{name}+.png"}
        )
        self.batch()
        page = self.page()
        self.assertEqual(self.shown(page), [f"{name}.png", f"{name}+.png"])
        self.assertEqual(page.figures[0].pictures[0]["alt"], nasty)
        self.assertIn(nasty, page.figures[0].text)
        self.assertIn(f"\n{name} · ", page.figures[0].text)
        self.batch(file="<i>x&amp;.jsonl")
        self.assertIn("<i>x&amp;", "".join(self.page(self.work / "<i>x&amp;").texts))

    def test_lines_and_odd_characters_in_a_prompt(self) -> None:
        prompts = ("two\nlines", "\u202ereversed", "🦊 «renard»", "\x01control")
        self.prompts(*prompts)
        self.batch()
        page = self.page()
        self.assertIn("two\nlines", page.figures[0].text)
        self.assertIn("🦊 «renard»", "".join(figure.text for figure in page.figures))

    def test_pictures_elsewhere_are_linked_too(self) -> None:
        self.write(
            {"prompt": "a", "output": "sub/x y.png"},
            {"prompt": "b", "output": str(self.tmp / "far.png")},
            {"prompt": "c", "output": "../beside.png"},
        )
        self.batch()
        page = self.page()
        self.assertEqual(self.shown(page), ["sub/x y.png", "../../far.png", "../beside.png"])

    def test_other_kinds_of_pictures(self) -> None:
        self.painter.order("a", answer(jpeg(8, 8)))
        self.prompts("a")
        self.batch()
        self.assertEqual(self.shown(self.page()), ["0001.jpg"])


class Upkeep(GalleryCase):
    """When the page is written, and from what."""

    def test_jobs_are_in_the_order_of_their_numbers(self) -> None:
        release = self.painter.hold("a")
        self.prompts("a", "b", "c")
        tool = self.start_tool("batch", "jobs.jsonl")
        self.api.wait_for_request(3)
        self.wait_until(lambda: len(list(self.folder.glob("0*.png"))) == 2)
        release.set()
        self.check(self.finish(tool), 0)
        self.assertEqual(self.shown(self.page()), ["0001.png", "0002.png", "0003.png"])

    def test_a_redone_job_shows_its_newest_picture(self) -> None:
        self.prompts("a", "b")
        self.batch()
        self.batch("--redo", "0001")
        self.assertEqual(self.shown(self.page()), ["0001-2.png", "0002.png"])

    def test_while_the_batch_runs_a_page_and_a_line_on_stderr(self) -> None:
        self.hurry(40)
        release = self.painter.hold("b", "c")
        self.prompts("a", "b", "c", "d")
        tool = self.start_tool("batch", "jobs.jsonl", "--concurrency", "2")
        self.hear(tool, "batch: 1 done, 0 failed, 3 left")
        page = self.page()
        self.assertIn("0001.png", self.shown(page))
        self.assertRegex("".join(figure.text for figure in page.figures), "under way")
        release.set()
        self.check(self.finish(tool), 0)
        self.assertEqual(len(self.shown(self.page())), 4)

    def test_after_a_signal_and_a_run_that_sends_nothing(self) -> None:
        self.prompts("a")
        self.batch()
        (self.folder / "index.html").unlink()
        self.batch()
        self.assertEqual(self.shown(self.page()), ["0001.png"])

    def test_all_shards_are_on_one_page(self) -> None:
        self.prompts("a", "b", "c")
        self.batch("--shard", "1/2")
        self.batch("--shard", "2/2")
        self.assertEqual(self.shown(self.page()), ["0001.png", "0002.png", "0003.png"])

    def test_the_sandboxs_pictures_are_on_its_own_page(self) -> None:
        self.prompts("a")
        where = ("--output-dir", "one")
        self.batch("--sandbox", *where)
        self.assertEqual(self.shown(self.page(self.work / "one")), ["0001-sandbox.png"])
        self.batch(*where)
        self.assertEqual(self.shown(self.page(self.work / "one")), ["0001.png"])

    def test_lines_that_are_gone_keep_their_pictures(self) -> None:
        self.prompts("a", "b")
        self.batch()
        self.prompts("b")
        self.batch()
        self.assertEqual(self.shown(self.page()), ["0001.png", "0002.png"])

    def test_nothing_else_is_left_in_the_folder(self) -> None:
        self.prompts("a")
        self.painter.order("a", Reply(), Reply())
        self.batch()
        names = ["0001.png", "index.html", "results.jsonl", "results.lock"]
        self.assertEqual(self.listing(self.folder), names)

    def test_a_journal_that_lies(self) -> None:
        """A line whose parts are of other kinds than ours breaks nothing."""
        self.prompts("a")
        self.batch()
        saved = {"state": "saved", "number": 9}
        odd: list[dict[str, Any]] = [
            {**saved, "images": [7]},
            {**saved, "images": {"a": 1}, "fields": [1]},
            {**saved, "images": [{"path": 5}], "cost": 5, "seconds": "x"},
            {"state": ["x"], "prompt": {"a": 1}, "error": "x", "number": "9"},
            {"state": "failed", "error": {"message": ["x"]}, "id": {"a": "<b>"}},
        ]
        odd = [{"identity": f"odd-{number}", **line} for number, line in enumerate(odd)]
        with (self.folder / "results.jsonl").open("a", encoding="ascii") as file:
            file.write("".join(f"{json.dumps(line)}\n" for line in odd))
        self.batch()
        text = (self.folder / "index.html").read_text(encoding="utf-8")
        self.assertIn('src="0001.png"', text)
        self.assertNotIn("<b>", text)

    def test_a_page_that_can_not_be_written_is_a_warning(self) -> None:
        (self.folder / "index.html").mkdir(parents=True)
        self.prompts("a")
        run = self.batch()
        self.assertIn("warning: cannot write", run.err)
        self.assertEqual((self.folder / "0001.png").read_bytes(), drawn("a"))

    def test_a_thousand_jobs(self) -> None:
        """Made from a journal of that many jobs, and not from a thousand requests."""
        self.prompts("a")
        self.batch()
        journal = self.folder / "results.jsonl"
        line = journal.read_text().splitlines()[-1]
        lines = []
        for number in range(2, 1001):
            other = re.sub(r'"identity": "[^"]*"', f'"identity": "{number:016x}-1"', line)
            lines.append(re.sub(r'"number": 1\b', f'"number": {number}', other))
        with journal.open("a", encoding="ascii") as file:
            file.write("".join(f"{line}\n" for line in lines))
        self.batch()
        page = self.page()
        self.assertEqual(len(page.figures), 1000)
        self.assertEqual({p["loading"] for f in page.figures for p in f.pictures}, {"lazy"})
        self.assertIn("1000 of 1000 jobs saved", "".join(page.texts))
