"""RMS norm of each head of queries or keys, then rotation of adjacent pairs, with heads put before tokens.

``QKNormRope(x, weight, cos, sin)``:

- ``x`` (batch, tokens, heads, width), in any float type; ``weight`` (width,), of the same type;
- ``cos``, ``sin`` (batch, tokens, width / 2) float32;
- result (batch, heads, tokens, width), of the type of ``x``; computed in float32.

``JointQKNormRope(context, context_weight, x, weight, cos, sin)`` puts the tokens of a context, normalized by weights of
their own, before those of ``x``; the tables have rows for all.
"""

from __future__ import annotations

from zimgkit.plugins.definition import Definition

_NORM = "RMSNormalization <axis: int = -1, epsilon: float = @epsilon>"
_ROTATION = (
    "turned = Transpose <perm: ints = [0, 2, 1, 3]> (tokens)",
    "wide = Cast <to: int = 1> (turned)",
    "rotated = RotaryEmbedding <interleaved: int = 1> (wide, cos, sin)",
    "y = CastLike (rotated, x)",
)

DEFINITIONS = (
    Definition(
        "JointQKNormRope",
        ("epsilon",),
        ("context", "context_weight", "x", "weight", "cos", "sin"),
        ("y",),
        (
            f"normed_context = {_NORM} (context, context_weight)",
            f"normed = {_NORM} (x, weight)",
            "tokens = Concat <axis: int = 1> (normed_context, normed)",
            *_ROTATION,
        ),
    ),
    Definition(
        "QKNormRope",
        ("epsilon",),
        ("x", "weight", "cos", "sin"),
        ("y",),
        (f"tokens = {_NORM} (x, weight)", *_ROTATION),
    ),
)
"""What is looked for first comes first."""
