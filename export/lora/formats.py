"""The keys of a LoRA's file: which module of the model each is for, and which part it plays there.

Keys end in a part (``lora_A.weight``, ``lokr_w1``, ``alpha``, …); what goes before it is the module, as the trainer
called it. Sources: peft's and diffusers' ``lora_A``/``lora_B``, kohya's ``lora_down``/``lora_up``/``alpha``, LyCORIS'
``lokr_*`` and ``hada_*`` (https://github.com/KohakuBlueleaf/LyCORIS), DiffSynth's adapter name before ``weight``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from zimgkit.engines.errors import LoraError
from zimgkit.engines.tensors.dtypes import to_float32
from zimgkit.engines.tensors.safetensors import SafetensorsError, TensorInfo, read_header, read_metadata, view
from zimgkit.export.checkpoints.layouts import squash
from zimgkit.export.checkpoints.peft_config import PeftConfig, read_peft_config
from zimgkit.export.lora.deltas import Change, Factor, Hadamard, Kronecker, LowRank
from zimgkit.export.lora.source import LoraFile
from zimgkit.export.weights.finite import count_in_words, count_non_finite

ROLES = (
    ("down", r"lora_A(\.[^.]+)?\.weight|lora_A|lora_down(\.weight)?|lora\.down(\.weight)?"),
    ("up", r"lora_B(\.[^.]+)?\.weight|lora_B|lora_up(\.weight)?|lora\.up(\.weight)?"),
    ("alpha", r"alpha"),
    ("magnitude", r"dora_scale|lora_magnitude_vector(\.[^.]+)*"),
    *((part, rf"{part}(\.(default|weight))*") for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
    *((part, rf"{part}(\.(default|weight))*") for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    *((part, rf"{part}(\.(default|weight))*") for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
)
"""Part -> how a key of it ends."""
ENDS = re.compile(r"(?P<module>.+?)\.(?:" + "|".join(f"(?P<{role}>{end})" for role, end in ROLES) + ")")

NAMES = (
    ("kohya (lora_unet_…)", r"lora_(unet|te\d?|transformer)_"),
    ("LyCORIS (lycoris_…)", r"lycoris_"),
    ("ComfyUI (diffusion_model.…)", r"(model\.)?diffusion_model\."),
    ("peft (base_model.model.…)", r"base_model\.model\."),
    ("diffusers (transformer.…)", r"(transformer|text_encoder)\."),
    ("DiffSynth (….lora_A.default.weight)", r".*\.lora_A\.[^.]+\.weight"),
    ("lora_down and lora_up", r".*\.lora_down"),
    ("dots (….lora.down.weight)", r".*\.lora\.down"),
    ("bare names", r""),
)
"""What a format is called, by the first pattern that one of its keys begins with."""


@dataclass(frozen=True)
class Module:
    """All that a file holds for one module."""

    name: str
    """As the file calls it."""
    parts: Mapping[str, TensorInfo]

    @property
    def kind(self) -> str:
        """``"LoRA"``, ``"LoKr"`` or ``"LoHa"``."""
        return next(
            (kind for sign, kind in (("lokr_", "LoKr"), ("hada_", "LoHa")) if sign in " ".join(self.parts)), "LoRA"
        )

    @property
    def is_alpha(self) -> bool:
        """Whether the file has nothing but an alpha under this name."""
        return self.parts.keys() == {"alpha"}

    @property
    def rank(self) -> int | None:
        """None for a LoKr of two full factors."""
        sides = [("down", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0), ("hada_w1_b", 0)]
        return next((self.parts[part].shape[axis] for part, axis in sides if part in self.parts), None)

    @property
    def magnitude(self) -> TensorInfo | None:
        """Of a DoRA: the norms its rows or columns get."""
        return self.parts.get("magnitude")


@dataclass(frozen=True)
class Lora:
    """A LoRA's file, read: headers, hash, alphas. Its matrices stay where they are."""

    file: LoraFile
    sha256: str
    format: str
    modules: tuple[Module, ...]
    unknown: tuple[str, ...]
    """Keys that are no part of any format."""
    config: PeftConfig | None = None
    """Peft's own account of rank and alpha, where there is one."""

    def alpha(self, module: Module) -> float | None:
        """What a module's change is multiplied by, before the division by the rank; None where nothing says."""
        if "alpha" in module.parts:
            return _scalar(module.parts["alpha"])
        return self.config.alpha_of(module.name) if self.config else None

    def factor(self, module: Module) -> float:
        """What a module's product of matrices is multiplied by: alpha / rank, or 1 where the file has no alpha.

        With peft's ``use_rslora`` alpha / sqrt(rank). LyCORIS leaves alpha out where a LoKr's factors are both full.
        """
        alpha, rank = self.alpha(module), module.rank
        if rank is None and self.config is None:
            return 1.0
        rank = rank or (self.config.r if self.config else None)
        if alpha is None or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if self.config and self.config.use_rslora else rank)

    def change(self, module: Module) -> Change:
        """A module's change, without its scale.

        Raises:
            LoraError: a matrix is missing, they do not fit each other, have no rank, or a factor no float32 holds.
        """
        parts, factor = module.parts, self.factor(module)
        if not abs(factor) <= float(np.finfo(np.float32).max):
            made = f"alpha {self.alpha(module)} and rank {module.rank}"
            message = f"{self.file.path}: {module.name} is multiplied by {factor} ({made})"
            raise LoraError(message, "fetch the file again, or train it again")
        if module.rank == 0:
            raise LoraError(f"{self.file.path}: the matrices of {module.name} are of rank 0", "fetch the file again")

        def need(name: str) -> TensorInfo:
            if name not in parts:
                has = ", ".join(sorted(parts))
                raise LoraError(f"{self.file.path}: {module.name} has {has} and no {name}", "fetch the file again")
            return parts[name]

        def either(name: str) -> Factor:
            if name in parts:
                return Factor(parts[name])
            return Factor(need(f"{name}_a"), need(f"{name}_b"))

        try:
            if module.kind == "LoKr":
                return Kronecker(either("lokr_w1"), either("lokr_w2"), factor)
            if module.kind == "LoHa":
                one, two = (Factor(need(f"hada_w{i}_a"), need(f"hada_w{i}_b")) for i in (1, 2))
                return Hadamard(one, two, factor)
            return LowRank(need("up"), need("down"), factor)
        except ValueError as error:
            raise LoraError(f"{self.file.path}: {module.name}: {error}", "fetch the file again") from None


