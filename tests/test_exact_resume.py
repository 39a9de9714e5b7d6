"""Killed at any step and resumed, on whatever machine, a run is the run that was never stopped, bit for bit."""

from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT
from fits import assert_same_run, column, kill_and_go_on, run, trace
from maes import real_clips
from methods import settings_of

from audiossl import load
from audiossl.__main__ import main

METHODS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
LABELLED = ("passt", "atst_c2f")
KILLS = (7, 13, 16, 20, 21, 33)
STEPS, EPOCH = 40, 20  # 40 clips, two a step


def settings(model: str) -> list[str]:
    """Set up two epochs of 20 steps; Audio-MAE says so in epochs, and its learning rate has a share of them to rise."""
    length = ["trainer.max_steps=40"]
    if model == "audiomae":
        length = ["trainer.max_steps=null", "trainer.max_epochs=2", "optim.warmup_steps=null", "optim.warmup_ratio=0.2"]
    fraction = 0.462 if model in LABELLED else 0.12
    data = [f"data.fraction={fraction}", "data.validation_split=null", "data.validation_clips=4", "data.batch_size=2"]
    return [*settings_of(model), *length, *data, "validate_every_steps=15", "checkpoint.every_steps=1"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Give the folder of a method's run that nothing stopped."""
    folders: dict[tuple[str, int], Path] = {}

    def straight_run(model: str, every_steps: int = 1) -> Path:
        key = (model, every_steps)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("straight") / model
            run(folders[key], *settings(model), f"checkpoint.every_steps={every_steps}")
        return folders[key]

    return straight_run


@pytest.mark.faults("R1", "R2", "R4", "R5", "P12")
@pytest.mark.parametrize("model", METHODS)
def test_killed_in_and_between_epochs_again_and_again_a_method_ends_as_if_never_stopped(straight, model, tmp_path):
    """Three times within the first epoch, at its end, at the second's first step, and once more within it."""
    kill_and_go_on(tmp_path / "killed", *settings(model), at=KILLS)
    assert_same_run(straight(model), tmp_path / "killed", STEPS)
    assert column(straight(model), "val_loss") == column(tmp_path / "killed", "val_loss")
    keys = [row["keys"] for row in trace(tmp_path / "killed")]
    clips = [" ".join(keys[start : start + EPOCH]).split() for start in (0, EPOCH)]
    assert all(len(set(epoch)) == len(epoch) == 2 * EPOCH for epoch in clips) and clips[0] != clips[1]


@pytest.mark.slow
@pytest.mark.faults("R1")
@pytest.mark.parametrize("every_steps", [1, 4])
@pytest.mark.parametrize("step", KILLS)
@pytest.mark.parametrize("model", METHODS)
def test_killed_once_at_any_of_these_steps_a_method_ends_as_if_never_stopped(
    straight, model, step, every_steps, tmp_path
):
    """Resumed at the very step, and up to three steps before it, which are done again."""
    kill_and_go_on(tmp_path, *settings(model), f"checkpoint.every_steps={every_steps}", at=(step,))
    assert_same_run(straight(model, every_steps), tmp_path, STEPS)


@pytest.mark.parametrize("model", METHODS)
def test_what_a_run_leaves_loads_again(straight, model, tmp_path, capsys):
    """Its encoder, and its method, which fills gaps or says that it does not."""
    tokens = load(straight(model))(torch.zeros(2, 16000), rate_hz=16000)
    assert tokens.shape[0] == 2 and tokens.isfinite().all()
    soundfile.write(tmp_path / "clip.wav", real_clips(1, 2.0)[0].numpy(), 16000)
    options = ["--checkpoint", str(straight(model)), "--out", str(tmp_path)]
    code = main(["reconstruct", str(tmp_path / "clip.wav"), *options])
    assert code == (0 if model == "audiomae" else 2)
    assert model == "audiomae" or "fills no gaps; give an Audio-MAE run" in capsys.readouterr().err
