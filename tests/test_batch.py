"""batch: what a jobs file may say, what is sent and saved, its pace, its limits, its exit codes."""

from __future__ import annotations

import json
import os
import re
import threading
from typing import Any

from gpt_image2 import draw_mask
from tests.batches import (
    BAD_REQUEST,
    LOW,
    NO_CREDIT,
    NOT_THIS,
    ONE,
    SILENT,
    UNAUTHORIZED,
    BatchCase,
    clock,
    drawn,
)
from tests.case import Run
from tests.images import jpeg, png
from tests.server import KEY, OPENAI_USAGE, PATIENCE, Reply, answer, hk_answer, refusal

ROOM, CHAIR = png(64, 48, seed=1), png(64, 48, seed=2)
MASK = png(64, 48, alpha=True, hole=(8, 8, 16, 16))
BOX = draw_mask(64, 48, (8, 8, 16, 16))
IMAGE_COST = 0.00828  # OPENAI_USAGE at OpenAI's prices
LOW_ESTIMATE = 0.0059  # a low 1024x1024: 16 * 16 * (2,000,000 + 1024 * 1024) / 4,000,000 tokens


ODD = ('n="10"', "n=10.0", 'size="3840X2160"', "n=ten", "size=0x0", "partial_images=[]")


def slow_down(seconds: int) -> Reply:
    wait = [("Retry-After", str(seconds))]
    return refusal(429, "rate_limit_exceeded", "Slow.", headers=wait)


