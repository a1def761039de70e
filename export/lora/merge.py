"""Several LoRAs, each with its scale: what every tensor of the checkpoint gets from them.

The sum of a tensor is taken in an order that the files' hashes give, so that the order of the arguments changes no bit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from zimgkit.engines.bundle import MergedLora
from zimgkit.engines.errors import LoraError
from zimgkit.export.lora.deltas import Addend, Change, Magnitude, Slice
from zimgkit.export.lora.formats import Lora, Module, check_values, read_lora
from zimgkit.export.lora.names import TEXT_ENCODER, Meaning, Names, Target, families
from zimgkit.export.lora.source import find_lora
from zimgkit.export.weights.addends import Addends


@dataclass(frozen=True)
class Merge:
    """What a set of LoRAs does to a checkpoint."""

    addends: Addends
    loras: tuple[MergedLora, ...]
    """Those that do something, in the order of the sums."""
    ignored: tuple[str, ...] = ()
    """Modules and keys that mean nothing here, where that was allowed."""
    positive: Addends = field(default_factory=dict)
    """What tensors get in the branch of the prompt, of those that LoRAs for it alone touch: of all LoRAs."""
    positive_loras: tuple[MergedLora, ...] = ()
    """Those for it alone."""

    @property
    def of_positive(self) -> Addends:
        """What all tensors get in the branch of the prompt."""
        names = self.addends.keys() | self.positive.keys()
        return {name: {**self.addends.get(name, {}), **self.positive.get(name, {})} for name in names}

    @property
    def for_both(self) -> Merge:
        """What it does to both branches of guidance."""
        return replace(self, positive={}, positive_loras=())


NOTHING = Merge({}, ())
BACKBONE = "transformer"
"""The component of a checkpoint that guidance runs twice."""


def read_loras(arguments: Iterable[str], hub: str = "huggingface") -> list[Lora]:
    """Find, fetch and read LoRAs.

    Args:
        arguments: see :func:`zimgkit.export.lora.source.find_lora`.
        hub: ``"huggingface"`` or ``"modelscope"``.

    Raises:
        UsageError: a scale is no number.
        LoraError: a file is missing, or none that can be merged.
    """
    return [read_lora(find_lora(argument, hub)) for argument in arguments]


def merge(
    loras: Sequence[Lora],
    names: Names,
    family: str,
    positive_only: Sequence[Lora] = (),
    *,
    allow_unmatched: bool = False,
) -> Merge:
    """Find what each tensor gets. A LoRA of scale 0 is checked as the others are, and left out.

    Args:
        loras: as they were read.
        names: of the checkpoint.
        family: what to call the checkpoint's family in messages.
        positive_only: likewise, those for the branch of the prompt alone.
        allow_unmatched: go on where a LoRA has modules that the checkpoint has not.

    Raises:
        LoraError: a LoRA is of another family, has modules that the checkpoint has not, or shapes that do not fit; or
            one for the branch of the prompt changes what no branch has of its own.
    """
    both = _merge(loras, names, family, allow_unmatched=allow_unmatched)
    if not positive_only:
        return both
    own = _merge(positive_only, names, family, allow_unmatched=allow_unmatched)
    for component, tensors in own.addends.items():
        if tensors and component != BACKBONE:
            raise LoraError(
                f"{positive_only[0].file.path} changes {component} {next(iter(tensors))}, which has no branches",
                f"a LoRA for the branch of the prompt alone changes the {BACKBONE} alone: merge it with --lora",
            )
    every = _merge([*loras, *positive_only], names, family, allow_unmatched=allow_unmatched).addends
    positive = {name: {tensor: every[name][tensor] for tensor in tensors} for name, tensors in own.addends.items()}
    ignored = tuple(dict.fromkeys((*both.ignored, *own.ignored)))
    return replace(both, positive=positive, positive_loras=own.loras, ignored=ignored)


def _merge(loras: Sequence[Lora], names: Names, family: str, *, allow_unmatched: bool) -> Merge:
    """What LoRAs for both branches do."""
    found: dict[str, dict[str, list[tuple[tuple[str, float], Addend]]]] = defaultdict(lambda: defaultdict(list))
    ignored: list[str] = []
    for lora in loras:
        meanings = {module.name: names.find(module.name) for module in lora.modules}
        ignored += _unmatched(lora, meanings, names, family, allow_unmatched=allow_unmatched)
        for module, target, change in _changes(_with_alphas(lora, meanings), meanings):
            label = f"{lora.file.path}: {module.name}"
            addend = Addend(change, lora.file.scale, _magnitude(lora, module, target, change), label)
            found[target.component][target.tensor].append(((lora.sha256, lora.file.scale), addend))
    merged = {
        (lora.sha256, lora.file.scale, index): MergedLora(lora.file.source, lora.sha256, lora.file.scale)
        for index, lora in enumerate(loras)
        if lora.file.scale
    }
    addends = {
        component: {
            tensor: tuple(addend for key, addend in sorted(entries, key=lambda entry: entry[0]) if key[1])
            for tensor, entries in tensors.items()
            if any(key[1] for key, _ in entries)
        }
        for component, tensors in found.items()
    }
    return Merge(addends, tuple(merged[key] for key in sorted(merged)), tuple(ignored))


def _unmatched(
    lora: Lora, meanings: Mapping[str, Meaning | None], names: Names, family: str, *, allow_unmatched: bool
) -> list[str]:
    """The modules and keys of a LoRA that mean nothing here."""
    unmatched = [name for name, meaning in meanings.items() if meaning is None]
    meant = {target.component for meaning in meanings.values() if meaning for target in meaning.targets}
    likely = [name for name in families(unmatched) if name != TEXT_ENCODER]
    # Text encoders are alike: what a LoRA has for its own may fit this one's.
    if BACKBONE not in meant and likely and family not in likely:
        raise LoraError(
            f"{lora.file.path} is no LoRA for {family}: its modules are called as those of {' or '.join(likely)}",
            "name one that was trained for this family",
        )
    matches = len(unmatched) < len(meanings)
    if (allow_unmatched and matches) or not (unmatched or lora.unknown):
        return [f"{lora.file.path.name}: {name}" for name in (*unmatched, *lora.unknown)]
    if not unmatched:
        raise LoraError(
            f"{lora.file.path}: {lora.unknown[0]!r} is no key that zimgkit knows{_others(lora.unknown)}",
            "--allow-unmatched leaves such keys out",
        )
    nearest = names.nearest(unmatched[0])
    like = f"; the nearest are {', '.join(nearest)}" if nearest else ""
    hint = "check which model it was trained for"
    if matches:
        hint += "; --allow-unmatched leaves such modules out"
    raise LoraError(
        f"{lora.file.path}: {unmatched[0]!r} means no tensor of this {family} checkpoint{_others(unmatched)}{like}",
        hint,
    )


def _with_alphas(lora: Lora, meanings: Mapping[str, Meaning | None]) -> Lora:
    """The same, where alphas that stand alone went to the modules of the same tensors, as ``out`` to ``to_out.0``."""
    alone = {
        meaning.targets: module.parts["alpha"]
        for module in lora.modules
        if module.is_alpha and (meaning := meanings[module.name]) and meaning.targets
    }
    modules = []
    for module in lora.modules:
        meaning = meanings[module.name]
        if meaning and not module.is_alpha and "alpha" not in module.parts and meaning.targets in alone:
            modules.append(replace(module, parts={**module.parts, "alpha": alone.pop(meaning.targets)}))
        else:
            modules.append(module)
    left = alone.values()
    return replace(lora, modules=tuple(m for m in modules if not m.is_alpha or m.parts["alpha"] in left))


def _changes(lora: Lora, meanings: Mapping[str, Meaning | None]) -> list[tuple[Module, Target, Change]]:
    """Each tensor's change. Of a module that is there under the checkpoint's name and another, the first counts."""
    own: dict[tuple[str, str], str] = {}
    for module in lora.modules:
        meaning = meanings[module.name]
        for target in meaning.targets if meaning and not meaning.is_alias else ():
            key = target.component, target.tensor
            if key in own:
                both = f"{own[key]!r} and {module.name!r}"
                raise LoraError(
                    f"{lora.file.path}: {both} are both for {target.tensor}", "keep one of them in the file"
                )
            own[key] = module.name
    changes = []
    for module in lora.modules:
        meaning = meanings[module.name]
        if meaning is None or not meaning.targets:
            continue
        check_values(lora, module)
        whole = lora.change(module)
        shape = (sum(target.shape[0] for target in meaning.targets), meaning.targets[0].shape[1])
        if whole.shape != shape:
            raise LoraError(
                f"{lora.file.path}: {module.name} changes a weight of shape {whole.shape}, and "
                f"{meaning.targets[0].tensor} has {shape}",
                "it was trained for a model of another size",
            )
        for target in meaning.targets:
            if own.get((target.component, target.tensor), module.name) == module.name:
                is_part = len(meaning.targets) > 1
                change = Slice(whole, target.first, target.shape[0]) if is_part else whole
                changes.append((module, target, change))
    if changes and not any(lora.factor(module) for module, _, _ in changes):
        raise LoraError(f"{lora.file.path} changes nothing: every alpha in it is 0", "fetch it again")
    return changes


def _magnitude(lora: Lora, module: Module, target: Target, change: Change) -> Magnitude | None:
    """The norms of a DoRA: one for each row, (out,) or (out, 1), or one for each column, (1, in)."""
    info = module.magnitude
    if info is None:
        return None
    whole = lora.change(module).shape
    of_columns = len(info.shape) > 1 and info.shape[0] == 1 != whole[0]
    if math.prod(info.shape) != (whole[1] if of_columns else whole[0]) or len(info.shape) == 0:
        raise LoraError(
            f"{lora.file.path}: {info.name} has shape {info.shape}, which fits no weight of shape {whole}",
            "fetch the file again",
        )
    if of_columns and change.shape != whole:
        raise LoraError(
            f"{lora.file.path}: {info.name} has norms over columns of q, k and v together, which are apart here",
            "train it on the model in the diffusers layout",
        )
    return Magnitude(info, of_columns, target.first)


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
