"""The Qwen-Image transformer where it takes more than one picture's tokens: conditions beside the target, and a mask.

Source: ``QwenImageTransformer2DModel`` of diffusers 0.42, whose ``hidden_states`` hold the target's tokens and then
those of conditions, and whose ``zero_cond_t`` modulates conditions as at time 0. The mask is what EliGen needs.
All are variants of the denoiser: they have its parameters and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zimgkit.export.networks.parts import Input, Part
from zimgkit.export.networks.qwen_image import (
    MODULATIONS,
    Config,
    QwenImageBlock,
    QwenImageDenoiser,
    SplitModulation,
    every_part,
    read_config,
)

MASK = Input("mask", torch.bool, ("all_tokens", "all_tokens"))
"""Whether a token, in rows, sees another; text first."""


class Mask(nn.Module):
    """The mask for every picture of the batch and every head."""

    def forward(self, mask: Tensor) -> Tensor:
        """(all tokens, all tokens) bool -> (1, 1, all tokens, all tokens)."""
        return mask[None, None]


class Join(nn.Module):
    """The target's tokens, then the conditions', which all pictures of the batch have in common."""

    def forward(self, target: Tensor, condition: Tensor) -> Tensor:
        """(batch, target tokens, dim), (1, condition tokens, dim) -> (batch, image tokens, dim)."""
        return torch.cat([target, condition.expand(target.shape[0], -1, -1)], dim=1)


class Target(nn.Module):
    """The target's tokens again; conditions have no velocity."""

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """(batch, image tokens, dim), (batch, target tokens, 64) -> the first target tokens of the image."""
        return image[:, : target.shape[1]]


class IsCondition(nn.Module):
    """Which tokens are those of conditions."""

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """(batch, image tokens, dim), (batch, target tokens, dim) -> bool (image tokens, 1)."""
        return (torch.arange(image.shape[1], device=image.device) >= target.shape[1])[:, None]


