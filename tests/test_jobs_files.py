"""Jobs files: their kinds, what a line may say, and what is said of a bad one."""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

from tests.batches import BatchCase
from tests.pictures import png, read_png
from tests.support import Request, Run

ROOM = png(64, 48, seed=1)
CHAIR = png(64, 48, seed=2)
MASK = png(64, 48, alpha=True, hole=(8, 8, 16, 16))


class JobsFileCase(BatchCase):
    """A case that looks at what a jobs file sends."""

    def sends(self, data: str | bytes, *prompts: str, name: str = "jobs.jsonl") -> Run:
        """Assert the prompts that a file of these bytes sends, one job after another."""
        data = data.encode() if isinstance(data, str) else data
        (self.work / name).write_bytes(data)
        self.painter.seen.clear()
        run = self.batch("--concurrency", "1", file=name)
        self.assertEqual(self.painter.seen, list(prompts), self.story(run))
        return run

    def faults(self, run: Run) -> dict[int, str]:
        """Return the reasons of the bad lines by their numbers; they must be sorted."""
        told = [
            line.partition(": ")[2].partition(": ")
            for line in run.err.splitlines()
            if re.match("gpt-image2: (line|item) [0-9]+: ", line)
        ]
        numbers = [int(word[0].split()[1]) for word in told]
        self.assertEqual(numbers, sorted(numbers))
        return dict(zip(numbers, (word[2] for word in told)))


class Kinds(JobsFileCase):
    """JSONL, a JSON array, or a prompt a line."""

    def test_jsonl(self) -> None:
        self.sends('{"prompt": "a"}\n{"prompt": "b"}\n', "a", "b")

    def test_array(self) -> None:
        self.sends('\n [\n{"prompt": "a"},\n {"prompt":\n"b"}]', "a", "b", name="jobs.json")

    def test_text(self) -> None:
        run = self.sends(
            "a fox\nzwei Füchse: 🦊\n", "a fox", "zwei Füchse: 🦊", name="foxes.prompts"
        )
        self.assertEqual([path.parent for path in run.saved], [self.work / "foxes"] * 2)

    def test_txt_is_text_whatever_it_begins_with(self) -> None:
        self.sends('{"prompt": "a"}\n', '{"prompt": "a"}', name="one.txt")
        self.sends("[a, b]\nc\n", "[a, b]", "c", name="two.TXT")

    def test_byte_order_mark_line_ends_and_blank_lines(self) -> None:
        self.sends(b"\xef\xbb\xbf\r\n  \na fox\r\n\n\t b \r\n", "a fox", "b", name="a.text")
        self.sends(b'\xef\xbb\xbf\n\n{"prompt": "c"}\r\n\n \n{"prompt": "d"}', "c", "d", name="b.x")
        self.assertEqual([line["file_line"] for line in self.lines(self.work / "b")], [3, 3, 6, 6])

    def test_standard_input(self) -> None:
        lines = '{"prompt": "a"}\n\n{"prompt": "b"}\n'
        run = self.batch("--output-dir", "out", file="-", stdin=lines)
        self.assertEqual(self.painted(self.work / "out"), {"0001.png": "a", "0002.png": "b"})
        self.assertEqual({path.parent for path in run.saved}, {self.work / "out"})
        self.batch("--output-dir", "out", file="-", stdin=lines)
        self.assertEqual(self.posted(), ["a", "b"])

    def test_standard_input_needs_a_folder(self) -> None:
        run = self.refused(file="-", stdin="a fox\n")
        self.assertIn("--output-dir", run.err)

    def test_a_line_of_json_may_hold_a_long_prompt(self) -> None:
        prompt = "a fox and " * 3000 + "a goose"
        self.sends(json.dumps({"prompt": prompt}), prompt)

    def test_what_is_no_jobs_file(self) -> None:
        (self.work / "folder").mkdir()
        table: list[tuple[bytes, str]] = [
            (b"", "no job"),
            (b"\n \n\t\n", "no job"),
            (b"[]", "no job"),
            (b'[{"prompt": "a"}', "no JSON array"),
            (b'[{"prompt": "a\xff"}]', "no JSON array"),
            (b'[{"prompt": "a", "prompt": "b"}]', "'prompt' stands twice"),
        ]
        for number, (data, why) in enumerate(table):
            with self.subTest(data=data):
                name = f"{number}.jsonl"
                (self.work / name).write_bytes(data)
                self.assertIn(why, self.refused(file=name).err)
        self.assertIn("missing.jsonl", self.refused(file="missing.jsonl").err)
        self.assertIn("folder", self.refused(file="folder").err)
        self.assertIn("one jobs file", self.check(self.run_tool("batch"), 2).err)
        self.assertIn("one jobs file", self.check(self.run_tool("batch", "a", "b"), 2).err)


