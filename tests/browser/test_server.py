"""Who may ask the server for what: real requests over the loopback interface."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from browser.server import MAX_BODY_BYTES, address, bind, create_app, serving


class Toy:
    """A tab that repeats, refuses, fails and takes long."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()

    def routes(self) -> list[Route]:
        async def echo(request: Request) -> Response:
            return JSONResponse({"sent": json.loads(await request.body())})

        async def refuse(request: Request) -> Response:
            raise ValueError("pose nan: give numbers")

        async def fail(request: Request) -> Response:
            raise RuntimeError("secret/path")

        async def wait(request: Request) -> Response:
            self.is_asked.set()
            await asyncio.sleep(60)
            return JSONResponse({})

        return [
            Route("/api/explorer/echo", echo, methods=["POST"]),
            Route("/api/explorer/refuse", refuse),
            Route("/api/explorer/fail", fail),
            Route("/api/explorer/wait", wait),
        ]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(create_app(None, Toy(), None)) as where:
        yield int(where.split(":")[2].strip("/"))


def ask(
    port: int, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    found = {name.lower(): value for name, value in answer.getheaders()}
    content = answer.read()
    connection.close()
    return answer.status, found, content


def own(port: int) -> dict[str, str]:
    return {"Origin": f"http://127.0.0.1:{port}", "Content_Type": "application/json"}


def test_the_page_and_its_files_are_served(port):
    for path, kind in (
        ("/", "text/html"),
        ("/static/app.js", "javascript"),
        ("/static/base.css", "css"),
        ("/static/style.css", "css"),
    ):
        status, headers, content = ask(port, path)
        assert status == 200
        assert kind in headers["content-type"]
        assert content


def test_the_session_says_which_tabs_there_are(port):
    _, _, content = ask(port, "/api/session")
    assert json.loads(content) == {
        "policies": [],
        "data": None,
        "features": False,
        "explorer": True,
    }


def test_it_listens_on_the_loopback_interface_only():
    with bind() as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        assert address(listening).startswith("http://127.0.0.1:")


def test_what_waits_for_an_answer_is_told_when_the_server_stops(caplog):
    toy, answers = Toy(), []
    with serving(create_app(None, toy, None)) as where:
        port = int(where.split(":")[2].strip("/"))
        asking = threading.Thread(target=lambda: answers.append(ask(port, "/api/explorer/wait")))
        asking.start()
        assert toy.is_asked.wait(10)
    asking.join(10)
    ((status, _, content),) = answers
    assert (status, json.loads(content)) == (503, {"error": "the server stops"})
    assert "Traceback" not in caplog.text


def test_a_port_that_is_taken_is_said():
    with bind() as listening:
        taken = listening.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {taken}"):
            bind(taken)
    with pytest.raises(ValueError, match="--port 70000"):
        bind(70000)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "0.0.0.0:{port}"]
)
def test_a_foreign_host_name_is_refused(host, port):
    for path in ("/", "/api/session", "/static/app.js"):
        status, _, content = ask(port, path, Host=host.format(port=port))
        assert status == 403
        assert b"Policyscope" not in content


def test_localhost_is_this_host(port):
    assert ask(port, "/api/session", Host=f"localhost:{port}")[0] == 200


def test_our_own_page_may_write(port):
    status, _, content = ask(port, "/api/explorer/echo", "POST", b"[1]", **own(port))
    assert (status, json.loads(content)) == (200, {"sent": [1]})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Type": None}, 415),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
    ],
)
def test_others_may_not_write(change, expected, port):
    headers = {name: value for name, value in {**own(port), **change}.items() if value}
    assert ask(port, "/api/explorer/echo", "POST", b"[1]", **headers)[0] == expected


def test_other_pages_may_not_make_it_work_either(port):
    status, _, _ = ask(port, "/api/session", Sec_Fetch_Site="cross-site")
    assert status == 403
    # Following a link from elsewhere is allowed; what the page asks then comes from itself.
    assert ask(port, "/", Sec_Fetch_Site="cross-site")[0] == 200


def test_a_large_body_is_refused_however_it_is_sent(port):
    headers = own(port)
    large = b" " * (MAX_BODY_BYTES + 1)
    assert ask(port, "/api/explorer/echo", "POST", large, **headers)[0] == 413
    fits = b" " * (MAX_BODY_BYTES - 1) + b"1"
    assert ask(port, "/api/explorer/echo", "POST", fits, **headers)[0] == 200
    head = "".join(
        f"{name.replace('_', '-')}: {value}\r\n"
        for name, value in {**headers, "Host": f"127.0.0.1:{port}"}.items()
    )
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            f"POST /api/explorer/echo HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        connection.sendall(f"{len(large):x}\r\n".encode() + large + b"\r\n0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_value_error_is_a_text_for_the_page(port):
    status, headers, content = ask(port, "/api/explorer/refuse")
    assert status == 400
    assert json.loads(content) == {"error": "pose nan: give numbers"}
    assert "content-security-policy" in headers


def test_what_fails_says_nothing_of_the_machine(port, capfd):
    status, headers, content = ask(port, "/api/explorer/fail")
    assert status == 500
    assert b"secret" not in content
    assert "content-security-policy" in headers


def test_an_unknown_address_is_json_too(port):
    for path in ("/api/nothing", "/static/../server.py", "/static/%2e%2e/server.py"):
        status, _, content = ask(port, path)
        assert status == 404
        assert "error" in json.loads(content)


def test_every_answer_binds_the_browser_to_this_origin(port):
    for path, status in (("/", 200), ("/api/session", 200), ("/nothing", 404)):
        found, headers, _ = ask(port, path)
        assert found == status
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
        assert "set-cookie" not in headers
    _, headers, _ = ask(port, "/api/session", Origin="http://evil.example")
    assert "access-control-allow-origin" not in headers


def test_a_page_about_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to show"):
        create_app(None, None, None)
