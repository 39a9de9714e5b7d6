"""trainer.devices is the number of devices in all."""

import pytest

from audiossl.errors import UserError
from audiossl.running.devices import plan


def test_one_device_on_a_laptop_needs_no_words():
    layout = plan("cpu", 1, 1, available=2, environ={})
    assert (layout.devices, layout.num_nodes, layout.note) == (1, 1, "")


def test_64_gpus_are_split_over_the_nodes_of_the_slurm_job():
    job = {"SLURM_NTASKS": "64", "SLURM_NNODES": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NAME": "mae"}
    layout = plan("gpu", 64, 1, available=8, environ=job)
    assert (layout.devices, layout.num_nodes) == (8, 8)


def test_more_devices_than_exist_is_one_line_with_both_numbers():
    with pytest.raises(UserError, match=r"trainer.devices=64: this machine has 1 GPU; set trainer.devices=1"):
        plan("gpu", 64, 1, available=1, environ={})


def test_a_job_with_other_tasks_than_devices_is_refused():
    job = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "mae"}
    with pytest.raises(UserError, match="--ntasks-per-node=4"):
        plan("gpu", 8, 1, available=8, environ=job)
    with pytest.raises(UserError, match="does not divide by 2 nodes"):
        plan("gpu", 7, 1, available=8, environ=job)


def test_an_interactive_slurm_shell_is_a_laptop():
    shell = {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "bash"}
    assert plan("gpu", 2, 1, available=2, environ=shell).devices == 2


def test_auto_takes_every_gpu_but_one_process_on_a_cpu():
    assert plan("gpu", "auto", 1, available=4, environ={}).devices == 4
    assert plan("cpu", "auto", 1, available=16, environ={}).devices == 1
