"""The operator in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, library

from zimgkit.plugins.pytorch import dtype_name, queue

BY_NAME = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "float8", torch.uint8: "int4"}
"""Element type of a weight -> its kernel; bytes hold two values of 4 bits, the first in the low half."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SIZES = ((33, 3840, 3072), (130, 256, 48))


@library.custom_op("zimg::round_rows", mutates_args=())
def round_rows(x: Tensor, step: Tensor | None, smooth: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round (..., in) by a step, or by one for each row that takes its largest number to the largest of the type.

    Args:
        x: in any float type.
        step: a scalar, of the type of ``x``; None for one for each row.
        smooth: (in,), what ``x`` is multiplied by first.
        dtype: int8, or float8.

    Returns:
        The numbers, and the step or steps (..., 1), the latter float32.
    """
    found = rounded_by_kernel(x, step, smooth, dtype)
    return rounded_by_calls(x, step, smooth, dtype) if found is None else found


def rounded_by_kernel(
    x: Tensor, step: Tensor | None, smooth: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """By the kernel, where there is one."""
    rows = x.reshape(-1, x.shape[-1])
    shapes = [(smooth, rows.shape[1:]), (step, ())]
    if any(each is not None and (each.dtype != x.dtype or each.shape != shape) for each, shape in shapes):
        return None
    if rows.stride(1) != 1 or (smooth is not None and not smooth.is_contiguous()):
        return None
    rounded = x.new_empty(x.shape, dtype=dtype)
    # What an operator gives is never what it took.
    steps = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if step is None else step.clone()
    queued = queue(
        "quantized_linear",
        f"round_rows.{dtype_name(x.dtype)}",
        x.device,
        x=rows,
        smooth=smooth,
        step=step,
        rounded=rounded,
        steps=steps,
        rows=len(rows),
        width=rows.shape[1],
        x_row=rows.stride(0),
        has_smooth=smooth is not None,
        has_step=step is not None,
        bits=1 if dtype == torch.int8 else 2,
    )
    return (rounded, steps) if queued else None


def rounded_by_calls(
    x: Tensor, step: Tensor | None, smooth: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """By PyTorch's own calls, in float32."""
    values, largest = x.float() if smooth is None else x.float() * smooth.float(), LARGEST[dtype]
    own = (values.abs().amax(-1, keepdim=True) / largest).clamp_min(1e-30)
    steps = own if step is None else step.clone()
    values = values / steps.float()
    if dtype == torch.int8:
        return values.round().clamp(-largest - 1, largest).to(dtype), steps
    return values.clamp(-largest, largest).to(dtype), steps


@round_rows.register_fake
def _(x: Tensor, step: Tensor | None, smooth: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    steps = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if step is None else torch.empty_like(step)
    return x.new_empty(x.shape, dtype=dtype), steps


@library.custom_op("zimg::quantized_linear", mutates_args=())
def quantized_linear(x: Tensor, step: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """A product of integers or of float8, and its scales.

    Args:
        x: (..., in) int8 or float8.
        step: a scalar, of the type of the result; or (..., 1) float32, one for each row.
        weight: (out, in), of the type of ``x``.
        scale: (out,), of the type of the result.
        bias: (out,), likewise.
    """
    y = launched(x, step, weight, scale, bias)
    return composed(x.float() * step.float(), weight, scale, bias) if y is None else y


@library.custom_op("zimg::weights_linear", mutates_args=())
def weights_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """A product with a weight of 8 or 4 bits.

    Args:
        x: (..., in), in any float type.
        weight: (out, in) int8 or float8, or (out, in / 2) uint8 that :func:`pack` made.
        scale: (out, blocks) or (out,), of the type of ``x``.
        bias: (out,), likewise.
    """
    y = launched(x, None, weight, scale, bias)
    return composed(x.float(), weight, scale, bias) if y is None else y


@quantized_linear.register_fake
def _(x: Tensor, step: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)), dtype=scale.dtype)


@weights_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def pack(weight: Tensor) -> Tensor:
    """Integers of 4 bits (out, in) int8, two to a byte: (out, in / 2) uint8."""
    return (weight[:, 0::2] & 15 | weight[:, 1::2] << 4).view(torch.uint8)


def launched(x: Tensor, step: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """By a kernel, where there is one; ``step`` is None where ``x`` is not rounded."""
    rows, blocks, dtype = x.reshape(-1, x.shape[-1]), 1 if scale.ndim == 1 else scale.shape[1], scale.dtype
    out, width = len(weight), rows.shape[1]
    if not (weight.is_contiguous() and scale.is_contiguous() and rows.stride(1) == 1):
        return None
    if scale.shape[0] != out or (bias is not None and (bias.dtype != dtype or bias.shape != (out,))):
        return None
    own_steps = step is not None and step.ndim > 0
    if step is None:
        # A tile of the weight has one scale for each row.
        takes = weight.dtype != torch.float8_e4m3fn and x.dtype == dtype and (blocks == 1 or width // blocks % 64 == 0)
    else:
        takes = x.dtype == weight.dtype and blocks == 1 and rows.is_contiguous() and step.is_contiguous()
        takes = takes and step.dtype == (torch.float32 if own_steps else dtype)
    if not takes:
        return None
    y = x.new_empty((*x.shape[:-1], out), dtype=dtype)
    tensors = {"x": rows, "weight": weight, "scale": scale, "bias": bias, "y": y}
    sizes = {"rows": len(rows), "width": width, "out": out, "has_bias": bias is not None}
    if step is None:
        kernel, sizes = "widened_product", {**sizes, "x_row": rows.stride(0), "block": width // blocks}
    else:
        steps = {"steps": step, "step": None} if own_steps else {"steps": None, "step": step}
        kernel, tensors, sizes = "rounded_product", {**tensors, **steps}, {**sizes, "has_steps": own_steps}
    name = f"{kernel}.{KINDS[weight.dtype]}.{dtype_name(dtype)}"
    return y if queue("quantized_linear", name, x.device, **tensors, **sizes) else None


def composed(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """By PyTorch's own calls, in float32, which ``x`` is in."""
    if weight.dtype == torch.uint8:
        pairs = weight.view(torch.int8)
        weight = torch.stack([(pairs << 4) >> 4, pairs >> 4], dim=-1).flatten(1)
    wide = (weight.float().reshape(*scale.shape, -1) * scale.float()[..., None]).reshape(weight.shape)
    y = x @ wide.T
    return (y if bias is None else y + bias.float()).to(scale.dtype)


def _rounded_call(x: Tensor, step: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    own = bias if bias is not None and bias.ndim == 1 else None
    y: Tensor = quantized_linear(x, step, weight, scale, own)
    # A sum with something else looks like a bias too.
    return y if bias is None or bias is own else y + bias


def _weights_call(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, block_size: int = 0) -> Tensor:
    own = bias if bias is not None and bias.ndim == 1 else None
    y: Tensor = weights_linear(x, weight, scale, own)
    return y if bias is None or bias is own else y + bias


def _round_call(x: Tensor, *inputs: Tensor, kind: str) -> Tensor:
    smooth = inputs[0] if len(inputs) > 1 else None
    y: Tensor = round_rows(x, inputs[-1], smooth, BY_NAME[kind])[0]
    return y


CALLS: dict[str, Callable[..., Any]] = {
    f"QuantizedLinear{kind}{bias}": call
    for kind, call in (("", _rounded_call), ("_weights", _weights_call), ("_blocks", _weights_call))
    for bias in ("", "_bias")
} | {
    f"RoundRows{smooth}_{kind}": partial(_round_call, kind=kind)
    for smooth, kind in (("", "int8"), ("_smooth", "int8"), ("", "float8"))
}
"""Function -> what computes it."""


def trials(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int]] = SIZES
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """What the kernels give, and what PyTorch's own calls give, for some rows, widths and rows of a weight."""
    maker = torch.Generator(device).manual_seed(0)

    def integers(largest: int, *shape: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=maker, device=device, dtype=torch.int8)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=maker, device=device)

    for rows, width, out in sizes:
        bias, scale = random(out).to(dtype), (random(out) / 100).to(dtype)
        step = random(1)[0].to(dtype)
        x, weight = integers(127, rows, width), integers(127, out, width)
        for steps in (step, random(rows, 1)):
            for kind in LARGEST:
                arguments = (weight.to(kind), scale, bias)
                found = launched(x.to(kind), steps, *arguments)
                yield found, composed(x.to(kind).float() * steps.float(), *arguments)
        floats, smooth = random(rows, width).to(dtype), random(width).to(dtype)
        small, scales = pack(integers(7, out, width)), (random(out, width // 128) / 100).to(dtype)
        for arguments in ((weight, scale, bias), (small, scales, bias)):
            yield launched(floats, None, *arguments), composed(floats.float(), *arguments)
        for given in (step / 64, None):
            for kind in LARGEST:
                by_kernel = rounded_by_kernel(floats, given, smooth, kind)
                yield from zip(by_kernel or (None, None), rounded_by_calls(floats, given, smooth, kind), strict=True)
