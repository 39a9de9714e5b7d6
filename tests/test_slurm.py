"""Jobs of `slurm/run.sbatch` on a real SLURM of two nodes: signalled, killed, requeued, and nothing is lost."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from clusters import Cluster, why_not
from commands import TINY, environment, metrics
from conftest import ROOT

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "none")
TWO = ("--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1")
SECONDS = 240


@pytest.fixture(scope="module")
def cluster():
    started = Cluster(grace=30)
    yield started
    started.stop()


class Job:
    """A submitted job: what SLURM says of it, and the run that it left."""

    def __init__(self, cluster: Cluster, folder: Path, *words: str, script: Path = ROOT / "slurm" / "run.sbatch"):
        self.cluster, self.folder = cluster, folder
        options = [f"--output={folder}/job-%j.log", f"--chdir={folder}"]
        where = environment() | {name: cluster.environment[name] for name in ("SLURM_CONF", "PATH")}
        where |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{where['PATH']}"}
        flags = [word for word in words if word.startswith("--")]
        arguments = [word for word in words if not word.startswith("--")]  # Hydra's one flag is -m
        command = ["sbatch", "--parsable", *options, *flags, str(script), str(ROOT / "train.py"), *arguments]
        self.id = subprocess.check_output(command, cwd=folder, env=where, text=True).strip()

    def says(self, key: str) -> str:
        return re.search(rf"\b{key}=(\S*)", self.cluster.run("scontrol", "show", "job", "--oneliner", self.id))[1]

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.rglob("*.log")))

    def wait(self, *states: str, seconds: float = SECONDS) -> str:
        """Wait until the job is in one of `states`, and return it."""
        end = time.monotonic() + seconds
        while (state := self.says("JobState")) not in states:
            over = state in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED", "NODE_FAIL")
            assert not over and time.monotonic() < end, f"{state}, not {states}:\n{self.log()[-6000:]}"
            time.sleep(0.2)
        return state

    def wait_for_step(self, run: Path, step: int) -> None:
        end = time.monotonic() + SECONDS
        while not ((run / "metrics.csv").exists() and len(metrics(run)) > step):
            assert time.monotonic() < end and self.says("JobState") in ("RUNNING", "PENDING"), self.log()[-6000:]
            time.sleep(0.1)

    def signal(self, name: str) -> None:
        self.cluster.run("scancel", f"--signal={name}", self.id)

    def start_again(self) -> None:
        """Wait until the job is back in the queue, and let it start without SLURM's two minutes' pause."""
        self.wait("PENDING")
        self.cluster.start_now(self.id)


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"]


def assert_equal(run: Path, straight: Path) -> None:
    ours, theirs = weights(run), weights(straight)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("trace.csv", "trace-rank=1.csv"):
        assert (run / name).read_text() == (straight / name).read_text()


def steps(run: Path) -> list[int]:
    return [int(row["step"]) for row in metrics(run)]


@pytest.mark.faults("X15")
def test_a_job_on_two_nodes_that_is_signalled_requeues_itself_and_does_every_step_once(cluster, tmp_path):
    """X15: USR1 to the ranks of a two-node job; it comes back by itself and goes on."""
    job, run = Job(cluster, tmp_path, *TWO, *TINY, "name=mine", "trainer.max_steps=120"), tmp_path / "runs" / "mine"
    job.wait_for_step(run, 5)
    job.signal("USR1")
    job.start_again()
    job.wait("COMPLETED")
    assert job.says("Restarts") == "1" and job.says("ExitCode") == "0:0"
    assert steps(run) == list(range(120))
    assert json.loads((run / "results.json").read_text())["status"] == "finished"
    assert job.log().count("requeue 1") == 1 and "start 2" in job.log()
    assert {path.name for path in run.glob("slurm-*.log")} == {f"slurm-{job.id}-{rank}.log" for rank in (0, 1)}


@pytest.mark.slow
@pytest.mark.faults("X15")
@pytest.mark.timeout(900)
def test_a_job_requeued_three_times_ends_with_the_weights_of_an_undisturbed_one(cluster, tmp_path):
    """X15: three requeues; the same weights, clips and noise bit for bit, one run id, every step once."""
    settings = (*TINY, "trainer.max_steps=300", "trace=true", "logger=wandb")
    straight = Job(cluster, tmp_path, *TWO, *settings, "name=straight")
    straight.wait("COMPLETED")
    job, run = Job(cluster, tmp_path, *TWO, *settings, "name=mine"), tmp_path / "runs" / "mine"
    for step in (20, 90, 180):
        job.wait_for_step(run, step)
        job.signal("USR1")
        job.start_again()
    job.wait("COMPLETED")
    assert job.says("Restarts") == "3"
    assert steps(run) == steps(tmp_path / "runs" / "straight") == list(range(300))
    assert_equal(run, tmp_path / "runs" / "straight")
    identifier = (run / "wandb_id.txt").read_text().strip()
    written = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(written) == 4 and all(name.endswith(f"-{identifier}") for name in written)


@pytest.mark.slow
@pytest.mark.faults("X15")
@pytest.mark.timeout(900)
def test_a_job_whose_time_runs_out_is_signalled_before_by_slurm_and_comes_back(cluster, tmp_path):
    """X15: `--signal=USR1@N`; SLURM counts time limits in minutes, and signals up to one earlier."""
    words = ("--time=3", "--signal=USR1@60", *TWO, *TINY, "name=mine", "trainer.max_steps=1000000")
    job, run = Job(cluster, tmp_path, *words), tmp_path / "runs" / "mine"
    job.wait("RUNNING")
    job.start_again()
    saved = len(metrics(run))
    job.wait_for_step(run, saved + 20)
    cluster.run("scancel", job.id)
    job.wait("CANCELLED")
    assert job.says("Restarts") == "1" and saved > 1 and steps(run)[: saved + 20] == list(range(saved + 20))
    assert "SIGUSR1: leaving at the next step" in job.log() and "TIME LIMIT" not in job.log()


@pytest.mark.slow
@pytest.mark.faults("X15", "P2")
@pytest.mark.timeout(900)
def test_a_job_killed_in_the_middle_of_a_save_starts_from_the_newest_whole_checkpoint(cluster, tmp_path):
    """X15, P2: SIGKILL of rank 0 while its checkpoint is half written ends the other rank; the requeued job goes on."""
    large = ("model.width=512", "model.depth=6", "model.num_heads=8", "checkpoint.every_steps=3")
    job = Job(cluster, tmp_path, *TWO, *TINY, *large, "name=mine", "trainer.max_steps=30")
    folder = tmp_path / "runs" / "mine" / "checkpoints"
    rank = kill_rank_while_saving(job, folder)
    job.wait("FAILED")
    saved = sorted(path.name for path in folder.glob("step=*.ckpt"))
    assert rank and saved and "SIGKILL" in job.log() and "failed with exit code 137" in job.log()
    cluster.run("scontrol", "requeue", job.id)
    job.start_again()
    job.wait("COMPLETED")
    assert steps(folder.parent) == list(range(30)) and not list(folder.glob("*.part"))
    assert f"resumes from {saved[-1]}" in job.log() or saved[-1] in job.log()


def kill_rank_while_saving(job: Job, folder: Path) -> int:
    """Kill rank 0 as soon as a checkpoint beside a whole one is being written."""
    job.wait("RUNNING")
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if list(folder.glob("step=*.ckpt")) and list(folder.glob(".*.part")) + list(folder.glob("*.part")):
            for place in Path("/proc").glob("[0-9]*"):
                try:
                    about = (place / "environ").read_bytes().split(b"\0")
                    words = (place / "cmdline").read_bytes()
                except OSError:
                    continue
                mine = f"SLURM_JOB_ID={job.id}".encode() in about and b"SLURM_PROCID=0" in about
                if mine and b"audiossl.cluster.rank" in words and not words.startswith(b"srun"):
                    os.kill(int(place.name), signal.SIGKILL)
                    return int(place.name)
        time.sleep(0.001)
    raise AssertionError(f"no save was seen:\n{job.log()[-6000:]}")


@pytest.mark.slow
@pytest.mark.faults("X15")
@pytest.mark.timeout(900)
def test_a_lost_node_requeues_the_job(cluster, tmp_path):
    """X15: a node's daemon and its rank die and SLURM gives the node up; the job comes back when it is repaired."""
    settings = (*TINY, "name=mine", "trainer.max_steps=200", "checkpoint.every_steps=10")
    job, run = Job(cluster, tmp_path, *TWO, *settings), tmp_path / "runs" / "mine"
    job.wait_for_step(run, 30)
    os.kill(cluster.pid("slurmd-n2"), signal.SIGKILL)
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    job.wait("PENDING")
    cluster.repair_node("n2")
    job.start_again()
    job.wait("COMPLETED")
    assert job.says("Restarts") == "1" and steps(run) == list(range(200))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pre_empted_job_saves_makes_room_and_comes_back(cluster, tmp_path):
    job, run = Job(cluster, tmp_path, *TWO, *TINY, "name=mine", "trainer.max_steps=200"), tmp_path / "runs" / "mine"
    job.wait_for_step(run, 10)
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=sleep 1"]
    cluster.run("sbatch", *urgent)
    job.start_again()
    job.wait("COMPLETED")
    assert job.says("Restarts") == "1" and steps(run) == list(range(200))
    assert "SIGTERM" in job.log() and "requeue 1" in job.log()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cancelled_job_saves_and_stays_away(cluster, tmp_path):
    job, run = Job(cluster, tmp_path, *TWO, *TINY, "name=mine", "trainer.max_steps=100000"), tmp_path / "runs" / "mine"
    job.wait_for_step(run, 10)
    cluster.run("scancel", job.id)
    job.wait("CANCELLED")
    assert job.says("Restarts") == "0" and "it was cancelled" in job.log()
    assert list((run / "checkpoints").glob("step=*.ckpt")) and not (run / "slurm.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_array_of_three_masking_ratios_ends_with_its_summary(cluster, tmp_path):
    """Two points at a time, one of them signalled on its way: it is requeued, and whoever ends last sums up."""
    one = ("--array=0-2%2", "--nodes=1", "--gpus-per-node=0", "--ntasks-per-node=1")
    job = Job(cluster, tmp_path, *one, "-m", "model.mask_ratio=0.7,0.8,0.9", *TINY, "trainer.max_steps=60")
    sweep = tmp_path / "runs" / f"sweep_{job.id}"
    job.wait_for_step(sweep / "0", 3)
    cluster.run("scancel", "--signal=USR1", f"{job.id}_0")
    end = time.monotonic() + 3 * SECONDS
    while not (sweep / "summary.csv").exists():
        assert time.monotonic() < end, job.log()[-6000:]
        for line in cluster.run("squeue", "-h", "-r", "-t", "PENDING", "-o", "%A %r").splitlines():
            if line.endswith("BeginTime"):
                cluster.start_now(line.split()[0])
        time.sleep(0.5)
    with open(sweep / "summary.csv", newline="") as file:
        rows = [(row["model.mask_ratio"], row["status"]) for row in csv.DictReader(file)]
    assert rows == [("0.7", "finished"), ("0.8", "finished"), ("0.9", "finished")]
    assert steps(sweep / "0") == list(range(60)) and "requeue 1" in job.log()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_points_sent_by_submitit_survive_a_signal_and_end_with_the_table(cluster, tmp_path):
    pytest.importorskip("submitit")
    where = environment(SLURM_CONF=cluster.environment["SLURM_CONF"], PYTHONPATH=str(ROOT))
    words = ["-m", "hydra/launcher=submitit_slurm", "model.mask_ratio=0.7,0.8", *TINY, "trainer.max_steps=200"]
    command = [sys.executable, str(ROOT / "train.py"), *words, "hydra.sweep.dir=sweep"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=where, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    end = time.monotonic() + SECONDS
    while not ((tmp_path / "sweep/1/metrics.csv").exists() and len(metrics(tmp_path / "sweep/1")) > 10):
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0][-6000:]
        time.sleep(0.2)
    point = next(line for line in cluster.run("squeue", "-h", "-r", "-o", "%A %K").splitlines() if line.endswith(" 1"))
    cluster.run("scancel", "--signal=USR1", point.split()[0])
    while "BeginTime" not in cluster.run("squeue", "-h", "-t", "PENDING", "-o", "%r"):
        assert time.monotonic() < end + SECONDS and process.poll() is None, process.communicate()[0][-6000:]
        time.sleep(0.2)
    cluster.start_now(point.split()[0])
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "2 jobs in sweep" in output, output[-6000:]
    assert steps(tmp_path / "sweep/1") == list(range(200))
    logs = "".join(path.read_text() for path in (tmp_path / "sweep").glob(".submitit/*/*_log.*"))
    assert "requeue 1" in logs and "is saved; leaving with exit code 75" in logs
