"""What ends a wait for a worker that has stopped answering?"""

from __future__ import annotations

import math
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Watch:
    """Kill workers that keep the trainer waiting where no time-out of torch's can end the wait.

    A worker that stands still altogether (stopped, frozen, out of reach) does not answer when the trainer fetches the
    memory of a batch it has finished, nor when it is told to end; and Python waits at its exit for every process it
    has started. Once killed, the trainer's wait ends with an error.
    """

    def __init__(self, workers: list[multiprocessing.process.BaseProcess]):
        self.has_killed = False
        self._workers = workers
        self._deadline = math.inf
        self._is_over = threading.Event()
        if workers:
            threading.Thread(target=self._run, daemon=True).start()

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Give what is inside so much time."""
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = math.inf

    def end(self) -> None:
        """Stop watching."""
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.wait(0.5):
            if time.monotonic() > self._deadline:
                self.has_killed = True
                for worker in self._workers:
                    worker.kill()
