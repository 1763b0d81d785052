"""Ctrl-C inside a step: delivered while the user's closure runs, held back while weights are being written."""

import signal
import threading
from types import FrameType, TracebackType


class _Allowed:
    def __init__(self, owner: "DeferredInterrupts"):
        self._owner = owner

    def __enter__(self) -> None:
        self._owner.allow = True
        self._owner.deliver()

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._owner.allow = False


class DeferredInterrupts:
    """Context in which SIGINT is held back except inside `with self.allowed()`, and delivered at the end at the latest.

    A second interrupt after the first one was delivered waits too: by then the step is taking back what it did.
    Outside the main thread Python delivers no signals, and nothing is done.
    """

    def __init__(self) -> None:
        self.allow = False
        self._pending: tuple[int, FrameType | None] | None = None
        self._previous = None

    def allowed(self) -> _Allowed:
        return _Allowed(self)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pending = (number, frame)
        if self.allow:
            self.deliver()

    def deliver(self) -> None:
        """Hand a held-back interrupt to the handler that was installed before."""
        if self._pending is not None and self._previous is not None:
            arguments, self._pending, self.allow = self._pending, None, False
            self._previous(*arguments)

    def __enter__(self) -> "DeferredInterrupts":
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            if kind is None or not issubclass(kind, KeyboardInterrupt):
                self.deliver()
