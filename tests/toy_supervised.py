"""A method that learns from labels, as small as can be: encoder, mean over tokens, linear head.

`supervised_project` makes a copy of the project in which it is `model=supervised`: a method is a file and a YAML.
"""

import shutil
from pathlib import Path

import torch
from conftest import ROOT
from torch import Tensor, nn
from torch.nn import functional

from audiossl.batch import Batch
from audiossl.encoder import Encoder
from audiossl.noise import Noise

CONF = "_target_: audiossl.methods.supervised.Supervised\nwidth: 0\ndepth: 0\nnum_heads: 0\nhas_average: false\n"


class Supervised(nn.Module):
    """Tell classes by the mean token; `has_average` keeps a mean of the heads of all steps beside the head."""

    needs_labels = True

    def __init__(
        self, *, frontend: nn.Module, num_classes: int, width: int, depth: int, num_heads: int, has_average: bool
    ):
        super().__init__()
        self.frontend = frontend
        sizes = dict(width=width, depth=depth, num_heads=num_heads, mlp_ratio=2.0, drop_path=0.0, positions="corrected")
        cut = dict(num_mels=frontend.num_mels, frames=frontend.frames, patch=(16, 16), stride=(16, 16))
        self.encoder = Encoder(**cut, **sizes)
        self.head = nn.Linear(width, num_classes)
        self.average_head = nn.Linear(width, num_classes).requires_grad_(False) if has_average else None

    def forward(self, batch: Batch, *, generator: Noise) -> dict[str, Tensor]:
        if len(batch) == 0:
            return {"loss": sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0}
        gain = 0.5 + generator.uniform(1)
        return {"loss": functional.binary_cross_entropy_with_logits(self._scores(batch, gain), batch.target)}

    def logits(self, batch: Batch) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return self._scores(batch, 1.0)

    def averages(self) -> dict[str, nn.Module]:
        return {} if self.average_head is None else {"swa": Averaged(self)}

    def after_step(self, step: int, max_steps: int) -> None:
        if self.average_head is not None:
            for mean, now in zip(self.average_head.parameters(), self.head.parameters(), strict=True):
                mean.data.lerp_(now.data, 1 / (step + 1))

    def features(self, batch: Batch, gain: Tensor | float) -> Tensor:
        return self.encoder(self.frontend(batch.waveform * gain, batch.num_samples))[:, 1:].mean(1)

    def _scores(self, batch: Batch, gain: Tensor | float) -> Tensor:
        return self.head(self.features(batch, gain))


class Averaged(nn.Module):
    """Take the logits of the mean of the heads."""

    def __init__(self, method: Supervised):
        super().__init__()
        self.method = method

    def logits(self, batch: Batch) -> Tensor:
        return self.method.average_head(self.method.features(batch, 1.0))


def supervised_project(folder: Path) -> Path:
    """Copy the project into `folder` with one method and its YAML more; returns its train.py."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("audiossl", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "demo").symlink_to(ROOT / "demo")
    shutil.copy(ROOT / "train.py", folder / "train.py")
    own = Path(__file__).read_text().replace("from conftest import ROOT\n", "ROOT = Path()\n")
    (folder / "audiossl" / "methods" / "supervised.py").write_text(own)
    (folder / "conf" / "model" / "supervised.yaml").write_text(CONF)
    return folder / "train.py"
