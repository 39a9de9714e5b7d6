"""Any method at the size of a test, from its shipped defaults."""

import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from audiossl.batch import Batch
from audiossl.index import Index
from audiossl.running.build import method_from_config
from audiossl.sound.waveform import resample

SMALL = {  # of which each method takes what it knows
    "width": 24,
    "depth": 2,
    "num_heads": 2,
    "decoder": "global",
    "decoder_width": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "projector_width": 32,
    "projection_width": 16,
    "mixup_memory": 8,
    "drop_path": 0.0,
    "stride": 16,
    "patchout_time": 4,
    "patchout_frequency": 2,
}
CLASSES = Index.load(ROOT / "demo" / "shards").vocabulary


def compose_for(model: str, *overrides: str) -> dict:
    """Compose what a method and its front end are built from, for `python train.py model=...`."""
    overrides = [f"model={model}", f"root={ROOT}", "run_dir=x", "name=x", *overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("train", overrides=overrides)
    return {part: OmegaConf.to_container(config[part], resolve=True) for part in ("model", "frontend")}


def small_settings(model: str) -> dict:
    """Choose what a test changes of a method's settings: those of SMALL that it has and that are plain numbers."""
    settings = compose_for(model)["model"]
    return {k: v for k, v in SMALL.items() if k in settings and not isinstance(settings[k], list)}


def settings_of(model: str) -> list[str]:
    """Give the command line of a run of seconds."""
    return [f"model={model}", *(f"model.{k}={v}" for k, v in small_settings(model).items())]


def build(model: str, **changes) -> torch.nn.Module:
    """Build the method on the demo's front end, its start the same every time."""
    config = compose_for(model)
    torch.manual_seed(0)
    return method_from_config(
        {**config, "model": config["model"] | small_settings(model) | changes}, vocabulary=CLASSES
    )


def batch_of(method: torch.nn.Module, clips: torch.Tensor, rows: list[int] | None = None) -> Batch:
    """Make a batch of clips (B, S) at 16 kHz, each with a class of its own, as the loader and `prepare` would."""
    rows = list(range(len(clips))) if rows is None else rows
    waveform = resample(clips, 16000, method.frontend.rate_hz)
    target = torch.eye(len(CLASSES))[rows] if getattr(method, "needs_labels", False) else None
    keys = [f"clip {row}" for row in rows]
    num_samples = torch.full((len(clips),), waveform.shape[1])
    return Batch(waveform, num_samples, rows=torch.tensor(rows), key=keys, target=target)
