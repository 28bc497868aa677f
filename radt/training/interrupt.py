"""Ctrl-C between two steps, never within one, so that what is saved is a whole step."""

import signal
import threading
from types import FrameType, TracebackType


class StopOnInterrupt:
    """Within it the first Ctrl-C only sets `requested`, so that no step is cut in two; the second one interrupts."""

    requested = False

    def __enter__(self) -> "StopOnInterrupt":
        # Only the main thread may set a handler. Elsewhere nothing is caught and `requested` stays False.
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
