"""Operators of ``plugins/`` on a GPU: each kernel beside the standard operators that it stands for, and one block.

Times are medians; between two runs the device's cache is filled with something else. What a kernel moves, every tensor
read or written once, is told as a share of what a copy on the same device moves. Without a GPU the values of all
operators are checked against numpy at tiny size, and the rest stays untested.

    python benchmarks/plugins.py --json benchmarks/results/plugins.json
    python benchmarks/plugins.py --device cpu --skip-block
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import onnx_ir as ir
import step_contestants
import torch
from torch import Tensor

from zimgkit.engines.torch import operators as used
from zimgkit.engines.torch.graph import compile_graph, run
from zimgkit.plugins.definition import Definition
from zimgkit.plugins.gate_norm_modulate.reference import gate_norm_modulate, round_to_float8
from zimgkit.plugins.gate_norm_modulate.torch import BY_NAME
from zimgkit.plugins.pytorch import OPERATORS, error, module_of
from zimgkit.plugins.qk_norm_rope.reference import joint_qk_norm_rope, qk_norm_rope
from zimgkit.plugins.quantized_linear.reference import quantized_linear, round_rows, weights_linear

SIZES = ((4224, 3840, 30), (4224, 3072, 24))
"""Tokens, width and heads of a picture of 1024x1024 and its prompt."""
TINY = ((33, 64, 4),)
NAMES = (
    "QKNormRope",
    "JointQKNormRope",
    "GateNormModulate_rms",
    "GateNormModulate_tanh_rms",
    "GateNormModulate_gate_layer_shift",
    "GateNormModulate_gate_layer_shift_smooth_int8",
    "GateNormModulate_tanh_rms_float8",
    "RoundRows_smooth_int8",
    "QuantizedLinear_bias",
    "QuantizedLinear_weights",
    "QuantizedLinear_blocks",
)
TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float", torch.int8: "int8", torch.float8_e4m3fn: "float8e4m3fn"}
EPSILON = {"epsilon": 1e-6, "branch_epsilon": 1e-5, "block_size": 64}
Array = np.ndarray[Any, Any]


class Case(NamedTuple):
    """An operator with its inputs, by name."""

    definition: Definition
    inputs: dict[str, Tensor]

    @property
    def attributes(self) -> dict[str, Any]:
        """Those that it has."""
        return {name: EPSILON[name] for name in self.definition.attributes}


def cases(tokens: int, width: int, heads: int, device: str, dtype: torch.dtype) -> Iterable[Case]:
    """Every operator of the list, on random inputs."""
    maker, each = torch.Generator(device).manual_seed(0), width // heads
    definitions = {definition.name: definition for definition in used.DEFINITIONS}
    for name in NAMES:
        definition, inputs = definitions[name], {}
        for key in definition.inputs:
            inputs[key] = torch.randn(_shape(name, key, tokens, width, heads), generator=maker, device=device).to(dtype)
        if "Rope" in name:
            rows = sum(inputs[key].shape[1] for key in ("x", "context") if key in inputs)
            angles = torch.rand((1, rows, each // 2), generator=maker, device=device) * 6
            inputs |= {"cos": angles.cos(), "sin": angles.sin()}
        if "step" in inputs:
            inputs["step"] = torch.full((), 1 / 32, device=device, dtype=dtype)
        for key in ("x", "weight") if name.startswith("QuantizedLinear") else ():
            if key == "weight" or "step" in inputs:
                largest = 7 if "blocks" in name else 127
                inputs[key] = (inputs[key] * largest / 4).clamp(-largest, largest).to(torch.int8)
        yield Case(definition, inputs)


def _shape(name: str, key: str, tokens: int, width: int, heads: int) -> tuple[int, ...]:
    """Of one input."""
    if "Rope" in name:
        count = tokens // 16 if key == "context" else tokens
        return (width // heads,) if "weight" in key else (1, count, heads, width // heads)
    if name.startswith("QuantizedLinear"):
        scale = (width, width // EPSILON["block_size"]) if "blocks" in name else (width,)
        shapes: dict[str, tuple[int, ...]] = {"x": (1, tokens, width), "weight": (width, width), "scale": scale}
        return () if key == "step" else shapes.get(key, (width,))
    if key in ("x", "branch"):
        return (1, tokens, width)
    return {"gate": (1, width), "factor": (1, width), "shift": (1, width), "step": ()}.get(key, (width,))


def by_kernel(case: Case) -> Callable[[], Any] | None:
    """The operator as PyTorch has it, where a kernel agrees with PyTorch's own calls."""
    x = case.inputs["x"]
    dtype = next(each.dtype for each in case.inputs.values() if each.dtype in (torch.bfloat16, torch.float32))
    call = used.operators(x.device, dtype).get(case.definition.name)
    inputs = [case.inputs[name] for name in case.definition.inputs]
    return None if call is None else lambda: call(*inputs, **case.attributes)


