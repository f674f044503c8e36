"""What servers say in words and shapes of their own: read for meaning, shown, and saved.

Each row names the public thread whose shape it has (owner/repo#N), or the issue that asked for it.
"""

from __future__ import annotations

import json
import unittest
from typing import Any

from tests.case import Case, Run
from tests.pictures import png
from tests.server import Api, Reply, b64, data_url, event_stream, json_reply, page

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
        "dickpy/dsh-imagegen#10": {"result": {"images": [{"url": [link]}]}, "status": "completed"},
        "Replicate": {"output": [link], "input": {"image": "https://a.invalid/in.png"}},
        "fal": {"images": [{"url": link, "content_type": "image/png"}], "seed": 1},
        "BFL": {"status": "Ready", "result": {"sample": link}},
        "Stable Diffusion web UI": {"images": [data], "parameters": {"prompt": "x"}, "info": "{}"},
        "a message beside it": {"status": "success", "message": "made", "image_url": link},
        "a list": {"data": {"image_urls": [link]}},
        "base64 in a list": {"data": {"image_base64": [data]}},
        "twice": {"image": data, "copy": {"image_base64": inline}},
        "a text that is a link": {"choices": [{"message": {"content": link}}]},
    }


class ReadCase(Case):
    """A case that asks once, and looks at what was made of the answer."""

    def ask(self, reply: Reply, *argv: str) -> Run:
        """Generate c.png from one answer; a second POST would be a fault."""
        self.serve_base(reply)
        return self.run_tool("generate", "a fox", "-o", "c.png", "--force", *argv)

    def links(self) -> Api:
        """Return a server for links."""
        return self.serve()


class TestImages(ReadCase):
    """An image is found wherever it stands."""

    def test_shapes(self) -> None:
        host = self.links()
        for image in (SMALL, LARGE):
            for name, value in shapes(image, host.put("/out?sig=1", image)).items():
                with self.subTest(name, size=len(image)):
                    run = self.check(self.ask(json_reply(value)), 0)
                    self.assertEqual([path.read_bytes() for path in run.saved], [image])
                    self.assertEqual(self.jobs(), [])

    def test_recover_finds_the_same_in_a_cut_answer(self) -> None:
        host = self.links()
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
        host = self.links()
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
        closed = self.serve()
        closed.close()
        api = self.serve_base(json_reply({"data": [{"url": f"{closed.origin}/img/a.png"}]}))
        api.put("/img/a.png", SMALL)
        run = self.check(self.run_tool("generate", "a fox"), 0)
        self.assertEqual(run.saved[0].read_bytes(), SMALL)
        self.assertNotIn("authorization", api.gets[0].headers)


