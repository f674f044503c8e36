"""What servers say in words and shapes of their own: read for meaning, shown, and saved.

Each row names the public thread whose shape it has (owner/repo#N), or the issue that asked for it.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import gpt_image2
from tests.case import Case, Run
from tests.images import png
from tests.server import Reply, b64, data_url, event_stream, json_reply

SMALL = png(40, 30, seed=1)
LARGE = png(300, 300, seed=3)  # longer than any string that the program holds in memory
OTHER = png(40, 30, seed=2)
SSE = [("Content-Type", "text/event-stream")]


def shapes(image: bytes, link: str) -> dict[str, Any]:
    """Return answers with one image, by where they were seen."""
    data, inline = b64(image), data_url(image)
    message = {"role": "assistant", "content": ""}
    return {
        "Responses": {
            "output": [{"type": "reasoning"}, {"type": "image_generation_call", "result": data}]
        },
        "BerriAI/litellm#13983": {"choices": [{"message": {**message, "image": {"url": inline}}}]},
        "0xPlaygrounds/rig#1804": {
            "choices": [{"message": {**message, "images": [{"image_url": {"url": inline}}]}}]
        },
        "langchain4j/langchain4j#3635": {
            "candidates": [
                {"content": {"parts": [{"text": "Here."}, {"inlineData": {"data": data}}]}}
            ]
        },
        "foxhui/WebAI2API#102": {"choices": [{"message": {**message, "content": inline}}]},
        "askimo-ai/askimo#280": {
            "choices": [{"message": {**message, "content": f"Done: ![fox]({inline}) Enjoy!"}}]
        },
        "agno-agi/agno#8938, a link": {
            "choices": [{"message": {**message, "images": [{"image_url": {"url": link}}]}}]
        },
        "Markdown, and a link in prose": {
            "choices": [{"message": {"content": f"![x]({link}) see https://a.invalid/help.html"}}]
        },
        "a link after a long text": {
            "choices": [{"message": {"content": "x" * 200_000 + f" ![i]({link}) and more"}}]
        },
        "dickpy/dsh-imagegen#10": {"result": {"images": [{"url": [link]}]}, "status": "completed"},
        "Replicate": {"output": [link], "input": {"image": "https://a.invalid/in.png"}},
        "BFL": {"status": "Ready", "result": {"sample": link}},
        "Stable Diffusion web UI": {"images": [data], "parameters": {"prompt": "x"}, "info": "{}"},
        "a message beside it": {"status": "success", "message": "made", "image_url": link},
        "base64 in a list": {"data": {"image_base64": [data]}},
        "twice": {"image": data, "copy": {"image_base64": inline}},
        "a text that is a link": {"choices": [{"message": {"content": link}}]},
    }


def said(message: str, **fields: Any) -> dict[str, Any]:
    """Return an error as most servers dress it."""
    return {"error": {"message": message, **fields}}


class ReadCase(Case):
    """A case that asks once, and looks at what was made of the answer."""

    def ask(self, reply: Reply, *argv: str) -> Run:
        """Generate c.png from one answer; a second POST would be a fault."""
        self.serve_base(reply)
        return self.run_tool("generate", "a fox", "-o", "c.png", "--force", *argv)


class TestImages(ReadCase):
    """An image is found wherever it stands."""

    def test_shapes(self) -> None:
        host = self.serve()
        for image in (SMALL, LARGE):
            for name, value in shapes(image, host.put("/out?sig=1", image)).items():
                with self.subTest(name, size=len(image)):
                    run = self.check(self.ask(json_reply(value)), 0)
                    self.assertEqual([path.read_bytes() for path in run.saved], [image])
                    self.assertEqual(self.jobs(), [])

    def test_recover_finds_the_same_in_a_cut_answer(self) -> None:
        host = self.serve()
        for image in (SMALL, LARGE):
            for name, value in shapes(image, host.put("/out.png", image)).items():
                reply = json_reply([value, {"cut": "here"}])
                with self.subTest(name, size=len(image)):
                    self.check(self.ask(reply._replace(cut=len(reply.body) - 8)), 8)
                    run = self.check(self.run_tool("recover", "--last", "--force"), 0)
                    self.assertEqual([path.read_bytes() for path in run.saved], [image])
                    self.run_tool("recover", "--clean", "--older-than", "0s")

    def test_streams(self) -> None:
        item = {"type": "image_generation_call", "result": b64(SMALL)}
        partial = "response.image_generation_call.partial_image"
        rows = {
            "Responses": event_stream(
                {"type": partial, "partial_image_b64": b64(OTHER)},
                {"type": "response.output_item.done", "item": item},
                {"type": "response.completed", "response": {"output": [item]}},
            ),
            "foxhui/WebAI2API#102": event_stream(
                {"choices": [{"delta": {"content": data_url(SMALL)}}]}, "[DONE]"
            ),
            "bare CR": Reply(200, b'data: {"b64_json": "%b"}\r\r' % b64(SMALL).encode(), SSE),
        }
        for name, reply in rows.items():
            with self.subTest(name):
                run = self.check(self.ask(reply), 0)
                self.assertEqual([path.read_bytes() for path in run.saved], [SMALL])

    def test_what_is_no_image(self) -> None:
        host = self.serve()
        help_page = host.put("/help.png", SMALL)
        rows = [
            {"message": f"see {help_page} for help"},
            {"error": {"message": "no", "url": help_page}},
            {"input": {"image": help_page}, "output": []},
            {"status": "queued", "thumbnail": help_page},
        ]
        for value in rows:
            with self.subTest(value):
                self.assertNotEqual(self.ask(json_reply(value)).code, 0)
        self.no_request(host)

    def test_a_link_that_only_the_relay_can_see(self) -> None:
        """Issue 14; chenyme/grok2api#640, xtekky/gpt4free#2740."""
        closed = self.serve()
        closed.close()
        api = self.serve_base(json_reply({"data": [{"url": f"{closed.origin}/img/a.png"}]}))
        api.put("/img/a.png", SMALL)
        run = self.check(self.run_tool("generate", "a fox"), 0)
        self.assertEqual(run.saved[0].read_bytes(), SMALL)
        self.assertNotIn("authorization", api.gets[0].headers)


