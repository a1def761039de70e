"""What is special about each family on the host side: one module of constants and small pure functions each.

The loop is the same for all; what it asks of a family is written down in :class:`Family`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import TextConfig
from zimgkit.engines.errors import BundleError
from zimgkit.runtime.families import qwen_image, z_image

Array = NDArray[np.float32]
Config = dict[str, dict[str, Any]]
"""The checkpoint's config per component, as in ``Manifest.config``."""
Feeds = dict[str, NDArray[Any]]


class Family(Protocol):
    """What a family's module offers. Sizes are of the picture, in pixels."""

    TEXT: TextConfig
    """The prompt template and its limits, where the checkpoint does not bring its own."""
    USES_CHAT_TEMPLATE: bool
    """Whether the reference pipeline renders the tokenizer's own chat template."""
    MAX_SIDE: int
    """The longest side the position tables allow, in pixels."""
    HAS_MODULATION_TABLE: bool
    """Whether the denoiser takes a row of the modulation table instead of a timestep."""
    NEGATIVE_PROMPT: str | None
    """What guidance uses where no negative prompt is given; None if there is no guidance then."""

    def graph_sides(self, height: int, width: int, tokens: int) -> dict[str, int]:
        """The free sides of all graphs but the batch, for a picture of this size and a prompt of so many token ids."""

    def base_sigmas(self, num_inference_steps: int) -> list[float] | None:
        """The noise levels the reference pipeline gives its scheduler; None for the schedule's own equal steps."""

    def noise_dtype(self, precision: str) -> str:
        """The element type the reference pipeline draws its noise in, for weights of this precision."""

    def noise_shape(self, config: Config, height: int, width: int) -> tuple[int, ...]:
        """The shape of one picture's noise as the reference pipeline draws it."""

    def from_noise(self, noise: Array) -> Array:
        """Drawn noise (batch, ...) to latents in the form the reference pipeline keeps them."""

    def latents_shape(self, config: Config, height: int, width: int) -> tuple[int, ...]:
        """The shape of one picture's latents in that form."""

    def to_vae(self, latents: Array, config: Config, height: int, width: int) -> Array:
        """Latents to the VAE decoder's input, (batch, channels, height / 8, width / 8)."""

    def conditioner_inputs(self, prompt_embeds: Array, config: Config) -> Feeds:
        """Inputs of ``conditioner`` for one prompt's rows (tokens, hidden)."""

    def denoiser_constants(self, conditioning: Array, tokens: int, config: Config, height: int, width: int) -> Feeds:
        """Inputs of ``denoiser`` that stay the same over all steps, for a prompt of so many tokens."""

    def denoiser_inputs(self, latents: Array, sigma: np.float32, modulation: Array | None, config: Config) -> Feeds:
        """Inputs of ``denoiser`` that change with every step."""

    def velocity(self, output: Array, latents: Array) -> Array:
        """The denoiser's output as a velocity in the form of the latents."""

    def guidance_scale(self, cfg_scale: float) -> float:
        """DiffSynth's ``cfg_scale`` as this family's ``guidance_scale``."""

    def cfg_scale(self, guidance_scale: float) -> float:
        """The other way round."""

    def is_guided(self, guidance_scale: float, sigma: float, cfg_truncation: float) -> bool:
        """Whether guidance is on at this noise level."""

    def guide(self, positive: Array, negative: Array, guidance_scale: float, cfg_normalization: float) -> Array:
        """Combine the velocities with and without the prompt."""


FAMILIES: dict[str, Family] = {"z-image": z_image, "qwen-image": qwen_image}


def family(name: str) -> Family:
    """The family a bundle belongs to.

    Raises:
        BundleError: this zimgkit does not know it.
    """
    if name not in FAMILIES:
        raise BundleError(
            f"the bundle is of family {name!r}, and this zimgkit knows {', '.join(FAMILIES)}", "upgrade zimgkit"
        )
    return FAMILIES[name]
