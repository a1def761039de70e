"""Products with quantized weights, found once when a graph is opened.

Where the input is quantized too, they are multiplied in 8 bits. A weight that alone has 8 bits is read as it is for a
few rows, and else widened without its scales, which multiply what comes out: ``benchmarks/weight_only.py`` compares
the ways. A weight of 4 bits is widened in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zimgkit.engines.cpu import VNNI, cpu_flags
from zimgkit.engines.torch import layers
from zimgkit.engines.torch.graph import Program, Step, schedule

FEWEST_ROWS = 17
"""Of an int8 product on CUDA."""
FEW_ROWS = 8
"""Up to so many a CPU takes less time to read an int8 weight as it is than to widen it."""
FLOAT8 = torch.float8_e4m3fn
LINEAR = {"MatMul": {}, "Gemm": {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}}
"""Operator -> the attributes with which it is a linear."""


def multiplied_types(device: torch.device) -> dict[torch.dtype, int]:
    """Element types that a device multiplies faster than bfloat16, and what both sides of a weight are multiples of.

    On CUDA untested; a CPU has a product of float8 too, which takes three times as long as widening its weight.
    """
    if device.type == "cpu":
        return {} if cpu_flags().isdisjoint(VNNI) else {torch.int8: 1}
    if device.type != "cuda":
        return {}
    capability = torch.cuda.get_device_capability(device)
    return {
        dtype: side for dtype, side, least in ((torch.int8, 8, (7, 5)), (FLOAT8, 16, (8, 9))) if capability >= least
    }


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """A product of integers, summed in 32 bits.

    Args:
        x: (..., in) int8.
        weight: (out, in) int8.
        scale: (out,) float32, of input and weight together.
        bias: (out,).
        dtype: of the result.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if x.device.type == "cuda" and count < FEWEST_ROWS:
        rows = F.pad(rows, (0, 0, 0, FEWEST_ROWS - count))
    return _scaled(torch._int_mm(rows, weight.t())[:count].float(), x, scale, bias, dtype)


