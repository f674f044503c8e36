"""Every field of the images API: its option, its way over the wire, and what is refused."""

from __future__ import annotations

import json
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any, Iterator, NamedTuple

from gpt_image2 import FIELDS
from tests.pictures import png
from tests.support import Case, Child, answer

PICTURE = png(1024, 1024)
RECORD = json.loads((Path(__file__).parent / "data" / "sdk_fields.json").read_text("utf-8"))
COMMANDS = {"generations": "generate", "edits": "edit"}
LETTERS = {"generations": "g", "edits": "e"}

# What has no row in the script's table of fields, as --help names it.
OTHERWISE = {"prompt": '"PROMPT"', "image": "--image", "mask": "--mask", "markup": "--markup"}

# Where we know less than the SDK: what went with DALL-E. --param still sends it.
RETIRED_FIELDS = {"style"}
RETIRED_VALUES = {"quality": {"hd", "standard"}, "size": {"256x256", "512x512"}}
# Where an option can't say a value: `stream` is a switch, and not to give it is to say false.
UNSPOKEN_VALUES = {"stream": {False}}
# Where we know more: sources disagree whether edits take it.
DISPUTED = {"edits": {"moderation"}, "generations": set()}


class Example(NamedTuple):
    """An option on the command line, and its value in JSON."""

    argv: str
    value: Any


EXAMPLES = {
    "background": Example("--background opaque", "opaque"),
    "complexity": Example("--complexity medium", "medium"),
    "frame_count": Example("--frame-count 9", 9),
    "frame_duration_ms": Example("--frame-duration-ms 250", 250),
    "input_fidelity": Example("--input-fidelity high", "high"),
    "model": Example("--model gpt-image-2.6-flare", "gpt-image-2.6-flare"),
    "moderation": Example("--moderation low", "low"),
    "n": Example("--n 2", 2),
    "output_compression": Example("--compression 80", 80),
    "output_format": Example("--format jpg", "jpeg"),
    "partial_images": Example("--partial-images 3", 3),
    "quality": Example("--quality xhigh", "xhigh"),
    "response_format": Example("--response-format b64_json", "b64_json"),
    "safety_identifier": Example("--safety-identifier 007", "007"),
    "size": Example("--size 16:9@2K", "2048x1152"),
    "stream": Example("--stream", True),
    "svg.model": Example("--svg-model 5", "5"),
    "svg.reasoning.effort": Example("--svg-effort minimal", "minimal"),
    "user": Example("--user true", "true"),
}


def literals(endpoint: str, name: str) -> list[Any]:
    """Return the values of the SDK that an option should take."""
    left_out = RETIRED_VALUES.get(name, set()) | UNSPOKEN_VALUES.get(name, set())
    values = RECORD["endpoints"][endpoint][name]["values"]
    return [value for value in values if value not in left_out]


def optional_fields(endpoint: str) -> list[str]:
    """Return the recorded fields that our table of fields should hold."""
    names = set(RECORD["endpoints"][endpoint]) | DISPUTED[endpoint]
    return sorted(names - set(OTHERWISE) - RETIRED_FIELDS)


def option_of(name: str) -> str:
    """Return the long option of a field."""
    return next(field.names[-1] for field in FIELDS if field.field == name)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Return dotted names as JSON nests them."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        place = result
        for step in path:
            place = place.setdefault(step, {})
        place[last] = value
    return result


def in_a_form(values: dict[str, Any]) -> dict[str, str]:
    """Return dotted names as a form spells them, and values as text."""
    result = {}
    for name, value in values.items():
        first, *steps = name.split(".")
        text = value if isinstance(value, str) else json.dumps(value)
        result[first + "".join(f"[{step}]" for step in steps)] = text
    return result


