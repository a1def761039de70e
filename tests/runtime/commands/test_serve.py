"""``zimg-run serve`` as it is typed: what it says, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.commands import invoke
from zimgkit.runtime.commands.cli import main

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
SECONDS = 60


class Process:
    """The command in a process of its own, and what it says."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "zimgkit.runtime", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        self.url = self.wait_for(r"ready: (http://\S+) is the page")

    def _read(self) -> None:
        assert self.process.stderr
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found[1]
            assert self.process.poll() is None, self.lines
            time.sleep(0.02)
        raise AssertionError(self.lines)

    def end(self) -> int:
        """Its exit code."""
        code = self.process.wait(SECONDS)
        self.thread.join(SECONDS)
        return code


@pytest.fixture
def start():
    started = []

    def make(*arguments: str) -> Process:
        started.append(Process(*arguments))
        return started[-1]

    yield make
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.end()


def test_it_draws_and_what_was_begun_outlives_sigterm(start):
    server = start("--bundle", "red=zimg-tiny-z", "--alias", "gpt-image-1=red")
    assert [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["red"]
    body = {"prompt": "a red circle", "model": "gpt-image-1", "num_inference_steps": 150, "seed": 1}
    with ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(httpx.post, f"{server.url}/v1/images/generations", json=body, timeout=SECONDS) for _ in range(2)
        ]
        while "zimg:num_requests_waiting 1.0" not in httpx.get(f"{server.url}/metrics").text:
            time.sleep(0.01)  # One is drawn, and one waits.
        server.process.send_signal(signal.SIGTERM)
        first, second = (answer.result() for answer in answers)
    assert first.status_code == second.status_code == 200
    assert first.json()["data"][0]["b64_json"] == second.json()["data"][0]["b64_json"]
    assert server.end() == 0
    logged = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert [entry["status"] for entry in logged if "generations" in entry["path"]] == [200, 200]
    assert not any("Traceback" in line for line in server.lines)


def test_what_takes_longer_than_the_grace_time_is_cancelled(start):
    server = start("--grace-seconds", "1")
    body = {"prompt": "a red circle", "num_inference_steps": 1000, "width": 256, "height": 256}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/images/generations", json=body, timeout=SECONDS)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(httpx.HTTPError):
            answer.result().raise_for_status()
    assert server.end() == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--host", "0.0.0.0"), "--no-auth"),
        (("--bundle", "nowhere"), "nowhere"),
        (("--bundle", "zimg-tiny-z", "--bundle", "zimg-tiny-z"), "NAME=FOLDER"),
        (("--alias", "a"), "NAME=MODEL"),
        (("--alias", "a=b"), "not served"),
        (("--api-key-file", "nowhere"), "nowhere"),
        (("--host", "256.1.1.1"), "256.1.1.1"),
        (("--allow-url-prefix", "pictures"), "is no address"),
        (("--backend", "openvino", "--device", "toaster"), "toaster"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    result = invoke(main, "serve", "--port", "0", *arguments)
    assert result.code in (1, 2), result
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if "error" in line]
    assert len(lines) == 1, result
    assert told in lines[0]
    assert "internal error" not in result.err


def test_a_key_file_without_a_key(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# none yet\n\n")
    invoke(main, "serve", "--api-key-file", keys).assert_refused("has no key", 2)
    keys.write_bytes(b"\xff\xfe")
    invoke(main, "serve", "--api-key-file", keys).assert_refused("no text", 2)


def test_a_port_that_is_taken(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = invoke(main, "serve", "--port", port)
    assert result.code == 2
    assert f"127.0.0.1:{port} cannot be listened on" in result.err
