"""The scripted server: it misbehaves as told, and a test that strays from its script fails."""

from __future__ import annotations

import socket
import threading
import unittest

from tests.server import (
    Api,
    Reply,
    Script,
    answer,
    event_stream,
    in_pieces,
    parse_multipart,
    ranged,
    refusal,
)

POST = b"POST /v1/images/generations HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"


def ask(api: Api, request: bytes = POST) -> bytes:
    """Send bytes, and return all that comes back; b"reset" where the connection is reset."""
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        connection.sendall(request)
        with connection.makefile("rb") as reader:
            try:
                return reader.read()
            except ConnectionResetError:
                return b"reset"


class ServerCase(unittest.TestCase):
    """A case that starts servers and ends them."""

    def serve(self, *replies: Script) -> Api:
        """Start a server whose script is checked by the test itself."""
        api = Api(*replies)
        self.addCleanup(api.close)
        return api


class TestScript(ServerCase):
    """What was scripted must be asked for, and nothing else."""

    def test_replies_come_in_order_and_requests_are_kept(self) -> None:
        api = self.serve(Reply(body=b"one"), lambda request: Reply(body=request.body * 2))
        self.assertEqual([ask(api)[-3:], ask(api)[-4:]], [b"one", b"{}{}"])
        self.assertEqual([post.json for post in api.posts], [{}, {}])
        self.assertEqual(api.posts[0].headers["content-length"], "2")
        api.check()

    def test_a_post_beyond_the_script_is_a_fault(self) -> None:
        api = self.serve()
        self.assertIn(b" 400 ", ask(api))
        self.assertRaisesRegex(AssertionError, "unscripted POST", api.check)

    def test_so_is_a_reply_that_nobody_asked_for(self) -> None:
        self.assertRaisesRegex(AssertionError, "1 scripted", self.serve(Reply()).check)

    def test_so_are_malformed_requests_and_bytes_after_the_end(self) -> None:
        for request in (
            b"POST / HTTP/3\r\n\r\n",
            b"POST / HTTP/1.1\r\nno colon\r\n\r\n",
            POST + b"x",
        ):
            with self.subTest(request=request):
                api = self.serve()
                api.otherwise = Reply()
                ask(api, request)
                api.close()
                self.assertRaises(AssertionError, api.check)

    def test_a_script_that_fails_is_a_fault(self) -> None:
        def script(request: object) -> Reply:
            raise OSError("the test's own")

        api = self.serve(script)
        self.assertEqual(ask(api), b"")
        self.assertRaisesRegex(AssertionError, "the test's own", api.check)

    def test_files_are_served_until_a_list_is_used_up(self) -> None:
        api = self.serve()
        api.put("/a.png", b"image")
        api.files["/b.png"] = [Reply(500), Reply(body=b"later")]
        get = b"GET %b HTTP/1.1\r\n\r\n"
        self.assertEqual(ask(api, get % b"/a.png?x=1")[-5:], b"image")
        self.assertIn(b" 500 ", ask(api, get % b"/b.png"))
        self.assertEqual(ask(api, get % b"/b.png")[-5:], b"later")
        self.assertIn(b" 404 ", ask(api, get % b"/c.png"))
        api.check()


class TestAnswers(ServerCase):
    """How an answer goes over the line."""

    def test_ways_to_fail(self) -> None:
        rows = [
            (Reply(silent=True), b""),
            (Reply(reset=True), b"reset"),
            (Reply(body=b"0123456789", cut=4), b"0123"),
            (Reply(raw=b"no HTTP at all"), b"no HTTP at all"),
            (Reply(body=b"abc", content_length=9), b"abc"),
            (Reply(body=b"abc", framing="close"), b"\r\n\r\nabc"),
            (Reply(body=b"abc", framing="chunked"), b"3\r\nabc\r\n0\r\n\r\n"),
            (
                in_pieces(Reply(body=b"abc", framing="chunked"), 2),
                b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
            ),
            (event_stream("[DONE]"), b"data: [DONE]\n\n\r\n0\r\n\r\n"),
        ]
        for reply, end in rows:
            with self.subTest(reply=reply):
                came = ask(self.serve(reply))
                self.assertTrue(came.endswith(end) if end else came == b"", came)

    def test_an_answer_waits_for_its_event_and_runs_functions(self) -> None:
        release, called = threading.Event(), threading.Event()
        reply = Reply(chunks=[b"a", called.set, release, b"b"], framing="close")
        api = self.serve(reply)
        came: list[bytes] = []
        client = threading.Thread(target=lambda: came.append(ask(api)))
        client.start()
        self.assertTrue(called.wait(30))
        self.assertEqual(came, [])
        release.set()
        client.join(30)
        self.assertEqual(came[0][-2:], b"ab")

    def test_an_early_answer_does_not_read_the_body(self) -> None:
        head = b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n"
        api = self.serve(refusal(413, None, "Too large.")._replace(early=True))
        self.assertIn(b" 413 ", ask(api, head))
        self.assertEqual(api.posts[0].body, b"")

    def test_ranges(self) -> None:
        api = self.serve()
        api.put("/a", ranged(b"0123456789"))
        whole, rest = b"GET /a HTTP/1.1\r\n\r\n", b"GET /a HTTP/1.1\r\nRange: bytes=7-\r\n\r\n"
        self.assertEqual(ask(api, whole)[-10:], b"0123456789")
        self.assertRegex(ask(api, rest), rb"(?s) 206 .*\r\n\r\n789$")

    def test_a_multipart_body_is_read_to_the_byte(self) -> None:
        head = 'Content-Disposition: form-data; name="mask"; filename="m.png"'
        body = f"--b\r\n{head}\r\nContent-Type: image/png\r\n\r\n\r\n1\r\n\r\n--b--\r\n".encode()
        (part,) = parse_multipart("multipart/form-data; boundary=b", body)
        self.assertEqual((part.name, part.filename, part.body), ("mask", "m.png", b"\r\n1\r\n"))
        for broken in (body[:-1], body[1:], body.replace(b"form-data", b"file")):
            self.assertRaises(
                ValueError, parse_multipart, "multipart/form-data; boundary=b", broken
            )

    def test_an_answer_in_the_shape_of_the_api(self) -> None:
        body = answer(b"x", usage={}).body
        self.assertEqual(body, b'{"created": 1763694000, "data": [{"b64_json": "eA=="}]}')


if __name__ == "__main__":
    unittest.main()