class ParameterCase(Case):
    """A case with pictures to edit, and a server that answers all with one picture."""

    def setUp(self) -> None:
        super().setUp()
        self.api = self.serve_base(otherwise=answer(PICTURE, PICTURE))
        (self.work / "a.png").write_bytes(png(64, 48))
        (self.work / "clear.png").write_bytes(png(64, 48, hole=(8, 8, 16, 16)))

    def start_of(self, endpoint: str) -> list[str]:
        """Return the command line that an endpoint's options are added to."""
        return ["generate", "a fox"] if endpoint == "generations" else ["edit", "a.png", "a fox"]

    def assert_sends(self, endpoint: str, argv: list[str], values: dict[str, Any]) -> None:
        """Assert that exactly these fields go, as the endpoint spells them."""
        self.check(self.run_tool(*self.start_of(endpoint), *argv), 0)
        request = self.api.posts[-1]
        self.assertEqual(request.path, f"/v1/images/{endpoint}")
        values = {"model": "gpt-image-2", "prompt": "a fox", **values}
        if endpoint == "generations":
            wanted = json.dumps(nested(values), sort_keys=True)  # 1, true and "1" differ in it
            self.assertEqual(json.dumps(request.json, sort_keys=True), wanted)
        else:
            wanted_form = in_a_form({"size": "auto", **values})
            self.assertEqual(request.fields, wanted_form)


class SdkFields(ParameterCase):
    """The fields recorded from OpenAI's own package, against ours."""

    def test_every_field_has_its_option(self) -> None:
        for endpoint, command in COMMANDS.items():
            shown = re.split(r"[\s,]+", self.check(self.run_tool(command, "--help"), 0).out)
            ours = {field.field for field in FIELDS if LETTERS[endpoint] in field.commands}
            for name in set(RECORD["endpoints"][endpoint]) - RETIRED_FIELDS:
                with self.subTest(endpoint=endpoint, field=name):
                    self.assertIn(name, ours | set(OTHERWISE))
                    self.assertIn(OTHERWISE.get(name) or option_of(name), shown)

    def test_no_option_is_of_a_field_that_the_sdk_does_not_know(self) -> None:
        for endpoint, letter in LETTERS.items():
            with self.subTest(endpoint):
                ours = {field.field for field in FIELDS if letter in field.commands}
                self.assertEqual(ours, set(optional_fields(endpoint)))

    def test_every_value_is_taken_and_arrives(self) -> None:
        """Each run takes the next value of every field, until none has one left."""
        done = {"model"}  # see Models
        for endpoint in COMMANDS:
            names = sorted(set(optional_fields(endpoint)) - done)
            known = [name for name in names if name in RECORD["endpoints"][endpoint]]
            done.update(known)
            columns = [[(name, value) for value in literals(endpoint, name)] for name in known]
            for row in zip_longest(*columns):
                values = dict(pair for pair in row if pair)
                argv = list(spoken(values))
                with self.subTest(endpoint=endpoint, argv=argv):
                    self.assert_sends(endpoint, argv, values)

    def test_all_fields_at_once_arrive_with_their_types(self) -> None:
        for endpoint in COMMANDS:
            with self.subTest(endpoint):
                examples = {name: EXAMPLES[name] for name in optional_fields(endpoint)}
                argv = [word for example in examples.values() for word in example.argv.split()]
                values = {name: example.value for name, example in examples.items()}
                self.assert_sends(endpoint, argv, values)

    def test_retired_fields_and_values_still_go_by_param(self) -> None:
        for fields in (
            {"style": "vivid", "quality": "hd", "size": "256x256"},
            {"style": "natural", "quality": "standard", "size": "512x512"},
        ):
            with self.subTest(fields):
                argv = [word for pair in fields.items() for word in ("--param", "=".join(pair))]
                self.assert_sends("generations", argv, dict(fields))

    def test_values_that_are_not_ours_name_the_nearest_and_the_way_past(self) -> None:
        table = {
            "--quality hd": "--param quality=",
            "--quality hihg": "high.*--param quality=",
            "--background clear": "--param background=",
            "--format tiff": "--param output_format=",
            "--svg-effort maximum": "max.*--param svg.reasoning.effort=",
        }
        for argv, phrase in table.items():
            with self.subTest(argv):
                run = self.check(self.run_tool("generate", "a fox", *argv.split()), 2)
                self.assertRegex(run.err, phrase)
        self.no_request(self.api)

    def test_the_longest_frame_that_the_sdk_documents(self) -> None:
        """GIF output "caps the encoded delay at 655,350 ms per frame"."""
        argv = ["-f", "gif", "--frame-duration-ms", "655350"]
        values = {"output_format": "gif", "frame_duration_ms": 655350}
        self.assert_sends("generations", argv, values)


