"""What lies between the products of a block, in one pass: gate, residual, norm, factor, shift, rounding.

It has forms: ``residual = x + gate * branch`` alone, ``y = norm(x) * factor + shift`` alone, or the second of what the
first gives. A form such as ``GateNormModulate_tanh_rms`` is named for its parts:

- ``gate``: a gate as it is. ``tanh``: its hyperbolic tangent, and an RMS norm of the branch.
- ``rms``, ``layer``: an RMS norm or a layer norm; ``shift``: a shift after the factor.
- ``int8``, ``float8``: ``y`` is rounded to 8 bits by a step, halves to even; ``smooth``: after another factor.

``x``, ``branch`` are (batch, tokens, width); ``gate``, ``factor``, ``shift`` can be broadcast to that, from (1, width)
on; ``weight``, ``branch_weight``, ``smooth`` are (width,), ``step`` is a scalar. All have one float type, and so have
the results, but for what is rounded. Kernels compute in float32, and round the residual before they normalize it.
"""

from __future__ import annotations

from typing import NamedTuple

from zimgkit.plugins.definition import Definition

NORMS = {"rms": "RMSNormalization", "layer": "LayerNormalization"}
ROUNDED = {"int8": 3, "float8": 17}
"""Part of a name -> the type in ``onnx.TensorProto.DataType``."""


class Form(NamedTuple):
    """The parts of one form."""

    gate: str = ""
    """``"gate"``, ``"tanh"`` or none."""
    norm: str = ""
    """``"rms"``, ``"layer"`` or none."""
    shift: bool = False
    smooth: bool = False
    rounded: str = ""
    """``"int8"``, ``"float8"`` or none."""

    @property
    def name(self) -> str:
        """Of the operator."""
        parts = (self.gate, self.norm, self.shift and "shift", self.smooth and "smooth", self.rounded)
        return "_".join(["GateNormModulate", *(part for part in parts if part)])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Their names, in the order of the operator."""
        gate = {"": (), "gate": ("branch", "gate"), "tanh": ("branch", "branch_weight", "gate")}[self.gate]
        norm = ("weight", "factor", *(["shift"] if self.shift else [])) if self.norm else ()
        rounded = (*(["smooth"] if self.smooth else []), *(["step"] if self.rounded else []))
        return ("x", *gate, *norm, *rounded)


_NORMED = [
    Form("", norm, shift, smooth, rounded)
    for smooth, rounded in ((True, "int8"), (False, "int8"), (False, "float8"), (False, ""))
    for norm, shift in (("layer", True), ("layer", False), ("rms", False))
]
FORMS = (
    *(form._replace(gate=gate) for gate in ("tanh", "gate") for form in _NORMED),
    Form("tanh"),
    *_NORMED,
    Form("gate"),
)
"""In the order in which they are looked for: a part of one may look like another."""


def definition(form: Form) -> Definition:
    """One form of the operator."""
    lines, value = [], "x"
    attributes = []
    if form.gate:
        share, added, value = "gate", "branch", "residual"
        if form.gate == "tanh":
            attributes.append("branch_epsilon")
            share, added = "share", "normed_branch"
            lines.append("share = Tanh (gate)")
            norm = "RMSNormalization <axis: int = -1, epsilon: float = @branch_epsilon>"
            lines.append(f"normed_branch = {norm} (branch, branch_weight)")
        lines += [f"gated = Mul ({share}, {added})", "residual = Add (x, gated)"]
    if form.norm:
        attributes.append("epsilon")
        norm = f"{NORMS[form.norm]} <axis: int = -1, epsilon: float = @epsilon>"
        lines += [f"normed = {norm} ({value}, weight)", "scaled = Mul (normed, factor)"]
        value = "scaled"
        if form.shift:
            lines.append("shifted = Add (scaled, shift)")
            value = "shifted"
        if form.smooth:
            lines.append(f"smoothed = Mul ({value}, smooth)")
            value = "smoothed"
        last = f"QuantizeLinear <output_dtype: int = {ROUNDED[form.rounded]}> ({value}, step)" if form.rounded else ""
        if last:
            lines.append(f"y = {last}")
        else:
            lines[-1] = lines[-1].replace(f"{value} =", "y =", 1)
    outputs = (*(["residual"] if form.gate else []), *(["y"] if form.norm else []))
    # Rotations and the like are sums of products too, but their terms have heads.
    alike = ("x", "branch", "residual") if form.gate else ()
    return Definition(form.name, tuple(attributes), form.inputs, outputs, tuple(lines), alike=alike)


DEFINITIONS = tuple(map(definition, FORMS))
