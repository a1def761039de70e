"""Latents to pixels, whole or in tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from zimgkit.engines.errors import BackendError, OutOfMemoryError, UsageError
from zimgkit.runtime.engine_pool import EnginePool
from zimgkit.runtime.families import Family
from zimgkit.runtime.families.base import Array, Progress
from zimgkit.runtime.parameters import VAE_TILING
from zimgkit.runtime.pictures.saving import from_vae
from zimgkit.runtime.pictures.tiles import SCALE, decode_tiled, ignored
from zimgkit.runtime.served import serves

COMPONENT = "vae_decoder"


class Decoder:
    """The VAE decoder of a session, and which sizes it decodes in tiles.

    Args:
        engines: of the bundle.
        family: of the bundle.
        vae_tiling: ``"auto"`` decodes in tiles where memory is short for the whole, ``"on"`` always, ``"off"`` never.
        warn: called once where tiles change a picture.

    Raises:
        UsageError: ``vae_tiling`` is none of these.
    """

    def __init__(self, engines: EnginePool, family: Family, vae_tiling: str, warn: Callable[[str], None]) -> None:
        self._engines = engines
        self._family = family
        self._warn = warn
        self._has_warned = False
        self.set_tiling(vae_tiling)

    def set_tiling(self, vae_tiling: str) -> None:
        """Decode in tiles where memory is short (``"auto"``), always (``"on"``) or never (``"off"``) from now on.

        Raises:
            UsageError: it is none of these.
        """
        if vae_tiling not in VAE_TILING:
            raise UsageError(f"vae_tiling is {vae_tiling!r}", f"choose of {', '.join(VAE_TILING)}")
        self.vae_tiling = vae_tiling
        self.tiled: dict[tuple[int, int], bool] = {}
        """Height and width of a picture -> whether it is decoded in tiles, where that was planned or found out."""

    def tiles(self, height: int, width: int) -> str | None:
        """The tiles that pictures of this size are decoded in, such as ``"512/384"``; None where they are not."""
        tiled = self.tiled.get((height, width), self.vae_tiling == "on")
        return str(self._family.TILING) if tiled and self._family.TILING.cuts(height, width) else None

    def tiles_are_served(self, height: int, width: int) -> bool:
        """Whether the engine takes the tiles of such a picture."""
        sizes = self._family.dynamic_dimensions(*self._family.TILING.tile(height, width), 1)
        return serves(self._engines.bundle, COMPONENT, self._engines.backend, sizes)

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

            decoded = np.concatenate(
                [self._decode_one(run, raw[i : i + 1], partial(tile_done, i)) for i in range(len(raw))]
            )
        if not np.isfinite(decoded).all():
            raise BackendError("the VAE decoder gave NaN or Inf", "zimg-export verify checks the bundle")
        return from_vae(decoded)

    def _decode_one(self, run: Callable[[Array], Array], latents: Array, progress: Progress) -> Array:
        """The engine's output for one picture. Where memory runs out over the whole, it is decoded in tiles."""
        height, width = (SCALE * side for side in latents.shape[2:])
        tiling = self._family.TILING
        if self.tiles(height, width) is None:
            try:
                return run(latents)
            except OutOfMemoryError:
                may = self.vae_tiling != "off" and tiling.cuts(height, width) and self.tiles_are_served(height, width)
                if not may:
                    raise
            self.tiled[height, width] = True
        if not tiling.is_close and not self._has_warned:
            self._has_warned = True
            self._warn(
                f"the picture is decoded in tiles ({tiling}), which changes it a little: this VAE's norms see a tile "
                "only; vae_tiling=off decodes the whole"
            )
        return decode_tiled(run, latents, tiling, progress)