class JobsFiles(BatchCase):
    def test_jsonl_an_array_or_a_prompt_a_line(self) -> None:
        long = "a fox and " * 3000 + "a goose"
        table: list[tuple[str, bytes, list[str]]] = [
            ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}', ["a", "b"]),
            ("b.json", b'\n [\n{"prompt": "a"},\n {"prompt":\n"b"}]', ["a", "b"]),
            ("c.prompts", "a fox\nzwei Füchse 🦊\n".encode(), ["a fox", "zwei Füchse 🦊"]),
            ("d.txt", b"[a, b]\nc\n", ["[a, b]", "c"]),  # text, whatever it begins with
            ("e.list", b"[watercolor] a fox\n[ink] b\n", ["[watercolor] a fox", "[ink] b"]),
            (
                "i.csv",
                b'\xef\xbb\xbfPrompt,size\r\n"a, ""b""\r\nc",\r\n,\r\nd,1K\r\n',
                ['a, "b"\r\nc', "d"],
            ),
            ("j.tsv", b"size\tprompt\n\ta; b\n", ["a; b"]),
            ("f.x", b"\xef\xbb\xbf\r\n  \na fox\r\n\n\t b \r\n", ["a fox", "b"]),
            ("g.jsonl", json.dumps({"prompt": long}).encode(), [long]),
            ("h.x", b'\xef\xbb\xbf\n\n{"prompt": "c"}\r\n\n{"prompt": "d"}', ["c", "d"]),
        ]
        for name, data, prompts in table:
            with self.subTest(name):
                (self.work / name).write_bytes(data)
                self.painter.seen.clear()
                run = self.batch(*ONE, file=name)
                self.assertEqual(self.painter.seen, prompts, self.story(run))
                self.assertEqual(len(run.saved), len(prompts))
                self.assertEqual({path.parent for path in run.saved}, {self.work / name[0]})
        file_lines = [line["file_line"] for line in self.lines(self.work / "h")]
        self.assertEqual(file_lines, [3, 3, 5, 5])
        self.assertIn("--output-dir", self.refused(file="-", stdin="a").err)
        (path,) = self.batch("--output-dir", "out", file="-", stdin=b'{"prompt": "x"}').saved
        self.assertEqual((path.parent.name, self.painter.seen[-1]), ("out", "x"))

    def test_what_is_none(self) -> None:
        (self.work / "folder").mkdir()
        table: dict[str, str] = {
            "\n \n\t\n": "no job",
            "[]": "no job",
            '[{"prompt": "a"}': "not a valid JSON array",
            '[{"prompt": "a\xff"}]': "not a valid JSON array",
            '[{"prompt": "a", "prompt": "b"}]': "duplicate key 'prompt'",
        }
        for text, why in table.items():
            with self.subTest(text):
                (self.work / "jobs.jsonl").write_text(text, encoding="latin-1")
                self.assertIn(why, self.refused().err)
        for name, text, why in (
            *((f"a.{kind}", "a fox\nb", f"not .{kind}; if each line") for kind in ("yaml", "MD")),
            ("a.html", "<html>", "not .html; if each line is a prompt, name it .txt"),
            ("a.csv", "a fox in snow\na goose\n", "no column named prompt: a fox in snow;"),
            ("a.csv", "prompt,zise\nx,1K\n", "row 2: 'zise' is not an option"),
            ("a.csv", "prompt,n\nx,2,3\n", "row 2 has 3 cells for 2 columns"),
            ("a.csv", "prompt,images\nx,[1\n", "'[1' does not exist"),
            ("a.tsv", "prompt\nx\xff\n", "not UTF-8"),
        ):
            (self.work / name).write_text(text, encoding="latin-1")
            self.assertIn(why.lower(), self.refused(file=name).err.lower())
        for name in ("missing.jsonl", "folder"):
            self.assertIn(name, self.refused(file=name).err)
        for words in ((), ("a", "b")):
            self.assertIn("one jobs file", self.check(self.run_tool("batch", *words), 2).err)

    def test_every_option_by_its_name_and_by_the_apis(self) -> None:
        """The line's word beats the option's, and that the config's."""
        self.configure(quality="medium", model="gpt-image-1.5", size="1024x1536", format="png")
        table: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"quality": "high", "user": "you"}, {"quality": "high", "user": "you"}),
            ({"quality": None, "size": "1024x1024"}, {"size": "1024x1024"}),
            ({"model": "gpt-image-2", "size": "16:9@2K"}, {"size": "2048x1152"}),
            ({"model": "gpt-image-2", "size": "1920x1080", "nearest_size": True},
             {"size": "1920x1088", "model": "gpt-image-2"}),
            ({"output_format": "webp", "output_compression": 50}, {"output_compression": 50}),
            ({"format": "jpeg", "compression": 7}, {"output_compression": 7}),
            ({"background": "opaque", "moderation": "low"}, {"background": "opaque"}),
            ({"safety_identifier": "u1"}, {"safety_identifier": "u1"}),
            ({"params": {"seed": 7, "style.kind": "ink"}}, {"seed": 7, "style": {"kind": "ink"}}),
            ({"param": {"quality": "ultra"}}, {"quality": "ultra"}),
            ({"output": "sub/x.webp"}, {"output_format": "webp"}),
            ({}, {"prompt": "p11"}),
        ]  # fmt: skip
        lines = [{"prompt": f"p{i}", **line} for i, (line, _) in enumerate(table)]
        (self.work / "long.txt").write_bytes(b"\xef\xbb\xbfa fox\nand a goose\n")
        self.write(*lines, {"prompt_file": "long.txt"})
        self.batch(*LOW, "--user", "me", "--param", "seed=1")
        self.assertIn("a fox\nand a goose", self.painter.seen)
        config = {"model": "gpt-image-1.5", "size": "1024x1536", "output_format": "png"}
        options = {"quality": "low", "user": "me", "seed": 1}
        for number, (line, expected) in enumerate(table):
            with self.subTest(line=line):
                sent = self.post_of(f"p{number}").json
                self.assertEqual({**sent, **expected}, sent)
                self.assertLessEqual({**config, **options}.keys(), sent.keys())
        self.assertEqual(sent, {"prompt": "p11", **config, **options})

    def test_edits_each_with_its_own_images(self) -> None:
        (self.work / "pics").mkdir()
        self.folder.mkdir()
        for name, data in (("room", ROOM), ("pics/chair", CHAIR), ("mask", MASK)):
            (self.work / f"{name}.png").write_bytes(data)
        (self.folder / "room.png").write_bytes(CHAIR)  # names are not looked for here
        room: dict[str, Any] = {"images": ["room.png"]}
        table: dict[str, tuple[dict[str, Any], list[bytes]]] = {
            "one": ({"images": "room.png"}, [ROOM]),
            "two": ({"images": ["room.png", "pics/chair.png"]}, [ROOM, CHAIR]),
            "list": ({"image": ["pics/chair.png"]}, [CHAIR]),
            "absolute": ({"images": [str(self.work / "room.png")], "n": 2}, [ROOM]),
            "masked": ({**room, "mask": "mask.png"}, [ROOM, MASK]),
            "marked": ({**room, "markup": "mask.png", "model": "gpt-image-2.6-flare"},
                       [ROOM, MASK]),
            "faithful": ({**room, "model": "gpt-image-1", "input_fidelity": "high"}, [ROOM]),
            "boxed": ({**room, "mask_box": "8,8,16,16"}, [ROOM, BOX]),
            "numbers": ({**room, "mask_box": [8, 8, 16, 16]}, [ROOM, BOX]),
        }  # fmt: skip
        lines = ({"prompt": prompt, **line} for prompt, (line, _) in table.items())
        self.write({"prompt": "plain"}, *lines)
        self.assertEqual(len(self.batch(*LOW).saved), 11)
        self.assertEqual(self.post_of("plain").path, "/v1/images/generations")
        for prompt, (_, files) in table.items():
            with self.subTest(prompt):
                post = self.post_of(prompt)
                self.assertEqual(post.path, "/v1/images/edits")
                self.assertEqual([part.body for part in post.uploads], files)
                self.assertEqual(post.fields["quality"], "low")
        self.assertEqual(self.post_of("faithful").fields["input_fidelity"], "high")
        self.assertEqual(self.post_of("marked").uploads[1].name, "markup")
        self.assertEqual(self.painted()["0005-2.png"], "absolute, 2")

    def test_ids_and_outputs_name_the_images(self) -> None:
        elsewhere = self.tmp / "elsewhere.png"
        self.write(
            {"prompt": "a", "id": "red fox"},
            {"prompt": "b", "id": 7},
            {"prompt": "c", "id": "zwölf", "n": 2},
            {"prompt": "d", "output": "fox.png"},
            {"prompt": "e", "output": "sub/deep/fox.png", "n": 2},
            {"prompt": "f", "output": str(elsewhere)},
            {"prompt": "g", "id": "own", "output": "named.jpg"},
            {"prompt": "h"},
            {"prompt": "i", "output": "folder/"},
        )
        self.painter.order("g", answer(jpeg(8, 8)))
        self.painter.order("h", answer(drawn("x"), drawn("y")))  # more than was asked for
        self.batch()
        names = {"red fox": "a", "7": "b", "zwölf-1": "c", "zwölf-2": "c, 2", "fox": "d"}
        rest = {"sub/deep/fox-1": "e", "sub/deep/fox-2": "e, 2"}
        expected = {f"{name}.png": label for name, label in {**names, **rest}.items()}
        others = dict.fromkeys(("named.jpg", "0008.png", "0008-2.png"), "?")
        (in_folder,) = os.listdir(self.folder / "folder")  # named by its date
        others[f"folder/{in_folder}"] = "i"
        self.assertEqual(self.painted(), {**expected, **others})
        self.assertEqual(self.painter.labels[elsewhere.read_bytes()], "f")


