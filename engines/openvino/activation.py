"""SiLU in float32 after a norm in float32: one operator with the norm's scale and shift, and one rounding for all."""

from __future__ import annotations

from typing import Any

from zimgkit.engines.openvino.api import load


def activate_before_rounding(model: Any) -> int:
    """Let each SiLU of what was cast to bfloat16 come before that cast.

    OpenVINO joins no operators over a cast, and rounds what it does not join. What a SiLU gives is then nearer to
    float32.

    Args:
        model: an ``openvino.Model``; it is changed.

    Returns:
        How many there were.
    """
    openvino = load()
    opset, found = openvino.opset13, 0
    for sigmoid in model.get_ordered_ops():
        if sigmoid.get_type_name() != "Sigmoid":
            continue
        cast = sigmoid.input(0).get_source_output().get_node()
        if cast.get_type_name() != "Convert" or cast.get_output_element_type(0) != openvino.Type.bf16:
            continue
        products = [reader.get_node() for reader in sigmoid.output(0).get_target_inputs()]
        wide = cast.input(0).get_source_output()
        if wide.get_element_type() != openvino.Type.f32 or [each.get_type_name() for each in products] != ["Multiply"]:
            continue
        factors = {each.get_source_output().get_node().get_friendly_name() for each in products[0].inputs()}
        if factors != {cast.get_friendly_name(), sigmoid.get_friendly_name()}:
            continue
        activated = opset.convert(opset.multiply(wide, opset.sigmoid(wide)), openvino.Type.bf16)
        for reader in products[0].output(0).get_target_inputs():
            reader.replace_source_output(activated.output(0))
        found += 1
    return found
