"""Which tensors of a checkpoint a LoRA's module means, whatever its trainer wrote before and between the words.

Names are compared with dots, dashes and underscores taken for the same, so kohya's ``layers_0_attention_to_q`` and the
checkpoint's ``layers.0.attention.to_q`` are one. Prefixes are taken off as long as that helps.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

PREFIXES = (
    "base_model_model_",
    "lora_unet_",
    "lora_transformer_",
    "lora_te_",
    "lora_te1_",
    "lycoris_",
    "transformer_",
    "diffusion_model_",
    "text_encoder_",
    "language_model_",
    "model_",
)
ALIASES = (
    (r"(.*_attention)_qkv", (r"\1_to_q", r"\1_to_k", r"\1_to_v")),
    (r"(.*_attention)_out", (r"\1_to_out_0",)),
    (r"(.*)_to_out", (r"\1_to_out_0",)),
    (r"x_embedder", ("all_x_embedder_2_1",)),
    (r"final_layer_(.*)", (r"all_final_layer_2_1_\1",)),
)
"""Other names of modules: those of Z-Image's original files, where q, k and v are one linear."""

TEXT_ENCODER = "text encoder"
SIGNS = (
    ("qwen-image", r"transformer_blocks_\d+_(attn_|img_m|txt_m)(?!.*attn\d)|txt_norm|txt_in"),
    ("z-image", r"(layers|noise_refiner|context_refiner)_\d+_(attention|feed_forward|adaLN)|cap_embedder|final_layer"),
    (TEXT_ENCODER, r"layers_\d+_(self_attn|mlp)_"),
    ("FLUX", r"double_blocks|single_blocks|single_transformer_blocks"),
    ("Wan", r"blocks_\d+_(cross_attn|self_attn|ffn)"),
    ("Stable Diffusion", r"(down|up|input|output|mid|middle)_blocks?_.*attn|joint_blocks"),
)
"""What some module of a model is called, squashed."""


@dataclass(frozen=True)
class Target:
    """A tensor that a module means, or those of its rows that are this tensor's."""

    component: str
    """The checkpoint's: ``"transformer"`` or ``"text_encoder"``."""
    tensor: str
    """Its canonical name."""
    shape: tuple[int, ...]
    first: int = 0
    """The first row of the module's change that is this tensor's."""


@dataclass(frozen=True)
class Meaning:
    """What a module's name means."""

    targets: tuple[Target, ...]
    is_alias: bool = False
    """Whether the checkpoint calls it otherwise."""


class Names:
    """The modules of a checkpoint, found by any of their names."""

    def __init__(
        self,
        shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
        is_dead: Callable[[str, str], bool] = lambda component, name: False,
    ) -> None:
        """Take the checkpoint's tensors.

        Args:
            shapes: component -> canonical name of a tensor -> its shape.
            is_dead: whether a component's tensor of this canonical name, which is not among them, is one that no
                picture needs.
        """
        self._known = {
            squash(name.removesuffix(".weight")): Target(component, name, shape)
            for component, names in shapes.items()
            for name, shape in names.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        self._components = tuple(shapes)
        self._is_dead = is_dead

    def find(self, module: str) -> Meaning | None:
        """The tensors that a module means: none where no picture needs them; None where there is no such module."""
        for name in _candidates(squash(module)):
            if name in self._known:
                return Meaning((self._known[name],))
        for name in _candidates(squash(module)):
            for pattern, others in ALIASES:
                if match := re.fullmatch(pattern, name):
                    found = [match.expand(other) for other in others]
                    if all(other in self._known for other in found):
                        return Meaning(tuple(self._in_rows(found)), is_alias=True)
        return Meaning(()) if self._means_dead(module) else None

    def _in_rows(self, found: Iterable[str]) -> Iterator[Target]:
        first = 0
        for name in found:
            target = self._known[name]
            yield Target(target.component, target.tensor, target.shape, first)
            first += target.shape[0]

    def _means_dead(self, module: str) -> bool:
        """Whether it is a module that was trained and serves no picture, such as the last layer of Qwen3."""
        dotted = re.sub(r"(^|_)layers_(\d+)_", r"\1layers.\2.", squash(module))
        names = {re.sub(r"^visual_", "visual.", name) for name in _candidates(dotted)}
        return any(self._is_dead(component, f"{name}.") for component in self._components for name in names)

    def nearest(self, module: str, count: int = 3) -> list[str]:
        """The names of the tensors that are most like a module's."""
        name = min(_candidates(squash(module)), key=len)
        # Few layers are enough to say how the checkpoint's modules are called.
        close = difflib.get_close_matches(name, self._known, n=count, cutoff=0.5)
        return [self._known[match].tensor for match in close]


def squash(name: str) -> str:
    """A name with dots and dashes as underscores."""
    return re.sub(r"[.\-]", "_", name)


def _candidates(name: str) -> list[str]:
    """The name, and what remains of it when prefixes are taken off, one after the other."""
    found = [name]
    for known in found:
        found.extend(known.removeprefix(prefix) for prefix in PREFIXES if known.startswith(prefix))
    return list(dict.fromkeys(found))


def families(modules: Iterable[str]) -> list[str]:
    """Which models' modules these could be, by signs in their names."""
    names = [squash(module) for module in modules]
    return [family for family, sign in SIGNS if any(re.search(f"(^|_)({sign})", name) for name in names)]
