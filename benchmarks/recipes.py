"""Which published recipes are timed and counted, and what is a training step of one?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from audiossl.batch import Batch
from audiossl.config import cli  # noqa: F401 - brings the resolvers of the config
from audiossl.noise import Noise
from audiossl.optim import OptimSettings, build_optimizer
from audiossl.parts import blocks
from audiossl.planning.cost import Cost, cost_of
from audiossl.planning.speed import STEADY
from audiossl.running.build import method_from_config
from benchmarks import ROOT

EXPERIMENTS = {
    "audiomae": "audiomae_base_as2m",
    "atst_clip": "atst_clip_base_as2m",
    "atst_frame": "atst_frame_base_as2m",
    "passt": "passt_s_as2m",
}
CLASSES = [f"class {number}" for number in range(527)]


def config_of(method: str, *overrides: str) -> dict[str, Any]:
    """Compose the published recipe of a method: model, frontend, optim and global_batch."""
    about = [f"experiment={EXPERIMENTS[method]}", f"root={ROOT}", "run_dir=x", "name=x", "data.shards=x", *overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("train", overrides=about)
    parts = {part: OmegaConf.to_container(config[part], resolve=True) for part in ("model", "frontend", "optim")}
    return parts | {"global_batch": config.global_batch}


def build(config: dict[str, Any]) -> nn.Module:
    """Build a method from random numbers, the same every time."""
    torch.manual_seed(0)
    return method_from_config(config, vocabulary=CLASSES)


def samples_of(method: nn.Module) -> int:
    """Count the samples of the crop that a method wants of a clip."""
    frontend = method.frontend
    return getattr(method, "crop_samples", None) or frontend.samples_for(frontend.frames)


def clip_cost(method: nn.Module, half: torch.dtype | None = None) -> Cost:
    """Count what training on a clip costs; `half` is the type of autocast."""
    classes = len(CLASSES) if getattr(method, "needs_labels", False) else None
    return cost_of(method, samples=samples_of(method), num_classes=classes, half=half)


class Step:
    """Take training steps of `clips` waveforms of noise on a device; each call is a step and gives the clips.

    `half` computes in bf16, `compile` the blocks; `naive_attention` writes the whole matrix of attention.
    """

    def __init__(
        self, config: dict[str, Any], clips: int, device: str, *, half=False, compile=False, naive_attention=False
    ):
        self.method = build(config).to(device).train()
        self.clips, self.device, self.half, self.number = clips, device, half, 0
        if compile:
            blocks.compile_blocks(self.method, device.split(":")[0])
        optim = OptimSettings(**{**config["optim"], **STEADY})
        self.optimizer = build_optimizer(self.method, optim, lr=1e-6)
        samples = samples_of(self.method)
        waveform = 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(1))
        target = (torch.rand(clips, len(CLASSES), generator=torch.Generator().manual_seed(2)) < 0.01).float()
        rows, key = torch.arange(clips), [str(row) for row in range(clips)]
        batch = Batch(waveform, torch.full((clips,), samples), rows=rows, key=key, target=target)
        self.batch = batch.to(device)
        self.attention: Callable[[], AbstractContextManager] = nullcontext
        if naive_attention:
            self.attention = lambda: sdpa_kernel(SDPBackend.MATH)

    def __call__(self) -> int:
        noise = Noise(0, self.number, self.batch.rows, self.clips, self.device)
        autocast = torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.half)
        with self.attention(), noise.of_this_step(), blocks.compiled():
            with autocast:
                loss: Tensor = self.method(self.batch, generator=noise)["loss"]
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if hasattr(self.method, "after_step"):
            self.method.after_step(self.number, 10**6)
        self.number += 1
        return self.clips
