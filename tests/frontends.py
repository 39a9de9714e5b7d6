"""Front ends and clips for the tests."""

import soundfile
import torch
from conftest import ROOT, SHARED, golden_cases
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file

from audiossl.spectrogram import resample, to_float

NAMES = ["kaldi_fbank", "atst_mel", "passt_mel"]
AUDIOSET = {"mean": -4.2677393, "std": 4.5689974}


def settings(name: str, **changes):
    """Read the published setting and change single values."""
    config = OmegaConf.create({"frontend": OmegaConf.load(ROOT / f"conf/frontend/{name}.yaml"), "data": AUDIOSET})
    OmegaConf.set_struct(config, True)
    config.frontend.update(changes)
    return config.frontend


def front_end(name: str, **changes):
    return instantiate(settings(name, **changes)).eval()


def noise_clips(samples: int, clips: int = 3, seed: int = 0) -> torch.Tensor:
    """Draw clips of different loudness: a shared statistic would show."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clips, samples, generator=generator) * torch.tensor([0.3, 0.03, 0.003])[:clips, None]


def recorded_clip() -> torch.Tensor:
    """Return (1, 24000) at 16 kHz: a recording, or a golden case's synthetic clip where the checkout has none."""
    for path in sorted((SHARED / "data/esc10/audio").glob("*"))[:1]:
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
        return resample(torch.from_numpy(samples[: 2 * rate_hz].mean(1)[None]), rate_hz, 16000)[:, :24000]
    return to_float(load_file(golden_cases("fe_atst_win640")[0] / "input.safetensors")["wav_i16.rich"])[None, :24000]
