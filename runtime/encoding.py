"""Pictures to latents, kept for all jobs that share them."""

from __future__ import annotations

import hashlib

import numpy as np

from zimgkit.engines.errors import BackendError
from zimgkit.runtime.diffusion.latents import normalize
from zimgkit.runtime.engine_pool import EnginePool
from zimgkit.runtime.families import Family
from zimgkit.runtime.families.base import Array
from zimgkit.runtime.inputs import InputPicture
from zimgkit.runtime.pictures.reading import flattened
from zimgkit.runtime.pictures.resizing import Filter, crop, resize, to_pixels
from zimgkit.runtime.pictures.tiles import SCALE
from zimgkit.runtime.recent import Recent
from zimgkit.runtime.vae_tiling import VaeTiling

MOST_KEPT = 16
"""Encoded pictures; one of a megapixel takes 2 MB."""


class Encoder:
    """The VAE encoder of a session, and the latents of the pictures it was given last.

    Args:
        engines: of the bundle.
        family: of the bundle.
        tiling: which pictures are encoded in tiles.
    """

    COMPONENT = "vae_encoder"

    def __init__(self, engines: EnginePool, family: Family, tiling: VaeTiling) -> None:
        self._engines = engines
        self._family = family
        self._tiling = tiling
        self.kept: Recent[tuple[object, ...], Array] = Recent(MOST_KEPT)

    def encode(
        self,
        image: InputPicture,
        height: int,
        width: int,
        device: str | None = None,
        noise: Array | None = None,
        kernel: Filter = "lanczos",
        reduced: tuple[int, int] | None = None,
    ) -> Array:
        """The latents of a picture, float32 (1, ...) in the form that the family keeps them in.

        Args:
            image: the picture; it is resized.
            height: of the picture to draw, in pixels.
            width: likewise.
            device: where the encoder runs.
            noise: float32 (1, ...) of the family's noise shape, to draw from the posterior; its mean where None.
            kernel: what it is resized with.
            reduced: the width and height that it is resized to, where its edges are then cut off.

        Raises:
            BackendError: the engine failed, or gave NaN or Inf.
        """
        moments = self.kept.get(
            (image.sha256, height, width, kernel, reduced, self._tiling.tiles(height, width)),
            lambda: self._moments(image, height, width, device, kernel, reduced),
        )
        mean, log_variance = np.split(moments, 2, axis=1)
        if noise is not None:
            # As DiagonalGaussianDistribution of diffusers.
            mean = mean + np.exp(np.float32(0.5) * np.clip(log_variance, -30, 20)) * noise.reshape(mean.shape)
        shape = (1, *self._family.noise_shape(height, width))
        return self._family.from_noise(normalize(mean, self._family.normalization).reshape(shape))

    def _moments(
        self,
        image: InputPicture,
        height: int,
        width: int,
        device: str | None,
        kernel: Filter,
        reduced: tuple[int, int] | None,
    ) -> Array:
        """What the encoder gives, float32 (1, 2 * channels, height / 8, width / 8)."""
        channels = self._engines.bundle.component(self.COMPONENT).inputs["image"].shape[1]
        picture = image.picture.convert("RGBA") if channels == 4 else flattened(image.picture)
        whole = resize(picture, *(reduced or (width, height)), kernel)
        return self._run(to_pixels(crop(whole, width, height) if reduced else whole), device)

    def encode_pixels(self, pixels: Array, device: str | None = None) -> Array:
        """The latents of pixels, float32 (1, channels, height / 8, width / 8), as the denoiser knows them.

        Args:
            pixels: float32 (1, 3, height, width) from -1 to 1.
            device: where the encoder runs.

        Raises:
            BackendError: the engine failed, or gave NaN or Inf.
        """
        height, width = pixels.shape[2:]
        tiles = self._tiling.tiles(height, width)
        key = ("pixels", tiles, pixels.shape, hashlib.sha256(pixels.tobytes()).hexdigest())
        moments = self.kept.get(key, lambda: self._run(pixels, device))
        return normalize(np.split(moments, 2, axis=1)[0], self._family.normalization)

    def _run(self, pixels: Array, device: str | None) -> Array:
        with self._engines.engine(self.COMPONENT, device) as engine:

            def run(part: Array) -> Array:
                moments: Array = engine.run({"image": part})["moments"]
                return moments

            height, width = pixels.shape[2:]
            moments = self._tiling.run(self.COMPONENT, run, pixels, (height, width), (1, SCALE))
        if not np.isfinite(moments).all():
            raise BackendError("the VAE encoder gave NaN or Inf", "zimg-export verify checks the bundle")
        return moments