def spoken(values: dict[str, Any]) -> Iterator[str]:
    """Yield the options that say these values."""
    for name, value in values.items():
        yield option_of(name)
        if value is not True:
            yield str(value)


class Streams(ParameterCase):
    """The two fields of a stream belong together."""

    def test_partial_images_imply_stream(self) -> None:
        for endpoint, number in (("generations", 0), ("edits", 2)):
            with self.subTest(endpoint):
                argv = ["--partial-images", str(number)]
                self.assert_sends(endpoint, argv, {"stream": True, "partial_images": number})

    def test_more_than_three_are_refused(self) -> None:
        for number in ("4", "-1"):
            with self.subTest(number):
                self.check(self.run_tool("generate", "a fox", f"--partial-images={number}"), 2)
        self.no_request(self.api)


class AtOpenai(ParameterCase):
    """What OpenAI is certain to refuse is not sent; what it only may refuse goes, with a word."""

    def start_at_openai(self, line: str) -> Child:
        """Start a command line with --provider openai."""
        return self.start_tool(*line.split(), "--provider", "openai", "--json")

    def test_certain_refusals_are_not_sent(self) -> None:
        table = {
            "generate x --background transparent -f jpeg": "transparent",
            "generate x --background transparent -f gif": "transparent",
            "generate x --background transparent -f svg": "transparent",
            "generate x -f gif --stream": "gif.*stream",
            "generate x -f svg --stream": "svg.*stream",
            "generate x -f gif --partial-images 0": "gif.*stream",
            "generate x -f gif --compression 50": "compression.*gif",
            "generate x -f svg --compression 50": "compression.*svg",
            "generate x --frame-duration-ms 200": "gif",
            "generate x --svg-effort low": "svg",
            "generate x -m gpt-image-1.5 -s 2K": "2048x2048.*1024x1024",
            "edit a.png x -f gif --mask-box 1,1,8,8": "gif.*mask",
            "edit a.png x --mask clear.png --markup clear.png -m gpt-image-2.5-flare": "mark-?up",
            "edit a.png x --input-fidelity low -m gpt-image-2.5-sunburst": "input_fidelity",
            "edit a.png x --input-fidelity high -m gpt-image-2.6-flare": "input_fidelity",
            "edit a.png x --input-fidelity high -m gpt-image-1-mini": "low",
        }
        started = [self.start_at_openai(line) for line in table]
        for (line, phrase), process in zip(table.items(), started):
            with self.subTest(line):
                run = self.check(self.finish(process), 2)
                self.assertRegex(run.json["error"]["message"], phrase)
                self.assertFalse(run.json["error"]["maybe_billed"])
        self.no_request(self.api)
        self.assertEqual(self.jobs(), [])

    def test_what_may_be_refused_goes_through_with_one_warning(self) -> None:
        table = {
            "generate x --background transparent": "transparent.*preview",
            "generate x --quality xhigh": "xhigh",
            "generate x --quality max": "max",
            "generate x --complexity low": "complexity.*2.6",
            "generate x -m gpt-image-3 --quality max --complexity low": "not in the table",
            "edit a.png x --moderation low": "moderation",
            "edit a.png x --response-format url": "response_format",
            "edit a.png x --markup clear.png": "markup.*2.5",
        }
        started = [self.start_at_openai(line) for line in table]
        for (line, phrase), process in zip(table.items(), started):
            with self.subTest(line):
                (warning,) = self.check(self.finish(process), 0).json["warnings"]
                self.assertRegex(warning, phrase)
        self.assertEqual(len(self.api.posts), len(table))

    def test_what_is_known_to_work_goes_without_a_word(self) -> None:
        lines = (
            "generate x --background transparent --quality xhigh -m gpt-image-2.5-flare -f webp",
            "generate x --quality max --complexity high -m gpt-image-2.6-flare --moderation low",
            "generate x -f gif --frame-count 2 --frame-duration-ms 40",
            "generate x -f svg --svg-model gpt-5.5 --svg-effort none",
            "edit a.png x --markup clear.png -m gpt-image-2.5-flare -f jpg --compression 1",
        )
        started = [self.start_at_openai(line) for line in lines]
        for line, process in zip(lines, started):
            with self.subTest(line):
                run = self.check(self.finish(process), 0)
                # the picture is a PNG whatever was asked for
                about_fields = [text for text in run.json["warnings"] if "png" not in text]
                self.assertEqual(about_fields, [])