class BadLines(BatchCase):
    """Every bad line is told, in one go, and nothing is sent."""

    def faults(self, run: Run) -> dict[int, str]:
        """Return the reasons of the bad lines by their numbers; they must be sorted."""
        told = re.findall(r"(?m)^gpt-image2: (?:line|item) (\d+): (.*)", run.err)
        numbers = [int(number) for number, _ in told]
        self.assertEqual(numbers, sorted(numbers))
        return {int(number): why for number, why in told}

    def test_each_by_number_and_reason(self) -> None:
        (self.work / "room.png").write_bytes(ROOM)
        a = {"prompt": "a"}
        table: list[tuple[Any, str]] = [
            ("{nonsense", "not JSON"),
            ("[1]", "not an object"),
            ('{"prompt": "a", "n": 2, "prompt": "b"}', "duplicate key 'prompt'"),
            ('{"prompt": "a", "params": {"x": NaN}}', "NaN is not a JSON"),
            ('{"prompt": "%s"}' % ("x" * 3_000_000), "longer"),
            ({}, "no prompt"),
            ({"prompt": ""}, "empty"),
            ({"prompt": 7}, "not a string"),
            ({**a, "prompt_file": "room.png"}, "both prompt and prompt_file"),
            ({"prompt_file": "missing.txt"}, "missing.txt"),
            ({**a, "qualitty": "low"}, "'qualitty'.*did you mean quality"),
            ({**a, "quality": "best"}, "quality.*best"),
            ({**a, "n": 11}, "n: "),
            ({**a, "n": True}, "n: "),
            ({**a, "images": []}, "images is empty"),
            ({**a, "images": ["missing.png"]}, "missing.png"),
            ({**a, "mask_box": "1,2,3,4"}, "needs images"),
            ({**a, "images": ["room.png"], "mask_box": [0, 0, 99, 99]}, "not inside"),
            ({**a, "input_fidelity": "high"}, "input_fidelity.*images"),
            ({**a, "params": [1]}, "params"),
            ({**a, "output": 7}, "output"),
            ({**a, "output": "a\u202eb.png"}, "output|path|character"),
            ({**a, "id": "a/b"}, "id 'a/b'"),
            ({**a, "id": "bi\u202edi"}, "bidi|character"),
            ({**a, "id": "x" * 101}, "id"),
            ({**a, "id": "one"}, "good is|line 1\\b"),
            ({**a, "output": "two.png"}, "two.png.*line 2\\b"),
            ({**a, "output": "./TWO.jpg"}, "line 2\\b"),
        ]
        good = [{"prompt": "x", "id": "one"}, {"prompt": "y", "output": "two.png"}]
        self.write(*good, *(line for line, _ in table), {"prompt": "good"})
        run = self.refused()
        told = self.faults(run)
        for number, (line, why) in enumerate(table, 3):
            with self.subTest(line=str(line)[:80]):
                self.assertRegex(told.get(number, "not told"), why)
        self.assertEqual(list(told), list(range(3, len(table) + 3)), run.err)
        self.assertIn(f"{len(table)} lines of {len(table) + 3}", run.err.splitlines()[-1])
        self.assertNotIn("\u202e", run.err)

    def test_of_a_text_and_of_an_array(self) -> None:
        (self.work / "a.txt").write_bytes(b"good\n\xff\xfe\n" + b"x" * (1 << 20) + b"y\nlast\n")
        told = self.faults(self.refused(file="a.txt"))
        self.assertEqual(list(told), [2, 3], "a line that is too long is one line")
        self.assertRegex("; ".join(told.values()), "UTF-8.*longer")
        self.write("a", '{"prompt": "b"}', name="a.prompts")
        self.assertIn("JSON", self.faults(self.refused(file="a.prompts"))[2])
        self.write('[{"prompt": "a"}, 7, {"prompt": "b", "n": 99}]')
        run = self.refused("--json")
        self.assertEqual(list(self.faults(run)), [2, 3], "numbered by element")
        self.assertEqual((run.json["ok"], run.json["error"]["exit_code"]), (False, 2))
        self.assertIn("item 2", run.json["error"]["message"])

    def test_an_output_that_exists(self) -> None:
        self.folder.mkdir()
        for name in ("0001.png", "fox.png", "owl.png.json"):
            (self.folder / name).write_bytes(b"mine")
        self.prompts("a")
        self.assertRegex(self.refused().err, "0001.*--force")
        outputs = ({"prompt": name, "output": f"{name}.png"} for name in ("fox", "owl"))
        self.write({"prompt": "a"}, *outputs)
        self.assertEqual(list(self.faults(self.refused("--sidecar"))), [2, 3])
        self.assertRegex(self.faults(self.refused())[2], "fox.png exists.*--force")
        self.batch("--force")
        self.check_images(**{"0001": "a", "fox": "fox", "owl": "owl"})

    def test_what_not_even_force_writes_over(self) -> None:
        """The batch's own files, an input image, what another line writes."""
        self.folder.mkdir()
        for path in (self.work / "room.png", self.folder / "x.png"):
            path.write_bytes(ROOM)
        outputs = ("../jobs.jsonl", "results.jsonl", "../room.png", "x.png", "X.jpg")
        lines = [{"prompt": "a", "images": ["room.png"], "output": name} for name in outputs]
        self.write(*lines, {"prompt": "b", "images": ["jobs/x.png"]})
        self.assertEqual(list(self.faults(self.refused("--force"))), [1, 2, 3, 5, 6])

    def test_the_command_lines_options_are_checked_too(self) -> None:
        self.prompts("a")
        words = [f"--concurrency {word}" for word in ("0", "x")]
        words += [f"--shard {word}" for word in ("0/4", "5/4", "2")]
        words += ["--rpm 0", "--max-cost -1", "--max-cost $5", "--redo=", "--redo no-such-job"]
        words += ["--quality best", "-o x.png", "--prompt a", "--image a.png"]
        for word in words:
            with self.subTest(word):
                self.refused(*word.split())


