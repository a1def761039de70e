from __future__ import annotations

import in_place
import pytest

WAYS = {f"{precision}, {way}" for precision in in_place.PRECISIONS for way in ("copies", "in place")}


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_every_way_of_a_tiny_model(family, tmp_path):
    result = in_place.compare(family, tmp_path, {}, size=64, tokens=8, repeats=2)
    assert result["seconds"].keys() == WAYS
    assert all(len(each) == 2 and min(each) > 0 for each in result["seconds"].values())


@pytest.mark.parametrize(("seconds", "broken"), [(0.8, 0), (1.2, 1)])
def test_the_bound(seconds, broken, capsys):
    found = {way: [1.0] for way in WAYS} | {"int8-weights, in place": [seconds]}
    result = {"family": "z-image", "size": 512, "tokens": 96, "seconds": found}
    assert in_place.report(result) == broken
    assert f"{1 / seconds:.2f}" in capsys.readouterr().out