def read_lora(file: LoraFile) -> Lora:
    """Read what a LoRA's file is. Keys that differ in dots and underscores alone are for one module.

    Raises:
        LoraError: it is no safetensors file, no LoRA, or has a key twice.
    """
    try:
        infos = read_header(file.path)
        metadata = read_metadata(file.path)
    except SafetensorsError as error:
        raise LoraError(error.message, error.hint) from None
    parts: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    names: dict[str, str] = {}
    unknown = []
    for key, info in infos.items():
        match = ENDS.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        role = next(role for role, _ in ROLES if match[role] is not None)
        found = parts[squash(match["module"])]
        if role in found:
            message = f"{file.path}: {match['module']} has two {role} matrices ({found[role].name!r}, {key!r})"
            raise LoraError(message, "keep one adapter in the file")
        found[role] = info
        if role != "alpha" or squash(match["module"]) not in names:  # Some trainers call the module otherwise there.
            names[squash(match["module"])] = match["module"]
    if all(found.keys() == {"alpha"} for found in parts.values()):
        example = f" ({next(iter(unknown or infos))}, …)" if infos else ""
        raise LoraError(
            f"{file.path} is no LoRA: none of its keys is of a format zimgkit knows{example}", "check the file"
        )
    with file.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    modules = [Module(names[squashed], found) for squashed, found in parts.items()]
    modules.sort(key=lambda module: module.name)
    return Lora(file, digest, _format(infos), tuple(modules), tuple(unknown), read_peft_config(file.path, metadata))


def _format(infos: Mapping[str, TensorInfo]) -> str:
    return next(name for name, sign in NAMES if any(re.match(sign, key) for key in infos))


def _scalar(info: TensorInfo) -> float:
    if math.prod(info.shape) != 1:
        raise LoraError(f"{info.file}: {info.name} has shape {info.shape} and should be one number", "check the file")
    stored = view(info).reshape(())
    return float(to_float32(stored, info.dtype) if info.dtype == "bfloat16" else stored)


def check_values(lora: Lora, module: Module) -> None:
    """Read all that a file holds for a module.

    Raises:
        LoraError: some of it is NaN or infinite, or in a format of 8 bits.
    """
    for info in module.parts.values():
        if info.dtype.startswith("float8"):
            raise LoraError(f"{lora.file.path}: {info.name} is stored in {info.dtype}", "name a LoRA in 16 or 32 bits")
        if count := count_non_finite(view(info), info.dtype):
            message = f"{lora.file.path}: {info.name} has {count_in_words(count)}"
            raise LoraError(message, "fetch the file again, or train it again")