class TestWords(ReadCase):
    """A refusal is told by what it means, whatever its status; its own words are shown."""

    def check_row(self, name: str, status: int, body: Any, code: int, *words: str) -> Run:
        """Assert exit code and words of one answer that is sent once and leaves no job."""
        with self.subTest(name):
            self.env["GPT_IMAGE2_RETRIES"] = "2"
            run = self.check(self.ask(json_reply(body, status), "--json"), code)
            error = run.json["error"]
            for word in words:
                self.assertIn(word, error["message"])
            self.assertEqual((error["maybe_billed"], self.jobs()), (False, []), run)
            return run
        raise AssertionError

    def test_out_of_credit(self) -> None:
        quota = "user quota is not enough (request id: 1)"
        for row in (
            ("Wei-Shaw/sub2api#890", 403, {"code": "INSUFFICIENT_BALANCE", "message": "No money"}),
            (
                "popjane/free_chatgpt_api#78",
                403,
                {"error": {"message": quota, "type": "v_api_error"}},
            ),
            ("elizaOS/auto.fun#321", 403, {"error": "Insufficient token balance."}),
            ("zh", 429, {"error": {"message": "用户余额不足, 剩余 $0"}}),
            ("not active", 429, {"error": {"message": "x", "code": "billing_not_active"}}),
            ("in a 500", 500, {"errorKey": "insufficient_balance", "errorMessage": "No credit"}),
            (
                "in a 200",
                200,
                {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
            ),
        ):
            run = self.check_row(*row, 6)
            self.assertIn("credit", run.json["error"]["hint"])

    def test_content_policy(self) -> None:
        filtered = "The response was filtered by Microsoft's content management policy."
        inner = {"code": "BadRequest", "innererror": {"code": "ResponsibleAIPolicyViolation"}}
        for row in (
            (
                "gpt4free/g4f.dev#81",
                400,
                {"error": {"message": filtered, "code": "content_filter"}},
            ),
            (
                "pollinations/pollinations#12067",
                422,
                {
                    "error": {
                        "message": "Your request was rejected by content moderation.",
                        "code": "content_policy_violation",
                    }
                },
            ),
            ("Azure", 400, {"error": {"code": "contentFilter", "message": "Task failed"}}),
            ("Azure, within", 400, {"error": {"message": "Failed", **inner}}),
            ("zh", 400, {"error": {"message": "提示词包含敏感词", "code": "x"}}),
            ("words", 500, {"detail": "rejected as a result of our safety system"}),
        ):
            self.check_row(*row, 5)
        wrong = {"message": "Bad file", "type": "image_generation_user_error"}
        self.check_row("openai/codex#25966", 400, {"error": wrong}, 1, "Bad file")

    def test_no_channel(self) -> None:
        told = "No available channels for model in group default"
        for row in (
            (
                "a37836323/-chatgpt4.0-api-key#2",
                503,
                {"error": {"message": told, "type": "new_api_error"}},
            ),
            (
                "binary-husky/gpt_academic#1894",
                503,
                {
                    "error": {
                        "message": "当前分组 default 下对于模型 dall-e-3 无可用渠道",
                        "type": "503",
                    }
                },
            ),
            (
                "QuantumNous/new-api#6310",
                503,
                {"error": {"message": "x", "code": "model_not_found"}},
            ),
            (
                "QuantumNous/new-api#6310, 404",
                404,
                {"error": {"message": "x", "code": "model_not_found"}},
            ),
        ):
            self.check_row(*row, 1)

    def test_other_shapes(self) -> None:
        for row in (
            (
                "Nest",
                400,
                {"statusCode": 400, "message": ["size must be <= 2048"], "error": "Bad Request"},
                1,
                "size must be",
            ),
            (
                "DashScope",
                400,
                {"code": "InvalidParameter", "msg": "size 1023 not supported"},
                1,
                "InvalidParameter",
                "1023",
            ),
            (
                "Cloudflare",
                400,
                {"success": False, "errors": [{"code": 7003, "message": "Could not route"}]},
                1,
                "7003",
                "Could not route",
            ),
            (
                "FastAPI",
                422,
                {"detail": [{"loc": ["body", "size"], "msg": "not valid"}]},
                1,
                "not valid",
            ),
            (
                "su-kaka/gcli2api#367",
                404,
                {
                    "error": {
                        "code": 404,
                        "status": "NOT_FOUND",
                        "message": "Requested entity was not found.",
                    }
                },
                1,
                "was not found",
            ),
            ("nothing known", 400, {"foo": {"bar": [1]}}, 1, '"bar"'),
        ):
            self.check_row(*row)

    def test_other_bodies(self) -> None:
        error = Reply(200, b"event: error\ndata: upstream said no\n\n", SSE)
        rows = [(error, 8, "upstream said no"), (page(403, "Attention Required!"), 1, "Attention")]
        for reply, code, words in rows:
            with self.subTest(words):
                run = self.check(self.ask(reply), code)
                self.assertIn(words, run.err)

    def test_try_again_in(self) -> None:
        told = "Rate limit reached: Limit 10000, Used 6701. Please try again in 7.188s."
        for text, wait in (
            (told, "7"),  # abi/screenshot-to-code#76
            ("Please retry after 30 seconds", "30"),
            ("Try again in 250ms.", "0.2"),
            ("Try again in 3 minutes", "180"),
        ):
            with self.subTest(text):
                reply = json_reply({"error": {"message": text}}, 429)
                run = self.check(self.ask(reply, "--retries", "0", "--json"), 6)
                self.assertEqual(run.json["error"]["exit_code"], 6)

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


if __name__ == "__main__":
    unittest.main()
