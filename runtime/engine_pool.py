"""The engines a pipeline keeps open, within a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from zimgkit.engines.base import Engine, Feeds, open_engine
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import OutOfMemoryError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Result = TypeVar("Result")


class EnginePool:
    """Opens the engines of a bundle's components when they are needed, and keeps them for the next time.

    Args:
        bundle: an open bundle.
        backend: as for :func:`zimgkit.engines.base.open_engine`.
        device: likewise.
        memory_budget: bytes of weights and working memory that may stay open, as the bundle's manifest counts them.
            The engine in use always may. None keeps all that fit the device: where one does not, the others are closed.
        opener: opens an engine.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        device: str | None,
        memory_budget: int | None = None,
        opener: Callable[[Bundle, str, str, str | None], Engine] | None = None,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.device = device
        self.memory_budget = memory_budget
        self._opener = opener
        self._engines: dict[str, Engine] = {}
        """Those that are open; the one used last is last."""

    @contextmanager
    def engine(self, component: str) -> Iterator[Borrowed]:
        """The engine of a component, opened if it is not; kept afterwards if the budget allows.

        Raises:
            BackendError: the backend cannot open it, or there is not enough memory for it alone.
            BundleError: there is no such component, or it is broken.
        """
        if component not in self._engines:
            self._close_beyond(reserved=engine_bytes(self.bundle, component, self.backend))
            self._engines[component] = self.retrying(
                component, lambda: (self._opener or open_engine)(self.bundle, component, self.backend, self.device)
            )
        else:
            self._engines[component] = self._engines.pop(component)
        try:
            yield Borrowed(self, component, self._engines[component])
        finally:
            self._close_beyond(reserved=0)

    def retrying(self, component: str, work: Callable[[], Result]) -> Result:
        """Do something for a component; where the device is full, close all other engines and do it again."""
        try:
            return work()
        except OutOfMemoryError:
            others = [name for name in self._engines if name != component]
            if not others:
                raise
            for name in others:
                self._engines.pop(name).close()
            return work()

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


class Borrowed:
    """An engine in use. Working memory is taken while it runs, so that too may need other engines closed."""

    def __init__(self, pool: EnginePool, component: str, engine: Engine) -> None:
        self._pool = pool
        self._component = component
        self._engine = engine

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> Feeds:
        """See :meth:`zimgkit.engines.base.Engine.upload`."""
        return self._pool.retrying(self._component, lambda: self._engine.upload(feeds))

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """See :meth:`zimgkit.engines.base.Engine.run`."""
        return self._pool.retrying(self._component, lambda: self._engine.run(feeds))


def engine_bytes(bundle: Bundle, component: str, backend: str) -> int:
    """What an engine of a component takes: its plan and working memory where it is compiled, else its weights."""
    sizes = [
        sum(bundle.manifest.files[name].size for name in engine.files) + engine.memory_bytes
        for engine in bundle.engines(component, backend)
    ]
    return max(sizes, default=bundle.component(component).weight_bytes)
