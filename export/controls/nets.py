"""ControlNets that are opened for a checkpoint or a bundle: their networks, and where their tensors lie."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from zimgkit.engines.bundle import Control, Quantization, Source
from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.engines.tensors.safetensors import SafetensorsError, TensorInfo, read_header, view
from zimgkit.export.attachments.control import prefix
from zimgkit.export.checkpoints.checkpoint import check_tensors
from zimgkit.export.controls.source import ControlFile, find_control
from zimgkit.export.networks.parts import ControlNet
from zimgkit.export.networks.registry import FAMILIES, control_net
from zimgkit.export.weights.stream import Wanted

ENCODED = ("vae_encoder",)
"""What a bundle needs for nets beside what it has for its tasks."""
DENOISER = "denoiser"
"""What they control."""
COMPONENT = f"{DENOISER}.control"
"""The denoiser with all nets that combine, and the beginning of the names of those with one."""


@dataclass(frozen=True)
class OpenNet:
    """A ControlNet and its file."""

    file: ControlFile
    net: ControlNet
    tensors: Mapping[str, TensorInfo]
    """Parameter -> where it lies."""

    @property
    def name(self) -> str:
        """What it is called in the bundle."""
        return self.file.name

    @property
    def source(self) -> Source:
        """Of its weights."""
        path = self.file.path
        return Source(self.file.source, None, {path.name: path.stat().st_size})

    def wanted(self) -> dict[str, Wanted]:
        """What each parameter comes from."""
        return {name: Wanted(self.tensors[name], shape) for name, shape in self.net.parameters().items()}

    def control(self) -> Control:
        """Its entry in the manifest."""
        net = self.net
        return Control(
            self.name,
            net.kind,
            source=role(self.name),
            component=component_of(self.name),
            takes=net.takes,
            needs=net.needs,
            scale=net.scale,
            combines=COMPONENT if net.combines else "",
            settings=dict(net.settings),
        )


def role(name: str) -> str:
    """The role of a net's weights among the bundle's sources, and the beginning of its files' names."""
    return f"control.{name}"


def component_of(name: str) -> str:
    """The denoiser with one net alone."""
    return f"{COMPONENT}.{name}"


def places(nets: Sequence[OpenNet]) -> dict[Path, str]:
    """The files of nets -> where they are linked to in a bundle."""
    return {net.file.path: f"control/{net.name}/{net.file.path.name}" for net in nets}


def unquantized(quantization: Quantization, nets: Sequence[OpenNet]) -> Quantization:
    """What a manifest says of how linears were quantized, with those of nets: they are left as they are."""
    kept = {role(net.name): dict.fromkeys(net.net.linears(), "of a ControlNet") for net in nets}
    return msgspec.structs.replace(quantization, unquantized=quantization.unquantized | kept)


def open_nets(
    arguments: Sequence[str],
    family: str,
    transformer: Mapping[str, Any],
    hub: str = "huggingface",
    taken: Collection[str] = (),
) -> list[OpenNet]:
    """Find, fetch and recognise ControlNets.

    Args:
        arguments: see :func:`.source.find_control`.
        family: of the checkpoint that they shall control.
        transformer: the config of its transformer.
        hub: ``"huggingface"`` or ``"modelscope"``.
        taken: names that nets of the bundle have already.

    Raises:
        UsageError: two nets have one name.
        CheckpointError: a file is missing, no ControlNet, or one of another family or size.
    """
    found: list[OpenNet] = []
    for argument in arguments:
        file = find_control(argument, hub)
        if file.name in (*taken, *(one.name for one in found)):
            hint = f"name it otherwise: NAME={argument.partition('=')[2] or argument}"
            raise UsageError(f"two ControlNets are called {file.name}", hint)
        found.append(_open(file, family, transformer))
    return found


def _open(file: ControlFile, family: str, transformer: Mapping[str, Any]) -> OpenNet:
    try:
        header = read_header(file.path)
    except SafetensorsError as error:
        raise CheckpointError(error.message, error.hint) from None
    net = control_net(family, transformer, trained_shapes(family, header), file.config, str(file.path))
    unused = [name for name in header if net.unused and name.startswith(net.unused)]
    check_tensors(header, net.parameters(), f"ControlNet {file.name}", ignore=unused.__contains__)
    return OpenNet(file, net, header)


def trained_shapes(family: str, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, without those that were never trained: see :attr:`.ControlKind.absent_if_zero`.

    Args:
        family: of the checkpoint that the net shall control.
        tensors: where they lie, by name.
    """
    marks = {name for kind in FAMILIES[family].controls.values() for name in kind.absent_if_zero}
    absent = {name for name in marks if name in tensors and not view(tensors[name]).any()}
    return {name: info.shape for name, info in tensors.items() if name not in absent}


def named(tensors: Mapping[str, TensorInfo], name: str) -> dict[str, TensorInfo]:
    """A net's tensors by the names of its parameters in a denoiser that has it; in graphs they bear the same prefix."""
    before = prefix(name)
    return {before + key: replace(info, name=before + info.name) for key, info in tensors.items()}