class Saving(BatchCase):
    def test_every_job_is_sent_once_and_saved_under_its_number(self) -> None:
        expected = {f"{number:04}.png": f"job {number:02}" for number in range(1, 13)}
        self.prompts(*expected.values())
        run = self.batch()
        self.assertEqual(self.posted(), list(expected.values()))
        self.assertEqual(self.painted(), expected)
        self.assertEqual(sorted(run.saved), [self.folder / name for name in expected])
        self.assertEqual((self.jobs(), self.processes()), ([], []))

    def test_what_others_do_meanwhile(self) -> None:
        """The same batch names this one; another, and a single request, don't mind it."""
        self.prompts("a")
        self.write({"prompt": "a"}, name="other.jsonl")
        others = ("batch jobs.jsonl", "batch jobs.jsonl --json", "batch other.jsonl", "generate a")
        runs = self.beside("a", *others)
        self.batch()
        for run, code in zip(runs, (2, 2, 0, 0)):
            self.check(run, code)
        self.assertRegex(runs[0].err, rf"process {os.getpid()}\b")
        self.assertEqual(runs[1].json["error"]["exit_code"], 2)
        self.assertEqual(self.painter.seen, ["a", "a", "a"])

    def test_sidecars_and_history(self) -> None:
        self.write({"prompt": "a", "id": "fox"})
        (path,) = self.batch("--sidecar").saved
        (entry,) = self.check(self.run_tool("history", "--json"), 0).json["entries"]
        sidecar = json.loads((self.folder / "fox.png.json").read_text())
        self.assertEqual((entry["paths"], sidecar["prompt"]), ([str(path)], "a"))

    def test_what_changes_meanwhile(self) -> None:
        """The jobs file is read once; a new file stays; a changed image is not sent."""
        lines = ({"prompt": "a"}, {"prompt": "b", "images": ["room.png"]}, {"prompt": "c"})
        self.write(*lines)
        room = self.work / "room.png"
        room.write_bytes(ROOM)

        def meanwhile() -> None:
            room.write_bytes(CHAIR)
            (self.folder / "0001.png").write_bytes(b"mine")
            self.prompts("x", "y")

        self.painter.order("a", meanwhile)
        run = self.batch(*ONE, code=9)
        self.assertRegex(run.err, "0002: .*changed")
        self.assertEqual(self.posted(), ["a", "c"])
        self.assertEqual((self.folder / "0001.png").read_bytes(), b"mine")
        self.assertEqual([path.name for path in run.saved], ["0001-2.png", "0003.png"])
        self.write(*lines)
        self.batch()
        self.assertEqual(self.post_of("b").uploads[0].body, CHAIR)

    def test_the_key_is_in_no_file_and_no_line(self) -> None:
        self.painter.order("a", refusal(400, "x", f"You sent {KEY}."))
        self.prompts("a", f"my key is {KEY}", user=KEY)
        run = self.batch("--json", code=9)
        self.assertNotIn(KEY, run.out + run.err)
        (self.work / "jobs.jsonl").unlink()  # tearDown looks into all other files

    def test_each_place(self) -> None:
        (self.work / "sub").mkdir()
        for name in ("sub/my.jobs.jsonl", "plain", "jobs.jsonl"):
            self.write({"prompt": "a"}, name=name)
        self.configure(output_dir=str(self.tmp / "mine"))
        none: dict[str, str | None] = {"XDG_CONFIG_HOME": str(self.home)}
        own = {**none, "GPT_IMAGE2_OUTPUT_DIR": f"{self.tmp}/all"}
        table: list[tuple[str, tuple[str, ...], str, dict[str, str | None]]] = [
            ("sub/my.jobs.jsonl", (), f"{self.work}/sub/my.jobs", none),
            ("plain", ("--output-dir", "deep/er"), f"{self.work}/deep/er", {}),
            ("jobs.jsonl", (), f"{self.tmp}/all/jobs", own),
            ("jobs.jsonl", (), f"{self.tmp}/mine/jobs", {}),
        ]
        for file, argv, expected, env in table:
            with self.subTest(expected):
                (path,) = self.batch(*argv, file=file, env=env).saved
                self.assertEqual(str(path.parent), expected)
                self.assertLess({"results.jsonl", "index.html"}, set(os.listdir(expected)))
        self.assertIn("--output-dir", self.refused(file="plain", env=none).err)
        self.folder.write_bytes(b"a file")
        self.assertIn(str(self.folder), self.refused(env=none).err)

    def test_the_sandbox_is_a_world_of_its_own(self) -> None:
        lines = {"prompt": "c", "output": "sub/c.png"}, {"prompt": "d", "output": "."}
        self.write({"prompt": "a"}, {"prompt": "b", "n": 2, "id": "fox"}, *lines)
        run = self.batch("--sandbox")
        self.no_request(self.api)
        names = ("0001-sandbox.png", "fox-sandbox-1.png", "fox-sandbox-2.png", "sub/c-sandbox.png")
        found = {path for path in run.saved if not path.name.startswith("20")}
        self.assertEqual(found, {self.work / "jobs-sandbox" / name for name in names})
        self.assertEqual({path.stem[-8:] for path in set(run.saved) - found}, {"-sandbox"})
        for argv, saved in ((("--sandbox",), 5), ((), 5), (("--sandbox",), 0), ((), 0)):
            self.assertEqual(len(self.batch("--output-dir", "one", *argv).saved), saved)
        self.assertEqual(
            self.posted(), ["a", "b", "c", "d"], "its images are not taken for real ones"
        )