class Models(ParameterCase):
    """Which models a word is said of, before their last day and after it."""

    living = (
        "gpt-image-2",
        "gpt-image-2-2026-04-21",
        "gpt-image-2.5-flare",
        "gpt-image-2.5-flare-2026-09-08",
        "gpt-image-2.5-sunburst",
        "gpt-image-2.5-sunburst-2026-09-08",
        "gpt-image-2.6-flare",
        "gpt-image-2.6-sunburst",
    )
    ending = {
        "gpt-image-1.5": "2026-12-01",
        "gpt-image-1-mini": "2026-12-01",
        "chatgpt-image-latest": "2026-12-01",
        "gpt-image-1": "2026-10-23",
        "dall-e-2": "2026-05-12",
        "dall-e-3": "2026-05-12",
    }
    nodekeys = ("gpt-image-2-vip", "gpt-image-2-1k", "gpt-image-2-2k", "gpt-image-2-4k")

    def warned(self, provider: str, *models: str) -> list[tuple[str, list[str]]]:
        """Return models with the warnings of a dry run, all of them running at once."""
        options = ("--provider", provider, "--dry-run", "--json")
        started = [self.start_tool("generate", "x", "-m", model, *options) for model in models]
        runs = [self.check(self.finish(process), 0) for process in started]
        return [(model, run.json["warnings"]) for model, run in zip(models, runs)]

    def test_the_models_of_the_sdk_are_all_known(self) -> None:
        for endpoint in COMMANDS:
            recorded = set(literals(endpoint, "model"))
            self.assertEqual(recorded, {*self.living, *self.ending})

    def test_living_models_and_nodekeys_go_without_a_word(self) -> None:
        for provider, models in (("openai", self.living), ("nodekey", self.nodekeys)):
            for model, warnings in self.warned(provider, *models):
                with self.subTest(model):
                    self.assertEqual(warnings, [])

    def test_models_near_or_past_their_last_day_name_it_and_a_successor(self) -> None:
        # relays may still serve gpt-image-1
        for provider, models in (("openai", self.ending), ("generic", ("gpt-image-1",))):
            for model, warnings in self.warned(provider, *models):
                with self.subTest(model=model, provider=provider):
                    successor = rf"\b({'|'.join(self.living)})\b"
                    (warning,) = warnings
                    self.assertRegex(warning, rf"{model}\b.*{self.ending[model]}.*{successor}")

    def test_a_model_that_is_not_in_the_table_names_the_nearest(self) -> None:
        ((_, (warning,)),) = self.warned("openai", "gpt-image-2.6-flair")
        self.assertRegex(warning, "gpt-image-2.6-flair.*gpt-image-2.6-flare")

    def test_azure_names_its_models_itself(self) -> None:
        self.assertEqual(self.warned("azure", "my-deployment"), [("my-deployment", [])])


class RequestId(ParameterCase):
    """OpenAI's support finds a request by the id that its sender gave it."""

    def test_only_openai_gets_it_and_it_is_the_job_id(self) -> None:
        for provider in ("openai", "openai-hk", "nodekey", "azure", "generic"):
            with self.subTest(provider):
                argv = ("edit", "a.png", "x", "--provider", provider)
                job = self.check(self.run_tool(*argv, "--json"), 0).json["job_id"]
                found = self.api.posts[-1].headers.get("x-client-request-id")
                self.assertEqual(found, job if provider == "openai" else None)
