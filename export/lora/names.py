"""Which tensors of a checkpoint a LoRA's module means, whatever its trainer wrote before and between the words.

Names are compared with dots, dashes and underscores taken for the same, so kohya's ``layers_0_attention_to_q`` and the
checkpoint's ``layers.0.attention.to_q`` are one. Prefixes are taken off as long as that helps.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zimgkit.export.checkpoints.layouts import squash, squashed_renames
from zimgkit.export.networks.registry import FAMILIES, LORA_SOURCES, is_unused

if TYPE_CHECKING:
    from zimgkit.export.checkpoints.checkpoint import Checkpoint

PREFIXES = (
    "base_model_model_",
    "lora_unet_",
    "lora_prior_unet_",
    "lora_dit_",
    "lora_transformer_",
    "lora_te_",
    "lora_te1_",
    "lycoris_",
    "transformer_",
    "diffusion_model_",
    "text_encoder_",
    "language_model_",
    "model_",
    "unet_",
    "dit_",
    "net_",
    "pipe_",
    "module_",  # Of torch's DistributedDataParallel, and the next of torch.compile.
    "_orig_mod_",
)
TEXT_ENCODER = "text encoder"
OTHERS = (
    (TEXT_ENCODER, r"layers_\d+_(self_attn|mlp)_"),
    ("FLUX", r"double_blocks|single_blocks|single_transformer_blocks"),
    ("Wan", r"blocks_\d+_(cross_attn|self_attn|ffn)"),
    ("Stable Diffusion", r"(down|up|input|output|mid|middle)_blocks?_.*attn|joint_blocks"),
)
"""What some module is called, squashed, in models that are no family of zimgkit's."""


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
        is_unused: Callable[[str, str], bool] = lambda component, name: False,
    ) -> None:
        """Take the checkpoint's tensors.

        Args:
            shapes: component -> canonical name of a tensor -> its shape.
            is_unused: whether a component's tensor of this canonical name, which is not among them, is one that no
                picture needs.
        """
        self._known = {
            squash(name.removesuffix(".weight")): Target(component, name, shape)
            for component, names in shapes.items()
            for name, shape in names.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        self._components = tuple(shapes)
        self._is_unused = is_unused

    def find(self, module: str) -> Meaning | None:
        """The tensors that a module means: none where no picture needs them; None where there is no such module."""
        for name in _candidates(squash(module)):
            if name in self._known:
                return Meaning((self._known[name],))
        for name in _candidates(squash(module)):
            for pattern, others in squashed_renames():
                if match := re.match(pattern, name):
                    found = [match.expand(other) + name[match.end() :] for other in others]
                    if all(other in self._known for other in found):
                        return Meaning(tuple(self._in_rows(found)), is_alias=True)
        return Meaning(()) if self._means_unused(module) else None

    def _in_rows(self, found: Iterable[str]) -> Iterator[Target]:
        first = 0
        for name in found:
            target = self._known[name]
            yield Target(target.component, target.tensor, target.shape, first)
            first += target.shape[0]

    def _means_unused(self, module: str) -> bool:
        """Whether it is a module that was trained and serves no picture, such as the last layer of Qwen3."""
        dotted = re.sub(r"(^|_)layers_(\d+)_", r"\1layers.\2.", squash(module))
        names = {re.sub(r"^visual_", "visual.", name) for name in _candidates(dotted)}
        return any(self._is_unused(component, f"{name}.") for component in self._components for name in names)

    def nearest(self, module: str, count: int = 3) -> list[str]:
        """The names of the tensors that are most like a module's."""
        name = min(_candidates(squash(module)), key=len)
        # Few layers are enough to say how the checkpoint's modules are called.
        close = difflib.get_close_matches(name, self._known, n=count, cutoff=0.5)
        return [self._known[match].tensor for match in close]


def names_of(checkpoint: Checkpoint) -> Names:
    """The modules of a checkpoint that LoRAs can change."""
    sources = dict.fromkeys(LORA_SOURCES.values())

    def unused(component: str, name: str) -> bool:
        return is_unused(checkpoint.family, component, checkpoint.config(component), name)

    shapes = {
        component: {
            name: info.shape for name, info in checkpoint.tensors(component).items() if not unused(component, name)
        }
        for component in sources
    }
    return Names(shapes, unused)


def _candidates(name: str) -> list[str]:
    """The name, and what remains of it when prefixes are taken off, one after the other."""
    found = [name]
    for known in found:
        found.extend(known.removeprefix(prefix) for prefix in PREFIXES if known.startswith(prefix))
    return list(dict.fromkeys(found))


def families(modules: Iterable[str]) -> list[str]:
    """Which models' modules these could be, by signs in their names."""
    names = [squash(module) for module in modules]
    signs = (*((row.name, row.lora_modules) for row in FAMILIES.values()), *OTHERS)
    return [family for family, sign in signs if any(re.search(f"(^|_)({sign})", name) for name in names)]