def box(kind: bytes, *parts: bytes) -> bytes:
    """Return a box of an ISO media file, as AVIF and HEIC are."""
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def media(brand: bytes) -> bytes:
    """Return the boxes of an image of 40x30 pixels, without its pixels."""
    size = box(b"ispe", struct.pack(">III", 0, 40, 30))
    head = box(b"meta", bytes(4), box(b"iprp", box(b"ipco", size)))
    return box(b"ftyp", brand, bytes(4), brand) + head + box(b"mdat", bytes(9000))


OTHER_FORMATS = {
    "avif": media(b"avif"),
    "heic": media(b"heic"),
    "bmp": b"BM"
    + struct.pack("<IIIIiiHHIIiiII", 58, 0, 54, 40, 40, 30, 1, 24, *[0] * 6)
    + bytes(4),
    "tiff": b"II*\0" + struct.pack("<IHI", 8, 0, 0) + bytes(99),
}


class TestFormats(ReadCase):
    """Images of formats that the API does not name, and what is no image."""

    def test_each_has_its_own_suffix(self) -> None:
        for kind, image in OTHER_FORMATS.items():
            for entry in ({"b64_json": b64(image)}, {"url": self.serve().put("/x", image)}):
                with self.subTest(kind, entry=[*entry]):
                    self.serve_base(json_reply({"data": [entry]}))
                    run = self.check(self.run_tool("generate", "x", "-f", "png"), 0)
                    self.assertEqual(run.saved[0].suffix, f".{kind}")
                    self.assertEqual(run.saved[0].read_bytes(), image)
                    self.assertRegex(run.err, f"warning: .* contains {kind}, not png as requested")

    def test_what_is_cut_or_no_image_is_kept_and_named(self) -> None:
        for name, data in {
            "cut": OTHER_FORMATS["avif"][:-1],
            "a document": b"%PDF-1.7" + bytes(900),
            "a video": box(b"ftyp", b"isom", bytes(4), b"isom") + box(b"mdat", bytes(900)),
        }.items():
            for entry in ({"b64_json": b64(data)}, {"url": self.serve().put("/x", data)}):
                with self.subTest(name, entry=[*entry]):
                    run = self.check(self.ask(json_reply({"data": [entry]}), "--json"), 10)
                    error = run.json["error"]
                    path = re.search(r"kept: (\S+)", error["message"] + " " + error["hint"])
                    assert path, error
                    kept = Path(path[1]).read_bytes()
                    self.assertTrue(data in kept or b64(data).encode() in kept)
                    self.run_tool("recover", "--clean", "--older-than", "0s")


