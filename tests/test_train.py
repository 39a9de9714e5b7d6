"""`python train.py` from the outside: what it leaves, what it says, how it ends."""

import json
import os

import pytest
import soundfile
import torch
import yaml
from commands import TINY, metrics, train

import audiossl
from audiossl.__main__ import main
from audiossl.running.build import load_method

DEMO = ["trainer=cpu", "trainer.log_every_n_steps=2", "model.depth=1", "model.decoder_depth=1", "data.num_workers=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the README's first command, cut short: eight steps, with probe and pictures."""
    folder = tmp_path_factory.mktemp("demo")
    shortened = ["trainer.max_steps=8", "validate_every_steps=4", "pictures.every_steps=4", "probe.every_steps=4"]
    output = train(*DEMO, *shortened, "name=short", cwd=folder, fresh=True)
    return folder / "runs" / "short", output


def test_a_run_leaves_everything_it_promises(finished):
    run, output = finished
    for name in ("checkpoints/last.ckpt", "encoder.safetensors", "encoder.json", "reconstruction.png", "loss.png"):
        assert (run / name).stat().st_size > 0, name
    for name in ("config.yaml", "provenance.json", "results.json", "metrics.csv", "pictures/step=000000004.png"):
        assert (run / name).stat().st_size > 0, name
    assert "checkpoints/last.ckpt" in output and "log-mel" in output and "clips/s" in output
    best = list((run / "checkpoints").glob("best-step=*-val_loss=*.ckpt"))
    assert len(best) == 1


def test_its_numbers_are_in_metrics_and_results(finished):
    run, _ = finished
    rows = metrics(run)
    for column in ("loss", "val_loss", "lr", "grad_norm", "clips_per_second", "tokens_per_second", "probe/linear"):
        assert any(row.get(column) for row in rows), column
    results = json.loads((run / "results.json").read_text())
    assert results["status"] == "finished" and results["steps"] == 8
    assert 0 <= results["scores"]["knn"] <= 1 and set(results["history"]) == {"0", "4", "8"}


def test_its_origin_is_in_the_run_and_in_the_checkpoint(finished):
    run, _ = finished
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["audiossl"]
    assert checkpoint["config"] == yaml.safe_load((run / "config.yaml").read_text())
    assert checkpoint["provenance"] == json.loads((run / "provenance.json").read_text())
    assert checkpoint["provenance"]["versions"]["torch"] and len(checkpoint["provenance"]["corpus_hash"]) == 64


def test_the_sound_holds_original_and_reconstruction_of_each_clip(finished):
    run, _ = finished
    waveform, rate = soundfile.read(run / "reconstruction.wav")
    assert rate == 16000 and len(waveform) / rate > 3 * 2 * 2.5 and abs(waveform).max() <= 1


def test_the_exported_encoder_gives_the_checkpoints_tokens(finished):
    run, _ = finished
    method, _ = load_method(run)
    encoder = audiossl.load(run)
    waveform = torch.from_numpy(soundfile.read(run / "reconstruction.wav", dtype="float32")[0][:41200])[None]
    with torch.no_grad():
        assert torch.equal(encoder(waveform, 16000), method.encoder(method.frontend(waveform)))


def test_a_second_run_of_that_name_is_refused_before_anything_is_touched(finished):
    run, _ = finished
    before = (run / "metrics.csv").read_bytes()
    output = train(*DEMO, "name=short", cwd=run.parent.parent, expect=2)
    assert "holds a run already" in output and "ckpt=last" in output and output.count("\n") == 1
    assert (run / "metrics.csv").read_bytes() == before


def test_a_finished_run_that_is_resumed_says_what_it_said(finished):
    run, _ = finished
    before = json.loads((run / "results.json").read_text())
    shortened = ["trainer.max_steps=8", "validate_every_steps=4", "pictures.every_steps=4", "probe.every_steps=4"]
    train(*DEMO, *shortened, "name=short", "ckpt=last", cwd=run.parent.parent)
    after = json.loads((run / "results.json").read_text())
    assert (after["steps"], after["scores"], after["loss"]) == (8, before["scores"], before["loss"])


def test_any_audio_file_can_be_reconstructed(finished, tmp_path, capsys):
    run, _ = finished
    soundfile.write(tmp_path / "mine.wav", torch.randn(44100, 2).numpy() * 0.1, 44100)
    arguments = ["reconstruct", str(tmp_path / "mine.wav"), "--checkpoint", str(run), "--out", str(tmp_path)]
    assert main([*arguments, "--mask", "time", "--ratio", "0.5"]) == 0
    assert (tmp_path / "mine.reconstruction.png").exists() and (tmp_path / "mine.reconstruction.wav").exists()
    assert main(["reconstruct", str(tmp_path / "none.wav"), "--checkpoint", str(run)]) == 2
    assert "none.wav" in capsys.readouterr().err


def test_training_can_start_from_another_run(finished, tmp_path):
    run, _ = finished
    output = train(*DEMO, "trainer.max_steps=1", "probe=none", f"init={run}", "name=next", cwd=tmp_path)
    assert "encoder starts from encoder" in output
    provenance = json.loads((tmp_path / "runs" / "next" / "provenance.json").read_text())
    assert str(run) in provenance["init"]
    output = train(*DEMO, "model.width=96", f"init={run}", "name=other", cwd=tmp_path, expect=2)
    assert "do not fit the model" in output and "size=" in output


@pytest.mark.faults("C10", "R12")
def test_a_checkpoint_of_another_size_is_refused(finished, tmp_path):
    run, _ = finished
    last = run / "checkpoints" / "last.ckpt"
    output = train(*DEMO, "model.width=96", f"ckpt='{last}'", "name=wider", "probe=none", cwd=tmp_path, expect=2)
    assert str(last) in output and "width" in output, output


def test_strangers_shards_train_to_the_end(folder_shards, tmp_path):
    run = tmp_path / "mine"
    output = train(*TINY, "data=folder", f"data.shards={folder_shards}/shard-*.tar", "trainer.max_steps=3",
                   f"hydra.run.dir={run}", cwd=tmp_path)  # fmt: skip
    assert json.loads((run / "results.json").read_text())["steps"] == 3, output


def test_a_sweep_ends_with_a_summary(tmp_path):
    train(*DEMO, "-m", "trainer.max_steps=2", "model.mask_ratio=0.7,0.9", "frontend.hop_ms=10,5", "pictures.clips=0",
          "hydra.sweep.dir=sweep", cwd=tmp_path)  # fmt: skip
    table = (tmp_path / "sweep" / "summary.csv").read_text().splitlines()
    assert len(table) == 5 and "linear" in table[0] and (tmp_path / "sweep" / "summary.png").stat().st_size > 10_000


def test_wandb_logs_offline_without_a_key(folder_shards, tmp_path):
    clean = {name: "" for name in os.environ if name.startswith("WANDB")} | {"HOME": str(tmp_path)}
    train(*TINY, "data=folder", f"data.shards={folder_shards}", "trainer.max_steps=2", "logger=wandb",
          "hydra.run.dir=run", cwd=tmp_path, **clean)  # fmt: skip
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.faults("C1", "C3", "C6")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trainer.max_step=5"], "trainer.max_steps"),
        (["+trainer.max_step=5"], "trainer.max_steps"),
        (["data=folder"], "data.shards"),
        (["data=folder", "data.shards=/nowhere/shard-*.tar"], "/nowhere/shard-*.tar"),
        (["model.mask_ratio=1.2"], "model.mask_ratio=1.2"),
        (["frontend.seconds=2.5"], "frontend.seconds=2.5"),
        (["frontend.seconds=0.1"], "frontend.seconds=0.1"),
        (["trainer=cpu", "trainer.devices=4096"], "trainer.devices=4096"),
        (["trainer.max_epochs=5"], "trainer.max_epochs=5"),
        (["validate_every_steps=0"], "validate_every_steps=0"),
        (["-m", "trainer.devices=2", "seed=1,2"], "trainer.devices=2"),
        (["trainer.limit_train_batches=2"], "trainer.limit_train_batches"),
        (["init=/nowhere.safetensors"], "/nowhere.safetensors"),
    ],
)
def test_wrong_input_is_one_line_that_names_key_and_way_out(tmp_path, arguments, expected):
    output = train(*arguments, cwd=tmp_path, expect=2)
    assert expected in output and output.count("\n") == 1, output
    assert not (tmp_path / "runs" / "audiomae_tiny_demo" / "config.yaml").exists()


def test_shards_without_an_index_are_told_how_to_get_one(folder_shards, tmp_path):
    shard = sorted(folder_shards.glob("*.tar"))[0]
    (tmp_path / shard.name).write_bytes(shard.read_bytes())
    output = train("data=folder", f"data.shards={tmp_path}/*.tar", cwd=tmp_path, expect=2)
    assert "python -m audiossl index" in output
