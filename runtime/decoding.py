"""Latents to pixels."""

from __future__ import annotations

from functools import partial

import numpy as np

from zimgkit.engines.errors import BackendError
from zimgkit.runtime.engine_pool import EnginePool
from zimgkit.runtime.families import Family
from zimgkit.runtime.families.base import Array, Progress
from zimgkit.runtime.pictures.saving import from_vae
from zimgkit.runtime.pictures.tiles import SCALE, ignored
from zimgkit.runtime.vae_tiling import VaeTiling

COMPONENT = "vae_decoder"


class Decoder:
    """The VAE decoder of a session.

    Args:
        engines: of the bundle.
        family: of the bundle.
        tiling: which pictures are decoded in tiles.
    """

    def __init__(self, engines: EnginePool, family: Family, tiling: VaeTiling) -> None:
        self._engines = engines
        self._family = family
        self._tiling = tiling

    def decode(
        self, latents: Array, height: int, width: int, device: str | None = None, progress: Progress = ignored
    ) -> Array:
        """Latents of pictures of this size in pixels as pixels, float32 (N, H, W, 3 or 4) from 0 to 1.

        Args:
            latents: in the form of the family.
            height: of the pictures.
            width: of the pictures.
            device: where it runs.
            progress: called with how many tiles of all are done, and how many there are.

        Raises:
            BackendError: the engine failed.
        """
        raw = self._family.to_vae(latents, height, width)
        with self._engines.engine(COMPONENT, device) as engine:

            def run(part: Array) -> Array:
                image: Array = engine.run({"latents": part})["image"]
                return image

            def tile_done(picture: int, done: int, tiles: int) -> None:
                progress(picture * tiles + done, len(raw) * tiles)

            decode = partial(self._tiling.run, COMPONENT, run, size=(height, width), scales=(SCALE, 1))
            decoded = np.concatenate([decode(raw[i : i + 1], progress=partial(tile_done, i)) for i in range(len(raw))])
        if not np.isfinite(decoded).all():
            raise BackendError("the VAE decoder gave NaN or Inf", "zimg-export verify checks the bundle")
        return from_vae(decoded)
