"""Exact resume under settings that change the arithmetic: 16 bits, deterministic kernels, weighted steps averaged."""

import pytest
from fits import assert_same_run, column, kill_and_go_on, run
from methods import settings_of

LENGTH = ("trainer.max_steps=8", "checkpoint.every_steps=1", "validate_every_steps=3")
DATA = ("data.batch_size=2", "data.fraction=0.1", "data.validation_clips=4")
SETTINGS = {
    "bf16-mixed": ("trainer.precision=bf16-mixed",),
    "deterministic": ("trainer.deterministic=true",),
    "average": ("trainer.accumulate_grad_batches=2", "swa.unit=steps", "swa.start=3", "swa.every=2"),
}


@pytest.mark.faults("R1")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resume_is_exact_whatever_the_arithmetic(tmp_path, name):
    """Killed before the first snapshot of the average and between two, that time right behind a validation.

    The checkpoint there is from before it, so it comes again: the loops have counted its batches twice, nothing else.
    """
    given = [*settings_of("audiomae"), *LENGTH, *DATA, *SETTINGS[name]]
    run(tmp_path / "straight", *given)
    said = kill_and_go_on(tmp_path / "killed", *given, at=(2, 6))
    assert_same_run(tmp_path / "straight", tmp_path / "killed", 8, but=("loops",))
    assert column(tmp_path / "straight", "val_loss") == column(tmp_path / "killed", "val_loss")
    assert (tmp_path / "killed" / "encoder.safetensors").exists() and "Traceback" not in said