class Said(BatchCase):
    def test_one_table_at_the_end_and_what_a_dry_run_says_then(self) -> None:
        self.prompts("a", "b", "c", "d")
        self.painter.order("b", BAD_REQUEST)
        self.painter.order("c", UNAUTHORIZED)
        self.painter.order("d", SILENT)
        run = self.batch(*ONE, code=9)
        counts = {"saved": "1", "failed": "1", "refused": "1", "unknown": "1", "cost": "-"}
        none = dict.fromkeys(("skipped", "partial", "left"), "0")
        self.assertEqual(self.summary(run), {**counts, **none})
        self.assertIn(f"\nGallery: {self.folder}/index.html\n", run.err)
        for line in ("0002: .*No such size", "0003: .*Wrong key", "0004: "):
            self.assertRegex(run.err, f"(?m)^gpt-image2: {line}")
        self.assertRegex(run.err.splitlines()[-1], "^gpt-image2: 1 of 4 jobs are saved")
        before = self.files()
        lines = self.batch("--dry-run").out.splitlines()
        self.assertEqual([line.split()[1] for line in lines[:4]], ["skip", "skip", "send", "look"])
        self.assertEqual((self.files(), len(self.api.posts)), (before, 4))
        self.assertEqual(self.batch("--quiet", "--output-dir", "quiet").err, "")

    def test_documents(self) -> None:
        (self.work / "room.png").write_bytes(ROOM)
        edit = {"prompt": "b", "images": ["room.png"]}
        self.write({"prompt": "a", "id": "fox"}, edit, {"prompt": "c"})
        self.painter.order("c", BAD_REQUEST)
        argv = ("--json", "--provider", "openai", *ONE, *LOW)
        *jobs, total = self.documents(self.batch(*argv, code=9))
        told = [(job["id"], job["command"], job["ok"]) for job in jobs]
        expected = [("fox", "generate", True), ("0002", "edit", True), ("0003", "generate", False)]
        self.assertEqual(told, expected)
        self.assertEqual([image["path"] for image in jobs[0]["images"]], [f"{self.folder}/fox.png"])
        self.assertEqual((total["ok"], total["command"], total["schema"]), (False, "batch", 1))
        self.assertAlmostEqual(total["summary"].pop("cost")["amount"], 2 * IMAGE_COST)
        zero = dict.fromkeys(("skipped", "partial", "failed", "unknown", "deferred", "left"), 0)
        self.assertEqual(total["summary"], {**zero, "jobs": 3, "saved": 2, "refused": 1})
        self.assertEqual((total["folder"], total["journal"]), (str(self.folder), str(self.journal)))
        self.assertEqual(total["gallery"], f"{self.folder}/index.html")
        self.assertEqual(total["error"]["exit_code"], 9)

    def test_a_document_is_printed_as_its_job_finishes(self) -> None:
        release = self.painter.hold("b")
        self.prompts("a", "b")
        tool = self.start_tool("batch", "jobs.jsonl", "--json")
        assert tool.stdout
        self.assertEqual(json.loads(tool.stdout.readline())["state"], "saved")
        release.set()
        self.check(self.finish(tool), 0)

    def test_dry_run_as_text_and_as_json(self) -> None:
        (self.work / "room.png").write_bytes(ROOM)
        edit = {"prompt": "b\x1b[31m", "id": "own", "images": ["room.png"], "size": "1024x1024"}
        self.write({"prompt": "a fox", "n": 2}, edit)
        before = self.listing(self.tmp)
        argv = ("--dry-run", "--provider", "openai", *LOW)
        first, second, totals, estimate = self.batch(*argv).out.splitlines()
        self.assertRegex(first, "^0001  send  generate .*gpt-image-2.* low .*a fox")
        self.assertRegex(second, "^own  send  edit .*1024x1024[^\x1b]*$")
        self.assertRegex(totals, f"2 jobs: 2 to send.*{re.escape(str(self.folder))}")
        self.assertRegex(estimate, r"^estimate: about \$0\.0702$")  # with room.png: 6563 tokens
        one, two, total = self.documents(self.batch(*argv, "--json"))
        self.assertEqual((one["id"], one["dry_run"]["fields"]["prompt"]), ("0001", "a fox"))
        paths = [f"{self.folder}/{name}.png" for name in ("0001-1", "0001-2", "own")]
        self.assertEqual(one["dry_run"]["paths"] + two["dry_run"]["paths"], paths)
        self.assertAlmostEqual(total["summary"]["estimate"]["amount"], 0.0702, places=4)
        self.assertEqual(self.listing(self.tmp), before)
        self.no_request(self.api)


