"""Who gets in, and with how much."""

from __future__ import annotations

import base64
import json
import logging
import socket
import time
import zlib
from io import BytesIO

import httpx
import pytest

from tests.runtime.serve.conftest import SECONDS, make_service, picture, serving

PROMPT = "a red circle"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
KEYS = ("sk-first", "sk-\u00e4nd")


@pytest.fixture(scope="module")
def guarded():
    service = make_service(limits={"max_body_bytes": 1 << 20, "body_seconds": 1.0})
    access = {"keys": KEYS, "origins": ("https://pictures.example.com",), "hosts": ("127.0.0.1", "localhost")}
    with serving(service, **access) as server:
        yield server


def ask(server, path="/v1/models", **headers):
    return httpx.get(server.url + path, headers=headers)


@pytest.mark.parametrize(
    "authorization",
    [
        b"Bearer sk-first",
        b"bearer sk-first",
        "Bearer sk-\u00e4nd".encode(),
        b"Basic " + base64.b64encode(b"me:sk-first"),
    ],
)
def test_a_key_lets_in(guarded, authorization):
    answer = httpx.get(f"{guarded.url}/v1/models", headers={b"Authorization": authorization})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer sk-firs",
        "Bearer sk-first2",
        "sk-first",
        "Basic x",
        "Basic !!",
        "Digest sk-first",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/sdapi/v1/options", "/metrics", "/openapi.json", GENERATIONS])
def test_no_key_does_not(guarded, authorization, path):
    answer = ask(guarded, path, Authorization=authorization)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/", "/health", "/health/live", "/health/ready"])
def test_what_needs_no_key(guarded, path):
    assert ask(guarded, path).status_code == 200


def test_pages_of_others_may_not_ask(guarded):
    key = {"Authorization": "Bearer sk-first"}
    assert ask(guarded, Origin="https://evil.example.com", **key).status_code == 403
    assert ask(guarded, Origin="null", **key).status_code == 403
    assert ask(guarded, Origin=guarded.url, **key).status_code == 200, "its own page"
    allowed = ask(guarded, Origin="https://pictures.example.com", **key)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://pictures.example.com"
    asked = {"Origin": "https://pictures.example.com", "Access-Control-Request-Method": "POST"}
    assert httpx.options(guarded.url + GENERATIONS, headers=asked).status_code == 200
    asked["Origin"] = "https://evil.example.com"
    assert httpx.options(guarded.url + GENERATIONS, headers=asked).status_code == 403


def test_other_names_are_not_its_own(guarded):
    key = {"Authorization": "Bearer sk-first"}
    assert ask(guarded, Host=f"localhost:{guarded.port}", **key).status_code == 200
    assert ask(guarded, Host=f"evil.example.com:{guarded.port}", **key).status_code == 403, "DNS that was rebound"


def test_bodies_are_bounded(guarded):
    headers = {"Authorization": "Bearer sk-first"}
    big = json.dumps({"prompt": PROMPT, "user": "x" * (1 << 20)})
    told = httpx.post(guarded.url + GENERATIONS, content=big, headers=headers)
    assert told.status_code == 413

    def chunks():
        for _ in range(80):
            yield b" " * (1 << 15)

    try:
        streamed = httpx.post(guarded.url + GENERATIONS, content=chunks(), headers=headers).status_code
    except httpx.WriteError:  # It had answered, and hung up on the rest.
        streamed = 413
    assert streamed == 413


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_a_body_that_never_ends_is_given_up(guarded, path):
    kind, begun = ("application/json", "{") if path == GENERATIONS else ("multipart/form-data; boundary=x", "--x")
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer sk-first\r\nContent-Type: {kind}\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port), SECONDS) as client:
        client.sendall(f"{head}Content-Length: 1000\r\n\r\n{begun}".encode())
        started = time.monotonic()
        assert client.recv(1000).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - started < 10


def bomb(side: int) -> bytes:
    """A PNG of few bytes that says it has very many pixels."""
    rows = zlib.compress(b"\0" * (side // 8 + 1) * 64)
    header = side.to_bytes(4, "big") * 2 + b"\x01\0\0\0\0"
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks
    )


@pytest.mark.parametrize("field", ["image", "mask"])
def test_decompression_bombs_are_refused(server, field):
    good = BytesIO()
    picture().save(good, "PNG")
    files = {"image": good.getvalue(), field: bomb(100_000)}
    answer = httpx.post(
        server.url + EDITS, data={"prompt": PROMPT}, files={name: (name, data) for name, data in files.items()}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field, answer.text


def test_names_of_files_are_not_read(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = BytesIO()
    picture().save(good, "PNG")
    for name in ("../../etc/passwd", "/etc/passwd", "a\0b", "x" * 5000):
        answer = httpx.post(
            server.url + EDITS,
            data={"prompt": PROMPT, "num_inference_steps": "1"},
            files={"image": (name, good.getvalue())},
        )
        assert answer.status_code in ((200,) if "passwd" in name else (200, 400)), answer.text
        assert "passwd" not in answer.text
    assert not list(tmp_path.iterdir())


def test_forms_are_bounded(server):
    many = [("image[]", (f"{n}", b"x")) for n in range(80)]
    assert httpx.post(server.url + EDITS, data={"prompt": PROMPT}, files=many).status_code == 400
    fields = {f"f{n}": "x" for n in range(300)}
    assert httpx.post(server.url + EDITS, data=fields, files={"image": b"x"}).status_code == 400
    broken = {"Content-Type": "multipart/form-data"}
    assert httpx.post(server.url + EDITS, content=b"x", headers=broken).status_code == 400


def test_requests_are_logged_as_json(caplog):
    with caplog.at_level(logging.INFO, "zimgkit.serve.access"), serving(make_service()) as server:
        server.process.config.app.log = True
        answer = httpx.post(
            server.url + GENERATIONS,
            json={"prompt": PROMPT, "num_inference_steps": 1},
            headers={"X-Request-Id": "abc-1"},
        )
        odd = httpx.get(f"{server.url}/v1/models", headers={"X-Request-Id": "a b\u00e4".encode()})
    assert answer.headers["x-request-id"] == "abc-1"
    assert odd.headers["x-request-id"].startswith("req_")
    entry = json.loads(next(r.message for r in caplog.records if "generations" in r.message))
    assert (entry["request_id"], entry["status"], entry["model"], entry["size"]) == (
        "abc-1",
        200,
        "zimg-tiny-z",
        "128x128",
    )
    assert PROMPT not in json.dumps(entry)


def test_metrics_have_the_names_that_dashboards_know(server):
    httpx.post(server.url + GENERATIONS, json={"prompt": PROMPT, "num_inference_steps": 2})
    text = httpx.get(f"{server.url}/metrics").text
    for name in (
        'zimg:num_requests_running{model_name="zimg-tiny-z"}',
        "zimg:num_requests_waiting ",
        'zimg:e2e_request_latency_seconds_bucket{le="0.05",model_name="zimg-tiny-z"}',
        'zimg:request_queue_time_seconds_count{model_name="zimg-tiny-z"}',
        'zimg:step_time_seconds_sum{model_name="zimg-tiny-z"}',
        'zimg:request_success_total{finished_reason="succeeded",model_name="zimg-tiny-z"}',
        "zimg:image_cache_hits_total ",
        "process_resident_memory_bytes ",
    ):
        assert name in text, name
