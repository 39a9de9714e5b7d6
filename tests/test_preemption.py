"""Signals to real training processes: what is saved, with which code they leave, and that nothing is lost."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from toy_training import Toys, straight_weights, toys

from audiossl.loading.loader import start_worker


@pytest.fixture(name="toys", scope="module")
def _toys() -> Toys:
    return toys()


def steps_saved(folder) -> list[int]:
    return sorted(int(path.stem.split("=")[1]) for path in (folder / "checkpoints").glob("step=*.ckpt"))


PLACES = {  # within a run: the step at which the signal comes, and the one that is saved
    "forward": (4, 5),
    "backward": (4, 5),
    "optimizer": (4, 5),
    "batch end": (5, 6),  # in the module's hook, after the boundary of step 5
    "save": (6, 6),
    "validation 1": (4, 4),
}


def check_signal_and_resume(toys, folder, at: str, signals: list[str]) -> None:
    """Signal a run at this place: it leaves with one checkpoint at a boundary; resumed, it ends as never signalled."""
    step, saved = PLACES[at]
    started = time.monotonic()
    fault = {"at": at, "step": step, "signals": signals}
    code, run = toys.run(folder, validate_every=2, every_steps=100 if at != "save" else 3, fault=fault)
    assert code == (130 if "SIGINT" in signals else 75), run.output()
    assert time.monotonic() - started < 30
    assert steps_saved(folder) == ([saved] if at != "save" else [3, saved])
    assert [line.split()[0] for line in run.losses()] == [str(step) for step in range(1, saved + 1)]
    code, resumed = toys.run(folder, validate_every=2, ckpt="last")
    assert code == 0, resumed.output()
    assert resumed.losses()[0].startswith(f"{saved + 1} ")
    assert resumed.weights() == straight_weights(validate_every=2)


@pytest.mark.faults("P5")
@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("signals", [["SIGTERM"], ["SIGUSR1"]], ids=lambda signals: signals[0])
def test_a_signal_saves_at_the_next_step_and_the_resumed_run_ends_with_the_same_weights(toys, tmp_path, at, signals):
    check_signal_and_resume(toys, tmp_path, at, signals)


@pytest.mark.faults("P5")
@pytest.mark.parametrize("at", ["save", "forward"])
def test_more_signals_change_nothing(toys, tmp_path, at):
    check_signal_and_resume(toys, tmp_path, at, ["SIGTERM", "SIGTERM", "SIGUSR1"])


@pytest.mark.faults("P6")
def test_one_interrupt_saves_and_leaves(toys, tmp_path):
    check_signal_and_resume(toys, tmp_path, "forward", ["SIGINT"])


@pytest.mark.faults("P5")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("at", ["start", "sanity 0"])
def test_a_signal_before_the_first_step_leaves_without_a_checkpoint(toys, tmp_path, at, name):
    fault = {"at": at, "step": 0, "signals": [name]}
    code, run = toys.run(tmp_path, sanity=2, validate_every=2, fault=fault)
    assert code == 75, run.output()
    assert steps_saved(tmp_path) == [] and run.losses() == []
    code, resumed = toys.run(tmp_path, sanity=2, validate_every=2, ckpt="last")
    assert (code, resumed.weights()) == (0, straight_weights(validate_every=2)), resumed.output()


@pytest.mark.faults("P6")
def test_a_second_interrupt_leaves_at_once_without_saving(toys, tmp_path):
    code, run = toys.run(tmp_path, fault={"at": "forward", "step": 4, "signals": ["SIGINT", "SIGINT"]})
    assert code == 130, run.output()
    assert steps_saved(tmp_path) == [3]
    code, resumed = toys.run(tmp_path, ckpt="must")
    assert (code, resumed.weights()) == (0, straight_weights())


@pytest.mark.faults("P5")
def test_a_signal_in_the_last_step_saves_the_end_and_asks_to_be_run_again(toys, tmp_path):
    code, run = toys.run(tmp_path, fault={"at": "forward", "step": 7, "signals": ["SIGTERM"]})
    assert code == 75, run.output()
    code, resumed = toys.run(tmp_path, ckpt="last")
    assert (code, resumed.losses(), resumed.weights()) == (0, [], straight_weights())


@pytest.mark.faults("P5")
@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_before_torch_is_imported_leaves_at_once(root, name, code):
    program = """import sys, time
from audiossl.checkpoints.signals import install_early_handlers
install_early_handlers()
assert "torch" not in sys.modules
print("ready", flush=True)
time.sleep(60)"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    assert process.wait(10) == code


