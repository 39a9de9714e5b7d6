"""Is a fine-tuning a run like any other: killed, resumed, validated, stopped early?"""

import csv
import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import commands
import lightning.pytorch as pl
import pytest
import torch
from commands import kill_when
from conftest import ROOT
from lightning.pytorch.plugins.precision import Precision
from test_pretraining import OPTIM
from test_pretraining import QUIET as BARE
from test_resume import column
from tunings import FRAME, MAE, QUIET, batch, export_of, tuning
from warm import Process

from audiossl import load
from audiossl.checkpoints.files import lower_is_better
from audiossl.errors import UserError
from audiossl.metrics import score_classes
from audiossl.pretraining import Pretraining
from audiossl.running.build import load_initial_weights
from audiossl.running.classscores import ClassScores, logits_and_targets
from audiossl.running.ranks import Ranks
from audiossl.running.stopping import EarlyStopping


def start(run: Path, *overrides: str, **changes) -> Process:
    """Start a fine-tuning of seconds on the demo set."""
    run.mkdir(parents=True, exist_ok=True)
    given = dict(run_dir=str(run), overrides=list(overrides), changes=changes)
    (run / "given.json").write_text(json.dumps(given))
    return commands.start(str(run / "given.json"), cwd=run, script=ROOT / "tests" / "toy_tuning.py")


def finish(run: Path, *overrides: str, expect: int = 0, **changes) -> str:
    process = start(run, *overrides, **changes)
    output = process.communicate(timeout=280)[0]
    assert process.returncode == expect, output[-4000:]
    return output


