"""What a set of LoRAs changes of a built bundle: which tensors are written anew and from what, which lie elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from zimgkit.engines.bundle import Bundle, Component
from zimgkit.engines.errors import BundleError
from zimgkit.engines.tensors.dtypes import to_float32
from zimgkit.engines.tensors.safetensors import TensorInfo, read_header
from zimgkit.export.checkpoints.layouts import canonical
from zimgkit.export.checkpoints.stored import Stored
from zimgkit.export.lora.graphs import initializers, read_graph
from zimgkit.export.lora.merge import Merge
from zimgkit.export.lora.names import Names
from zimgkit.export.lora.origin import Origin
from zimgkit.export.networks.registry import LORA_SOURCES, is_unused
from zimgkit.export.quantization.formats import SCALE
from zimgkit.export.quantization.quantized_weights import WEIGHT_SCALE, as_stored, float_shapes
from zimgkit.export.weights.stream import Wanted, pieces

OUTGROWN = 2.0
"""How much larger than without LoRAs a row of a quantized weight may become before that is worth a word.

Twice is a bit: from there on the row itself is rounded twice as coarsely, and what it gives may be twice as large as
what the inputs of the linears after it were calibrated on, which are cut off there.
"""


@dataclass
class Change:
    """What becomes of one component."""

    lora: dict[str, Wanted]
    """Its file of merged tensors: name -> what it comes from."""
    base: dict[str, Wanted]
    """Its file of base weights, where that is written anew."""
    moved: dict[str, TensorInfo] = field(default_factory=dict)
    """Where tensors lie now that lay elsewhere."""
    files: dict[str, str] = field(default_factory=dict)
    """``"lora"`` or ``"base"`` -> the new file."""
    graphs: dict[str, dict[str, str]] = field(default_factory=dict)
    """The component or one of its variants -> the element type a graph computes in -> the new file."""


class Changeable:
    """The components of a bundle that LoRAs can change, with their graphs and where their tensors lie."""

    def __init__(self, bundle: Bundle, origin: Origin) -> None:
        """Read the graphs.

        Args:
            bundle: an open bundle.
            origin: its checkpoint, opened where a base weight is not in the bundle.

        Raises:
            BundleError: a graph is no ONNX model.
        """
        self._bundle, self._origin = bundle, origin
        self.parts = {name: c for name, c in bundle.manifest.components.items() if name in LORA_SOURCES}
        # Variants are more graphs over a component's weights: what changes for it changes for them.
        self.members = {name: (name, *bundle.manifest.variants(name)) for name in self.parts}
        self.graphs = {
            member: {
                compute: read_graph(bundle.file(file)) for compute, file in bundle.component(member).graphs.items()
            }
            for members in self.members.values()
            for member in members
        }
        self._headers: dict[str, dict[str, TensorInfo]] = {}

    @cached_property
    def _shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Component -> the tensors that it consists of, by their stored names, in the checkpoint's shapes."""
        found = {}
        for name, component in self.parts.items():
            tensors, graphs = self._bundle.tensors(name), self.graphs[name]
            own = initializers(next(iter(graphs.values()))) if graphs else component.tensors
            if missing := [tensor for tensor in own if tensor not in tensors]:
                raise BundleError(f"{self._bundle.root} has no tensor {missing[0]}", "build the bundle again")
            found[name] = float_shapes(self._bundle, name, own)
        return found

    @cached_property
    def names(self) -> Names:
        """The modules that LoRAs can change."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, tensors in self._shapes.items():
            known_names = shapes.setdefault(LORA_SOURCES[name], {})
            known_names |= {canonical(LORA_SOURCES[name], tensor): shape for tensor, shape in tensors.items()}
        family, config = self._bundle.manifest.family, self._bundle.manifest.config
        return Names(
            shapes,
            lambda component, name: is_unused(family, component, config.get(component, {}), name),
        )

    def change(self, name: str, merged: Merge, *, keep_base: bool) -> Change | None:
        """What has to be written for a component; None where nothing changes.

        Args:
            name: of the component.
            merged: what the new set of LoRAs does.
            keep_base: write what they touch without them as well.

        Raises:
            CheckpointError: a base weight is in the checkpoint alone, and that is not there.
        """
        component, source = self.parts[name], LORA_SOURCES[name]
        shapes = self._shapes[name]
        addends = merged.addends.get(source, {})
        touched = {tensor: addends[key] for tensor in shapes if (key := canonical(source, tensor)) in addends}
        before = self._file(component.lora)
        if not touched and not before:
            return None
        base = self._base(component)
        # Files of base weights hold none of what was merged when they were written; it goes on lying beside them.
        homeless = (before.keys() - base.keys()) & shapes.keys()
        needed = sorted(touched.keys() | homeless)
        exact = {tensor: self._exact(component, base, source, tensor, shapes[tensor]) for tensor in needed}
        wants = {tensor: Wanted(exact[tensor], shapes[tensor], addends=touched.get(tensor, ())) for tensor in needed}
        wants = {tensor: _renamed(want, tensor) for tensor, want in wants.items()}
        wants = as_stored(self._bundle, name, wants)
        kept: dict[str, Wanted] = {}
        if keep_base:
            kept = {
                tensor: _renamed(Wanted(exact[tensor], shapes[tensor]), tensor)
                for tensor in needed
                if not exact[tensor].file.is_relative_to(self._bundle.root)
            }
            old = self._file(component.base)
            kept |= {tensor: Wanted(info, info.shape) for tensor, info in old.items() if kept and tensor not in kept}
        moved = {tensor: base[tensor] for tensor in before.keys() - wants.keys()}
        return Change(wants, kept, moved)

    def positive(self, name: str, merged: Merge) -> dict[str, Wanted]:
        """What LoRAs for the branch of the prompt alone make of a component. Arguments and errors as above."""
        component, source = self.parts[name], LORA_SOURCES[name]
        addends, base, found = merged.positive.get(source, {}), self._base(component), {}
        for tensor, shape in self._shapes[name].items():
            if (key := canonical(source, tensor)) in addends:
                exact = self._exact(component, base, source, tensor, shape)
                found[tensor] = _renamed(Wanted(exact, shape, addends=addends[key]), tensor)
        return found

    def outgrown(self, name: str, change: Change) -> Iterator[tuple[str, float]]:
        """The weights of a component that have outgrown what they are without LoRAs, and how many times.

        Args:
            name: of the component.
            change: what became of it, after it was written.
        """
        base = self._base(self.parts[name])
        for scale, want in change.lora.items():
            if want.suffix == WEIGHT_SCALE and want.addends:
                plain = Wanted(base[scale], want.shape) if scale in base else replace(want, addends=())
                dtype = want.dtype(SCALE)
                merged, unmerged = (
                    np.abs(to_float32(np.concatenate([*pieces(one, dtype)]), dtype))
                    .reshape(want.shape[0], -1)
                    .max(axis=1)
                    for one in (Wanted(change.moved[scale], want.shape), plain)
                )
                if (times := float((merged / unmerged).max())) > OUTGROWN:
                    yield scale.removesuffix(WEIGHT_SCALE), times

    def _exact(
        self, component: Component, base: Mapping[str, TensorInfo], source: str, tensor: str, shape: tuple[int, ...]
    ) -> Stored:
        """Where a tensor lies without LoRAs as the checkpoint has it, or wider: in the bundle, or in the checkpoint."""
        info = base.get(tensor)
        # What is not in the bundle's own folder is the checkpoint's, linked.
        if info and (info.file.parent != self._bundle.root or info.dtype == "float32"):
            return info
        return self._file(component.base).get(tensor) or self._origin.tensor(source, tensor, shape)

    def _base(self, component: Component) -> dict[str, TensorInfo]:
        """A component's tensors in the files that hold nothing merged."""
        return {
            tensor: info
            for file in component.weights
            if file != component.lora
            for tensor, info in self._file(file).items()
        }

    def _file(self, name: str | None) -> dict[str, TensorInfo]:
        """What a weight file of the bundle holds; its header is read once."""
        if name is None:
            return {}
        if name not in self._headers:
            self._headers[name] = read_header(self._bundle.file(name))
        return self._headers[name]


def _renamed(want: Wanted, name: str) -> Wanted:
    """The same under the bundle's name, where the checkpoint at hand stores it under another one."""
    return replace(want, source=replace(want.source, name=name))