def test_loader_workers_go_on_when_the_whole_process_group_is_signalled(toys, tmp_path):
    run = toys.start(tmp_path, num_workers=2, pause=0.05)
    run.wait_for_steps(2)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        os.killpg(run.pid, signum)
    assert run.wait() == 75, run.output()
    assert "DataLoader worker" not in run.output()
    code, resumed = toys.run(tmp_path, ckpt="last", num_workers=2)
    assert (code, resumed.weights()) == (0, straight_weights())


def hang(ready) -> None:
    start_worker(0)
    ready.set()
    time.sleep(60)


def test_a_hanging_worker_ignores_strangers_but_ends_when_its_parent_asks():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=hang, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(10)
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["/bin/sh", "-c", f"kill -{name} {worker.pid}"], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


def start_two_ranks(toys, folder, elsewhere=(), **options):
    """Start two ranks as srun or torchrun would: each on its own, with the environment that tells it its place."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "toy"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    folders = [elsewhere[rank] if rank in elsewhere else folder for rank in (0, 1)]
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return [toys.start(place, common | rank, **options) for place, rank in zip(folders, ranks, strict=True)]


def signal_two_ranks(toys, folder, order) -> None:
    """Signal the ranks in `order`, 50 ms apart, in the middle of training; check how they leave and what is there."""
    runs = start_two_ranks(toys, folder, pause=0.03, steps=40, every_steps=100)
    runs[0].wait_for_steps(3)
    for rank in order:
        os.kill(runs[rank].pid, signal.SIGTERM)
        time.sleep(0.05)
    codes = [run.wait(30) for run in runs]
    assert codes == [75, 75], runs[0].output() + runs[1].output()
    (saved,) = steps_saved(folder)
    assert all(f"step {saved} is saved; leaving" in run.output() for run in runs), "the ranks left at different steps"


@pytest.mark.faults("X5")
@pytest.mark.parametrize("order", [[0], [1], [1, 0]], ids=str)
def test_all_ranks_leave_together_whichever_of_them_was_signalled(toys, tmp_path, order):
    signal_two_ranks(toys, tmp_path, order)


@pytest.mark.slow
@pytest.mark.faults("X5")
@pytest.mark.parametrize("trial", range(4))
@pytest.mark.parametrize("order", [[0], [1], [0, 1], [1, 0], [0, 0, 1, 1]], ids=str)
def test_all_ranks_leave_together_every_time(toys, tmp_path, order, trial):
    signal_two_ranks(toys, tmp_path, order)


@pytest.mark.faults("X5", "R7")
def test_two_ranks_resume_to_the_weights_of_the_straight_run(toys, tmp_path):
    straight = start_two_ranks(toys, tmp_path / "straight")
    assert [run.wait() for run in straight] == [0, 0], straight[1].output()
    fault = {"at": "forward", "step": 4, "signals": ["SIGTERM"], "rank": 1}
    broken = start_two_ranks(toys, tmp_path / "broken", fault=fault)
    assert [run.wait() for run in broken] == [75, 75], broken[1].output()
    resumed = start_two_ranks(toys, tmp_path / "broken", ckpt="last")
    assert [run.wait() for run in resumed] == [0, 0], resumed[1].output()
    assert resumed[0].weights() == straight[0].weights()


def test_a_save_that_fails_on_one_rank_ends_all_ranks(toys, tmp_path):
    runs = start_two_ranks(toys, tmp_path, size=3000, fault={"limit": 5_000_000})
    assert [run.wait(30) for run in runs] == [1, 1], runs[1].output()
    assert "File too large" in runs[0].output() and "another rank failed" in runs[1].output()


def test_ranks_that_resume_from_different_steps_are_stopped(toys, tmp_path):
    assert toys.run(tmp_path)[0] == 0
    (tmp_path / "other").mkdir()
    runs = start_two_ranks(toys, tmp_path, steps=10, ckpt="last", elsewhere={1: tmp_path / "other"})
    assert [run.wait(30) for run in runs] == [1, 1], runs[1].output()
    assert all("different steps, 0 to 8" in run.output() for run in runs)


def test_under_slurm_nobody_requeues_behind_our_back(toys, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\ntouch {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    names = {"JOB_ID": "7", "JOB_NAME": "toy", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    slurm = {f"SLURM_{name}": value for name, value in names.items()} | {"SLURM_NNODES": "1"}
    slurm |= {"SLURM_NTASKS_PER_NODE": "1", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    code, run = toys.run(tmp_path, slurm, fault={"at": "backward", "step": 4, "signals": ["SIGUSR1", "SIGTERM"]})
    assert code == 75, run.output()
    assert steps_saved(tmp_path) == [3, 5] and not (tmp_path / "requeued").exists()
    assert not list(tmp_path.rglob("hpc_ckpt*"))
