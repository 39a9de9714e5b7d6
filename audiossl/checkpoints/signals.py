"""How does a run hear that it has to leave, from its first line of Python on?

A handler only notes what was asked for: 75 (SIGTERM, SIGUSR1: pre-empted, run me again) or 130 (SIGINT). Before
training there is nothing to save, so the process leaves at once; during training `preemption` acts on the
note at the next step boundary. No torch here: `install_early_handlers` has to work while torch is still being
imported.
"""

import os
import signal
import threading

PREEMPTED, INTERRUPTED = 75, 130
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AT_ONCE, AT_BOUNDARY, LEAVING = "at once", "at the next step", "already"


class Preempted(SystemExit):
    """Leave because a signal asked for it; `code` is the exit code, 75 or 130, also where nobody catches this."""

    def __init__(self, code: int):
        super().__init__(code)


class _Request:
    code = 0  # what to exit with; 0: nobody asked
    when = AT_ONCE
    interrupts = 0


request = _Request()


def install_early_handlers() -> None:
    """Make SIGTERM, SIGUSR1 and SIGINT end this process with 75, 75 and 130, or tell a training run to save and end.

    Does nothing outside of the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, _note)


def _note(signum, frame) -> None:
    request.interrupts += signum == signal.SIGINT
    if request.interrupts > 1:
        _say(f"second SIGINT: leaving without saving, exit code {INTERRUPTED}")
        os._exit(INTERRUPTED)
    code = INTERRUPTED if signum == signal.SIGINT else PREEMPTED
    if code > request.code:
        _say(f"{signal.Signals(signum).name}: leaving {request.when}, exit code {code}")
    request.code = max(request.code, code)
    if request.when == AT_ONCE:
        request.when = LEAVING
        raise Preempted(request.code)


def _say(text: str) -> None:
    # a handler may run in the middle of a print, where print() and logging cannot be entered again
    os.write(2, f"audiossl[{os.getpid()}]: {text}\n".encode())
