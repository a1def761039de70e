"""The Z-Image transformer beside a ControlNet: control layers see what it sees and add hints to what it computes.

Source: ``ZImageControlNet`` of DiffSynth-Studio 2.1 and ``ZImageControlTransformer2DModel`` of VideoX-Fun, whose
refiners' hints go into the transformer's own refiners; ``ZImageControlNetModel`` of diffusers 0.42 leaves those out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.parts import SCALE, ControlNet, Input, Shapes
from zimgkit.export.networks.z_image import Config, PatchEmbedding, ZImageBlock, ZImageDenoiser, read_config

EMBEDDER = "control_all_x_embedder.2-1.weight"
"""What files of this kind are known by."""
PATCH = 4
"""Latents in a patch."""
PLAIN, SHARED, OWN = "", "control_layers", "control_noise_refiner"
"""What refines the condition's tokens: plain blocks (1.0), the control layers themselves (2.0), control blocks (2.1).

The last two are called as diffusers calls them, and give hints to the transformer's refiners.
"""


@dataclass(frozen=True)
class ControlConfig:
    """What of a ControlNet's tensors makes the network."""

    channels: int
    layers: int
    """Control layers: they belong to main layers at equal distances, from the first."""
    refiner: str
    """One of ``PLAIN``, ``SHARED`` and ``OWN``."""