def float8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> Tensor:
    """Likewise of float8, summed in float32."""
    one = torch.ones((), device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    return _scaled(torch._scaled_mm(rows, weight.t(), one, one, out_dtype=torch.float32), x, scale, bias, dtype)


def weights_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product with a weight that alone has 8 bits.

    Args:
        x: (..., in) bfloat16 or float32: sums that are not scaled yet leave the range of float16.
        weight: (out, in) int8 or float8.
        scale: (out,), of the type of ``x``.
        bias: (out,), likewise.
    """
    rows = x.reshape(-1, x.shape[-1])
    if _is_read_as_it_is(rows, weight):
        y = torch._weight_int8pack_mm(rows, weight, scale)
    else:
        y = layers.matmul(rows, weight.to(x.dtype).t()) * scale
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], -1)


def _is_read_as_it_is(rows: Tensor, weight: Tensor) -> bool:
    on_cpu = rows.device.type == "cpu" and layers.PRODUCTS_IN_BFLOAT16
    return on_cpu and rows.dtype == torch.bfloat16 and weight.dtype == torch.int8 and len(rows) <= FEW_ROWS


def _scaled(sums: Tensor, x: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = sums * scale
    y = y if bias is None else y + bias
    return y.to(dtype).reshape(*x.shape[:-1], -1)


LINEARS: dict[torch.dtype, Callable[..., Tensor]] = {torch.int8: int8_linear, FLOAT8: float8_linear}
WIDE = (torch.bfloat16, torch.float32)
"""What a weight that alone has 8 bits is multiplied in."""


def multiply_in_8_bits(program: Program, types: Mapping[torch.dtype, int]) -> Program:
    """Multiply in 8 bits where a product's input and weight are both dequantized, the weight by a scale for each row.

    Where the weight alone is dequantized so, its scales multiply what comes out.

    Args:
        program: as it was compiled.
        types: as :func:`multiplied_types` gives them.
    """
    matcher = _Matcher(program, types)
    steps = [
        (matcher.rounded(step) or matcher.weights_alone(step) or step) if step.operator in LINEAR else step
        for step in program.steps
    ]
    constants = [slot for slot, value in enumerate(matcher.values) if value is not None]
    steps = schedule(steps, {*program.outputs.values()}, constants)
    return program._replace(slots=matcher.values, steps=steps)


class _Matcher:
    def __init__(self, program: Program, types: Mapping[torch.dtype, int]) -> None:
        self._makers = {slot: step for step in program.steps for slot in step.outputs}
        self._types = types
        self.values = [*program.slots]

    def rounded(self, step: Step) -> Step | None:
        """The step that multiplies in 8 bits; None where it is no such product."""
        widened, rounded = self._weight(step), self._maker(step.inputs[0], "DequantizeLinear")
        quantized = self._maker(rounded.inputs[0], "QuantizeLinear") if rounded else None
        if not (widened and rounded and quantized and all(map(self._is_plain, (rounded, quantized)))):
            return None
        weight, scale = self.values[widened.inputs[0]], self._constant(widened.inputs[1])
        unit, zero = self._constant(rounded.inputs[1]), self._constant((*quantized.inputs, 0, 0)[2])
        if weight is None or scale is None or unit is None or zero is None or zero.dtype != weight.dtype:
            return None
        multiple = self._types.get(weight.dtype)
        if not (multiple and unit.numel() == 1) or any(side % multiple for side in weight.shape):
            return None
        self.values.append(scale.float() * unit.float().reshape(()))
        inputs = (rounded.inputs[0], widened.inputs[0], len(self.values) - 1, *step.inputs[2:])
        return step._replace(call=partial(LINEARS[weight.dtype], dtype=scale.dtype), inputs=inputs)

    def weights_alone(self, step: Step) -> Step | None:
        """The step that multiplies by a weight of 8 bits; None where it is no such product."""
        widened = self._weight(step)
        scale = self._constant(widened.inputs[1]) if widened else None
        if widened is None or scale is None or scale.dtype not in WIDE:
            return None
        return step._replace(call=weights_linear, inputs=(step.inputs[0], *widened.inputs[:2], *step.inputs[2:]))

    def _weight(self, step: Step) -> Step | None:
        """What dequantizes the weight of a product, by a scale for each of the rows that it is multiplied by."""
        if step.operator == "MatMul":
            transpose = self._maker(step.inputs[1], "Transpose")
            widened = self._maker(transpose.inputs[0], "DequantizeLinear") if transpose else None
        else:
            is_linear = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0, **_attributes(step)} == LINEAR["Gemm"]
            widened = self._maker(step.inputs[1], "DequantizeLinear") if is_linear else None
        if widened is None:
            return None
        weight, scale = self.values[widened.inputs[0]], self._constant(widened.inputs[1])
        if weight is None or scale is None or weight.dtype not in LINEARS:
            return None
        one_for_each_row = scale.shape == weight.shape[:1] and _attributes(widened).get("axis", 1) == 0
        return widened if one_for_each_row and self._is_plain(widened) else None

    def _maker(self, slot: int, operator: str) -> Step | None:
        step = self._makers.get(slot)
        return step if step is not None and step.operator == operator else None

    def _constant(self, slot: int) -> Tensor | None:
        """A constant, or one that is cast."""
        cast = self._maker(slot, "Cast")
        if cast is None:
            return self.values[slot]
        value = self.values[cast.inputs[0]]
        return None if value is None else cast.call(value)

    def _is_plain(self, step: Step) -> bool:
        """Whether there are no blocks, and no zero points but zeros."""
        options = _attributes(step)
        if options.get("block_size"):
            return False
        zero = self._constant(step.inputs[2]) if len(step.inputs) > 2 and step.inputs[2] else None
        return zero is None or not bool(zero.float().any())


def _attributes(step: Step) -> Mapping[str, Any]:
    return step.call.keywords if isinstance(step.call, partial) else {}
