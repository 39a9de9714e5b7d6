"""A training run small enough to be killed a hundred times.

`Toys` (used by the tests) starts this file once; it imports torch and lightning and then forks a fresh process for
every run, since the imports take longer than the runs. Faults are made in `toy_faults`, by wrapping what the saving
code calls: the package itself has no switches for them.
"""

import atexit
import functools
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from processes import Patience

READY = "ready\n"  # what a server says when its imports are done
DEFAULTS = {
    "steps": 8,
    "accumulate": 2,
    "every_steps": 3,
    "every_minutes": None,
    "keep_last": 3,
    "keep_best": 0,
    "max_failed_saves": 0,
    "metric": None,
    "ckpt": None,
    "validate_every": None,
    "sanity": 0,  # batches of validation before the first step
    "num_workers": 0,
    "size": 10,  # kB of extra weights
    "pause": 0.0,  # seconds per micro-batch
    "fit": None,  # the real training instead, see `fits`
    "fault": {},  # kill: POINT | signals: [...], at: PLACE, step: N | nan: STEP | anything of `toy_faults.prepare`
}


class Run:
    """A forked training process: `wait` gives its exit code (negative: killed by that signal)."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def _read(self, what: str, seconds: float = 60.0) -> str:
        file = self.folder / f"{self.name}.{what}"
        self._wait_until(lambda: file.exists() and file.read_text().endswith("\n"), seconds, file.name)
        return file.read_text().strip()

    def _wait_until(self, is_there: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for as long as the run works; one that stands still for `seconds` is killed and shown."""
        patience, code = Patience(seconds), self.folder / f"{self.name}.code"
        while True:
            has_ended = code.exists()
            if is_there():
                return
            assert not has_ended or what == code.name, f"{what} did not come before the end:\n{self.output()}"
            if patience.is_lost(self.pid):
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"{what} did not come, and nothing moved for {seconds} s:\n{self.output()}")
            time.sleep(0.005)

    @property
    def pid(self) -> int:
        """Give the process, which is also its group; the server forks it whenever the machine lets it."""
        file, code = self.folder / f"{self.name}.pid", self.folder / f"{self.name}.code"
        while not (file.exists() and file.read_text().endswith("\n")):
            assert not code.exists() or file.exists(), f"it ended before it began:\n{self.output()}"
            time.sleep(0.005)
        return int(file.read_text())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 60.0) -> int:
        return int(self._read("code", seconds))

    def output(self) -> str:
        return (self.folder / f"{self.name}.output").read_text()

    def losses(self) -> list[str]:
        file = self.folder / f"{self.name}.losses"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for_steps(self, count: int) -> None:
        self._wait_until(lambda: len(self.losses()) >= count, 60.0, f"step {count}")

    def weights(self) -> str:
        return self._read("weights")