def read_control(shapes: Shapes, config: Config) -> ControlConfig:
    """Tell which ControlNet a file's tensors are.

    Args:
        shapes: of all of its tensors, without the first refiner's ``before_proj`` where that is nothing but zeros:
            release 2.0 has refiners that were never trained.
        config: of the transformer that it is for.

    Raises:
        CheckpointError: it is of no kind that is implemented, or of another transformer.
    """
    if EMBEDDER not in shapes:
        raise CheckpointError(f"the ControlNet has no {EMBEDDER}", "name a ControlNet for this family")
    width, features = (*shapes[EMBEDDER], 0, 0)[:2]
    if width != config.dim:
        message = f"the ControlNet is {width} wide, and the transformer {config.dim}"
        raise CheckpointError(message, "name one that was trained for this checkpoint")
    plain = config.in_channels
    if features not in (PATCH * plain, PATCH * (2 * plain + 1)):  # With a mask, and latents of what it leaves.
        known = f"{PATCH * plain} or {PATCH * (2 * plain + 1)}"
        raise CheckpointError(f"the ControlNet's {EMBEDDER} takes {features} features; zimgkit supports {known}")
    layers, refiners = _count(shapes, "control_layers"), _count(shapes, OWN)
    if not layers or len(places(config, layers)) != layers:
        raise CheckpointError(f"the ControlNet has {layers} control layers, and the transformer {config.n_layers}")
    if f"{OWN}.0.before_proj.weight" in shapes:
        refiner = OWN
    else:
        refiner = PLAIN if refiners and features == PATCH * plain else SHARED
    has = min(layers, config.n_refiner_layers) if refiner == SHARED else refiners
    if has != config.n_refiner_layers:
        message = f"the ControlNet has {has} refiners, and the transformer {config.n_refiner_layers}"
        raise CheckpointError(message, "name one that was trained for this checkpoint")
    return ControlConfig(features // PATCH, layers, refiner)


def places(config: Config, layers: int) -> range:
    """The main layers that so many control layers belong to: 0, 2, 4 … for 15 of 30, 0, 5, 10 … for 6, 0, 10, 20."""
    return range(0, config.n_layers, -(-config.n_layers // layers))


def _count(shapes: Shapes, name: str) -> int:
    """How many blocks a list of blocks has."""
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{name}.")})


class ControlBlock(ZImageBlock):
    """A block on the condition's tokens, and what it hints the transformer at."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.after_proj = nn.Linear(config.dim, config.dim)

    def forward(  # type: ignore[override]
        self, control: Tensor, cos: Tensor, sin: Tensor, time_embedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(batch, tokens, dim), tables as the base class -> the tokens and the hint, (batch, tokens, dim) each."""
        control = super().forward(control, cos, sin, time_embedding)
        return control, self.after_proj(control)


class FirstControlBlock(ControlBlock):
    """The first of several, which joins the condition's tokens to the transformer's."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.before_proj = nn.Linear(config.dim, config.dim)

    def forward(  # type: ignore[override]
        self, control: Tensor, x: Tensor, cos: Tensor, sin: Tensor, time_embedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the base class; the condition may be (1, tokens, dim), ``x`` is (batch, tokens, dim)."""
        return super().forward(self.before_proj(control) + x, cos, sin, time_embedding)


class AddHint(nn.Module):
    """A hint, as strong as was asked for."""

    def forward(self, x: Tensor, hint: Tensor, scale: Tensor) -> Tensor:
        """(batch, tokens, dim), likewise, (1,) float32 -> (batch, tokens, dim)."""
        return x + hint * scale.to(hint.dtype)


class FunControlNet(nn.Module):
    """What a ControlNet's file holds."""

    def __init__(self, config: Config, control: ControlConfig) -> None:
        super().__init__()
        self.control_all_x_embedder = nn.ModuleDict({"2-1": PatchEmbedding(PATCH * control.channels, config.dim)})
        self.control_layers = _control_blocks(config, control.layers)
        if control.refiner == PLAIN:
            self.control_noise_refiner = nn.ModuleList(ZImageBlock(config) for _ in range(config.n_refiner_layers))
        if control.refiner == OWN:
            self.control_noise_refiner = _control_blocks(config, config.n_refiner_layers)


def _control_blocks(config: Config, count: int) -> nn.ModuleList:
    """So many in a row."""
    return nn.ModuleList((ControlBlock if index else FirstControlBlock)(config) for index in range(count))


class ControlledDenoiser(ZImageDenoiser):
    """Every step, beside a ControlNet, whose parameters are named ``control.<name>``."""

    def __init__(self, config: Config, control: ControlConfig, name: str) -> None:
        super().__init__(config)
        self.name = name
        self.control = nn.ModuleDict({name: FunControlNet(config, control)})
        self.refiner, self.places = control.refiner, places(config, control.layers)
        self.add_hint = AddHint()

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        sinusoids: Tensor,
        caption: Tensor,
        cos: Tensor,
        sin: Tensor,
        pad: Tensor,
        condition: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """As the base class, with two inputs more.

        Each control block runs before the hint that it gives is added, so one hint is kept at a time.

        Args:
            hidden_states: (batch, image tokens, 64) float32.
            sinusoids: (1, 256) float32.
            caption: (1, caption tokens, dim) float32.
            cos: (image tokens + caption tokens, head_dim / 2) float32.
            sin: as ``cos``.
            pad: (image tokens,) bool.
            condition: (1, image tokens, 4 * channels) float32, the patches of what controls the picture.
            scale: (1,) float32, what hints are multiplied by.

        Returns:
            (batch, image tokens, 64) float32.
        """
        net: Any = self.control[self.name]
        time = self.t_embedder(sinusoids)
        x = self.pad_rows(self.all_x_embedder["2-1"](hidden_states), pad, self.x_pad_token)
        control = self.pad_rows(net.control_all_x_embedder["2-1"](condition), pad, self.x_pad_token)
        wide_cos, wide_sin = self.tables(x, cos, sin)
        image_cos, image_sin = self.leading(x, wide_cos, wide_sin)
        if self.refiner == PLAIN:
            # One condition serves the whole batch, and tables for one.
            own_cos, own_sin = self.tables(control, cos, sin)
            own_cos, own_sin = self.leading(control, own_cos, own_sin)
            for block in net.control_noise_refiner:
                control = block(control, own_cos, own_sin, time)
            for block in self.noise_refiner:
                x = block(x, image_cos, image_sin, time)
        else:
            blocks = net.control_layers if self.refiner == SHARED else net.control_noise_refiner
            steps = _walk(blocks, control, x, image_cos, image_sin, time)
            for block in self.noise_refiner:
                control, hint = next(steps)
                x = self.add_hint(block(x, image_cos, image_sin, time), hint, scale)
            for step in steps:  # Shared blocks are more than there are refiners.
                control = step[0]
        x, control = self.join(x, caption), self.join(control, caption)
        steps = _walk(net.control_layers, control, x, wide_cos, wide_sin, time)
        for index, block in enumerate(self.layers):
            if index not in self.places:
                x = block(x, wide_cos, wide_sin, time)
                continue
            _, hint = next(steps)
            x = self.add_hint(block(x, wide_cos, wide_sin, time), hint, scale)
        out: Tensor = self.all_final_layer["2-1"](x, time, pad)
        return out


def _walk(blocks: Iterable[nn.Module], control: Tensor, x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The condition's tokens and the hint after each control block, which runs when it is asked for."""
    for block in blocks:
        joined = (control, x) if isinstance(block, FirstControlBlock) else (control,)
        control, hint = block(*joined, *others)
        yield control, hint


def fun(config: Mapping[str, Any], shapes: Shapes, own: Mapping[str, Any]) -> ControlNet:
    """Nets of all releases; those of 1.0 take no picture to inpaint.

    Args:
        config: of the checkpoint's transformer.
        shapes: see :func:`read_control`.
        own: the config beside the file, which says nothing that its tensors do not.

    Raises:
        CheckpointError: the net is of no kind that is implemented, or of another transformer.
    """
    transformer = read_config(config)
    found = read_control(shapes, transformer)
    inpaints = found.channels > transformer.in_channels
    return ControlNet(
        "fun",
        partial(FunControlNet, transformer, found),
        inputs=(Input("condition", torch.float32, (1, "image_tokens", PATCH * found.channels)), SCALE),
        woven=partial(ControlledDenoiser, transformer, found),
        takes=("image", "mask", "inpaint_image") if inpaints else ("image",),
        needs=() if inpaints else ("image",),
        unused=f"{OWN}." if found.refiner == SHARED else "",
    )
