"""Pictures by address: only from where the owner allows, however the address is written."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import httpx
import pytest

from tests.runtime.serve.conftest import make_service, picture, serving
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.serve.errors import ApiError
from zimgkit.runtime.serve.fetching import Fetcher

PREFIX = "https://pictures.example.com/public"


@pytest.mark.parametrize(
    "url",
    [
        f"{PREFIX}/a.png",
        f"{PREFIX}/a/b.png?size=3#x",
        "https://pictures.example.com:443/public/a.png",
        "HTTPS://PICTURES.example.com/public/a.png",
        f"{PREFIX}//a.png",
    ],
)
def test_what_lies_below_a_prefix_is_allowed(url):
    assert Fetcher((PREFIX,)).allows(url)
    assert Fetcher(("http://other.example.com", f"{PREFIX}/")).allows(url)


@pytest.mark.parametrize(
    "url",
    [
        PREFIX,
        "http://pictures.example.com/public/a.png",
        "https://pictures.example.com:444/public/a.png",
        "https://pictures.example.com:0/public/a.png",
        "https://pictures.example.com:x/public/a.png",
        "https://pictures.example.com.evil.org/public/a.png",
        "https://pictures.example.com@evil.org/public/a.png",
        "https://a:b@pictures.example.com/public/a.png",
        "https://evil.org/https://pictures.example.com/public/a.png",
        "https://pictures.example.com/publicity/a.png",
        f"{PREFIX}/../secret/a.png",
        f"{PREFIX}/%2e%2e/secret/a.png",
        f"{PREFIX}/%252e%252e/secret/a.png",
        f"{PREFIX}/..%2fsecret/a.png",
        f"{PREFIX}/..\\secret/a.png",
        f"{PREFIX}/..%5csecret/a.png",
        f"{PREFIX}/a\r\nHost: evil.org",
        f"{PREFIX}/a b.png",
        f"{PREFIX}/\u0430.png",
        "https://pictures.example.com\\@evil.org/public/a.png",
        "https:///public/a.png",
        "https://[::1/public/a.png",
        "file:///public/a.png",
        "ftp://pictures.example.com/public/a.png",
        "",
    ],
)
def test_what_does_not_is_refused(url):
    fetcher = Fetcher((PREFIX,))
    assert not fetcher.allows(url)
    with pytest.raises(ApiError, match="image is an address, and addresses there are not fetched"):
        fetcher.fetch(url, "image")


@pytest.mark.parametrize("prefix", ["pictures.example.com", "file:///srv", "https://", "https://a.com/?x", "/srv", ""])
def test_a_prefix_must_be_an_address(prefix):
    with pytest.raises(UsageError, match="is no address"):
        Fetcher((prefix,))


class Files(BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self):
        data = BytesIO()
        picture(32, 48).save(data, "PNG")
        answers = {
            "/public/a.png": (200, data.getvalue()),
            "/public/redirect": (302, b""),
            "/public/large": (200, b"x" * 300_000),
            "/public/text": (200, b"no picture"),
        }
        status, body = answers.get(self.path, (404, b""))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/secret/a.png")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Be quiet."""


@pytest.fixture(scope="module")
def files():
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


def test_a_server_draws_from_an_address(files):
    fetcher = Fetcher((f"{files}/public/",), most_bytes=200_000)
    with serving(make_service(fetcher=fetcher)) as server:

        def edit(path):
            body = {
                "prompt": "a red circle",
                "image": files + path,
                "num_inference_steps": 1,
                "width": 32,
                "height": 48,
            }
            return httpx.post(f"{server.url}/v1/images/edits", json=body)

        assert edit("/public/a.png").status_code == 200
        for path in ("/public/none", "/public/redirect", "/public/large", "/public/text", "/secret/a.png"):
            answer = edit(path)
            assert answer.status_code == 400, path
            assert answer.json()["error"]["param"] == "image"
            assert files not in answer.text
