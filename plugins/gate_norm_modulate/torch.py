"""The operator in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from zimgkit.plugins.gate_norm_modulate.definition import FORMS, Form
from zimgkit.plugins.pytorch import dtype_name, queue

BY_NAME = {form.name: form for form in FORMS}
ROUNDED = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


@library.custom_op("zimg::gate_norm_modulate", mutates_args=())
def gate_norm_modulate(form: str, inputs: Sequence[Tensor], branch_epsilon: float, epsilon: float) -> list[Tensor]:
    """One form, by its name; see :mod:`zimgkit.plugins.gate_norm_modulate.definition`."""
    arguments = (BY_NAME[form], inputs, branch_epsilon, epsilon)
    results = launched(*arguments)
    return composed(*arguments) if results is None else results


@gate_norm_modulate.register_fake
def _(form: str, inputs: Sequence[Tensor], branch_epsilon: float, epsilon: float) -> list[Tensor]:
    return _empty(BY_NAME[form], inputs[0])


def _call(*inputs: Tensor, form: str, branch_epsilon: float = 0.0, epsilon: float = 0.0) -> list[Tensor]:
    results: list[Tensor] = gate_norm_modulate(form, list(inputs), branch_epsilon, epsilon)
    return results


CALLS: dict[str, Callable[..., Any]] = {name: partial(_call, form=name) for name in BY_NAME}
"""Function -> what computes it."""
SIZES = ((33, 3840), (64, 3072), (5, 48))


def launched(form: Form, inputs: Sequence[Tensor], branch_epsilon: float, epsilon: float) -> list[Tensor] | None:
    """By the kernel, where there is one."""
    x, given = inputs[0], dict[str, Tensor | None](zip(form.inputs, inputs, strict=True))
    if x.ndim != 3 or any(each.dtype != x.dtype for each in inputs):
        return None
    batch, tokens, width = x.shape
    shapes = dict.fromkeys(("branch_weight", "weight", "smooth"), (width,)) | {"branch": x.shape, "step": ()}
    if any(name in shapes and (each is None or each.shape != shapes[name]) for name, each in given.items()):
        return None
    if any(each is not None and each.ndim == 1 and not each.is_contiguous() for each in given.values()):
        return None
    strides = {}
    for name in ("x", "branch", "gate", "factor", "shift"):
        tensor = given.get(name)
        if tensor is not None and tensor.ndim > x.ndim:
            return None
        wide = None if tensor is None else tensor.expand(x.shape)
        if wide is not None and wide.stride(-1) != 1:
            return None
        strides[f"{name}_batch"], strides[f"{name}_token"] = (0, 0) if wide is None else wide.stride()[:2]
    results = _empty(form, x)
    y = results[-1] if form.norm else None
    queued = queue(
        "gate_norm_modulate",
        f"gate_norm_modulate.{dtype_name(x.dtype)}",
        x.device,
        **{name: given.get(name) for name in ("x", "branch", "branch_weight", "gate", "weight", "factor", "shift")},
        smooth=given.get("smooth"),
        step=given.get("step"),
        residual=results[0] if form.gate else None,
        y=None if form.rounded else y,
        rounded=y if form.rounded else None,
        tokens=tokens,
        batch=batch,
        width=width,
        **strides,
        branch_epsilon=branch_epsilon,
        epsilon=epsilon,
        has_branch=bool(form.gate),
        has_branch_norm=form.gate == "tanh",
        has_tanh=form.gate == "tanh",
        has_norm=bool(form.norm),
        has_mean=form.norm == "layer",
        has_shift=form.shift,
        has_smooth=form.smooth,
        bits={"": 0, "int8": 1, "float8": 2}[form.rounded],
    )
    return results if queued else None


def composed(form: Form, inputs: Sequence[Tensor], branch_epsilon: float, epsilon: float) -> list[Tensor]:
    """By PyTorch's own calls, in float32."""
    given = {name: tensor.float() for name, tensor in zip(form.inputs, inputs, strict=True)}
    value, width, results = given["x"], inputs[0].shape[-1:], []
    if form.gate:
        share, branch = given["gate"], given["branch"]
        if form.gate == "tanh":
            share, branch = (
                share.tanh(),
                F.rms_norm(branch, width, given["branch_weight"].expand(width), branch_epsilon),
            )
        # What is added up is rounded as those who read it later find it.
        results.append((value + share * branch).to(inputs[0].dtype))
        value = results[0].float()
    if form.norm == "layer":
        value = F.layer_norm(value, width, given["weight"].expand(width), None, epsilon)
    elif form.norm:
        value = F.rms_norm(value, width, given["weight"].expand(width), epsilon)
    if form.norm:
        value = value * given["factor"]
        value = value + given["shift"] if form.shift else value
        value = value * given["smooth"] if form.smooth else value
        results.append(_rounded(value / given["step"], form) if form.rounded else value.to(inputs[0].dtype))
    return results


def _rounded(values: Tensor, form: Form) -> Tensor:
    if form.rounded == "int8":
        return values.round().clamp(-128, 127).to(torch.int8)
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def _empty(form: Form, x: Tensor) -> list[Tensor]:
    y = [x.new_empty(x.shape, dtype=ROUNDED.get(form.rounded, x.dtype))] if form.norm else []
    return [*([x.new_empty(x.shape)] if form.gate else []), *y]


def trials(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[tuple[int, int]] = SIZES
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """What the kernel gives, and what PyTorch's own calls give, for some tokens and widths."""
    maker = torch.Generator(device).manual_seed(0)
    forms = (
        Form("tanh", "rms"),
        Form("gate", "layer", shift=True),
        Form("tanh", "rms", smooth=True, rounded="int8"),
        Form("", "layer", shift=True, rounded="float8"),
        Form("gate"),
    )
    for form in forms:
        for tokens, width in sizes:
            shapes = dict.fromkeys(("x", "branch"), (2, tokens, width)) | {"gate": (1, 1, width), "step": ()}
            inputs = [
                torch.randn(shapes.get(name, (width,)), generator=maker, device=device).to(dtype)
                for name in form.inputs
            ]
            if form.rounded:
                inputs[-1] = torch.full((), 1 / 16, device=device, dtype=dtype)
            expected = composed(form, inputs, 1e-5, 1e-6)
            found = launched(form, inputs, 1e-5, 1e-6)
            yield from zip([None] * len(expected) if found is None else found, expected, strict=True)
