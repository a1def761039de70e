"""What waits to be drawn: in turn between clients, and bounded in seconds of work."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from zimgkit.runtime.serve.errors import closing, queue_full, too_long

if TYPE_CHECKING:
    from zimgkit.runtime.serve.drawing import Drawing


class Waiting:
    """Drawings that wait for a device. A client with many waits behind one with few, and each keeps its own order.

    Args:
        max_seconds: how much work may wait; what would take longer alone is refused.
    """

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self._clients: dict[str, deque[Drawing]] = {}
        """Client -> what it waits for; the one whose turn it is is first."""
        self._seconds = 0.0
        self._changed = threading.Condition()
        self.closed = False

    def put(self, drawing: Drawing) -> None:
        """Add one at the end of its client's.

        Raises:
            ApiError: it takes too long, more waits than may, or nothing is begun any more.
        """
        with self._changed:
            if self.closed:
                raise closing()
            if drawing.seconds > self.max_seconds:
                raise too_long(drawing.seconds, self.max_seconds)
            if self._seconds + drawing.seconds > self.max_seconds:
                raise queue_full(self._seconds, min(120.0, self._seconds + drawing.seconds - self.max_seconds))
            self._clients.setdefault(drawing.client, deque()).append(drawing)
            self._seconds += drawing.seconds
            self._changed.notify()

    def take(self) -> Drawing | None:
        """The next one, waited for; None when there will be none any more."""
        with self._changed:
            while not self._clients:
                if self.closed:
                    return None
                self._changed.wait()
            client = next(iter(self._clients))
            own = self._clients.pop(client)
            drawing = own.popleft()
            if own:
                self._clients[client] = own  # Behind the others.
            self._seconds = max(0.0, self._seconds - drawing.seconds) if self._clients else 0.0
            return drawing

    def remove(self, drawing: Drawing) -> bool:
        """Take one out that nobody waits for any more; whether it was there."""
        with self._changed:
            own = self._clients.get(drawing.client)
            if own is None or drawing not in own:
                return False
            own.remove(drawing)
            if not own:
                del self._clients[drawing.client]
            self._seconds = max(0.0, self._seconds - drawing.seconds) if self._clients else 0.0
            return True

    def order(self) -> list[Drawing]:
        """All that wait, in the order in which they will be taken."""
        with self._changed:
            queues = [list(own) for own in self._clients.values()]
        longest = max(map(len, queues), default=0)
        return [own[turn] for turn in range(longest) for own in queues if turn < len(own)]

    @property
    def seconds(self) -> float:
        """How much work waits."""
        with self._changed:
            return self._seconds

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._clients.values()))

    def close(self) -> None:
        """Take nothing more; what waits is still given out."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
