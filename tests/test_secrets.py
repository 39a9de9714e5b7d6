"""Passwords and keys that a run is given stand nowhere in what it leaves."""

import logging
import os

import pytest
import torch
import yaml
from commands import TINY, train
from finetunes import clips_folder, encoder
from finetunes import run as fine_tune
from servers import Files, Server
from tiny_shards import audio, clip, noise, write_shards

from audiossl.config.secrets import mask, mask_log
from audiossl.errors import UserError
from audiossl.running.build import load_method

PLANTED = ("planted-key-of-wandb-0123456789012345678", "planted-key-in-env", "planted-token", "planted-password")


@pytest.mark.faults("S9")
def test_planted_secrets_are_nowhere_in_a_runs_folder(tmp_path):
    """A variable's value in a key, W&B's own, one set for the job, and one in a URL; searched byte by byte."""
    arguments = ["logger=wandb", "logger.project=p-${oc.env:MY_API_KEY}", f"+hydra.job.env_set.MY_TOKEN={PLANTED[2]}"]
    arguments += [f"data.cache_dir=https://me:{PLANTED[3]}@host/x", "hydra.run.dir=run", "trainer.max_steps=2"]
    clean = {name: "" for name in os.environ if name.startswith("WANDB")} | {"HOME": str(tmp_path / "home")}
    given = {"WANDB_MODE": "offline", "WANDB_API_KEY": PLANTED[0], "MY_API_KEY": PLANTED[1]}
    train(*TINY, "data.validation_clips=4", *arguments, cwd=tmp_path, **clean | given)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".wandb", ".ckpt", ".yaml", ".json", ".log", ".safetensors"} <= kinds
    assert not found_in(tmp_path / "run", *PLANTED)


def found_in(folder, *secrets):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {(path.name, secret) for path in files for secret in secrets if secret.encode() in path.read_bytes()}


@pytest.mark.faults("S9")
def test_a_secret_in_an_address_is_used_and_written_nowhere(tmp_path, certificate, monkeypatch):
    """The server knows the shards by the secret path alone; one clip is bad, and the run is gone on with."""
    secret, run = "planted-path-0123", tmp_path / "run"
    clips = [clip(f"c{i}", audio(noise(i, 4000)) if i != 3 else b"no audio", 4000) for i in range(12)]
    (tmp_path / "web").mkdir()
    write_shards(tmp_path / "web" / secret, [clips[:6], clips[6:]])
    server = Server(tmp_path / "web", Files, certificate)
    monkeypatch.setenv("SHARDS_TOKEN", secret)
    where = f"data.shards=https://{server.host}/${{oc.env:SHARDS_TOKEN}}"
    arguments = [*TINY, where, "data.validation_clips=0", "data.max_bad_fraction=0.5", "data.cache_dir=cache"]
    trusted = {"SSL_CERT_FILE": str(certificate)}
    said = train(*arguments, "hydra.run.dir=run", "trainer.max_steps=4", cwd=tmp_path, **trusted)
    said += train(*arguments, "hydra.run.dir=run", "trainer.max_steps=6", "ckpt=last", cwd=tmp_path, **trusted)
    server.stop()
    assert server.sent["shard-000001.tar"] > 0 and f"https://{server.host}/***" in (run / "bad_clips.csv").read_text()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert not found_in(run, secret) and secret not in said
    said = train(*arguments, "hydra.run.dir=other", cwd=tmp_path, expect=2, **trusted)
    assert f"https://{server.host}/***" in said and secret not in said, "nobody answers any more"


def test_a_fine_tuning_reads_from_secret_places_and_goes_on(tmp_path, monkeypatch):
    task, init = clips_folder(tmp_path / "set"), encoder(tmp_path / "planted-encoder")
    fine_tune(tmp_path / "planted-teacher", init, task)
    monkeypatch.setenv("MY_TOKEN", "planted-encoder")
    monkeypatch.setenv("MY_SECRET", "planted-teacher")
    run, taught = tmp_path / "run", [f"model.teacher={tmp_path}/planted-teacher", "model.distill_weight=0.5"]
    first = fine_tune(run, init, task, *taught)
    for name in ("results.json", "predictions.safetensors"):  # as if it had been killed: trained, and not yet tested
        (run / name).unlink()
    assert fine_tune(run, init, task, *taught, "ckpt=last")["scores"]["score"] == first["scores"]["score"]
    assert not found_in(run, "planted-encoder", "planted-teacher")
    assert yaml.safe_load((run / "finetune.yaml").read_text())["model"]["teacher"] == f"{tmp_path}/***"
    with pytest.raises(UserError, match="model.teacher was a secret, which no checkpoint keeps"):
        load_method(run)


def test_a_checkpoint_whose_model_needs_a_masked_value_says_so_in_a_line(tmp_path):
    config = {"model": {"_target_": "audiossl.methods.AudioMAE", "teacher": "https://h/***/t.pt"}, "frontend": {}}
    torch.save({"audiossl": {"config": config}, "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(
        UserError, match=r"a\.ckpt: model\.teacher was a secret, which no checkpoint keeps.*encoder\.saf"
    ):
        load_method(tmp_path / "a.ckpt")


def test_logs_and_their_tracebacks_are_masked(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "planted-0123")
    try:
        raise ValueError("of planted-0123")
    except ValueError as error:
        about = (type(error), error, error.__traceback__)
    record = logging.LogRecord("a", logging.INFO, "file", 1, "at %s", ("https://h/planted-0123",), about)
    assert mask_log(record)
    said = logging.Formatter().format(record)
    assert said.startswith("at https://h/***\n") and "ValueError: of ***" in said and "planted" not in said


@pytest.mark.faults("S9")
def test_secrets_in_a_text_are_masked_and_all_else_stays():
    text = "+logger.token=abc name=x my_api_key: 'k' num_tokens=5 key=dog secret=${oc.env:A} https://a:b@host/x"
    assert (
        mask(text)
        == "+logger.token=*** name=x my_api_key: '***' num_tokens=5 key=dog secret=${oc.env:A} https://***@host/x"
    )
    assert mask({"password": "abc", "args": ["--password=abc", "depth=3"]}) == {
        "password": "***", "args": ["--password=***", "depth=3"]
    }  # fmt: skip


def test_a_password_that_is_a_word_spoils_no_config(monkeypatch):
    """A development server's, of the environment: it is masked where it stands alone, and nothing else changes."""
    monkeypatch.setenv("DATABASE_PASSWORD", "audiossl")
    config = {"_target_": "audiossl.methods.AudioMAE", "run_dir": "/audiossl/runs", "name": "audiosslnext"}
    assert mask(config) == config
    assert mask({"name": "x-audiossl", "my_token": 5}) == {"name": "x-***", "my_token": "***"}
