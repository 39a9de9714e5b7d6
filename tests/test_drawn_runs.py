"""Runs on balanced draws, mixtures, fractions and shard windows train, and end the same whether killed or not."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from commands import TINY, kill_when, metrics, start, train
from conftest import ROOT
from test_resume import assert_same_run, column

from audiossl.__main__ import main
from audiossl.index import Index

STEPS = 14


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """Pack two corpora out of the demo set: environmental sounds with their class, and music with a class of ours."""
    folder = tmp_path_factory.mktemp("corpora")
    demo = Index.load(ROOT / "demo" / "shards")
    clips = range(len(demo))
    kinds = {
        "sounds": [(i, demo.labels(i)[0]) for i in clips if demo.labels(i)][:24],
        "music": [(i, "music;rare" if i % 5 == 0 else "music") for i in clips if demo.key(i).startswith("music")][:15],
    }
    paths = {}
    for name, chosen in kinds.items():
        source, paths[name] = folder / f"{name}_audio", folder / name
        source.mkdir()
        rows = [("filename", "label")]
        for i, label in chosen:
            rows.append((f"{demo.key(i)}.{demo.extension(i)}", label))
            (source / rows[-1][0]).write_bytes(demo.read(i))
        with open(source / "meta.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
        assert main(["pack", str(source), "--out", str(paths[name]), "--rate", "16000", "--shard-size", "1MB"]) == 0
    return paths


def mixture(corpora, run: Path, *more: str) -> list[str]:
    return [
        *TINY,
        "data=mix",
        f"data.sources.sounds.shards={corpora['sounds']}",
        "data.sources.sounds.weight=1",
        f"data.sources.music.shards={corpora['music']}/shard-*.tar",
        "data.sources.music.weight=3",
        "data.validation_clips=8",
        "data.sampling=audiomae",
        "data.draws_per_epoch=16",
        "validate_every_steps=4",
        f"trainer.max_steps={STEPS}",
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=9",
        "trace=true",
        f"hydra.run.dir={run}",
        *more,
    ]


def keys_of(run: Path) -> list[str]:
    with open(run / "trace.csv", newline="") as file:
        return [key for row in csv.DictReader(file) for key in row["keys"].split()]


@pytest.fixture(scope="module")
def straight(corpora, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    output = train(*mixture(corpora, run), cwd=run.parent)
    assert "3.5 epochs (of 16 draws, music: 75.0% of the draws from 12 clips, sounds: 25.0% of" in output
    return run


def test_a_balanced_mixture_gives_each_epoch_its_shares_and_resumes_exactly(straight, corpora, tmp_path):
    """16 draws an epoch, 4 a step: the kill at step 3 lies inside the first epoch, and three more begin after it."""
    keys = keys_of(straight)
    for epoch in range(3):
        owners = Counter(key.split("/")[0] for key in keys[16 * epoch : 16 * epoch + 16])
        assert owners == {"music": 12, "sounds": 4}
    process = start(*mixture(corpora, tmp_path / "killed"), cwd=tmp_path)
    assert kill_when(process, tmp_path / "killed" / "checkpoints" / "step=000000003.ckpt") == -9
    assert "resuming from" in train(*mixture(corpora, tmp_path / "killed"), "ckpt=last", cwd=tmp_path)
    assert_same_run(straight, tmp_path / "killed")
    assert column(straight, "val_loss") == column(tmp_path / "killed", "val_loss")


@pytest.mark.faults("R12")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.sources.music.weight=2", "data.sources.music.weight: 3 -> 2"),
        pytest.param(
            "data.sources.music.fraction=0.5", "data.sources.music.fraction: None -> 0.5", marks=pytest.mark.slow
        ),
        ("data.sampling=null", "data.sampling: audiomae -> None"),
        pytest.param("data.fraction=0.5", "data.fraction: 1.0 -> 0.5", marks=pytest.mark.slow),
        pytest.param("data.draws_per_epoch=20", "data.draws_per_epoch: 16 -> 20", marks=pytest.mark.slow),
    ],
)
def test_another_mixture_fraction_or_sampling_is_no_resume(straight, corpora, change, said):
    output = train(*mixture(corpora, straight), "ckpt=last", change, cwd=straight.parent, expect=2)
    assert said in output and "is of another run" in output


def test_an_epoch_of_n_draws_sets_the_length_of_run_and_warm_up(corpora, tmp_path):
    epochs = ["trainer.max_steps=null", "trainer.max_epochs=2", "optim.warmup_steps=null", "optim.warmup_epochs=1"]
    drawn = ["data=folder", f"data.shards={corpora['sounds']}", "data.sampling=passt", "data.draws_per_epoch=12"]
    train(
        *TINY, *drawn, *epochs, "optim.warmup_ratio=null", "trace=true", f"hydra.run.dir={tmp_path}/run", cwd=tmp_path
    )
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 6
    rates = [float(row["lr"]) for row in metrics(tmp_path / "run")]
    assert rates.index(max(rates)) == 3, "the warm-up ends after one epoch of 12 draws in steps of 4"
    keys = keys_of(tmp_path / "run")
    assert len(set(keys[:12])) == len(set(keys[12:])) == 12, "without replacement"


def test_a_class_balanced_fraction_in_shard_windows_trains(corpora, tmp_path):
    drawn = ["data=folder", f"data.shards={corpora['sounds']}", "data.fraction=0.5", "data.fraction_by=class"]
    changes = ["data.shuffle_shards=1", "trainer.max_steps=3", "trace=true", f"hydra.run.dir={tmp_path}/run"]
    output = train(*TINY, *drawn, *changes, cwd=tmp_path)
    assert "12 clips (" in output and "1.0 epochs;" in output
    keys = keys_of(tmp_path / "run")
    index = Index.load(corpora["sounds"])
    shard = {index.key(i): int(index.shard[i]) for i in range(len(index))}
    met = [shard[key] for key in keys]
    changes = sum(a != b for a, b in zip(met, met[1:], strict=False))
    assert len(set(keys)) == 12 and len(set(met)) > 1 and changes == len(set(met)) - 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_million_clips_start_and_resume_within_ten_seconds_and_half_a_gigabyte(tmp_path):
    """The memory is what the data adds to the imports; torch, lightning and the rest take 0.9 GB before it."""
    subprocess.run([sys.executable, "-m", "benchmarks.order", "--out", str(tmp_path)], cwd=ROOT, check=True)
    rows = json.loads((tmp_path / "order.json").read_text())["rows"]
    assert len(rows) == 12  # a row for each of its modes
    for row in rows:
        assert row["open"] + row["resume"] < 10 and row["data"] < 0.5, row
