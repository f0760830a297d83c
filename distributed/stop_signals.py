"""Requests to stop: SIGTERM, SIGINT and SIGUSR1 end a run after the current step, with its state saved.

All ranks stop at the same step. A signal reaches one rank (`local_signal`); it counts once all ranks know of
it (`agreed_signal`), which the exchange of each step tells them. With one process it counts at once. An
evaluation is left at once (`interruptible`).
"""

import contextlib
import logging
import signal
from collections.abc import Iterator, Sequence

from distributed import collectives
from utils import Interrupted

logger = logging.getLogger(__name__)

EXIT_REQUEUE = 75  # exit status of a run that was asked to stop and can go on (EX_TEMPFAIL)


class StopSignals:
    """Handlers of the signals that ask a run to stop; used as a context manager.

    A second SIGINT stops at once. The handlers from before are put back at the end.

    Args:
        on: False installs no handler: signals do what they do without this class.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, enabled: bool = False):
        self.enabled = enabled
        self.may_leave_now = False  # whether the handler itself may raise
        self.previous_handlers = {}
        self.local_signal = 0  # number of the signal that this rank got last
        self.agreed_signal: str | None = None  # name of the signal that all ranks know of

    def __enter__(self) -> "StopSignals":
        if self.enabled:
            self.previous_handlers = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.local_signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.local_signal = number
        name = self._local_name
        logger.warning("%s: finishing the step and saving it; once more Ctrl-C stops at once", name)
        if collectives.world_size() == 1:  # several ranks agree in the next exchange
            self.agreed_signal = name
        self._leave_if_asked()

    @property
    def _local_name(self) -> str:
        return signal.Signals(self.local_signal).name

    def merge_signals(self, local_signals: Sequence[float]) -> None:
        """Agree on what the ranks have received: of each rank the number of a signal, or 0."""
        if any(local_signals):
            self.agreed_signal = signal.Signals(int(max(local_signals))).name

    def raise_if_stopped(self) -> None:
        """Raise Interrupted on all ranks where one of them has been asked to stop; an exchange."""
        if self.enabled and collectives.world_size() > 1:
            self.merge_signals([number for (number,) in collectives.gather([self.local_signal])])
        if self.agreed_signal:
            raise Interrupted(self.agreed_signal)

    def _leave_if_asked(self) -> None:
        """Raise Interrupted where nothing has to be finished first and this rank has been asked to stop."""
        if self.may_leave_now and self.local_signal:
            raise Interrupted(self._local_name)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a request raises Interrupted at once.

        With several ranks this holds in work that a rank does by itself. Where a forward needs all ranks, no
        rank may leave: the request counts at the end.
        """
        self.raise_if_stopped()
        if collectives.world_size() == 1:
            with self._leaving():
                yield
            return
        ranks_stay = collectives.forwards_are_exchanges()
        if self.enabled and not ranks_stay:
            collectives.local_work = self._leaving
        try:
            yield
        finally:
            collectives.local_work = contextlib.nullcontext
        if ranks_stay:
            self.raise_if_stopped()

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        """Let the handler raise inside; a request that came before raises first."""
        try:
            self.may_leave_now = True
            self._leave_if_asked()
            yield
        finally:
            self.may_leave_now = False
