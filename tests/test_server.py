"""The scripted server: it misbehaves as told, and a test that strays from its script fails."""

from __future__ import annotations

import socket
import threading
import unittest

from tests.server import Api, Reply, Script, event_stream, in_pieces, parse_multipart

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

    def test_what_is_a_fault(self) -> None:
        """Too few or too many requests, malformed ones, and a script that fails."""
        self.assertRaisesRegex(AssertionError, "1 scripted", self.serve(Reply()).check)
        for request, script, fault in (
            (POST, None, "unscripted POST"),
            (b"POST / HTTP/3\r\n\r\n", Reply(), "not a request line"),
            (b"POST / HTTP/1.1\r\nno colon\r\n\r\n", Reply(), "not a header"),
            (POST + b"x", Reply(), "after the end"),
            (POST, lambda request: Reply(body=request.fields), "not multipart"),
        ):
            with self.subTest(fault):
                api = self.serve()
                api.otherwise = script
                ask(api, request)
                api.close()
                self.assertRaisesRegex(AssertionError, fault, api.check)

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
        for reply, end in (
            (Reply(silent=True), b""),
            (Reply(reset=True), b"reset"),
            (Reply(body=b"0123456789", cut=4), b"0123"),
            (Reply(raw=b"no HTTP at all"), b"no HTTP at all"),
            (Reply(body=b"abc", content_length=9), b"abc"),
            (Reply(body=b"abc", framing="close"), b"\r\n\r\nabc"),
            (Reply(body=b"abc", framing="chunked"), b"3\r\nabc\r\n0\r\n\r\n"),
            (in_pieces(Reply(body=b"abc", framing="close"), 2), b"\r\n\r\nabc"),
            (event_stream("[DONE]"), b"data: [DONE]\n\n\r\n0\r\n\r\n"),
        ):
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
        api = self.serve(Reply(413, early=True))
        self.assertIn(b" 413 ", ask(api, head))
        self.assertEqual(api.posts[0].body, b"")

    def test_a_multipart_body_is_read_to_the_byte(self) -> None:
        head = 'Content-Disposition: form-data; name="mask"; filename="m.png"'
        body = f"--b\r\n{head}\r\nContent-Type: image/png\r\n\r\n\r\n1\r\n\r\n--b--\r\n".encode()
        (part,) = parse_multipart("multipart/form-data; boundary=b", body)
        self.assertEqual((part.name, part.filename, part.body), ("mask", "m.png", b"\r\n1\r\n"))
        for broken in (body[:-1], body[1:], body.replace(b"form-data", b"file")):
            with self.assertRaises(ValueError):
                parse_multipart("multipart/form-data; boundary=b", broken)