class Toys:
    """Start runs; close it at the end."""

    script, defaults = __file__, DEFAULTS

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        how = dict(text=True, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.server = subprocess.Popen([sys.executable, self.script], **how)
        self.count = 0

    def start(self, run_dir: Path, environment: dict[str, str] | None = None, **options) -> Run:
        if self.count == 0:  # its imports take as long as the machine is busy, and no run's time
            assert READY in iter(self.server.stdout.readline, ""), "the server of the runs did not come up"
        run_dir.mkdir(parents=True, exist_ok=True)
        self.count += 1
        run = Run(run_dir, f"run{self.count}")
        options = self.defaults | options
        assert options.keys() == self.defaults.keys(), options
        job = {"folder": str(run_dir), "name": run.name, "environment": environment or {}, "options": options}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return run

    def run(self, run_dir: Path, environment: dict[str, str] | None = None, **options) -> tuple[int, Run]:
        run = self.start(run_dir, environment, **options)
        return run.wait(), run

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(30)


@functools.cache
def toys() -> Toys:
    """Give the one server of this test session."""
    started = Toys()
    atexit.register(started.close)
    return started


@functools.cache
def straight_weights(**options) -> str:
    """Give the hash of the final weights of a run that nothing interrupts."""
    with tempfile.TemporaryDirectory() as folder:
        code, run = toys().run(Path(folder), **options)
        assert code == 0, run.output()
        return run.weights()


def serve() -> None:
    # what takes its time, and what a process without rights could not read later
    import toy_faults  # noqa: F401
    import toy_model  # noqa: F401

    import audiossl.training  # noqa: F401

    gc.freeze()  # forks share the memory of what is there now
    sys.stdout.write(READY)
    sys.stdout.flush()
    os.dup2(2, 1)  # nobody reads on
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            leave_with(supervise, json.loads(line))


def leave_with(function, job: dict) -> None:
    """Exit as Python would after `function(job)`, but without taking apart the modules, which takes seconds."""
    code = 0
    try:
        function(job)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        if code == 1:
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def supervise(job: dict) -> None:
    folder, name = Path(job["folder"]), job["name"]
    pid = os.fork()
    if pid == 0:
        os.setsid()
        output = os.open(folder / f"{name}.output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        given = os.environ | job["environment"]
        os.environ.clear()
        os.environ.update({variable: value for variable, value in given.items() if value is not None})
        (folder / f"{name}.pid").write_text(f"{os.getpid()}\n")
        if job["options"].get("fit"):
            import fits

            return fits.train(folder, **job["options"]["fit"])
        return train(folder, name, **job["options"])
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (folder / f"{name}.code").write_text(f"{code}\n")


def train(folder: Path, name: str, **options) -> None:
    import lightning.pytorch as pl
    from toy_faults import prepare
    from toy_model import Toy

    from audiossl.checkpointing import describe_file
    from audiossl.checkpoints.signals import install_early_handlers
    from audiossl.errors import UserError

    install_early_handlers()
    prepare(options["fault"], folder / "checkpoints")
    pl.seed_everything(7, verbose=False)
    model = Toy(folder / f"{name}.losses", options)
    handlers = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
    try:
        fit(model, folder, options)
    except UserError as error:
        for path in sorted((folder / "checkpoints").iterdir()):
            print(f"left: {path.name}: {describe_file(path)}")
        sys.exit(f"UserError: {error}")
    finally:
        assert {signum: signal.getsignal(signum) for signum in handlers} == handlers, "handlers not restored"
    if model.global_rank == 0:
        digest = hashlib.sha256()
        for key, value in model.state_dict().items():
            digest.update(key.encode() + value.numpy().tobytes())
        (folder / f"{name}.weights").write_text(digest.hexdigest() + "\n")


def fit(model, folder: Path, options: dict) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    from audiossl.checkpointing import AtomicCheckpointIO, Checkpointing, resolve_ckpt
    from audiossl.checkpoints.preemption import Preemption

    ckpt = resolve_ckpt(options["ckpt"], folder)
    names = ("every_steps", "every_minutes", "keep_last", "keep_best", "max_failed_saves", "metric")
    settings = {name: options[name] for name in names}
    checkpointing = Checkpointing(folder=folder / "checkpoints", provenance={"config": {"seed": 7}}, **settings)
    world = int(os.environ.get("WORLD_SIZE", 1))
    plugins = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp" if world > 1 else "auto",
        devices=world,
        max_steps=options["steps"],
        max_epochs=-1,
        accumulate_grad_batches=options["accumulate"],
        val_check_interval=(options["validate_every"] or 1) * options["accumulate"],
        limit_val_batches=1.0 if options["validate_every"] else 0,
        num_sanity_val_steps=options["sanity"],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO(), *plugins],
        callbacks=[Preemption(checkpointing), checkpointing],
        default_root_dir=folder,
    )
    trainer.fit(model, ckpt_path=ckpt, weights_only=True)


if __name__ == "__main__":
    serve()
