"""Audio-MAE models, golden cases and real clips for the tests."""

import io
import tarfile
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from conftest import ROOT, SHARED
from einops import rearrange
from goldens import Golden

from audiossl.methods.audiomae import AudioMAE
from audiossl.sound.audio import resample
from audiossl.spectrogram import KaldiFbank
from audiossl.weights.audiomae import import_pretrained

TINY = dict(width=24, depth=2, num_heads=2, decoder="global", decoder_width=16, decoder_depth=2, decoder_num_heads=2)
PLAIN = dict(  # `OptimSettings` without ATST's and PaSST's ways
    schedule="warmup_cosine",
    ramp_down=None,
    adamw="torch",
    final_weight_decay=None,
    decay="matrices",
    optimizer="adamw",
    momentum=0.9,
    layer_decay=None,
    layer_decay_rule="audiomae",
    head_lr_scale=1.0,
)


def kaldi_fbank(frames: int | None, num_mels: int = 128) -> KaldiFbank:
    published = dict(rate_hz=16000, window_ms=25, hop_ms=10, fmin_hz=20, fmax_hz=None, preemphasis=0.97)
    seconds = None if frames is None else frames / 100
    return KaldiFbank(**published, num_mels=num_mels, mean=-4.2677393, std=4.5689974, seconds=seconds)


def audiomae(frames: int | None = 128, num_mels: int = 128, **changes) -> AudioMAE:
    """Build a small model from the shipped defaults, its start the same every time."""
    settings = yaml.safe_load((ROOT / "conf/model/audiomae.yaml").read_text())
    del settings["_target_"]
    torch.manual_seed(0)
    return AudioMAE(frontend=kaldi_fbank(frames, num_mels), **(settings | TINY | changes))


class MAEGolden(Golden):
    """Hold a case of Audio-MAE and our model with its weights, in evaluation mode."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        heads = {key: self.config[key] for key in ("num_heads", "decoder_num_heads")}
        weights, geometry = import_pretrained(folder / "official.pth", **heads)
        frames, num_mels = geometry.pop("frames"), geometry.pop("num_mels")
        self.model = audiomae(frames, num_mels, **geometry, norm_target=self.config["norm_pix_loss"])
        self.model.load_state_dict(weights)
        self.model.eval()
        self.grid = self.model.encoder.grid


def ours(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Reorder (B, N, ...) from the published time-major order to ours."""
    return rearrange(values, "b (column row) ... -> b (row column) ...", row=grid[0], column=grid[1])


def published(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Reorder (B, N, ...) from our order to the published one."""
    return rearrange(values, "b (row column) ... -> b (column row) ...", row=grid[0], column=grid[1])


def real_clips(count: int, seconds: float, to_hz: int = 16000) -> torch.Tensor:
    """Read recordings as (count, S) at `to_hz`: from the committed demo set, or from the shared data."""
    found = list(_demo_audio(count)) or [
        p.read_bytes() for p in sorted((SHARED / "data/esc10/audio").glob("*"))[:count]
    ]
    if len(found) < count:
        pytest.skip("neither the demo set nor the shared recordings are here")
    clips = torch.zeros(count, int(to_hz * seconds))
    for row, content in zip(clips, found, strict=True):
        samples, rate_hz = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        samples = torch.from_numpy(resample(samples.mean(1), rate_hz, to_hz))[: len(row)]
        row[: len(samples)] = samples
    return clips


def _demo_audio(count: int):
    for shard in sorted(ROOT.glob("demo/**/*.tar"))[:1]:
        with tarfile.open(shard) as tar:
            sounds = [m for m in tar if m.name.rpartition(".")[2] in ("ogg", "flac", "wav", "mp3")]
            for member in sounds[:: max(len(sounds) // count, 1)][:count]:
                yield tar.extractfile(member).read()