def by_body(case: Case) -> Callable[[], list[Tensor]]:
    """The standard operators that it stands for, one after the other."""
    ends = {name: f"{TYPES[each.dtype]}{_dimensions(each)} {name}" for name, each in case.inputs.items()}
    attributes = ", ".join(f"{name} = {value}" for name, value in case.attributes.items())
    results = ", ".join(case.definition.outputs)
    call = f"{results} = zimg.{case.definition.name} {f'<{attributes}>' if attributes else ''}"
    text = (
        f'<ir_version: 11, opset_import: ["" : 23, "zimg" : 1]>\nbody ({", ".join(ends.values())}) => '
        f"({', '.join(f'float {name}' for name in case.definition.outputs)}) "
        f"{{ {call} ({', '.join(case.definition.inputs)}) }}\n{case.definition.text}"
    )
    program = compile_graph(ir.from_onnx_text(text), lambda tensor: torch.from_numpy(tensor.numpy()), _device(case))
    return lambda: list(run(program, case.inputs).values())


def _device(case: Case) -> torch.device:
    return case.inputs["x"].device


def _dimensions(tensor: Tensor) -> str:
    return f"[{','.join(map(str, tensor.shape))}]"


def by_reference(case: Case) -> list[Array]:
    """In numpy, in float64."""
    name, given = case.definition.name, {key: each.double().numpy() for key, each in case.inputs.items()}
    if "Rope" in name:
        found: Any = (joint_qk_norm_rope if "Joint" in name else qk_norm_rope)(**given, epsilon=EPSILON["epsilon"])
    elif name in BY_NAME:
        return gate_norm_modulate(BY_NAME[name], given, branch_epsilon=EPSILON["branch_epsilon"], epsilon=1e-6)
    elif name == "RoundRows_float8":
        found = round_to_float8(given["x"] / given["step"])
    elif name.startswith("RoundRows"):
        found, _ = round_rows(given["x"], given["step"], given.get("smooth"))
    else:
        found = (quantized_linear if "step" in given else weights_linear)(**given)
    return [found]


def every_call() -> dict[str, Callable[..., Any]]:
    """All operators in PyTorch, whether they have kernels on the device or not."""
    return {name: call for operator in OPERATORS for name, call in module_of(operator).CALLS.items()}


def check_values() -> dict[str, float]:
    """On the CPU, in float32: the largest relative error of each operator, as PyTorch's own calls compute it."""
    found = {}
    calls = every_call()
    for case in cases(*TINY[0], "cpu", torch.float32):
        inputs = [case.inputs[name] for name in case.definition.inputs]
        results = calls[case.definition.name](*inputs, **case.attributes)
        results = results if isinstance(results, list) else [results]
        pairs = zip([*results, *by_body(case)()], 2 * by_reference(case), strict=True)
        found[case.definition.name] = max(error(one, torch.from_numpy(two)) for one, two in pairs)
    return found


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The median of some runs on the current device."""
    other = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        function()
    found = []
    for _ in range(repeats):
        other.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


def copied_bytes(repeats: int) -> float:
    """What a copy reads and writes in a second."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats)


