"""Whether a VAE takes pictures whole or in tiles, and what runs it either way."""

from __future__ import annotations

from collections.abc import Callable

from zimgkit.engines.errors import OutOfMemoryError, UsageError
from zimgkit.runtime.engine_pool import EnginePool
from zimgkit.runtime.families import Family
from zimgkit.runtime.families.base import Array, Progress
from zimgkit.runtime.parameters import VAE_TILING
from zimgkit.runtime.pictures.tiles import ignored, run_tiled
from zimgkit.runtime.served import serves


class VaeTiling:
    """Which sizes the VAE of a session takes in tiles, be it to encode pictures or to decode them.

    Args:
        engines: of the bundle.
        family: of the bundle.
        mode: ``"auto"`` takes tiles where memory is short for the whole, ``"on"`` always, ``"off"`` never.
        warn: called once where tiles change a picture.

    Raises:
        UsageError: ``mode`` is none of these.
    """

    def __init__(self, engines: EnginePool, family: Family, mode: str, warn: Callable[[str], None]) -> None:
        self._engines = engines
        self._family = family
        self._warn = warn
        self._has_warned = False
        self.set(mode)

    def set(self, mode: str) -> None:
        """Take tiles where memory is short (``"auto"``), always (``"on"``) or never (``"off"``) from now on.

        Raises:
            UsageError: it is none of these.
        """
        if mode not in VAE_TILING:
            raise UsageError(f"vae_tiling is {mode!r}", f"choose of {', '.join(VAE_TILING)}")
        self.mode = mode
        self.tiled: dict[tuple[int, int], bool] = {}
        """Height and width of a picture -> whether it is taken in tiles, where that was planned or found out."""

    def tiles(self, height: int, width: int) -> str | None:
        """The tiles that pictures of this size are taken in, such as ``"512/384"``; None where they are not."""
        tiled = self.tiled.get((height, width), self.mode == "on")
        return str(self._family.TILING) if tiled and self._family.TILING.cuts(height, width) else None

    def are_served(self, component: str, height: int, width: int) -> bool:
        """Whether the engine of a component takes the tiles of such a picture."""
        sizes = self._family.dynamic_dimensions(*self._family.TILING.tile(height, width), 1)
        return serves(self._engines.bundle, component, self._engines.backend, sizes)

    def run(
        self,
        component: str,
        run: Callable[[Array], Array],
        whole: Array,
        size: tuple[int, int],
        scales: tuple[int, int],
        progress: Progress = ignored,
    ) -> Array:
        """What a component gives for one picture. Where memory runs out over the whole, it is taken in tiles.

        Args:
            component: ``vae_encoder`` or ``vae_decoder``.
            run: runs it, float32 (1, channels, h, w) to likewise.
            whole: what it is given of the whole picture.
            size: height and width of the picture in pixels.
            scales: pixels of an element each way, of what it is given and of what it gives.
            progress: called with how many tiles are done, and how many there are.
        """
        tiling = self._family.TILING
        if self.tiles(*size) is None:
            try:
                return run(whole)
            except OutOfMemoryError:
                if self.mode == "off" or not tiling.cuts(*size) or not self.are_served(component, *size):
                    raise
            self.tiled[size] = True
        if not tiling.is_close and not self._has_warned:
            self._has_warned = True
            done = "decoded" if component == "vae_decoder" else "encoded"
            self._warn(
                f"the picture is {done} in tiles ({tiling}), which changes it a little: this VAE's norms see a tile "
                f"only; vae_tiling=off takes the whole"
            )
        return run_tiled(run, whole, tiling, scales, progress)
