"""A stub of an OpenAI-compatible endpoint in this process."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class ChatServer:
    """
    What was asked, and what is answered: `answer` gets the text of the last message and returns a text, or a status
    and a body. Each reply is counted as 10 prompt and 2 completion tokens.
    """

    def __init__(self, answer: Callable[[str], str | tuple[int, str]]):
        self.answer, self.requests, self.keys, self.url = answer, [], [], ""


@contextmanager
def chat_server(answer: Callable[[str], str | tuple[int, str]]) -> Iterator[ChatServer]:
    """Serves on a free port of this machine as long as the block runs."""
    state = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append(request)
            state.keys.append(self.headers.get("Authorization"))
            answer = state.answer(request["messages"][-1]["content"])
            status, body = answer if isinstance(answer, tuple) else (200, answer)
            if status == 200:
                usage = {"prompt_tokens": 10, "completion_tokens": 2}
                body = json.dumps({"choices": [{"message": {"content": body}}], "usage": usage})
            self.send_response(status if self.path == "/v1/chat/completions" else 404)
            if status == 429:
                self.send_header("Retry-After", "7")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
