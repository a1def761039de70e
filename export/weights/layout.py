"""What the files of a bundle are called. The checkpoint's own, linked, keep their paths: ``transformer/…``.

A random suffix tells files apart that follow one another: a new one never takes the name of one that is in use.
"""

from __future__ import annotations

from zimgkit.engines.bundle import POSITIVE


def weights_name(component: str) -> str:
    """The file of a component's weights that are not linked."""
    return f"{component}.safetensors"


def lora_name(component: str, suffix: str = "") -> str:
    """The file of the tensors that LoRAs touch, merged."""
    return f"{component}.lora{suffix}.safetensors"


def positive_name(component: str, suffix: str = "") -> str:
    """The file of the tensors that are others in the branch of the prompt."""
    return f"{component}{POSITIVE}{suffix}.safetensors"


def base_name(component: str, suffix: str = "") -> str:
    """The file of those tensors as the checkpoint has them."""
    return f"{component}.base{suffix}.safetensors"


def graph_name(component: str, compute: str, precision: str, suffix: str = "") -> str:
    """A component's graph: the one that computes in the bundle's own precision, or another one."""
    return f"{component}{'' if compute == precision else f'.{compute}'}{suffix}.onnx"