class Verdicts(BatchCase):
    def test_states(self) -> None:
        whole = answer(drawn("x"))
        table: list[tuple[str, int, Reply]] = [
            ("refused", 1, BAD_REQUEST),
            ("refused", 5, NOT_THIS),
            ("failed", 4, UNAUTHORIZED),
            ("failed", 6, NO_CREDIT),
            ("failed", 6, slow_down(0)),
            ("failed", 1, refusal(503, "model_not_found", "No available channel.")),
            ("failed", 1, Reply(301, b"", [("Location", "https://elsewhere.example/v1")])),
            ("unknown", 8, refusal(500, "server_error", "Oops.")),
            ("unknown", 8, SILENT),
            ("unknown", 8, whole._replace(cut=len(whole.body) // 3)),
            ("unknown", 10, answer(b"no image at all")),
            ("partial", 9, answer(drawn("x"), b"no image")),
            ("saved", 0, whole),
        ]
        prompts = [f"p{number:02}" for number in range(len(table))]
        for prompt, (_, _, reply) in zip(prompts, table):
            self.painter.order(prompt, reply)
        self.write(*({"prompt": prompt, "id": prompt} for prompt in prompts))
        *jobs, _ = self.documents(self.batch("--json", "--retries", "0", code=9))
        told = {job["id"]: (job["state"], (job["error"] or {}).get("exit_code", 0)) for job in jobs}
        for prompt, (state, code, reply) in zip(prompts, table):
            with self.subTest(state=state, status=reply.status, body=reply.body[:80]):
                self.assertEqual(self.states()[prompt], state)
                self.assertEqual(told[prompt], (state, code))
        self.assertEqual(self.posted(), prompts)

    def test_the_lines_of_the_journal(self) -> None:
        """One says *sent* before the POST arrives, and one what came of it."""
        self.write({"prompt": "a", "n": 2}, {"prompt": "b", "id": "fox"})
        on_arrival: list[Any] = []
        self.painter.order("a", lambda: on_arrival.extend(self.lines()))
        self.painter.order("b", NOT_THIS)
        self.batch(*ONE, "--provider", "openai", *LOW, code=9)
        sent, saved, _, refused = lines = self.lines()
        self.assertEqual(on_arrival, [sent])
        states = [line["state"] for line in lines]
        self.assertEqual(states, ["sent", "saved", "sent", "refused"])
        same = {"id": "0001", "number": 1, "file_line": 1, "schema": 1, "prompt": "a"}
        same.update(identity=sent["identity"], job_id=sent["job_id"])
        for line in (sent, saved):
            self.assertEqual({**line, **same}, line)
        paths = [str(self.folder / name) for name in ("0001-1.png", "0001-2.png")]
        told = (saved["paths"], saved["usage"], saved["error"])
        self.assertEqual(told, (paths, OPENAI_USAGE, None))
        self.assertAlmostEqual(saved["cost"]["amount"], IMAGE_COST)
        self.assertEqual((refused["id"], refused["paths"]), ("fox", []))
        self.assertEqual(refused["error"]["code"], "moderation_blocked")

    def test_exit_codes_of_the_whole(self) -> None:
        table: list[tuple[int, Reply, Reply]] = [
            (0, Reply(), Reply()),
            (9, Reply(), BAD_REQUEST),
            (9, answer(drawn("x"), b"no image"), BAD_REQUEST),
            (1, BAD_REQUEST, BAD_REQUEST),
            (5, NOT_THIS, NOT_THIS),
            (4, UNAUTHORIZED, UNAUTHORIZED),
            (8, SILENT, SILENT),
            (1, BAD_REQUEST, UNAUTHORIZED),
        ]
        self.prompts("a", "b")
        for number, (code, first, second) in enumerate(table):
            with self.subTest(code=code, statuses=(first.status, second.status)):
                self.painter.order("a", first)
                self.painter.order("b", second)
                self.batch("--output-dir", str(number), code=code)

    def test_before_anything_is_sent(self) -> None:
        """Nobody listens, there is no key, there is no curl: the next run sends all."""
        self.prompts("a", "b")
        base = {"GPT_IMAGE2_BASE_URL": f"http://127.0.0.1:{self.closed_port()}/v1"}
        keyless = {"GPT_IMAGE2_API_KEY": None, "GPT_IMAGE2_BASE_URL": "https://relay.example/v1"}
        self.batch(code=3, env=keyless)
        self.assertEqual(self.listing(), ["jobs.jsonl"])
        self.batch(code=3, env={"PATH": str(self.home)})
        run = self.batch("--retries", "0", code=7, env=base)
        self.assertEqual(set(self.states().values()), {"failed"}, self.story(run))
        self.batch()
        self.assertEqual(self.posted(), ["a", "b"])

    def test_fail_fast(self) -> None:
        self.prompts("a", "b", "c", "d")
        self.painter.order("b", BAD_REQUEST)
        run = self.batch("--fail-fast", *ONE, code=9)
        self.assertEqual((self.posted(), self.summary(run)["left"]), (["a", "b"], "2"))
        self.batch("--fail-fast", *ONE, code=9)
        self.assertEqual(self.posted(), ["a", "b", "c", "d"])

    def test_ten_refusals_of_the_account_in_a_row_end_it(self) -> None:
        for code, reply in ((4, UNAUTHORIZED), (6, NO_CREDIT)):
            with self.subTest(code=code):
                names = [f"{code}-{number:02}" for number in range(18)]
                for name in names[:15]:  # the fifth says nothing of the account
                    self.painter.order(name, BAD_REQUEST if name == names[4] else reply)
                self.prompts(*names)
                self.painter.seen.clear()
                run = self.batch(*ONE, "--output-dir", str(code), code=1)
                self.assertRegex(run.err, "0 of 18 jobs .* the last 10 jobs were refused")
                self.assertEqual(self.posted(), names[:15])
                self.assertEqual(len(self.batch("--output-dir", str(code), code=9).saved), 17)


class Pace(BatchCase):
    def test_so_many_a_minute_in_the_order_of_the_file(self) -> None:
        self.prompts("b", "a", "d", "c")
        with clock() as passed:
            self.batch("--rpm", "20", *ONE)
        self.assertEqual(self.painter.seen, ["b", "a", "d", "c"])
        self.assertAlmostEqual(passed(), 9.0, places=1)

    def test_more_than_a_day_is_not_waited_for(self) -> None:
        """As if a date were read by a clock that was set back."""
        self.prompts("a")
        self.api.script.append(slow_down(90_000))
        self.assertIn("90000 s", self.batch(code=6).err)
        self.batch(code=0)

    def test_a_429_holds_all_workers(self) -> None:
        """B's worker is free once a's waits; it waits too, and c is not begun before that ends."""
        release = self.painter.hold("b")
        sleepers: set[int] = set()
        both_sleep, posts = threading.Event(), 0

        def asleep() -> None:
            nonlocal posts
            sleepers.add(threading.get_ident())
            release.set()
            if len(sleepers) == 2 and not both_sleep.is_set():
                posts = len(self.api.posts)
                both_sleep.set()
            both_sleep.wait(PATIENCE)

        def hold_a() -> Reply:
            self.api.wait_for_request(2)  # b is under way
            return refusal(429, "rate_limit_exceeded", "Limit 5. Please try again in 60s.")

        self.painter.order("a", hold_a)
        self.prompts("a", "b", "c", "d")
        with clock(asleep) as passed:
            self.batch("--concurrency", "2")
        self.assertEqual((both_sleep.is_set(), posts), (True, 2))
        self.assertGreaterEqual(passed(), 60)
        self.assertEqual(self.posted(), ["a", "a", "b", "c", "d"])


class MaxCost(BatchCase):
    openai = ("--provider", "openai", *LOW)

    def test_counts_what_is_spent_and_what_may_be_and_the_next_one(self) -> None:
        """An image costs 0.0083, and so may the next; the first, and one unknown, counts 0.0059."""
        half = answer(drawn("a"), b"no image")
        table: list[tuple[str, Reply, str, str, str, str]] = [
            ("saved", Reply(), "0.0141", "a", "0.0167", "ab"),
            ("unknown", SILENT, "0.0195", "ab", "0.0226", "abc"),
            ("saved in part", half, "0.0143", "a", "0.0167", "ab"),
            ("not billed", BAD_REQUEST, "0.0058", "", "0.006", "ab"),
        ]
        for name, reply, low, of_low, high, of_high in table:
            with self.subTest(name):
                prompts = [f"{letter} {name}" for letter in "abc"]
                self.painter.seen.clear()
                self.painter.order(prompts[0], reply)
                self.prompts(*prompts)
                argv = (*self.openai, *ONE, "--output-dir", name)
                for limit, letters in ((low, of_low), (low, of_low), (high, of_high)):
                    run = self.batch("--max-cost", limit, *argv, code=9 if letters else 6)
                    self.assertEqual(self.painter.seen, prompts[: len(letters)])
                    self.assertEqual(self.summary(run)["left"], str(3 - len(letters)))

    def test_what_it_lets_through_and_what_goes_over_it(self) -> None:
        """The first of a kind can cost more than its estimate: then it is said by how much."""
        self.prompts("a", "b")
        lines = self.batch("--dry-run", "--max-cost", "0.008", *self.openai).out.splitlines()
        self.assertEqual(lines[-1], "--max-cost 0.008 allows 1 of 2 (about $0.0059)")
        run = self.batch("--max-cost", "0.008", *self.openai, *ONE, code=9)
        self.assertIn(
            "warning: the jobs cost $0.0083, which is $0.0003 over --max-cost 0.008", run.err
        )
        last = run.err.splitlines()[-1]
        self.assertRegex(
            last,
            "1 of 2 .* is too low for .*; raise --max-cost to send 1 failed or left job$",
        )
        self.assertNotIn("same command", last)
        lines = self.batch("--dry-run", "--max-cost", "0.0166", *self.openai).out.splitlines()
        self.assertEqual(lines[-1], "--max-cost 0.0166 allows 1 of 1 (about $0.0083)")

    def test_one_request(self) -> None:
        self.write({"prompt": "x"})
        self.env["GPT_IMAGE2_MAX_COST"] = "0.1"
        high = ("--provider", "openai", "--quality", "high")
        for argv, code, words in (
            (("generate", "x", *high), 2, "more than --max-cost 0.1; raise --max-cost"),
            (("generate", "x", *self.openai), 0, ""),
            (("generate", "x", *high, "--max-cost", "1"), 0, ""),
            (("generate", "x", *high, "--sandbox"), 0, ""),
            (("generate", "x", "--provider", "nodekey"), 2, "prices"),
            *((("generate", "x", *high, "--param", f"{odd}"), 2, "--max-cost") for odd in ODD),
        ):
            with self.subTest(argv):
                posts = len(self.api.posts)
                run = self.check(self.run_tool(*argv), code)
                self.assertIn(words, run.err)
                sent = 0 if code or "--sandbox" in argv else 1
                self.assertEqual(len(self.api.posts) - posts, sent)

    def test_counts_what_is_in_flight(self) -> None:
        """The first of a kind goes alone; then two find money, and the fourth waits for them."""
        release = self.painter.hold("b", "c")

        def asleep() -> None:
            if len(self.api.posts) == 3:
                release.set()

        self.prompts("a", "b", "c", "d")
        with clock(asleep):
            self.batch("--max-cost", "0.026", *self.openai, code=9)
        self.assertEqual(self.posted(), ["a", "b", "c"])

    def test_counts_what_is_in_flight_at_what_its_kind_has_cost(self) -> None:
        """When a has cost 0.0083, b counts so much too; so c would come to 0.0249."""
        release = self.painter.hold("b")

        def asleep() -> None:
            if self.journal.exists() and "saved" in self.states().values():
                release.set()

        self.prompts("a", "b", "c")
        with clock(asleep):
            self.batch("--max-cost", "0.023", "--concurrency", "2", *self.openai, code=9)
        self.assertEqual(self.posted(), ["a", "b"])

    def test_no_kind_counts_less_than_the_dearest_of_it(self) -> None:
        """Of 0.0083 and 0.1501 it is the latter, in this run and in the next; not of another
        quality, and a redo does not add up."""
        self.prompts("a", "b", "c")
        dear = answer(drawn("b"), usage={"input_tokens": 20, "output_tokens": 5000})
        self.painter.order("b", dear)
        for _ in range(2):
            run = self.batch("--max-cost", "0.3", *self.openai, *ONE, code=9)
            self.assertEqual(self.painter.seen, ["a", "b"])
        run = self.batch("--max-cost", "0.3", *self.openai, *ONE, "--redo", "0002", code=9)
        self.assertRegex(
            run.err,
            "; raise --max-cost to send 1 selected job; raise.*, without --redo, to send 1 failed",
        )
        self.batch(*self.openai, "--redo", "all")
        for argv, price in (
            (("--redo", "all"), "$0.4503"),
            (("--redo=changed", "--quality=medium"), "$0.1581"),
        ):
            run = self.batch(*self.openai, *argv, "--dry-run")
            self.assertIn(f"estimate: about {price}", run.out)

    def test_counts_what_a_redo_pays_again(self) -> None:
        self.prompts("a", "b")
        self.batch(*self.openai)
        self.batch("--max-cost", "0.0255", *self.openai, *ONE, "--redo", "all", code=9)
        self.assertEqual(len(self.painter.seen), 3)

    def test_other_currencies_and_prices(self) -> None:
        self.prompts("a", "b")
        self.painter.order("a", hk_answer(drawn("a")))
        self.batch("--max-cost", "800", "--provider", "openai-hk", *LOW, *ONE, code=9)
        self.assertEqual(self.painter.seen, ["a"])
        generic = ("--provider", "generic", "--output-dir", "own", *LOW, *ONE)
        self.assertIn("price", self.refused("--max-cost", "5", *generic).err)
        self.configure(prices={"text_in": 5, "image_in": 8, "out": 30})
        self.batch("--max-cost", "0.007", *generic, code=9)
        self.assertEqual(self.painter.seen, ["a", "a"])
        self.configure()
        self.write({"prompt": "a"}, {"prompt": "b", "model": "gpt-image-9"})
        self.assertIn("line 2", self.refused("--max-cost", "5", "--provider", "openai").err)