class TestWords(ReadCase):
    """A refusal is told by what it means, whatever its status; its own words are shown."""

    def check_row(self, name: str, status: int, body: Any, code: int, *words: str) -> None:
        """Assert what comes of one answer, which is sent once and leaves no job."""
        with self.subTest(name):
            self.env["GPT_IMAGE2_RETRIES"] = "2"
            run = self.check(self.ask(json_reply(body, status), "--json"), code)
            error = run.json["error"]
            for word in words:
                self.assertIn(word, f"{error['message']} {error['hint']}")
            self.assertEqual((error["maybe_billed"], self.jobs()), (False, []), run)

    def test_out_of_credit(self) -> None:
        quota = said("user quota is not enough (request id: 1)", type="v_api_error")
        low = {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}
        rows: list[tuple[str, int, Any]] = [
            ("Wei-Shaw/sub2api#890", 403, {"code": "INSUFFICIENT_BALANCE", "message": "No money"}),
            ("popjane/free_chatgpt_api#78", 403, quota),
            ("elizaOS/auto.fun#321", 403, {"error": "Insufficient token balance."}),
            ("zh", 429, said("用户余额不足, 剩余 $0")),
            ("not active", 429, said("x", code="billing_not_active")),
            ("in a 500", 500, {"errorKey": "insufficient_balance", "errorMessage": "No credit"}),
            ("in a 200", 200, low),
        ]
        for row in rows:
            self.check_row(*row, 6, "credit")

    def test_content_policy(self) -> None:
        filtered = "The response was filtered by Microsoft's content management policy."
        moderated = "Your request was rejected by content moderation."
        inner = {"code": "BadRequest", "innererror": {"code": "ResponsibleAIPolicyViolation"}}
        rows: list[tuple[str, int, Any]] = [
            ("gpt4free/g4f.dev#81", 400, said(filtered, code="content_filter")),
            (
                "pollinations/pollinations#12067",
                422,
                said(moderated, code="content_policy_violation"),
            ),
            ("Azure", 400, said("Task failed", code="contentFilter")),
            ("Azure, within", 400, said("Failed", **inner)),
            ("zh", 400, said("提示词包含敏感词", code="x")),
            ("words", 500, {"detail": "rejected as a result of our safety system"}),
        ]
        for row in rows:
            self.check_row(*row, 5)
        wrong = said("Bad file", type="image_generation_user_error")
        self.check_row("openai/codex#25966", 400, wrong, 1, "Bad file")

    def test_no_channel(self) -> None:
        told = "No available channels for model in group default"
        zh = "当前分组 default 下对于模型 dall-e-3 无可用渠道"
        for row in (
            ("a37836323/-chatgpt4.0-api-key#2", 503, said(told, type="new_api_error")),
            ("binary-husky/gpt_academic#1894", 503, said(zh, type="503")),
            ("QuantumNous/new-api#6310", 503, said("x", code="model_not_found")),
            ("QuantumNous/new-api#6310, 404", 404, said("x", code="model_not_found")),
        ):
            self.check_row(*row, 1)

    def test_other_shapes(self) -> None:
        nest = {"statusCode": 400, "message": ["size must be <= 2048"], "error": "Bad Request"}
        cloudflare = {"success": False, "errors": [{"code": 7003, "message": "Could not route"}]}
        gone = said("Requested entity was not found.", code=404, status="NOT_FOUND")
        for name, status, body, *words in (
            ("Nest", 400, nest, "size must be"),
            ("DashScope", 400, {"code": "InvalidParameter", "msg": "1023"}, "Parameter", "1023"),
            ("Cloudflare", 400, cloudflare, "7003", "Could not route"),
            ("su-kaka/gcli2api#367", 404, gone, "was not found"),
            (
                "FastAPI",
                422,
                {"detail": [{"loc": ["body", "size"], "msg": "bad"}]},
                "bad (body, size)",
            ),
            ("nothing known", 400, {"foo": {"bar": [1]}}, '"bar"'),
        ):
            self.check_row(name, status, body, 1, *words)

    def test_an_event_that_is_no_json(self) -> None:
        reply = Reply(200, b"event: error\ndata: upstream said no\n\n", SSE)
        self.assertIn("upstream said no", self.check(self.ask(reply), 8).err)

    def test_try_again_in(self) -> None:
        for text, seconds in (
            ("Limit 10000, Used 6701. Please try again in 7.188s.", 7.188),
            ("Please retry after 30 seconds", 30),
            ("Try again in 250ms.", 0.25),
            ("Try again in 3 minutes", 180),
            ("Please try again in 6m0s.", 360),
            ("Please retry after 1h2m3.5s", 3723.5),
            ("Requested 775. Please try again in 232ms. Visit https://a.invalid/", 0.232),
            ("You have exhausted your capacity on this model. Your quota will reset after 3s.", 3),
            ("You are uploading too fast. Please wait 59 more minutes.", 3540),
        ):  # abi/screenshot-to-code#76, pixeltable/pixeltable#704,
            with self.subTest(text):  # lbjlaq/Antigravity-Manager#156, bkeiren/EasyImgur#54
                self.assertEqual(gpt_image2.retry_after({}, text), seconds)
        self.check_row("too long", 429, said("Try again in 60 minutes"), 6, "3600 s")

    def test_a_task(self) -> None:
        for name, value in (
            ("dickpy/dsh-imagegen#10", {"data": {"status": "submitted", "task_id": "task_7"}}),
            ("Syh1906/openai-compatible-imagegen#14", {"id": "task_7", "status": "processing"}),
            ("Wangnov/gpt-image-2-skill#40", {"code": 200, "data": [{"task_id": "task_7"}]}),
        ):
            with self.subTest(name):
                run = self.check(self.ask(json_reply(value), "--json"), 8)
                self.assertIn("task_7", run.json["error"]["hint"])
                self.assertIn("response.json", run.json["error"]["hint"])
                self.run_tool("recover", "--clean", "--older-than", "0s")

    def test_a_refusal_in_words(self) -> None:
        value = {"choices": [{"message": {"content": "I can't draw that."}}]}
        run = self.check(self.ask(json_reply(value), "--json"), 8)
        self.assertIn("I can't draw that", run.json["error"]["message"])


