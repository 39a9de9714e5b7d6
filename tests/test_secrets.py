"""Passwords and keys that a run is given stand nowhere in what it leaves."""

import os

import pytest
from commands import TINY, train

from audiossl.config.secrets import mask

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
    found = {(path.name, secret) for path in files for secret in PLANTED if secret.encode() in path.read_bytes()}
    assert not found


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
