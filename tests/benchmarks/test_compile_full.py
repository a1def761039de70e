"""How a network is cut into chunks, and a chunk of tiny blocks through the compiler."""

from __future__ import annotations

import json
import sys

import compile_full as benchmark
import pytest


@pytest.mark.parametrize(("family", "depth"), [("z-image", 30), ("qwen-image", 60)])
@pytest.mark.parametrize("blocks", [1, 7, 15, 16, 30, 100])
def test_every_block_is_in_one_chunk(family, depth, blocks):
    name = {"z-image": "n_layers", "qwen-image": "num_layers"}[family]
    found = benchmark.chunks(family, tiny=False, blocks=blocks)
    assert sum(config[name] for config in found) == depth
    assert all(1 <= config[name] <= blocks for config in found)
    assert len(found) == -(-depth // blocks)
    if family == "z-image":
        assert [config["n_refiner_layers"] for config in found] == [2] + [0] * (len(found) - 1)


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_chunks_follow_the_memory(family, monkeypatch):
    block = {"z-image": 0.361e9, "qwen-image": 0.453e9}[family]  # Without Qwen-Image's modulation.
    counts = []
    for memory in (2e9, 8e9, 24e9, 1e12):
        monkeypatch.setattr(benchmark, "_memory", lambda memory=memory: memory)
        counts.append(len(benchmark.chunks(family, tiny=False, blocks=None)))
        largest = max(
            config.get("n_layers", config.get("num_layers"))
            for config in benchmark.chunks(family, tiny=False, blocks=None)
        )
        assert largest == 1 or largest * block * benchmark.PEAK_PER_WEIGHT < memory
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1


def test_tiny_chunks_compile(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorrt_rtx", reason="no TensorRT compiler here: run make test-tensorrt")
    result = tmp_path / "result.json"
    arguments = ["--tiny", "--blocks", "1", "--family", "z-image", "--size", "256x256", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["compile_full.py", *arguments, "--json", str(result)])
    benchmark.main()
    chunks = json.loads(result.read_text())["results"]["z-image"]["chunks"]
    assert [chunk["blocks"] for chunk in chunks] == [2, 1]
    assert all(chunk["attention"] == [chunk["blocks"], 0] for chunk in chunks)
    assert all(chunk["plan_bytes"] > 1e5 and chunk["peak_bytes"] > chunk["weight_bytes"] for chunk in chunks)
    assert "z-image: 3 blocks" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [result]
