"""Is the average of the weights their mean, from where it was asked for, and the same after a resume?"""

import json
import math

import pytest
import torch
from commands import TINY, train
from safetensors.torch import load_file

from audiossl.errors import UserError
from audiossl.running.averaging import Averaging

LABELLED = [  # a model of seconds that learns from the demo set's labels
    "model=passt",
    "model.width=24",
    "model.depth=1",
    "model.num_heads=2",
    "model.stride=16",
    "model.patchout_time=1",
    "model.patchout_frequency=1",
    "frontend.seconds=0.64",
    "data.batch_size=4",
    "data.num_workers=0",
    "data.validation_clips=8",
    "probe=none",
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
]
AVERAGED = ["swa.start=4", "swa.every=3", "swa.unit=steps", "checkpoint.every_steps=1", "checkpoint.keep_last=99"]


def state(run, step):
    return torch.load(run / "checkpoints" / f"step={step:09d}.ckpt", weights_only=True)


def averaging(checkpoint):
    (found,) = [saved for name, saved in checkpoint["callbacks"].items() if "Averaging" in name]
    return found


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    run = tmp_path_factory.mktemp("labelled") / "run"
    arguments = [*LABELLED, *AVERAGED, "trainer.max_steps=11", "validate_every_steps=5"]
    return run, arguments, train(*arguments, f"hydra.run.dir={run}", cwd=run.parent)


def test_the_average_is_the_mean_of_its_snapshots_and_is_exported(folder_shards, tmp_path):
    data = ["data=folder", f"data.shards={folder_shards}/shard-*.tar", "data.validation_clips=8"]
    steps = ["trainer.max_steps=8", "trainer.accumulate_grad_batches=2"]
    train(*TINY, *data, *steps, *AVERAGED, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    run = tmp_path / "run"
    snapshots = [state(run, step)["state_dict"] for step in (4, 7)]
    saved = averaging(state(run, 8))
    assert saved["num_snapshots"] == 2
    exported, last = (load_file(run / f"{name}.safetensors") for name in ("encoder_swa", "encoder"))
    for name, value in saved["weights"].items():
        torch.testing.assert_close(value, sum(s[f"method.{name}"] for s in snapshots) / 2)
        if name.startswith("encoder."):
            assert torch.equal(exported[name.removeprefix("encoder.")], value), name
    assert any(not torch.equal(exported[name], last[name]) for name in exported)
    before = state(run, 3)["callbacks"]
    assert not any("Averaging" in name for name in before), "no snapshot yet"


def test_an_average_is_scored_beside_the_last_weights(labelled):
    run, _, said = labelled
    assert "PaSST LEARNS FROM LABELS" in said
    scores = json.loads((run / "results.json").read_text())["scores"]
    for name in ("val_mAP", "val_auc", "val_d_prime"):
        assert math.isfinite(scores[name]) and math.isfinite(scores[f"{name}_swa"])
        assert scores[name] != scores[f"{name}_swa"]
    assert (run / "per_class.csv").read_text().startswith("class,clips,AP,AUC,d_prime,AP_swa,AUC_swa,d_prime_swa\n")
    assert (run / "encoder_swa.safetensors").exists() and (run / "encoder_swa.json").exists()


@pytest.mark.parametrize("step", [2, 6])
def test_a_resumed_run_ends_with_the_bits_of_the_straight_one(labelled, step, tmp_path):
    """Resumed before the first snapshot and between two; under the whole recipe of PaSST."""
    run, arguments, _ = labelled
    ckpt = f"ckpt='{run}/checkpoints/step={step:09d}.ckpt'"
    train(*arguments, ckpt, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    straight, resumed = (state(folder, 11) for folder in (run, tmp_path / "run"))
    for name, value in straight["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    first, second = averaging(straight), averaging(resumed)
    assert first["num_snapshots"] == second["num_snapshots"] == 3
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    scores = [json.loads((folder / "results.json").read_text())["scores"] for folder in (run, tmp_path / "run")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("unit", "start", "every", "first_step", "every_steps"),
    [("epochs", 50, 5, 500, 50), ("steps", 7, 2, 7, 2), ("run", 0.5, 0.25, 600, 300), ("run", 0.0, 1e-9, 1, 1)],
)
def test_its_unit_says_what_start_and_every_count(unit, start, every, first_step, every_steps):
    callback = Averaging(start=start, every=every, unit=unit, steps_per_epoch=10.0, max_steps=1200)
    assert (callback.first_step, callback.every_steps) == (first_step, every_steps)


def test_an_average_that_would_never_begin_is_refused():
    with pytest.raises(UserError, match="swa.start=50 .epochs. is step 500, behind the run's 400"):
        Averaging(start=50, every=5, unit="epochs", steps_per_epoch=10.0, max_steps=400)
