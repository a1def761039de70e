"""ONNX Runtime tells nobody that it is used, unless it is told to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DRAW = """
import sys
from zimgkit.runtime import Pipeline

with Pipeline.open("zimg-tiny-z") as pipeline:
    pipeline("a", height=16, width=16, num_inference_steps=1)
"""


def folders_of_a_user(home: Path, **variables: str) -> set[str]:
    """What lies in the cache of a new user after a first picture."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
    }
    environment = kept | {"HOME": str(home)} | variables
    subprocess.run([sys.executable, "-c", DRAW], env=environment, check=True, timeout=120)
    return {path.name for path in (home / ".cache").iterdir()}


def test_no_usage_data(tmp_path: Path) -> None:
    assert folders_of_a_user(tmp_path) == {"zimgkit"}


@pytest.mark.parametrize(("wanted", "kept"), [(None, "1"), ("0", "0"), ("1", "1")])
def test_who_wants_it_sets_the_variable(wanted: str | None, kept: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    if wanted is not None:
        variables["ORT_DISABLE_TELEMETRY"] = wanted
    probe = "import os, zimgkit.engines.onnxruntime.engine; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    run = subprocess.run([sys.executable, "-c", probe], env=variables, check=True, timeout=120, capture_output=True)
    assert run.stdout.decode().strip() == kept