class Lines(JobsFileCase):
    """What a line may say, and what it sends."""

    def fields(self, line: dict[str, Any], *argv: str) -> Any:
        """Return the JSON that a line sends, without model and prompt."""
        return {**self.one(line, *argv).json}

    def one(self, line: dict[str, Any], *argv: str) -> Request:
        """Return the POST of a batch of one line."""
        self.write(line)
        self.batch(*argv)
        return self.api.posts[-1]

    def test_every_option_by_its_name_and_by_the_apis(self) -> None:
        table: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({}, {"quality": "low", "user": "me"}),
            ({"quality": "high", "user": "you"}, {"quality": "high", "user": "you"}),
            ({"quality": None}, {"quality": "low", "user": "me"}),
            ({"model": "gpt-image-1.5"}, {"model": "gpt-image-1.5"}),
            ({"size": "16:9@2K"}, {"size": "2048x1152"}),
            ({"size": "1920x1080", "nearest_size": True}, {"size": "1920x1088"}),
            ({"n": 2}, {"n": 2}),
            ({"format": "jpg"}, {"output_format": "jpeg"}),
            ({"output_format": "webp", "output_compression": 50}, {"output_format": "webp"}),
            ({"format": "jpeg", "compression": 7}, {"output_compression": 7}),
            ({"background": "opaque", "moderation": "low"}, {"background": "opaque"}),
            ({"safety_identifier": "u1"}, {"safety_identifier": "u1"}),
            ({"params": {"seed": 7, "style.kind": "ink"}}, {"seed": 7, "style": {"kind": "ink"}}),
            ({"param": {"quality": "ultra"}}, {"quality": "ultra"}),
            ({"output": "sub/x.webp"}, {"output_format": "webp"}),
        ]
        lines = [{"prompt": f"p{i}", **line} for i, (line, _) in enumerate(table)]
        self.write(*lines)
        run = self.batch("--quality", "low", "--user", "me")
        for number, (line, expected) in enumerate(table):
            with self.subTest(line=line):
                sent = self.post_of(f"p{number}").json
                self.assertEqual({**sent, **expected}, sent, self.story(run))
        self.assertEqual(
            self.post_of("p0").json,
            {"model": "gpt-image-2", "prompt": "p0", "quality": "low", "user": "me"},
        )

    def test_the_lines_word_beats_option_and_config(self) -> None:
        self.configure(quality="medium", size="1024x1536", model="gpt-image-1.5")
        self.write({"prompt": "a", "size": "1024x1024"}, {"prompt": "b", "model": "gpt-image-2"})
        self.batch("--quality", "low", "--param", "seed=1")
        first, second = self.post_of("a").json, self.post_of("b").json
        common = {"quality": "low", "seed": 1}
        self.assertEqual(
            first, {"prompt": "a", "model": "gpt-image-1.5", "size": "1024x1024", **common}
        )
        self.assertEqual(
            second, {"prompt": "b", "model": "gpt-image-2", "size": "1024x1536", **common}
        )

    def test_prompt_file(self) -> None:
        (self.work / "long.txt").write_bytes(b"\xef\xbb\xbfa fox\nand a goose\n")
        self.write({"prompt_file": "long.txt"})
        self.batch()
        self.assertEqual(self.painter.seen, ["a fox\nand a goose"])

    def test_generations_and_edits_each_with_its_own_pictures(self) -> None:
        (self.work / "room.png").write_bytes(ROOM)
        (self.work / "pics").mkdir()
        (self.work / "pics" / "chair.png").write_bytes(CHAIR)
        (self.work / "mask.png").write_bytes(MASK)
        self.write(
            {"prompt": "plain"},
            {"prompt": "one", "images": "room.png"},
            {"prompt": "two", "images": ["room.png", "pics/chair.png"], "size": "1024x1024"},
            {"prompt": "list", "image": ["pics/chair.png"]},
            {"prompt": "absolute", "images": [str(self.work / "room.png")], "n": 2},
            {"prompt": "masked", "images": ["room.png"], "mask": "mask.png"},
            {"prompt": "marked", "images": ["room.png"], "markup": "mask.png",
             "model": "gpt-image-2.6-flare"},
            {"prompt": "text box", "images": ["room.png"], "mask_box": "1,2,3,4"},
            {"prompt": "list box", "images": ["room.png"], "mask_box": [1, 2, 3, 4]},
            {"prompt": "faithful", "images": ["room.png"], "model": "gpt-image-1",
             "input_fidelity": "high"},
        )  # fmt: skip
        (self.work / "jobs").mkdir()  # the pictures' names are not looked for here
        (self.work / "jobs" / "room.png").write_bytes(CHAIR)
        run = self.batch("--quality", "low")
        self.assertEqual(len(self.api.posts), 10)
        plain = self.post_of("plain")
        self.assertEqual(plain.path, "/v1/images/generations")
        self.assertEqual(plain.json, {"model": "gpt-image-2", "prompt": "plain", "quality": "low"})
        expected: dict[str, list[bytes]] = {
            "one": [ROOM],
            "two": [ROOM, CHAIR],
            "list": [CHAIR],
            "absolute": [ROOM],
            "masked": [ROOM, MASK],
            "marked": [ROOM, MASK],
            "faithful": [ROOM],
        }
        for prompt, files in expected.items():
            with self.subTest(prompt):
                post = self.post_of(prompt)
                self.assertEqual(post.path, "/v1/images/edits")
                self.assertEqual([part.body for part in post.uploads], files)
                self.assertEqual(post.fields["quality"], "low")
        self.assertEqual(self.post_of("two").fields["size"], "1024x1024")
        self.assertEqual(self.post_of("one").fields["size"], "auto")
        self.assertEqual(self.post_of("faithful").fields["input_fidelity"], "high")
        self.assertEqual(self.post_of("marked").uploads[1].name, "markup")
        masks = [self.post_of(prompt).uploads[1] for prompt in ("text box", "list box")]
        self.assertEqual(masks[0].body, masks[1].body)
        mask = read_png(masks[0].body)
        clear = [(x, y) for y in range(48) for x in range(64) if mask.pixel(x, y)[-1] == 0]
        self.assertEqual(clear, [(x, y) for y in range(2, 6) for x in range(1, 4)])
        self.assertEqual(len(run.saved), 11)
        self.assertEqual(self.painted()["0005-2.png"], "absolute, 2")

    def test_output_of_a_line_beats_the_names(self) -> None:
        elsewhere = self.tmp / "elsewhere.png"
        self.write(
            {"prompt": "a", "output": "fox.png"},
            {"prompt": "b", "output": "sub/deep/fox.png", "n": 2},
            {"prompt": "c", "output": str(elsewhere)},
            {"prompt": "d", "id": "own", "output": "named.png"},
            {"prompt": "e"},
        )
        self.batch()
        self.assertEqual(
            self.painted(),
            {
                "0005.png": "e",
                "fox.png": "a",
                "named.png": "d",
                "sub/deep/fox-1.png": "b",
                "sub/deep/fox-2.png": "b, 2",
            },
        )
        self.assertEqual(self.painter.labels[elsewhere.read_bytes()], "c")
        self.batch()
        self.assertEqual(len(self.api.posts), 5)

    def test_an_output_that_is_a_folder_is_one_in_the_output_folder(self) -> None:
        self.write({"prompt": "a", "output": "sub/"}, {"prompt": "b", "output": "sub2/x.png"})
        run = self.batch("--output-dir", "out")
        folders = [str(path.parent.relative_to(self.work)) for path in run.saved]
        self.assertEqual(sorted(folders), ["out/sub", "out/sub2"])

    def test_an_output_that_exists_is_a_bad_line(self) -> None:
        (self.work / "jobs").mkdir()
        (self.work / "jobs" / "fox.png").write_bytes(b"mine")
        self.write({"prompt": "a"}, {"prompt": "b", "output": "fox.png"})
        told = self.faults(self.refused())
        self.assertEqual(list(told), [2])
        self.assertRegex(told[2], "fox.png exists.*--force")
        self.batch("--force")
        self.assertEqual(self.painted(), {"0001.png": "a", "fox.png": "b"})

    def test_ids_name_the_pictures(self) -> None:
        self.write(
            {"prompt": "a", "id": "red fox"},
            {"prompt": "b", "id": 7},
            {"prompt": "c", "id": "zwölf", "n": 2},
            {"prompt": "d"},
        )
        self.batch()
        names = {"red fox.png": "a", "7.png": "b", "zwölf-1.png": "c", "zwölf-2.png": "c, 2"}
        self.assertEqual(self.painted(), {**names, "0004.png": "d"})


