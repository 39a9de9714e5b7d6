"""Which settings may another run of the same name change, and what becomes of those that it may?"""

import signal
from pathlib import Path

import pytest
import torch
from commands import metrics
from fits import column, config_of, run
from methods import settings_of

from audiossl.errors import UserError
from audiossl.running.build import check_same_run

SETTINGS = (*settings_of("audiomae"), "data.batch_size=2", "data.fraction=0.1", "data.validation_clips=4")
SETTINGS += ("trainer.max_steps=8", "validate_every_steps=3", "checkpoint.every_steps=2")

REFUSED = {  # they change what the saved steps meant: override -> what is said of it
    "seed=3": "seed: 0 -> 3",
    "model.width=48": "model.width: 24 -> 48",
    "model.depth=3": "model.depth: 2 -> 3",
    "model.mask_ratio=0.5": "model.mask_ratio: 0.8 -> 0.5",
    "model.decoder=local": "model.decoder: global -> local",
    "frontend.num_mels=64": "frontend.num_mels: 128 -> 64",
    "frontend.seconds=1.0": "frontend.seconds: ",
    "data.validation_clips=8": "data.validation_clips: 4 -> 8",
    "data.fraction=0.2": "data.fraction: 0.1 -> 0.2",
    "data.fraction_seed=1": "data.fraction_seed: 0 -> 1",
    "data.sampling=passt": "data.sampling: None -> passt",
    "data.crop_seconds=1.0": "data.crop_seconds: ",
    "optim.weight_decay=0.5": "optim.weight_decay: 0.05 -> 0.5",
    "optim.betas=[0.8,0.9]": "optim.betas: ",
    "optim.eps=0.001": "optim.eps: ",
    "optim.optimizer=sgd": "optim.optimizer: adamw -> sgd",
    "optim.layer_decay=0.75": "optim.layer_decay: None -> 0.75",
}
OF_THE_RUN = {  # what only a run knows: the saved value is replaced
    "corpus_hash": "corpus_hash: ",
    "global_batch": "global_batch: 2 -> 4; give the settings it was made with (here data.batch_size=1 keeps",
    "vocabulary": "vocabulary: None -> ",
}
ALLOWED = (  # the learning rate, the length, how often what is done, and on what machine
    *("optim.lr=0.0001", "optim.warmup_steps=2", "trainer.max_steps=9", "trainer.precision=bf16-mixed"),
    *("trainer.gradient_clip_val=1.0", "trainer.devices=2", "trainer.timeout_seconds=9.0", "logger=default"),
    *("checkpoint.every_steps=5", "checkpoint.keep_last=1", "validate_every_steps=4", "data.num_workers=2"),
    *("data.cache_mb=64", "data.timeout_seconds=9.0", "data.max_bad_fraction=0.5", "trace=false", "pictures.clips=1"),
    *("swa.start=1", "stopping.patience=3", "name=other"),
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "run"
    run(folder, *SETTINGS, fault={"do": "kill", "step": 4}, expect=-signal.SIGKILL)
    return folder


def outcome(folder: Path, *overrides: str, **provenance) -> str:
    """Say why a resume with these changes is refused; nothing where it is not."""
    path = folder / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)["audiossl"]["provenance"]
    try:
        check_same_run(path, config_of(*SETTINGS, *overrides), saved | provenance)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.faults("R12")
def test_what_would_make_another_run_of_it_is_refused_with_both_values(killed):
    said = {override: outcome(killed, override) for override in REFUSED}
    assert not {override: said[override] for override, words in REFUSED.items() if words not in said[override]}
    assert all("is of another run, saved -> now: " in words and "init=" in words for words in said.values())
    changed = {"corpus_hash": "0" * 64, "global_batch": 4, "vocabulary": ["dog"]}
    for key, words in OF_THE_RUN.items():
        assert words in outcome(killed, **{key: changed[key]}), key


@pytest.mark.faults("R12")
def test_nothing_else_is_refused(killed):
    assert outcome(killed) == ""
    assert not {override: words for override in ALLOWED if (words := outcome(killed, override))}


@pytest.mark.faults("R12")
def test_what_may_change_takes_effect(killed):
    """Learning rate, length, how often is saved, validated, traced, precision and an average that was not there."""
    before = column(killed, "loss")
    rows_before = (killed / "trace.csv").read_text()
    changed = ["optim.lr=0.0001", "trainer.max_steps=9", "checkpoint.every_steps=5"]
    changed += ["validate_every_steps=4", "trainer.precision=bf16-mixed", "trace=false"]
    changed += ["swa.unit=steps", "swa.start=6"]
    run(killed, *SETTINGS, *changed, ckpt="last")
    rows = metrics(killed)
    assert column(killed, "loss")[:4] == before[:4] and len(rows) == 9
    rates = [float(row["lr"]) for row in rows]
    assert max(rates[4:]) <= 1e-4 < rates[3], rates
    assert [step for step, _ in column(killed, "val_loss")] == [2, 7]
    assert {path.name for path in (killed / "checkpoints").glob("step=*")} >= {"step=000000005.ckpt"}
    assert (killed / "trace.csv").read_text() == rows_before
    assert torch.load(killed / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["Averaging"]