class SplitTwoModulations(SplitModulation):
    """The rows of a step and those of time 0, cut for the blocks: each image stream gets six and six."""

    def forward(self, rows: Tensor, condition_rows: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Twice (12 layers + 2, dim) -> by turns (12, dim) and (6, dim), then (2, dim)."""
        found = list(rows.split(self.sizes))
        for index, more in enumerate(condition_rows.split(self.sizes)[:-1:2]):
            found[2 * index] = torch.cat([found[2 * index], more])
        return tuple(found)


class ZeroConditionBlock(QwenImageBlock):
    """A block that modulates conditions by rows of their own."""

    def forward(  # type: ignore[override]
        self,
        image: Tensor,
        text: Tensor,
        image_rows: Tensor,
        text_rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        is_condition: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As the base class, but for image rows (12, dim), the conditions' last, and bool (image tokens, 1)."""
        of_target, of_condition = (rows.chunk(MODULATIONS) for rows in image_rows.chunk(2))
        image_mod = [torch.where(is_condition, b, a) for a, b in zip(of_target, of_condition, strict=True)]
        return self._streams(image, text, image_mod, text_rows.chunk(MODULATIONS), cos, sin, mask)


class MaskedDenoiser(QwenImageDenoiser):
    """Every step, where some tokens do not see others."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mask = Mask()

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:
        """As the base class.

        Args:
            hidden_states: (batch, image tokens, 64) float32.
            text: (1, text tokens, dim) float32, that of all prompts one after the other.
            modulation: (12 layers + 2, dim) float32.
            cos: (text tokens + image tokens, head_dim / 2) float32.
            sin: as ``cos``.
            mask: (all tokens, all tokens) bool, text first: whether a token, in rows, sees another.

        Returns:
            (batch, image tokens, 64) float32.
        """
        image = self.img_in(hidden_states)
        rows = self.split_modulation(self.modulation_rows(modulation, image))
        return self.head(self.blocks(image, text, rows, cos, sin, self.mask(mask)), rows)


class ConditionedDenoiser(QwenImageDenoiser):
    """Every step, with the tokens of other pictures beside those that are drawn."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.join, self.target = Join(), Target()

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, condition: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """As the base class.

        Args:
            hidden_states: (batch, target tokens, 64) float32.
            condition: (1, condition tokens, 64) float32, the packed latents of all other pictures.
            text: (1, text tokens, dim) float32.
            modulation: (12 layers + 2, dim) float32.
            cos: (text tokens + target tokens + condition tokens, head_dim / 2) float32.
            sin: as ``cos``.

        Returns:
            (batch, target tokens, 64) float32.
        """
        return self.step(hidden_states, condition, (modulation,), text, cos, sin)

    def step(
        self,
        hidden_states: Tensor,
        condition: Tensor,
        modulations: Sequence[Tensor],
        text: Tensor,
        cos: Tensor,
        sin: Tensor,
        *masks: Tensor,
    ) -> Tensor:
        """What all variants with conditions do: the masks of some come last, as their blocks take them."""
        target = self.img_in(hidden_states)
        image = self.join(target, self.img_in(condition))
        rows = self.split_modulation(*(self.modulation_rows(one, image) for one in modulations))
        image = self.blocks(image, text, rows, cos, sin, *self.roles(image, target), *masks)
        return self.head(self.target(image, hidden_states), rows)

    def roles(self, image: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """What blocks are told of tokens besides: here nothing."""
        return ()


class ZeroConditionedDenoiser(ConditionedDenoiser):
    """Likewise, where conditions are modulated as at time 0."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.transformer_blocks = nn.ModuleList(ZeroConditionBlock(config) for _ in range(config.num_layers))
        self.split_modulation = SplitTwoModulations(config.num_layers)
        self.is_condition = IsCondition()

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        condition: Tensor,
        text: Tensor,
        modulation: Tensor,
        condition_modulation: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """As :class:`ConditionedDenoiser`; ``condition_modulation`` (12 layers + 2, dim) float32 is that of time 0."""
        return self.step(hidden_states, condition, (modulation, condition_modulation), text, cos, sin)

    def roles(self, image: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Which tokens are conditions."""
        return (self.is_condition(image, target),)


class MaskedConditionedDenoiser(ConditionedDenoiser):
    """Other pictures beside those that are drawn, and some tokens that do not see others."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mask = Mask()

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        condition: Tensor,
        text: Tensor,
        modulation: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """As :class:`ConditionedDenoiser`; the mask is that of :class:`MaskedDenoiser`."""
        return self.step(hidden_states, condition, (modulation,), text, cos, sin, self.mask(mask))


class MaskedZeroConditionedDenoiser(ZeroConditionedDenoiser):
    """Likewise, where conditions are modulated as at time 0."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mask = Mask()

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        condition: Tensor,
        text: Tensor,
        modulation: Tensor,
        condition_modulation: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """As :class:`ZeroConditionedDenoiser`; the mask is that of :class:`MaskedDenoiser`."""
        modulations = (modulation, condition_modulation)
        return self.step(hidden_states, condition, modulations, text, cos, sin, self.mask(mask))


def conditioned_part(config: Config, denoiser: Part) -> Part:
    """The variant that takes conditions."""
    kind: Callable[[Config], nn.Module] = ZeroConditionedDenoiser if config.zero_cond_t else ConditionedDenoiser
    hidden_states, text, modulation, cos, sin = denoiser.inputs
    condition = Input("condition", torch.float32, (1, "condition_tokens", config.in_channels))
    at_zero = (replace(modulation, name="condition_modulation"),) if config.zero_cond_t else ()
    return replace(
        denoiser,
        network=lambda: kind(config),
        inputs=(hidden_states, condition, text, modulation, *at_zero, cos, sin),
        sizes=_more(
            denoiser,
            {"condition_tokens": 46, "joint_tokens": 111, "all_tokens": 145},
            {"condition_tokens": 59, "joint_tokens": 136, "all_tokens": 191},
        ),
    )


def masked_part(config: Config, denoiser: Part) -> Part:
    """The variant that takes a mask."""
    return replace(denoiser, network=lambda: MaskedDenoiser(config), inputs=(*denoiser.inputs, MASK))


def masked_conditioned_part(config: Config, denoiser: Part) -> Part:
    """The variant that takes both."""
    kind: Callable[[Config], nn.Module]
    kind = MaskedZeroConditionedDenoiser if config.zero_cond_t else MaskedConditionedDenoiser
    part = conditioned_part(config, denoiser)
    return replace(part, network=lambda: kind(config), inputs=(*part.inputs, MASK))


def edit_parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """The components that the transformer becomes where it draws beside other pictures: the denoiser's ``conditions``.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements.
    """
    return _with_variant(config, "conditions", conditioned_part)


def entity_parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """The components that the transformer becomes where prompts have regions: the denoiser's ``masked``.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements.
    """
    return _with_variant(config, "masked", masked_part)


def edit_entity_parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """Likewise where there are both: its ``masked_conditions``.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements.
    """
    return _with_variant(config, "masked_conditions", masked_conditioned_part)


def _with_variant(config: Mapping[str, Any], name: str, part: Callable[[Config, Part], Part]) -> dict[str, Part]:
    found = read_config(config)
    whole = every_part(found)
    return whole | {"denoiser": replace(whole["denoiser"], variants={name: part(found, whole["denoiser"])})}


def _more(
    part: Part, first: Mapping[str, int], second: Mapping[str, int]
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    return {**part.sizes[0], **first}, {**part.sizes[1], **second}
