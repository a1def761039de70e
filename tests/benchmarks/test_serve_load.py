"""The benchmark of the server: its clients tell right from wrong, and a short run holds its bounds."""

from __future__ import annotations

import argparse
import asyncio
import json

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

import serve_load

from tests.runtime.serve.conftest import make_service, serving


def test_a_short_run():
    options = argparse.Namespace(steps=2, clients=[1, 4], seconds=2.0, turn_seconds=0.5, repeats=1)
    result = serve_load.measure(options)
    assert result["wrong"] == {}
    assert {level["clients"] for level in result["levels"]} == {1, 4}
    assert all(found[0] > 0 for found in result["pictures_a_second"].values())
    assert serve_load.report(json.loads(json.dumps(result))) in (0, 1)


def test_a_picture_of_another_seed_is_found():
    loop = serve_load.Loop(2)
    with serving(make_service()) as server:
        good = serve_load.Crowd(server.url, loop.expected, 2)
        asyncio.run(good.run(4, 1.5))
        assert dict(good.wrong) == {}
        bad = serve_load.Crowd(server.url, loop.expected[1:] + loop.expected[:1], 2)
        asyncio.run(bad.run(2, 1.0))
        assert bad.wrong["another picture"] > 0


def test_what_is_wrong_ends_with_1(capsys):
    pairs = {"loop": [2.0], "server, 1 client": [2.0], "server, 8 clients": [2.0]}
    result = {"pictures_a_second": pairs, "levels": [], "clients": {}, "wrong": {}, "memory_growth": 0.0}
    assert serve_load.report(result) == 0
    assert serve_load.report(result | {"wrong": {"another picture": 1}}) == 1
    assert serve_load.report(result | {"memory_growth": 0.2}) == 1
    assert serve_load.report(result | {"pictures_a_second": pairs | {"server, 8 clients": [1.8]}}) == 1
    assert "WRONG   another picture: 1" in capsys.readouterr().out
