"""trainer.devices is the number of devices in all."""

import os
import warnings

import pytest
from hydra import compose, initialize_config_dir
from lightning.fabric.plugins.environments import SLURMEnvironment

from audiossl import training
from audiossl.config.cli import CONF
from audiossl.config.commands import check_global_batch
from audiossl.errors import UserError
from audiossl.optim import OptimSettings
from audiossl.planning.jobs import job_of, split_over_nodes
from audiossl.running.devices import plan
from audiossl.running.rundata import max_steps_of
from audiossl.training import warmed_up

STEP = {  # what srun gives each of 64 tasks on 8 nodes, without --ntasks-per-node on the command line
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "mae",
    "SLURM_NTASKS": "64",
    "SLURM_NNODES": "8",
    "SLURM_TASKS_PER_NODE": "8(x8)",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "64",
    "SLURM_STEP_NUM_NODES": "8",
    "SLURM_STEP_TASKS_PER_NODE": "8(x8)",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURMD_NODENAME": "node3",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}


def step(nodes: int, tasks: int, listed: str, **extra: str) -> dict[str, str]:
    counts = {"SLURM_NTASKS": tasks, "SLURM_NNODES": nodes, "SLURM_TASKS_PER_NODE": listed}
    counts |= {
        f"SLURM_STEP_{k}": v for k, v in (("NUM_TASKS", tasks), ("NUM_NODES", nodes), ("TASKS_PER_NODE", listed))
    }
    return STEP | {name: str(value) for name, value in counts.items()} | extra


def test_one_device_on_a_laptop_needs_no_words():
    layout = plan("cpu", 1, available=2, environ={})
    assert (layout.devices, layout.num_nodes, layout.note) == (1, 1, "")


def test_more_devices_of_one_machine_are_said():
    assert plan("cpu", 2, available=2, environ={}).note == "2 CPU processes = 1 node x 2"


@pytest.mark.parametrize("asked", [64, "auto"])
@pytest.mark.parametrize("num_nodes", [None, 8])
def test_64_gpus_are_split_over_the_nodes_of_the_slurm_job(asked, num_nodes):
    layout = plan("gpu", asked, num_nodes, available=8, environ=STEP)
    assert (layout.devices, layout.num_nodes) == (8, 8)
    assert layout.note == "64 GPUs = 8 nodes x 8 (SLURM job 17)"


def test_a_job_without_step_counts_is_read_by_the_options_it_was_submitted_with():
    old = {"SLURM_JOB_NAME": "mae", "SLURM_NTASKS": "64", "SLURM_NNODES": "8", "SLURM_NTASKS_PER_NODE": "8"}
    assert job_of(old).tasks_on == (8,) * 8
    assert job_of({k: v for k, v in old.items() if k != "SLURM_NTASKS_PER_NODE"}).tasks_on == (8,) * 8
    assert job_of(old | {"SLURM_TASKS_PER_NODE": "16,8(x6),0"}).tasks_on == (16, 8, 8, 8, 8, 8, 8, 0)


def test_more_devices_than_exist_is_one_line_with_the_command_that_asks_a_cluster_for_them():
    with pytest.raises(
        UserError, match=r"=64: this machine has 1 GPU; .* 8 nodes x 8: sbatch --nodes=8 slurm/run.sbatch"
    ):
        plan("gpu", 64, available=1, environ={})
    with pytest.raises(UserError, match=r"=64: this machine has 0 GPUs and 2 CPU cores; take trainer.devices=1 here"):
        plan("cpu", 64, available=2, environ={})
    with pytest.raises(UserError, match=r"2 nodes x 6: sbatch --nodes=2 --ntasks-per-node=6 --gpus-per-node=6 slurm"):
        plan("gpu", 12, available=0, environ={})
    with pytest.raises(UserError, match=r"trainer.num_nodes=4: .* 4 nodes x 2: sbatch --nodes=4 --ntasks-per-node=2"):
        plan("gpu", 8, 4, available=8, environ={})  # several machines, and nobody has started the others


def test_a_product_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="does not divide by trainer.num_nodes=3; take trainer.devices=66"):
        plan("gpu", 64, 3, available=64, environ={})
    with pytest.raises(UserError, match="trainer.num_nodes=4: SLURM job 17 has 8"):
        plan("gpu", 64, 4, available=8, environ=STEP)
    with pytest.raises(UserError, match="trainer.num_nodes=3: SLURM job 17 has 8"):  # and not what would divide by 3
        plan("gpu", 64, 3, available=8, environ=STEP)


@pytest.mark.parametrize("job, is_said", [("", False), ("17", True)])
def test_the_advice_to_use_srun_is_heard_in_a_job_alone(job, is_said, tmp_path, monkeypatch):
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        training._quieten()
        SLURMEnvironment.detect()
    assert any("srun" in str(warning.message) for warning in heard) == is_said


