"""Fine-tuning of small encoders for the tests, from the shipped settings."""

from pathlib import Path

import torch
import yaml
from conftest import ROOT

from audiossl.batch import Batch
from audiossl.config.settings import instantiate
from audiossl.encoder import Encoder
from audiossl.finetuning import FineTuning

SIZES = dict(width=24, depth=3, num_heads=2, mlp_ratio=2.0, drop_path=0.0)
MAE = dict(num_mels=64, frames=96, patch=[16, 16], stride=[16, 16], positions="published", **SIZES)
FRAME = dict(num_mels=64, frames=96, patch=[64, 4], stride=[64, 4], positions="learned", num_class_tokens=0, **SIZES)
CLIP = FRAME | dict(num_class_tokens=1, qkv_bias=False)
PASST = MAE | dict(positions="time+frequency", num_class_tokens=2, stride=[12, 12])
QUIET = dict(  # nothing augmented
    gain_db=0, roll_samples=0, roll_magnitude="none", waveform_mixup=0.0, resized_crop="none", mask_bands=0,
    mask_frames=0, spectrogram_mixup=0.0,
)  # fmt: skip


def settings_of(name: str = "default", **changes) -> dict:
    """Read `conf/tuning`, with changes; those of `hiding` and `augment` are found by their names."""
    settings = yaml.safe_load((ROOT / f"conf/tuning/{name}.yaml").read_text())
    settings["loss"] = settings["loss"].replace("auto", "bce")  # as finetune.py settles it
    for key, value in changes.items():
        part = next(p for p in (settings, settings["hiding"], settings["augment"]) if key in p)
        part[key] = value
    return settings


def frontend_of(geometry: dict, *, seconds: float | None = None):
    """Build a front end as long as the encoder's positions, unless said."""
    published = yaml.safe_load((ROOT / "conf/frontend/kaldi_fbank.yaml").read_text())
    seconds = geometry["frames"] / 100 if seconds is None else seconds
    return instantiate(
        {
            **{k: v for k, v in published.items() if not str(v).startswith("${")},
            **dict(num_mels=geometry["num_mels"], seconds=seconds, mean=-4.27, std=4.57),
        }
    )


def tuning(
    geometry: dict = MAE, name: str = "default", *, num_classes: int = 5, frontend=None, **changes
) -> FineTuning:
    """Build a small fine-tuning, its start the same every time."""
    settings = settings_of(name, **changes) | dict(geometry=geometry)
    torch.manual_seed(0)
    frontend = frontend_of(geometry) if frontend is None else frontend
    return instantiate(settings, frontend=frontend, num_classes=num_classes)


def export_of(method: FineTuning, folder: Path, **about) -> Path:
    """Export a fine-tuning as its run would."""
    from audiossl.weights.export import describe, write_export

    frontend = yaml.safe_load((ROOT / "conf/frontend/kaldi_fbank.yaml").read_text())
    frontend = {k: v for k, v in frontend.items() if not str(v).startswith("${")}
    frontend |= dict(num_mels=64, seconds=method.frontend.frames / 100, mean=-4.27, std=4.57)
    description = describe(method.encoder, method.head, frontend, None) | about
    write_export(method.encoder, method.head, description, folder / "encoder.safetensors", attention=method.attention)
    return folder


def batch(count: int = 4, samples: int = 15600, num_classes: int = 5, **changes) -> Batch:
    """Make clips of noise, each with a label."""
    noise = torch.Generator().manual_seed(1)
    wave = torch.randn(count, samples, generator=noise) * 0.1
    target = torch.eye(num_classes)[torch.arange(count) % num_classes]
    given = dict(waveform=wave, num_samples=torch.full((count,), samples), rows=torch.arange(count), target=target)
    return Batch(**given | dict(key=[f"clip{i}" for i in range(count)]) | changes)


def encoder_with(geometry: dict) -> Encoder:
    torch.manual_seed(1)
    return Encoder(**geometry)
