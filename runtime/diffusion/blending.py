"""Inpainting: what a mask keeps of a picture, put back after a step or into its velocity.

Latents, clean latents and noise are float32 of one shape; the mask is 1 where the picture is drawn anew, 0 where it is
kept, and broadcasts to that shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zimgkit.runtime.diffusion.schedule import add_noise

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Kept:
    """A picture under a mask."""

    clean: Array
    """Its latents without noise."""
    noise: Array
    """What its latents started from."""
    mask: Array
    by_velocity: bool = False
    """Whether velocities are blended, as DiffSynth does it, rather than latents, as diffusers."""

    def blend_velocity(self, velocity: Array, latents: Array, sigma: float) -> Array:
        """The velocity of a step, with that towards the clean latents where the picture is kept.

        Source: ``QwenImagePipeline.step`` with ``inpaint_mask`` in DiffSynth-Studio 2.1.
        """
        if not self.by_velocity:
            return velocity
        towards = (latents - self.clean) / np.float32(sigma)
        blended: Array = towards * (1 - self.mask) + velocity * self.mask
        return blended

    def blend_latents(self, latents: Array, sigma: float) -> Array:
        """The latents after a step, with the picture at their noise level where it is kept.

        Source: ``QwenImageInpaintPipeline`` and ``ZImageInpaintPipeline`` of diffusers 0.42.
        """
        if self.by_velocity:
            return latents
        blended: Array = (1 - self.mask) * add_noise(self.clean, self.noise, sigma) + self.mask * latents
        return blended
