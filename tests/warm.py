"""Start the product's scripts without waiting for their imports, which take longer than most runs in the tests.

A server imports the libraries once, then forks a process for every command: own arguments, environment, folder, output
and signals, the script run as `__main__`. What a fresh interpreter does differently (what is imported when, variables
that libraries read while they are imported) needs a real one: `commands.start(..., fresh=True)`.
"""

import atexit
import functools
import gc
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

READY = "ready\n"  # what the server says when its imports are done


class Process:
    """A started script, used as `subprocess.Popen` is; its output is on `communicate` only."""

    def __init__(self, place: Path):
        self._place = place
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        return int(self._read("pid", None))

    def poll(self) -> int | None:
        if (
            self.returncode is None
            and (file := self._place / "code").exists()
            and (text := file.read_text())[-1:] == "\n"
        ):
            self.returncode = int(text)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.returncode = int(self._read("code", timeout))
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return (self._place / "output").read_text(errors="replace"), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self, name: str, timeout: float | None) -> str:
        file, end = self._place / name, None if timeout is None else time.monotonic() + timeout
        while not (file.exists() and (text := file.read_text()).endswith("\n")):
            if end is not None and time.monotonic() > end:
                output = (self._place / "output").read_text(errors="replace")[-4000:]
                raise subprocess.TimeoutExpired(f"{self._place.name}:\n{output}", timeout)
            time.sleep(0.01)
        return text


class Server:
    """Fork processes from one that has imported everything; close it at the end."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="warm")
        self.numbers = itertools.count()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], text=True, env=environment, **pipes)
        self.is_ready = False

    def start(self, script: Path, arguments: list[str], cwd: Path, environment: dict[str, str]) -> Process:
        if not self.is_ready:  # its imports take as long as the machine is busy, and no command's time
            assert READY in iter(self.process.stdout.readline, ""), "the server of the commands did not come up"
            self.is_ready = True
        place = Path(self.folder.name, str(next(self.numbers)))
        place.mkdir()
        (place / "output").touch()
        job = dict(place=str(place), argv=[str(script), *arguments], cwd=str(cwd), environment=environment)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Process(place)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.folder.cleanup()


@functools.cache
def server() -> Server:
    """Give the one server of this test process."""
    started = Server()
    atexit.register(started.close)
    return started


def serve() -> None:
    sys.path.pop(0)  # tests/, which a user's script does not see
    import sklearn.linear_model  # noqa: F401

    import audiossl.probes.run
    import audiossl.tuning.runs  # noqa: F401

    gc.freeze()  # forks share the memory of what is there now
    sys.stdout.write(READY)
    sys.stdout.flush()
    os.dup2(2, 1)  # nobody reads on
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            supervise(json.loads(line))


def supervise(job: dict) -> None:
    """Fork the script's process, wait for it, and note how it ended."""
    place = Path(job["place"])
    pid = os.fork()
    if pid == 0:
        leave_with(job, place)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (place / "code").write_text(f"{code}\n")
    os._exit(0)


def leave_with(job: dict, place: Path) -> None:
    """Become the script's process; exit as Python would, but for taking the modules apart, which takes seconds."""
    output = os.open(place / "output", os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    sys.argv = job["argv"]
    sys.path[:0] = [os.path.dirname(sys.argv[0])]
    (place / "pid").write_text(f"{os.getpid()}\n")
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