def compare(repeats: int) -> list[dict[str, Any]]:
    """Each kernel beside its body, both as they are run, on the current device."""
    bandwidth, rows = copied_bytes(repeats), []
    for size in SIZES:
        for case in cases(*size, "cuda", torch.bfloat16):
            row: dict[str, Any] = {"operator": case.definition.name, "size": size}
            body = by_body(case)
            row["body_s"] = seconds(body, repeats)
            if (kernel := by_kernel(case)) is None:
                rows.append(row | {"failed": "no kernel, or it does not agree"})
                continue
            results = kernel()
            results = results if isinstance(results, list) else [results]
            moved = sum(each.nbytes for each in (*case.inputs.values(), *results))
            row["error"] = max(error(one, two) for one, two in zip(results, body(), strict=True))
            row["kernel_s"] = seconds(kernel, repeats)
            row["share"] = moved / row["kernel_s"] / bandwidth
            rows.append(row)
    return rows


def block(family: str, device: str, repeats: int, *, tiny: bool) -> dict[str, Any]:
    """A denoiser of one layer with operators and without; on a CPU, which has no kernels, by PyTorch's own calls."""
    size = {"height": 64, "width": 64, "tokens": 20} if tiny else {}
    settings = step_contestants.Settings(family, device=device, tiny=tiny, layers=1, **size)
    found, usual = {}, used.operators
    calls = usual if device == "cuda" else lambda *_: every_call()
    with tempfile.TemporaryDirectory(prefix="zimg-plugins-") as folder:
        settings.save(Path(folder))
        step_contestants.prepare(Path(folder))
        reference = np.load(Path(folder) / "reference.npy")
        for name, kernels in (("without", lambda *_: {}), ("with", calls)):
            used.operators = kernels
            step, times = step_contestants.zimg(Path(folder), settings, "torch"), []
            for _ in range(repeats + 3):
                start = time.perf_counter()
                out = step.run()
                times.append(time.perf_counter() - start)
            errors = step_contestants.error(step.velocity(out), reference)
            found[name] = {"seconds": statistics.median(times[3:]), **errors}
    used.operators = usual
    return found


def main() -> int:
    """The script."""
    parser = common.parser(__doc__, folder=False)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="CUDA_VISIBLE_DEVICES picks the GPU")
    parser.add_argument("--repeats", type=int, default=50, help="runs that count")
    parser.add_argument("--skip-block", action="store_true", help="the operators alone")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no GPU: --device cpu checks the values")
    results: dict[str, Any] = {"values": check_values()}
    bounds = ((name, value, 3e-2 if "8" in name else 1e-5) for name, value in results["values"].items())
    broken = common.broken_bounds(bounds)
    if on_cpu:
        print("No GPU: the kernels, their speed and a block with them are untested.")
    else:
        results |= {"card": torch.cuda.get_device_name(), "operators": compare(options.repeats)}
        header = [results["card"], "size", "body µs", "kernel µs", "times", "of a copy", "rel. L2"]
        print("", common.table(header, map(_cells, results["operators"])), sep="\n")
    for family in () if options.skip_block else common.families(options):
        results[family] = block(family, options.device, options.repeats, tiny=on_cpu)
        rows = [(n, f"{1e3 * r['seconds']:.2f}", f"{r['relative_l2']:.1e}") for n, r in results[family].items()]
        print("", common.table([f"{family}, one layer", "ms", "rel. L2"], rows), sep="\n")
    common.save(options.json, common.machine(), results)
    return broken


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    size, body = "x".join(map(str, row["size"])), f"{1e6 * row['body_s']:.0f}"
    if "failed" in row:
        return (row["operator"], size, body, row["failed"], "-", "-", "-")
    times = f"{row['body_s'] / row['kernel_s']:.2f}"
    kernel, share = f"{1e6 * row['kernel_s']:.0f}", f"{row['share']:.0%}"
    return (row["operator"], size, body, kernel, times, share, f"{row['error']:.1e}")


if __name__ == "__main__":
    common.start(main)