class TestPasted(ReadCase):
    """A base URL as people paste it."""

    def test_base_urls(self) -> None:
        azure = "https://r.openai.azure.com"
        old = "https://r-westus3.cognitiveservices.azure.com/openai/deployments"
        v1 = "/openai/v1/images/generations"
        for name, pasted, url, model in (
            (
                "OkGoDoIt/OpenAI-API-dotnet#165",
                f"{azure}/openai/deployments/pics/images/generations?api-version=2023-06-01",
                azure + v1,
                "pics",
            ),
            (
                "Azure-Samples/openai#146",
                f"{old}/gpt-image-1/images/edits?api-version=2025-03-01",
                f"https://r-westus3.cognitiveservices.azure.com{v1}",
                "gpt-image-1",
            ),
            ("langgenius/dify-official-plugins#2881", f"{azure}/", azure + v1, "gpt-image-2"),
            ("open-webui/open-webui#16267", f"{azure}/openai/deployments/", azure + v1, ""),
            (
                "egoist/chatwise-releases#943",
                f"{azure}/openai/deployments/i1/v1/images/generations",
                azure + v1,
                "i1",
            ),
            (
                "microsoft/UFO#8",
                f"{azure}/openai/deployments/d/chat/completions?api-version=1",
                azure + v1,
                "d",
            ),
            (
                "a Foundry project",
                "https://r.services.ai.azure.com/api/projects/p",
                f"https://r.services.ai.azure.com{v1}",
                "",
            ),
            (
                "MicrosoftDocs/azure-docs#114602",
                f"{azure}/openai/deployments/d/completions?api-version=2023-05-15",
                azure + v1,
                "d",
            ),
            (
                "OpenBMB/ChatDev#191",
                f"{azure}/openai/deployments/my_gpt35turbo?api-version=2023-05-15",
                azure + v1,
                "my_gpt35turbo",
            ),
            (
                "an endpoint",
                "relay.invalid/v1/chat/completions",
                "https://relay.invalid/v1/images/generations",
                "",
            ),
            (
                "another",
                "https://relay.invalid/api/v3/responses?x=1",
                "https://relay.invalid/api/v3/images/generations",
                "",
            ),
        ):
            with self.subTest(name):
                run = self.run_tool("generate", "x", "--dry-run", "--json", "--base-url", pasted)
                plan = self.check(run, 0).json["dry_run"]
                self.assertEqual(plan["endpoint"], url)
                self.assertEqual(plan["fields"]["model"], model or "gpt-image-2")

    def test_only_what_was_asked_is_sent(self) -> None:
        """Issue 14; kyh/vibedgames#182, liliMozi/openhanako#657, lofcz/LLMTornado#155."""
        api = self.serve_base()
        for name, more in (("c.png", {}), ("c.jpg", {"output_format": "jpeg"})):
            api.script.append(json_reply({"data": [{"b64_json": b64(SMALL)}]}))
            self.check(self.run_tool("generate", "x", "-o", name), 0)
            sent = {"model": "gpt-image-2", "prompt": "x", **more}
            self.assertEqual(api.posts[-1].json, sent)


