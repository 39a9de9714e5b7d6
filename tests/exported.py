"""Small encoders of four methods, exported and loaded as a user's are, and files of sound to describe."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from methods import CLASSES, build, compose_for

from audiossl.pretrained import PretrainedEncoder
from audiossl.weights.export import export_encoder, load_encoder

METHODS = ("audiomae", "atst_clip", "atst_frame", "passt")
OVERLAPPING = "passt stride=10"  # patches that overlap in time, an odd number of columns


def export(model: str, folder: Path) -> Path:
    """Export the method `model` ("passt stride=10") at the size of a test, with a head where it learns from labels."""
    folder.mkdir(parents=True, exist_ok=True)
    model, *changes = model.split()
    method = build(model, **{key: int(value) for key, value in (change.split("=") for change in changes)})
    config = compose_for(model) | {"data": {"mean": 0.0, "std": 1.0}}
    names = CLASSES if hasattr(method, "head") else None
    export_encoder(method, config, folder / "encoder.safetensors", vocabulary=names)
    return folder


@functools.cache
def encoder_of(model: str) -> PretrainedEncoder:
    """Load the export of the method `model`."""
    with tempfile.TemporaryDirectory() as folder:
        return load_encoder(export(model, Path(folder)))


def noise(seconds: float, rate_hz: int, seed: int = 0) -> np.ndarray:
    """Draw noise (S,) float32 that swells and fades, so that no two moments are alike."""
    count = max(1, round(seconds * rate_hz))
    swell = 0.1 + 0.09 * np.sin(np.arange(count) / rate_hz * 2.1)
    return (np.random.default_rng(seed).normal(size=count) * swell).clip(-1, 1).astype(np.float32)


def write(path: Path, waveform: np.ndarray, rate_hz: int, **options) -> Path:
    soundfile.write(path, waveform, rate_hz, **options)
    return path
