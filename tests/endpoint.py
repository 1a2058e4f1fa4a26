"""A local server that speaks the OpenAI chat protocol, and misbehaves on demand."""

import contextlib
import http.server
import json
import socket
import threading
import time
from typing import NamedTuple


class Raw(NamedTuple):
    """A whole answer of the server, whatever it is."""

    status: int = 200
    body: bytes = b""
    kind: str = "application/json"
    headers: tuple = ()


class Stall(NamedTuple):
    """No answer for some seconds; with `trickle`, a byte now and then."""

    seconds: float
    trickle: bool = False


DROP = object()  # the connection is closed without a word


class Endpoint:
    """`reply(body, number) -> str | Raw | Stall | DROP`; a string is the model's text.

    Attributes:
      calls: bodies of the requests, in order of arrival; `keys`: what they authorised with.
      most: the most requests that were under way at a time.
    """

    def __init__(self, reply):
        self.reply, self.calls, self.keys, self.most = reply, [], [], 0
        self._now, self._lock, self._over = 0, threading.Lock(), threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer._handle(self)

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):  # a client that has gone
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.calls)
            self.calls.append(body)
            self.keys.append(handler.headers.get("Authorization"))
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            found = self.reply(body, number)
            if found is DROP:
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)
            elif isinstance(found, Stall):
                self._stall(handler, found)
            else:
                self._send(handler, found if isinstance(found, Raw) else completion(found))
        finally:
            with self._lock:
                self._now -= 1

    def _stall(self, handler, stall):
        end = time.monotonic() + stall.seconds
        if stall.trickle:
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", "1000000")
            handler.end_headers()
        while time.monotonic() < end and not self._over.wait(0.05):
            if stall.trickle:
                handler.wfile.write(b" ")
        handler.close_connection = True

    def _send(self, handler, raw):
        handler.send_response(raw.status)
        handler.send_header("Content-Type", raw.kind)
        handler.send_header("Content-Length", str(len(raw.body)))
        for name, value in raw.headers:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw.body)


def completion(text, finish="stop", usage=(11, 3)) -> Raw:
    """A chat completion as servers send it."""
    message = {"role": "assistant", "content": text}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    if usage:
        body["usage"] = {
            "prompt_tokens": usage[0],
            "completion_tokens": usage[1],
            "total_tokens": sum(usage),
        }
    return Raw(body=json.dumps(body).encode())


def asked(body) -> str:
    """All the text of a request."""
    texts = []
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(texts)


@contextlib.contextmanager
def serving(reply):
    """An endpoint with this behaviour, closed at the end."""
    endpoint = Endpoint(reply)
    try:
        yield endpoint
    finally:
        endpoint.close()
