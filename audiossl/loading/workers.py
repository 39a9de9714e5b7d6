"""How does a worker start, whom does it obey, and what ends a wait for one that has stopped answering?

Workers come from a fork server: forking the trainer itself would copy its threads' locks, and a spawned worker imports
torch anew (seconds each on a laptop), while the server imports the loader once, and neither lightning nor hydra.
Signals concern the trainer alone, which stops its workers itself.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

from torch.utils.data import get_worker_info

from audiossl.loading.handover import Ring, Slots

FOR_THE_TRAINER = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def fork_server() -> multiprocessing.context.BaseContext:
    """Start the fork server with the trainer's signals blocked: it inherits the mask, and so does each worker."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["audiossl.loading.loader"])
    resource_tracker.ensure_running()  # the server would start it, and its start unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINER)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start_worker(worker: int, environment: dict[str, str] | None = None, ring: Ring | None = None) -> None:
    """Leave signals to the trainer; end when it ends, or when it says so to a worker that hangs.

    `environment` is the trainer's; the fork server's may be older. Batches go into its slots of `ring`.
    """
    os.environ.update(environment or {})
    if ring is not None:
        get_worker_info().dataset.slots = Slots(ring, worker)
    signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINER)
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "only a worker process starts like this"
    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=_follow, args=(trainer,), daemon=True).start()
    else:  # macOS cannot tell who sent a signal: obey it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        threading.Thread(target=lambda: (trainer.join(), os._exit(0)), daemon=True).start()


def _follow(trainer: multiprocessing.process.BaseProcess) -> None:
    """Exit on a SIGTERM that comes from the trainer, and when the trainer is gone.

    torch's own watch compares parents, but a worker's parent is the fork server, which lives as long as any worker.
    """
    while trainer.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 2.0)
        if received is not None and received.si_pid == trainer.pid:
            break
    os._exit(0)


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
