"""Plugins that were compiled ahead of time: what TensorRT's own Python and parser are told, and what they say.

No compiler here takes such plugins, so no plan is made.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.commands import invoke
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import BackendError
from zimgkit.engines.tensorrt import api
from zimgkit.export.cli import main as cli
from zimgkit.export.compilers.tensorrt.graph import read_graph
from zimgkit.export.compilers.tensorrt.plugins import KERNELS, register
from zimgkit.plugins.manifest import FOLDER, PTX, folder_of, read_manifest

ROOT = Path(__file__).parents[4]
CALLED = {"z-image": "QKNormRope", "qwen-image": "JointQKNormRope"}
KINDS = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


def program(*arguments: object) -> tuple[int, str, str]:
    """What the program beside this file prints, and the last line of what went wrong."""
    command = [sys.executable, "-m", "tests.export.compilers.tensorrt.plugin_program", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout, done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", CALLED)
def test_graphs_call_them(bundle_of: Callable[..., Path], family: str, precision: str) -> None:
    bundle = Bundle.open(bundle_of(family, precision), verify=False)
    plain, model = (
        onnx.load_model_from_string(read_graph(bundle, "denoiser", plugins=plugins).model) for plugins in (False, True)
    )
    assert not {function.name for function in model.functions} & {*KERNELS}
    rotations = {}
    for function in plain.functions:
        rotations[function.name] = sum(node.op_type == "RotaryEmbedding" for node in function.node)
    for function in model.functions:
        nodes = [node for node in function.node if node.op_type in KERNELS]
        assert len(nodes) == rotations[function.name]
        assert "RotaryEmbedding" not in {node.op_type for node in function.node}
        for node in nodes:
            assert (node.domain, node.op_type) == ("zimg", CALLED[family])
            attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            assert attributes.pop("epsilon") == pytest.approx(1e-5 if family == "z-image" else 1e-6)
            assert attributes == {"plugin_namespace": b"zimg", "plugin_version": b"1"}
    assert sum(rotations.values()) > 1
    assert [node.name for node in model.graph.node] == [node.name for node in plain.graph.node]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("sizes", "epsilon"), [((2, 33, 7, 3, 128), 1e-6), ((1, 20, 0, 9, 32), 1e-5), ((1, 4096, 0, 30, 128), 1e-5)]
)
def test_what_they_tell_the_compiler(sizes: tuple[int, ...], epsilon: float, dtype: str) -> None:
    batch, tokens, context, heads, width = sizes
    code, out, problem = program("launch", int(context > 0), dtype, epsilon, *sizes)
    assert code == 0, problem
    told: dict[str, Any] = json.loads(out.splitlines()[-1])
    name = ("joint_" if context else "") + "dense_qk_norm_rope"
    kernel = read_manifest("qk_norm_rope").kernels[f"{name}.{KINDS[dtype]}"].compiled[PTX]
    bits = struct.unpack("<i", struct.pack("<f", epsilon))[0]
    assert told == {
        "types": [dtype],
        "shape": [batch, heads, tokens + context, width],
        "symbol": name,
        "text": (folder_of("qk_norm_rope") / FOLDER / kernel.file).read_text(),
        "grid": [tokens + context, batch, -(-heads // 8)],
        "block": [kernel.threads, 1, 1],
        "shared": kernel.shared,
        "integers": [*([context] if context else []), tokens + context, batch, heads, width, bits],
    }


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        ("INT32", 32, "QKNormRope has no kernel for INT32; leave --plugins out"),
        ("HALF", 40, "no kernel for heads of this width; it takes multiples of 16 up to 128"),
        ("HALF", 144, "no kernel for heads of this width; it takes multiples of 16 up to 128"),
    ],
)
def test_what_has_no_kernel(dtype: str, width: int, message: str) -> None:
    code, _, problem = program("launch", 0, dtype, 1e-6, 1, 5, 0, 3, width)
    assert code == 1
    assert message in problem


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("family", CALLED)
def test_the_parser_finds_them(bundle_of: Callable[..., Path], family: str) -> None:
    """Under their namespace and version; then this one, of TensorRT for RTX, refuses their kind."""
    code, out, problem = program("parse", bundle_of(family, "bf16"))
    assert code == 0, problem
    said = json.loads(out.splitlines()[-1])
    assert "imports IPluginV3 plugins registered with an IPluginCreatorV3One creator only" in said
    assert f"{CALLED[family]}); try it without --plugins, which is untested" in said


@pytest.mark.usefixtures("compiler")
def test_a_compiler_without_them(bundle_of: Callable[..., Path]) -> None:
    with pytest.raises(
        BackendError, match=r"^tensorrt_rtx \S+ takes no plugins that were compiled ahead of time; leave"
    ):
        register(api.load())
    result = invoke(cli.main, "compile", bundle_of("z-image", "bf16"), "--plugins", "--component", "denoiser")
    result.assert_refused("takes no plugins that were compiled ahead of time; leave --plugins out", 1)
