"""How long do the front ends take, beside torchaudio's Kaldi fbank called clip by clip?

One thread, 32 clips of 2.56 s, the best of several rounds that take turns, so that a busy machine slows all alike.
Run: python -m benchmarks.frontend [--device cuda]
"""

import argparse
import time

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torchaudio.compliance.kaldi import fbank

from benchmarks import ROOT

CONF = ROOT / "conf" / "frontend"


def front_end(name: str, device: str):
    """Build a published setting for clips of 2.56 s (the frames of ATST's centred windows are one more)."""
    config = OmegaConf.create({"frontend": OmegaConf.load(CONF / f"{name}.yaml"), "data": {"mean": -4.27, "std": 4.57}})
    config.frontend.seconds = None
    return instantiate(config.frontend).to(device)


def torchaudio_loop(clips: torch.Tensor) -> torch.Tensor:
    options = dict(htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=128, sample_frequency=16000)
    return torch.stack([fbank((clip - clip.mean())[None], **options) for clip in clips])


def seconds_taken(work, clips: torch.Tensor) -> float:
    started = time.perf_counter()
    work(clips)
    if clips.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Print one line per front end: ms per batch, clips per second, speed relative to torchaudio's loop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    works = {"torchaudio kaldi.fbank, looped": (torchaudio_loop, 16000)}
    works |= {n: (f, f.rate_hz) for n in ("kaldi_fbank", "atst_mel", "passt_mel") for f in [front_end(n, device)]}
    clips = {rate: torch.rand(32, int(2.56 * rate), device=device) - 0.5 for rate in (16000, 32000)}
    best = {name: min(seconds_taken(work, clips[rate]) for _ in range(3)) for name, (work, rate) in works.items()}
    for _ in range(15):
        for name, (work, rate) in works.items():
            best[name] = min(best[name], seconds_taken(work, clips[rate]))
    baseline = best["torchaudio kaldi.fbank, looped"]
    print(f"{'front end':32}{'ms':>8}{'clips/s':>9}{'ratio':>7}")
    for name, taken in best.items():
        print(f"{name:32}{taken * 1e3:8.1f}{32 / taken:9.0f}{baseline / taken:7.2f}")


if __name__ == "__main__":
    main()