class BadLines(JobsFileCase):
    """Every bad line is told, in one go, and nothing is sent."""

    def test_each_by_number_and_reason(self) -> None:
        (self.work / "room.png").write_bytes(ROOM)
        (self.work / "words.png").write_bytes(b"no picture")
        table: list[tuple[Any, str]] = [
            ("{nonsense", "not JSON"),
            ('{"prompt": "a"', "not JSON"),
            ("a fox", "not JSON"),
            ("[1]", "not an object"),
            ('"a fox"', "not an object"),
            ('{"prompt": "a", "n": 2, "prompt": "b"}', "'prompt' stands twice"),
            ('{"prompt": "a", "params": {"x": 1, "x": 2}}', "'x' stands twice"),
            ('{"prompt": "a", "params": {"x": NaN}}', "NaN is no JSON"),
            ({"prompt": "a", "images": []}, "images is empty"),
            ({}, "no prompt"),
            ({"prompt": ""}, "empty"),
            ({"prompt": 7}, "not a text"),
            ({"prompt": ["a"]}, "not a text"),
            ({"prompt": "a", "prompt_file": "room.png"}, "prompt or prompt_file"),
            ({"prompt_file": "missing.txt"}, "missing.txt"),
            ({"prompt": "a", "qualitty": "low"}, "'qualitty'.*did you mean quality"),
            ({"prompt": "a", "timeout": 5}, "'timeout'"),
            ({"prompt": "a", "quality": "best"}, "quality.*best"),
            ({"prompt": "a", "quality": 3}, "quality"),
            ({"prompt": "a", "n": 0}, "n: "),
            ({"prompt": "a", "n": 11}, "n: "),
            ({"prompt": "a", "n": True}, "n: "),
            ({"prompt": "a", "n": [2]}, "n: "),
            ({"prompt": "a", "size": "512x512"}, "816x816"),
            ({"prompt": "a", "size": "huge"}, "huge"),
            ({"prompt": "a", "format": "jpeg", "background": "transparent"}, "jpeg"),
            ({"prompt": "a", "images": ["missing.png"]}, "missing.png"),
            ({"prompt": "a", "images": ["words.png"]}, "words.png"),
            ({"prompt": "a", "images": [7]}, "images"),
            ({"prompt": "a", "images": {"a": 1}}, "images"),
            ({"prompt": "a", "mask": "room.png"}, "need images"),
            ({"prompt": "a", "mask_box": "1,2,3,4"}, "need images"),
            ({"prompt": "a", "images": ["room.png"], "mask_box": "1,2"}, "mask_box"),
            ({"prompt": "a", "images": ["room.png"], "mask_box": [0, 0, 99, 99]}, "leaves"),
            ({"prompt": "a", "images": ["room.png"], "mask_box": {}}, "mask_box"),
            ({"prompt": "a", "input_fidelity": "high"}, "input_fidelity.*images"),
            ({"prompt": "a", "params": [1]}, "params"),
            ({"prompt": "a", "params": {"a..b": 1}}, "params"),
            ({"prompt": "a", "output": 7}, "output"),
            ({"prompt": "a", "output": "a\u202eb.png"}, "output|path|character"),
            ({"prompt": "a", "id": "a/b"}, "id 'a/b'"),
            ({"prompt": "a", "id": "../a"}, "id"),
            ({"prompt": "a", "id": ".hidden"}, "id"),
            ({"prompt": "a", "id": "bi\u202edi"}, "bidi|character"),
            ({"prompt": "a", "id": "x" * 101}, "id"),
        ]
        self.write(
            {"prompt": "good"},
            *(line for line, _ in table),
            {"prompt": "good too"},
        )
        run = self.refused()
        told = self.faults(run)
        for number, (line, why) in enumerate(table, 2):
            with self.subTest(line=line):
                self.assertRegex(told.get(number, "not told"), why)
        self.assertEqual(sorted(told), list(range(2, len(table) + 2)), run.err)
        self.assertIn(f"{len(table)} lines of {len(table) + 2}", run.err.splitlines()[-1])
        self.assertFalse(self.folder.exists())
        self.assertEqual(self.api.connections, 0)
        self.assertEqual(self.jobs(), [])
        self.assertNotIn("\u202e", run.err)

    def test_as_json(self) -> None:
        self.write({"prompt": "a"}, "nonsense", {"prompt": ""})
        document = self.refused("--json").json
        self.assertEqual((document["ok"], document["command"]), (False, "batch"))
        self.assertEqual(document["error"]["exit_code"], 2)
        self.assertIn("line 2", document["error"]["message"])

    def test_of_a_text(self) -> None:
        (self.work / "a.txt").write_bytes(b"good\n\xff\xfe\n" + b"x" * (1 << 20) + b"y\nlast\n")
        told = self.faults(self.refused(file="a.txt"))
        self.assertEqual(list(told), [2, 3], "a line that is too long is one line")
        self.assertIn("UTF-8", told[2])
        self.assertIn("longer", told[3])

    def test_a_line_that_is_much_too_long_is_one(self) -> None:
        lines = ['{"prompt": "a"}', '{"prompt": "%s"}' % ("x" * 3_000_000), '{"bad']
        self.write(*lines)
        told = self.faults(self.refused())
        self.assertEqual(list(told), [2, 3])
        self.assertIn("longer", told[2])

    def test_of_an_array_are_numbered_by_element(self) -> None:
        self.write('[{"prompt": "a"}, 7, {"prompt": "b", "n": 99}]')
        run = self.refused()
        self.assertEqual(list(self.faults(run)), [2, 3])
        self.assertNotIn("line 2", run.err)

    def test_two_with_one_id_or_one_output(self) -> None:
        self.write(
            {"prompt": "a", "id": "fox"},
            {"prompt": "b", "output": "x.png"},
            {"prompt": "c", "id": "fox"},
            {"prompt": "d", "output": "x.png"},
            {"prompt": "e", "id": "goose", "output": "y.png"},
        )
        told = self.faults(self.refused())
        self.assertRegex(told[3], "fox.*line 1")
        self.assertRegex(told[4], "x.png.*line 2")
        self.assertEqual(list(told), [3, 4])

    def test_one_output_spelled_in_two_ways(self) -> None:
        self.write(
            {"prompt": "a", "output": "x.png"},
            {"prompt": "b", "output": "./x.png"},
            {"prompt": "c", "output": str(self.folder / "x.png")},
        )
        self.assertEqual(list(self.faults(self.refused())), [2, 3])

    def test_an_id_like_a_number_is_no_other_lines_number(self) -> None:
        self.write({"prompt": "a"}, {"prompt": "b", "id": "0001"}, {"prompt": "c"})
        self.batch()
        names = {label: name for name, label in self.painted().items()}
        self.assertEqual((names["b"], names["c"]), ("0001.png", "0003.png"))
        self.assertNotRegex(names["a"], "000[123]")
        self.assertEqual(len(self.states()), 3)

    def test_an_output_like_another_lines_name_loses_nothing(self) -> None:
        self.write({"prompt": "a"}, {"prompt": "b", "output": "0001.png"})
        self.batch()
        self.assertEqual(sorted(self.painted().values()), ["a", "b"])

    def test_the_command_lines_options_are_checked_too(self) -> None:
        self.prompts("a")
        for argv in (
            ("--concurrency", "0"),
            ("--concurrency", "x"),
            ("--rpm", "0"),
            ("--max-cost", "-1"),
            ("--max-cost", "$5"),
            ("--shard", "0/4"),
            ("--shard", "5/4"),
            ("--shard", "2"),
            ("--redo", ""),
            ("--redo", "no-such-job"),
            ("--quality", "best"),
            ("-o", "x.png"),
            ("--prompt", "a"),
            ("--image", "a.png"),
        ):
            with self.subTest(argv=argv):
                self.refused(*argv)


class Size(JobsFileCase):
    """Thousands of lines are checked in seconds."""

    def test_two_thousand_lines(self) -> None:
        self.prompts(*(f"job {number}" for number in range(2000)))
        started = time.monotonic()
        run = self.batch("--dry-run")
        self.assertLess(time.monotonic() - started, 10)
        lines = run.out.splitlines()
        jobs = [line for line in lines if "  send  generate" in line]
        self.assertEqual(len(jobs), 2000)
        self.assertTrue(jobs[0].startswith("0001  "), jobs[0])
        self.assertTrue(jobs[-1].startswith("2000  "), jobs[-1])
        self.assertIn("2000 jobs: 2000 to send", run.out)
        self.assertEqual(self.listing(), ["jobs.jsonl"])
        self.assertFalse(os.path.exists(self.folder))
        self.no_request(self.api)
        self.assertEqual(self.jobs(), [])
