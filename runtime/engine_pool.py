"""The engines a pipeline keeps open, within a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zimg.engines.base import Engine, open_engine
from zimg.engines.bundle import Bundle
from zimg.engines.errors import OutOfMemoryError


class EnginePool:
    """Opens the engines of a bundle's components when they are needed, and keeps them for the next time.

    Args:
        bundle: an open bundle.
        backend: as for :func:`zimg.engines.base.open_engine`.
        device: likewise.
        memory_budget: bytes of weights and working memory that may stay open, as the bundle's manifest counts them.
            The engine in use always may. None keeps all that fit the device: where one does not, the others are closed.
    """

    def __init__(self, bundle: Bundle, backend: str, device: str | None, memory_budget: int | None = None) -> None:
        self.bundle = bundle
        self.backend = backend
        self.device = device
        self.memory_budget = memory_budget
        self._engines: dict[str, Engine] = {}
        """Those that are open; the one used last is last."""

    @contextmanager
    def engine(self, component: str) -> Iterator[Engine]:
        """The engine of a component, opened if it is not; kept afterwards if the budget allows.

        Raises:
            BackendError: the backend cannot open it, or there is not enough memory for it alone.
            BundleError: there is no such component, or it is broken.
        """
        if component not in self._engines:
            self._close_beyond(reserved=engine_bytes(self.bundle, component, self.backend))
            try:
                engine = open_engine(self.bundle, component, self.backend, self.device)
            except OutOfMemoryError:
                if not self._engines:
                    raise
                self.close()
                engine = open_engine(self.bundle, component, self.backend, self.device)
            self._engines[component] = engine
        else:
            self._engines[component] = self._engines.pop(component)
        try:
            yield self._engines[component]
        finally:
            self._close_beyond(reserved=0)

    def close(self) -> None:
        """Close all engines and free their memory."""
        while self._engines:
            self._engines.popitem()[1].close()

    def _close_beyond(self, reserved: int) -> None:
        """Close the engines used longest ago until the others and what is reserved fit the budget."""
        if self.memory_budget is None:
            return
        sizes = {name: engine_bytes(self.bundle, name, self.backend) for name in self._engines}
        held = reserved + sum(sizes.values())
        for name, size in sizes.items():
            if held <= self.memory_budget:
                return
            self._engines.pop(name).close()
            held -= size


def engine_bytes(bundle: Bundle, component: str, backend: str) -> int:
    """What an engine of a component takes: its plan and working memory where it is compiled, else its weights."""
    sizes = [
        bundle.manifest.files[engine.file].size + engine.memory_bytes for engine in bundle.engines(component, backend)
    ]
    return max(sizes, default=bundle.component(component).weight_bytes)
