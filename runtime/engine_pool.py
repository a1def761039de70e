"""The engines a session has open, by component and device, within a budget of memory, for any number of threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from zimgkit.engines.base import Engine, Feeds, Handle, open_engine
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import OutOfMemoryError
from zimgkit.runtime.memory.needs import engine_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

Result = TypeVar("Result")
Opener = Callable[[Bundle, str, str, str | None], Engine]
Key = tuple[str, str | None]
"""Component and device."""


@dataclass(eq=False)
class _Entry:
    """An engine, and who uses it."""

    engine: Engine | None = None
    borrows: int = 0
    opening: bool = False
    """Whether a thread is opening it now."""
    waiting: int = 0
    """Borrows of threads that can go on only when another thread does something."""
    behind: list[list[_Entry]] = field(default_factory=list)
    """What else threads have borrowed that wait for this to be opened."""
    closing: bool = False
    """Whether it is to be closed when the last borrow ends."""


class EnginePool:
    """Opens the engines of a bundle's components when they are needed, and keeps them for the next time.

    An engine is closed only while nobody has borrowed it: because the budget asks for it, because a device is full, or
    because the pool is closed.

    Args:
        bundle: an open bundle.
        backend: as for :func:`zimgkit.engines.base.open_engine`.
        memory_budget: bytes of weights and working memory that may stay open, as the bundle's manifest counts them.
            Borrowed engines always may. None keeps all that fit the device: where one does not, others are closed.
        opener: opens an engine.
    """

    def __init__(
        self, bundle: Bundle, backend: str, memory_budget: int | None = None, opener: Opener | None = None
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.memory_budget = memory_budget
        self.in_turn: Collection[str] = ()
        """Components whose engines are closed as soon as nobody needs them, whatever the budget."""
        self._opener = opener
        self._entries: dict[Key, _Entry] = {}
        """Those that are open or being opened; the one borrowed last is last."""
        self._leaving: list[_Entry] = []
        """Those to be closed when they are given back."""
        self._wanted: Counter[Key] = Counter()
        self._changes = 0
        """Counts engines that were given back or closed."""
        self._returned = threading.Condition(threading.RLock())
        """Guards all of the above; told when an engine is given back or opened."""
        self._own = threading.local()

    @contextmanager
    def engine(self, component: str, device: str | None = None) -> Iterator[Borrowed]:
        """Borrow the engine of a component, opened if it is not; afterwards it stays open if the budget allows.

        Raises:
            BackendError: the backend cannot open it, or there is not enough memory for it.
            BundleError: there is no such component, or it is broken.
        """
        key = (component, device)
        with self._returned:
            entry = self._entries.pop(key, None) or _Entry()
            self._entries[key] = entry
            entry.borrows += 1
            self._borrowed().append(entry)
        try:
            yield Borrowed(self, self._opened(key, entry))
        finally:
            self._give_back(key, entry)

    def keep(self, component: str, device: str | None = None) -> None:
        """Leave an engine open, whatever the budget says, until :meth:`let_go` is called as often as this."""
        with self._returned:
            self._wanted[component, device] += 1

    def let_go(self, component: str, device: str | None = None) -> None:
        """Undo one :meth:`keep`."""
        with self._returned:
            self._wanted[component, device] -= 1
            self._close_beyond(reserved=0)

    @property
    def opened(self) -> list[str]:
        """The components that are open, once for each device."""
        with self._returned:
            return [component for (component, _), entry in self._entries.items() if entry.engine]

    def retrying(self, work: Callable[[], Result]) -> Result:
        """Do something; where a device is full, close all engines that nobody has borrowed, and do it again.

        Where there are none, wait until another thread gives one back, unless all of them wait.
        """
        while True:
            before = self._changes
            try:
                return work()
            except OutOfMemoryError:
                with self._returned:
                    # What another thread gave back or closed meanwhile may be room enough.
                    if self._changes == before and not self._close_idle() and not self._wait():
                        raise

    def close_idle(self, which: Callable[[str], bool]) -> bool:
        """Close engines of components for which that holds, where nobody has borrowed them or wants them kept.

        Returns:
            Whether there was any.
        """
        with self._returned:
            idle = [key for key in self._entries if which(key[0]) and self._is_idle(key)]
            for key in idle:
                self._close(key)
            return bool(idle)

    def close(self) -> None:
        """Close all engines that nobody has borrowed now, and the others when they are given back."""
        with self._returned:
            self._close_idle()
            for entry in self._entries.values():
                entry.closing = True
            self._leaving.extend(self._entries.values())
            self._entries.clear()

    def _borrowed(self) -> list[_Entry]:
        """What this thread has borrowed."""
        if not hasattr(self._own, "entries"):
            self._own.entries = []
        entries: list[_Entry] = self._own.entries
        return entries

    def _opened(self, key: Key, entry: _Entry) -> Engine:
        """The engine of an entry: one thread opens it, the others wait for that."""
        with self._returned:
            while entry.opening:
                outer = [other for other in self._borrowed() if other is not entry]
                entry.behind.append(outer)
                _mark(outer, 1)
                while entry.opening:
                    self._returned.wait()
            if entry.engine is not None:
                return entry.engine
            entry.opening = True
        try:
            component, device = key
            self._close_beyond(reserved=engine_bytes(self.bundle, component, self.backend))
            opener = self._opener or open_engine
            entry.engine = self.retrying(lambda: opener(self.bundle, component, self.backend, device))
            return entry.engine
        finally:
            with self._returned:
                entry.opening = False
                # Here, and not where they wake up: until then they would count as waiting.
                for outer in entry.behind:
                    _mark(outer, -1)
                entry.behind.clear()
                self._returned.notify_all()

    def _give_back(self, key: Key, entry: _Entry) -> None:
        with self._returned:
            entry.borrows -= 1
            self._borrowed().remove(entry)
            self._changes += 1
            if not entry.borrows:
                if entry.closing:
                    self._leaving.remove(entry)
                    if entry.engine:
                        entry.engine.close()
                elif entry.engine is None and self._entries.get(key) is entry:
                    del self._entries[key]
            self._close_beyond(reserved=0)
            self._returned.notify_all()

    def _close_idle(self) -> bool:
        with self._returned:
            idle = [key for key, entry in self._entries.items() if entry.engine and not entry.borrows]
            for key in idle:
                self._close(key)
            return bool(idle)

    def _wait(self) -> bool:
        """Wait a moment for other threads to give engines back; False where all that have some wait themselves."""
        with self._returned:
            own = self._borrowed()
            _mark(own, 1)
            try:
                others = (*self._entries.values(), *self._leaving)
                if not any(_is_active(entry) for entry in others):
                    return False
                self._returned.wait(timeout=1)
                return True
            finally:
                _mark(own, -1)

    def _close(self, key: Key) -> None:
        self._changes += 1
        engine = self._entries.pop(key).engine
        if engine:
            engine.close()

    def _close_beyond(self, reserved: int) -> None:
        """Close engines to be opened in turn, then those used longest ago until the others and what is reserved fit."""
        if self.memory_budget is None and not self.in_turn:
            return
        with self._returned:
            for key in [key for key in self._entries if _base(key) in self.in_turn and self._is_idle(key)]:
                self._close(key)
            if self.memory_budget is None:
                return
            opened = [key for key, entry in self._entries.items() if entry.engine]
            sizes = {key: engine_bytes(self.bundle, key[0], self.backend) for key in opened}
            held = reserved + sum(sizes.values())
            for key, size in sizes.items():
                if held <= self.memory_budget:
                    return
                if self._is_idle(key):
                    self._close(key)
                    held -= size

    def _is_idle(self, key: Key) -> bool:
        """Whether an engine is open, and nobody has borrowed it or wants it kept."""
        entry = self._entries[key]
        return entry.engine is not None and not entry.borrows and self._wanted[key] <= 0


def _base(key: Key) -> str:
    """The component whose weights an engine has: a variant's own is another's."""
    return key[0].partition(".")[0]


def _mark(entries: Iterable[_Entry], change: int) -> None:
    for entry in entries:
        entry.waiting += change


def _is_active(entry: _Entry) -> bool:
    """Whether a thread that has borrowed it will give it back without the help of another."""
    if entry.engine is None:
        return entry.opening and not entry.waiting
    return entry.borrows > entry.waiting


class Borrowed:
    """An engine in use. Working memory is taken while it runs, so that too may need other engines closed."""

    def __init__(self, pool: EnginePool, engine: Engine) -> None:
        self._pool = pool
        self._engine = engine

    @property
    def device(self) -> str:
        """Where it runs: handles are good for all engines there."""
        return self._engine.device

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Handle]:
        """See :meth:`zimgkit.engines.base.Engine.upload`."""
        return self._pool.retrying(lambda: self._engine.upload(feeds))

    def download(self, handle: Handle) -> NDArray[Any]:
        """See :meth:`zimgkit.engines.base.Engine.download`."""
        return self._engine.download(handle)

    def run(self, feeds: Feeds, keep: Collection[str] = ()) -> dict[str, Any]:
        """See :meth:`zimgkit.engines.base.Engine.run`."""
        return self._pool.retrying(lambda: self._engine.run(feeds, keep))

    def run_together(self, sets: Sequence[Feeds]) -> list[dict[str, Any]]:
        """See :meth:`zimgkit.engines.base.Engine.run_together`."""
        return self._pool.retrying(lambda: self._engine.run_together(sets))