@pytest.mark.parametrize(
    ("environ", "devices", "gpus", "words"),
    [
        (STEP, 1, 8, r"has 64 tasks \(8 nodes x 8\), one a device; set trainer.devices=64, or submit"),
        (step(2, 4, "2(x2)"), 8, 8, "or submit it with --nodes=2 --ntasks-per-node=4 --gpus-per-node=4"),
        (step(2, 4, "2(x2)"), 7, 8, "set trainer.devices=4, or submit it with --nodes=7 --ntasks-per-node=1"),
        (step(3, 5, "2(x2),1"), 5, 8, "has 2, 2, 1 tasks on its 3 nodes, and every node must have as many"),
        (step(1, 1, "1"), 4, 4, "or submit it with --nodes=1 --ntasks-per-node=4"),
        (step(2, 4, "2(x2)", SLURM_GPUS_ON_NODE="1"), 4, 1, "2 tasks a node and only 1 of its GPUs"),
        (
            step(2, 4, "2(x2)", SLURM_GPUS_ON_NODE="2"),
            4,
            1,
            "sees 1 GPU and its node has 2 tasks.*neither --gpus-per-task",
        ),
        (TORCHRUN, 8, 8, "torchrun has 4 tasks .* or start torchrun with --nnodes=2 --nproc-per-node=4"),
        (TORCHRUN | {"WORLD_SIZE": "3"}, 3, 8, "torchrun has 2, 1 tasks"),
    ],
)
def test_a_job_with_other_tasks_than_devices_is_refused_with_what_would_do(environ, devices, gpus, words):
    with pytest.raises(UserError, match=words):
        plan("gpu", devices, available=gpus, environ=environ)


def test_torchrun_s_processes_are_counted():
    layout = plan("cpu", 4, available=2, environ=TORCHRUN)
    assert (layout.devices, layout.num_nodes, layout.note) == (2, 2, "4 CPU processes = 2 nodes x 2 (torchrun)")


def test_a_batch_script_that_forgot_srun_is_told():
    script = {k: v for k, v in STEP.items() if "STEP" not in k}
    with pytest.raises(UserError, match="job 17: has 64 tasks, and this process was started once, not by srun"):
        plan("gpu", 64, available=8, environ=script)
    alone = script | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "1"}
    assert plan("gpu", 1, available=8, environ=alone).total == 1


def test_an_interactive_slurm_shell_is_a_laptop():
    shell = {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "bash"}
    assert plan("gpu", 2, available=2, environ=shell).devices == 2
    with pytest.raises(UserError, match="the SLURM job has more nodes, but this was not started on them: srun"):
        plan("gpu", 16, available=8, environ=shell | {"SLURM_JOB_NUM_NODES": "2"})


def test_a_machine_of_several_started_by_hand_trusts_who_started_it():
    started = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    assert plan("gpu", 16, 2, available=8, environ=started).devices == 8


def test_auto_takes_every_gpu_but_one_process_on_a_cpu():
    assert plan("gpu", "auto", available=4, environ={}).devices == 4
    assert plan("cpu", "auto", available=16, environ={}).devices == 1


def test_nodes_are_filled_evenly():
    assert [split_over_nodes(n, 8) for n in (1, 6, 8, 12, 64, 7, 11)] == [
        (1, 1), (1, 6), (1, 8), (2, 6), (8, 8), (1, 7), (11, 1),
    ]  # fmt: skip


def test_the_recipe_s_global_batch_is_kept_whatever_the_devices():
    recipe = {"global_batch": 512, "trainer.devices": 64, "data.batch_size": 8, "trainer.accumulate_grad_batches": 1}
    check_global_batch(recipe)
    check_global_batch(recipe | {"trainer.devices": 8, "trainer.accumulate_grad_batches": 8})
    check_global_batch(recipe | {"trainer.devices": 1, "global_batch": None})
    check_global_batch(recipe | {"trainer.devices": "auto"})  # counted when the run begins
    with pytest.raises(
        UserError, match=r"is 64 clips a step; take trainer.accumulate_grad_batches=8 or data.batch_size=64"
    ):
        check_global_batch(recipe | {"trainer.devices": 8})
    with pytest.raises(UserError, match=r"is 40 clips a step; take global_batch=40"):
        check_global_batch(recipe | {"trainer.devices": 5})


def test_the_same_global_batch_has_the_same_schedule_however_it_is_shared():
    """On 64 devices, 8, or one; in epochs of AudioSet's length, which make the steps and the warm-up."""
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("train", ["experiment=audiomae_base_as2m", "data.shards=x", "run_dir=x"])
    found = set()
    for devices, batch, accumulate in ((64, 8, 1), (8, 8, 8), (8, 64, 1), (1, 128, 4)):
        global_batch = devices * batch * accumulate
        steps = max_steps_of(config.trainer, 1_900_000, global_batch)
        optim = warmed_up(OptimSettings(**config.optim), 1_900_000 / global_batch, steps)
        rates = [optim.lr_at(step, global_batch=global_batch, max_steps=steps) for step in (0, 1, 5_000, 20_000, steps)]
        found.add((steps, optim.warmup_steps, *rates))
    assert len(found) == 1 and max(found.pop()[2:]) == pytest.approx(4e-4, rel=0.05)
