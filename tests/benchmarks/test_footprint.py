from __future__ import annotations

from importlib import metadata

import footprint
import numpy as np
import pytest
from safetensors.numpy import load_file


def test_starts():
    found = footprint.starts(1)
    assert set(footprint.BOUNDED) <= set(found)
    assert all(times["seconds"] > 0 and times["peak_bytes"] > 5e6 for times in found.values())
    assert found["numpy and onnxruntime"]["peak_bytes"] > found["python alone"]["peak_bytes"]


def test_generation_counts_the_weights(bundle_of):
    bundle = bundle_of("z-image")
    found = footprint.generation(bundle, 64, 2)
    arrays = [array for file in bundle.rglob("*.safetensors") for array in load_file(file).values()]
    assert all(array.dtype == np.float32 for array in arrays)
    # Linked files hold what no picture needs as well.
    assert 0 < found["weight_bytes"] <= sum(array.nbytes for array in arrays)
    assert found["peak_bytes"] == found["weight_bytes"] + found["beyond_bytes"]
    assert 20e6 < found["beyond_bytes"] < 1e9
    bundle.with_suffix(".png").unlink()


def test_size_of_a_package():
    dist = metadata.distribution("click")
    paths = {dist.locate_file(file).resolve() for file in dist.files}
    assert footprint.size_of(dist) == sum(path.stat().st_size for path in paths if path.exists())


def test_requirements_are_followed():
    found = footprint.requirements(("diffusers", "torch"))
    assert {"diffusers", "torch", "numpy", "pillow", "huggingface-hub", "sympy", "safetensors"} <= set(found)
    assert "pytest" not in found
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_requirements_of_what_is_not_installed():
    assert footprint.requirements(("zimg-no-such-package",)) == {}


@pytest.mark.parametrize(("beyond", "code"), [(100e6, 0), (160e6, 1)])
def test_report(beyond, code, capsys):
    times = {"seconds": 0.1, "peak_bytes": 20e6}
    generation = {"peak_bytes": beyond + 10e6, "weight_bytes": 10e6, "beyond_bytes": beyond}
    results = {
        "start": dict.fromkeys(footprint.BOUNDED, times),
        "generation": {"z-image": {footprint.BOUNDED_SIZE: generation}},
        "install": {"bytes": 200e6, "packages": {"numpy": 70e6, "onnxruntime": 69e6}},
    }
    assert footprint.report(results) == code
    assert "install: 200 MB (numpy 70, onnxruntime 69 …)" in capsys.readouterr().out