def weights_of(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("changes", [{}, dict(head_norm="batch", freeze=1, loss="ce")], ids=["audiomae", "frozen"])
def test_a_killed_fine_tuning_that_is_resumed_is_the_one_that_was_never_stopped(changes, tmp_path):
    runs = tmp_path / "straight", tmp_path / "killed"
    finish(runs[0], **changes)
    process = start(runs[1], **changes)
    assert kill_when(process, runs[1] / "checkpoints" / "step=000000003.ckpt") == -signal.SIGKILL
    finish(runs[1], "ckpt=must", **changes)
    first, second = map(weights_of, runs)
    assert first["global_step"] == second["global_step"] == 8
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    assert column(runs[0], "loss") == column(runs[1], "loss") and len(column(runs[0], "loss")) == 8
    scores = json.loads((runs[0] / "results.json").read_text())["scores"]
    assert 0 <= scores["val_accuracy"] <= 1 and 0 < scores["val_mAP"] <= 1
    loaded = load(runs[0])
    assert loaded.head.pooling == "mean" and loaded.labels


def test_the_best_checkpoint_is_that_of_the_highest_accuracy(tmp_path):
    finish(tmp_path, "checkpoint.metric=val_accuracy", "checkpoint.every_steps=2", "validate_every_steps=2")
    with open(tmp_path / "metrics.csv", newline="") as file:
        found = [float(row["val_accuracy"]) for row in csv.DictReader(file) if row["val_accuracy"]]
    best = next((tmp_path / "checkpoints").glob("best-*.ckpt")).name
    assert len(found) == 4 and f"val_accuracy={max(found):.6g}.ckpt" in best


def test_a_run_that_gets_no_better_stops_by_itself_and_at_the_same_step_when_resumed(tmp_path):
    early = ("stopping.patience=2", "stopping.min_delta=1000", "validate_every_steps=2", "trainer.max_steps=40")
    runs = tmp_path / "straight", tmp_path / "killed"
    finish(runs[0], *early)
    process = start(runs[1], *early)
    kill_when(process, runs[1] / "checkpoints" / "step=000000003.ckpt")
    finish(runs[1], *early, "ckpt=must")
    for run in runs:
        results = json.loads((run / "results.json").read_text())
        assert results["status"] == "finished" and results["steps"] == 6
        assert list(json.loads((run / "stopping.json").read_text())) == ["2", "4", "6"]
    finish(runs[0], *early, "ckpt=must")
    assert json.loads((runs[0] / "results.json").read_text())["steps"] == 6


def stopping(values, **changes):
    given = dict(patience=2, min_delta=0.0, metric="val_accuracy", folder=Path())
    callback = EarlyStopping(**given | changes)
    callback.values = dict(enumerate(values, 1))
    return callback.num_since_best()


def test_validations_since_the_best_are_counted():
    assert stopping([]) == 0
    assert stopping([0.1, 0.3, 0.2, 0.3]) == 2  # no better than equal
    assert stopping([0.1, 0.3, 0.2, 0.31]) == 0
    assert stopping([0.1, 0.3, 0.2, 0.31], min_delta=0.05) == 2
    assert stopping([3.0, 2.0, 2.5], metric="val_loss") == 1
    assert stopping([math.nan, 0.1, math.nan]) == 1
    assert stopping([math.nan, math.nan]) == 2
    assert lower_is_better("val_loss") and not lower_is_better("val_mAP")


def test_impossible_ways_to_stop_are_refused():
    for changes, said in (
        (dict(patience=0), "stopping.patience=0"),
        (dict(metric=None), "of which number"),
        (dict(min_delta=-1.0), "stopping.min_delta=-1"),
    ):
        with pytest.raises(UserError, match=said):
            stopping([], **changes)


def test_moments_are_scored_one_by_one_and_only_known_ones():
    method = tuning(FRAME, level="frame", pooling="columns").eval()
    target = torch.zeros(4, 24, 5)
    target[0, 3:7, 2] = 1
    target[1, 5:] = math.nan
    target[2] = math.nan
    given = batch(frame_target=target)
    logits, targets = logits_and_targets(method, given)
    assert logits.shape == targets.shape == (24 + 5 + 24, 5) and targets.sum() == 4
    with torch.no_grad():
        torch.testing.assert_close(logits[:24], method.logits(given)[0])
    weak = tuning(FRAME, level="frame", pooling="columns", weak_pooling="max").eval()
    logits, targets = logits_and_targets(weak, batch())
    assert torch.equal(targets, batch().target)
    with torch.no_grad():
        torch.testing.assert_close(logits, weak.logits(batch()).amax(1), rtol=1e-4, atol=1e-5)


def test_a_validation_leaves_out_what_nobody_judged(tmp_path):
    method, given = tuning(MAE).eval(), batch(20)
    given.target[torch.rand(20, 5, generator=torch.Generator().manual_seed(0)) < 0.3] = math.nan
    known = ~given.target.isnan().numpy()
    trainer = SimpleNamespace(is_global_zero=True, global_step=1, precision_plugin=Precision())
    module = SimpleNamespace(method=method, device=torch.device("cpu"), prepare=lambda batch: batch)
    scores = ClassScores(vocabulary=list("abcde"), folder=tmp_path, others=dict)
    scores.ranks = Ranks()
    scores._begin(module)
    scores._collect(trainer, module, given)
    scores._score(trainer)
    with torch.no_grad():
        expected = score_classes(method.logits(given), given.target.nan_to_num(0), known)
    assert scores.scores[""].mean_average_precision == pytest.approx(expected.mean_average_precision, abs=1e-6)
    assert scores.unit == "clips" and (scores.scores[""].judged == known.sum(0)).all() and not known.all()


@pytest.mark.parametrize("level", ["clip", "frame"])
def test_micro_batches_of_other_sizes_weigh_what_they_hold(level):
    """Three clips and one, accumulated, are the four of one batch: the same loss, the same gradient."""
    changes = dict(level="frame", pooling="columns", weak_pooling="max") if level == "frame" else {}
    rows, whole = [], batch(4)
    apart = [
        replace(whole, waveform=whole.waveform[s], num_samples=whole.num_samples[s], rows=whole.rows[s],
                target=whole.target[s], key=whole.key[s])
        for s in (slice(0, 3), slice(3, 4))
    ]  # fmt: skip
    for batches in ([whole], apart):
        method = tuning(FRAME if level == "frame" else MAE, head_norm="none", **QUIET, **changes)
        module = Pretraining(
            method, optim=OPTIM, max_steps=1, batch_size=4 // len(batches), waveform_rate_hz=16000, seed=0
        )
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        pl.Trainer(max_steps=1, accumulate_grad_batches=len(batches), **BARE).fit(module, loader)
        rows.append([float(module.row[name]) for name in ("loss", "grad_norm")])
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)


def test_an_encoder_whose_head_normalises_leaves_its_norm_behind(tmp_path):
    source = tuning(MAE).eval()
    export_of(source, tmp_path)
    target = tuning(MAE, "audiomae")
    assert "tensors" in load_initial_weights(target, str(tmp_path))
    spectrogram = torch.randn(2, 1, 64, 96)
    with torch.no_grad():
        ours = target.eval().encoder(spectrogram)
        torch.testing.assert_close(source.encoder.norm(ours), source.encoder(spectrogram))