class TestUsage(ReadCase):
    """Usage has the API's names, whatever the server calls its fields."""

    def test_names(self) -> None:
        image = {"data": [{"b64_json": b64(SMALL)}]}
        chat = {"prompt_tokens": 54, "completion_tokens": 23, "total_tokens": 77}
        zero = {**chat, "input_tokens": 0, "output_tokens": 0}
        gemini = {"promptTokenCount": 54, "candidatesTokenCount": 23, "totalTokenCount": 77}
        call = {"type": "image_generation_call", "result": b64(SMALL)}
        done = {"response": {"output": [call], "usage": {"input_tokens": 54, "output_tokens": 23}}}
        for name, reply in (
            ("alexrudall/ruby-openai#161", json_reply({**image, "usage": chat})),
            ("NodeKey: zeros", json_reply({**image, "usage": zero})),
            ("laravel/ai#457", json_reply({**image, "usageMetadata": gemini})),
            (
                "prism-php/prism#583",
                json_reply({**image, "usage": {"prompt_tokens": 54, "output_tokens": 23}}),
            ),
            ("Wei-Shaw/sub2api#4644", event_stream({"type": "response.completed", **done})),
        ):
            with self.subTest(name):
                usage = self.check(self.ask(reply, "--json"), 0).json["usage"]
                wanted = {"input_tokens": 54, "output_tokens": 23, "total_tokens": 77}
                self.assertEqual(usage, wanted)
