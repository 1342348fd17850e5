"""A local stand-in for the W&B server, which fails in the ways that servers and networks do."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def hanging_server() -> Iterator[str]:
    """Give the address of a server that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextlib.contextmanager
def failing_server(status: int) -> Iterator[str]:
    """Give the address of a server that answers everything with one status code."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = do_PUT = _answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class FailingLater:
    """The address of a server that takes a run, and of what becomes of it."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server = server
        self.hanging = threading.Event()
        self.dead = threading.Event()
        self._ended = threading.Event()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def wait(self) -> None:
        """Answer nothing until the test is over."""
        self._ended.wait(120)

    def die(self) -> None:
        """Close the port, and answer nothing on what is connected."""
        self.dead.set()
        self._server.shutdown()
        self._server.server_close()

    def end(self) -> None:
        """Let go of all who wait."""
        self._ended.set()
        self.die()


@contextlib.contextmanager
def accepting_server() -> Iterator[FailingLater]:
    """Give a server that answers as W&B's does when a run begins."""
    run = {
        "id": "abc",
        "name": "r",
        "displayName": "r",
        "description": "",
        "config": "{}",
        "sweepName": None,
        "historyLineCount": 0,
        "tags": [],
        "project": {"id": "p", "name": "policyscope", "entity": {"id": "e", "name": "me"}},
    }
    user = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
    features = {"serverInfo": {"cliVersionInfo": {}, "features": []}}
    answers = {
        "upsertBucket": {"upsertBucket": {"bucket": run, "inserted": True}},
        "viewer": {"viewer": user, **features},
        "serverInfo": features,
        "createRunFiles": {"createRunFiles": {"runID": "abc", "uploadHeaders": [], "files": []}},
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode("latin1")
            if later.dead.is_set():
                self.close_connection = True
                return
            if later.hanging.is_set():
                later.wait()
                return
            data = next((each for word, each in answers.items() if word in asked), {"model": None})
            if "upsertBucket" in asked:
                run["name"] = json.loads(asked)["variables"]["name"]
            answer = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = _answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    later = FailingLater(server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield later
    finally:
        later.end()
        thread.join()


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
