"""The page on 127.0.0.1: what is served, to whom, and what becomes of errors.

Whoever may open a page in the user's browser could send requests here, too. So a request must name
this host (a foreign name that resolves to 127.0.0.1 does not), what changes something must come
from our own page, and nothing is shared with other origins.
"""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from browser import features
from browser.features import FeatureLibrary
from browser.notes import NoteBook

HOST = "127.0.0.1"
"""The only address that is listened to."""
STANDARD_PORT = 80
MAX_BODY_BYTES = 4 * 2**20
STATIC = Path(__file__).parent / "static"
BASE_STYLE = Path(__file__).parents[1] / "rendering" / "web" / "base.css"
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
SAFE_METHODS = ("GET", "HEAD")
OWN_SITES = ("same-origin", "none")
"""What a browser says of requests by our own page, and by the address bar."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@runtime_checkable
class Tab(Protocol):
    """A part of the page that answers requests of its own."""

    def routes(self) -> list[Route]:
        """All of them below ``/api/<name>/``."""
        ...


def create_app(
    library: FeatureLibrary | None,
    explorer: Tab | None,
    notes: NoteBook | None,
    about: Mapping[str, Any] | None = None,
) -> Starlette:
    """Put the page and its tabs together.

    Args:
        library: What the tab of features shows; no such tab when None.
        explorer: What the tab of landscapes shows; no such tab when None.
        notes: Names of the library's features; needed with a library.
        about: More of the session in plain values: ``policies`` (``name``, ``path``, ``kind`` of
            each) and ``data``.

    Raises:
        ValueError: If there is nothing to show, or a library comes without notes.
    """
    if library is None and explorer is None:
        raise ValueError("neither features nor landscapes: there is nothing to show")
    session = {
        "policies": [],
        "data": None,
        **(about or {}),
        "features": library is not None,
        "explorer": explorer is not None,
    }

    async def index(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def style(request: Request) -> Response:
        return FileResponse(BASE_STYLE)

    async def describe(request: Request) -> Response:
        return JSONResponse(session)

    routes: list[BaseRoute] = [
        Route("/", index),
        Route("/static/base.css", style),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/api/session", describe),
    ]
    if library is not None:
        if notes is None:
            raise ValueError("features without notes: give the note book that keeps their names")
        routes += features.routes(library, notes)
    if explorer is not None:
        routes += explorer.routes()
    return Starlette(
        routes=routes,
        middleware=[Middleware(OnlyOwnPage)],
        exception_handlers={
            ValueError: _refused,
            HTTPException: _http_error,
            Exception: _failed,
        },
    )


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


async def _failed(request: Request, error: Exception) -> Response:
    # What went wrong stands in the terminal; it may hold paths, which are not for the page.
    return JSONResponse(
        {"error": "the server failed; its terminal says why"}, status_code=500, headers=HEADERS
    )


class OnlyOwnPage:
    """Refuses requests that our own page does not send, and says to the browser what is allowed.

    Args:
        app: What answers the others.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            # No tab talks over WebSockets, and browsers let every page open them.
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                found = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                if not any(name == b"cache-control" for name, _ in message["headers"]):
                    found.append((b"cache-control", b"no-cache"))
                message["headers"] = [*message["headers"], *found]
            await send(message)

        refused = self._refusal(scope)
        if refused is not None:
            status, reason = refused
            answer = JSONResponse({"error": reason}, status_code=status)
            await answer(scope, receive, send_with_headers)
            return
        try:
            await self.app(scope, _bounded(receive), send_with_headers)
        except asyncio.CancelledError:
            # The server stops while an answer is computed.
            answer = JSONResponse({"error": "the server stops"}, status_code=503)
            await answer(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason; None for what may pass."""
        headers = Request(scope).headers
        host = headers.get("host", "")
        port = scope["server"][1]
        # Browsers leave the standard port out.
        end = "" if port == STANDARD_PORT else f":{port}"
        if host not in (f"{HOST}{end}", f"localhost{end}"):
            return 403, f"host {host!r} is not this server; open http://{HOST}:{port}/"
        is_api = scope["path"].startswith("/api/")
        if is_api and headers.get("sec-fetch-site", "none") not in OWN_SITES:
            return 403, "only the server's own page may ask this"
        if scope["method"] in SAFE_METHODS:
            return None
        if headers.get("origin") != f"http://{host}":
            return 403, f"origin {headers.get('origin')!r} is not the server's own page"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return 415, f"content type {kind!r}: send application/json"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return 413, f"a body of {length} bytes; send at most {MAX_BODY_BYTES}"
        return None


def _bounded(receive: Receive) -> Receive:
    """Stop reading a body that is longer than it may be, or than it said."""
    n_bytes = 0

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal n_bytes
        message = await receive()
        n_bytes += len(message.get("body", b""))
        if n_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, f"send at most {MAX_BODY_BYTES} bytes")
        return message

    return bounded


def bind(port: int = 0) -> socket.socket:
    """Take a port of 127.0.0.1; any free one when 0.

    Raises:
        ValueError: If it is taken, or not allowed.
    """
    # With the protocol named, asyncio sends answers at once; without, each waits 40 ms for an ACK.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        # Only now it is ours alone; connections that come before they are accepted wait.
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise ValueError(
            f"--port {port}: cannot be used ({error}); give another one, or 0 for any"
        ) from error
    return listening


def address(listening: socket.socket) -> str:
    """What to open in a browser."""
    return f"http://{HOST}:{listening.getsockname()[1]}/"


def serve(app: Starlette, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    # The server stops in good order at the first one, and then raises it once more.
    with suppress(KeyboardInterrupt):
        _server(app).run(sockets=[listening])


@contextmanager
def serving(app: Starlette, port: int = 0) -> Iterator[str]:
    """Answer requests from a thread, e.g. in a notebook, and give the address.

    Args:
        app: What answers.
        port: Any free one when 0.
    """
    listening = bind(port)
    server = _server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield address(listening)
    finally:
        # A page that is still open may keep its connections; nobody waits for answers here.
        server.should_exit = server.force_exit = True
        thread.join()
        listening.close()


def _server(app: Starlette) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            # Nothing starts or ends with the page; a task for it would only be cut off.
            lifespan="off",
            server_header=False,
            # What is still streaming to a page must not hold Ctrl-C up.
            timeout_graceful_shutdown=1,
        )
    )
