"""PaSST models and golden cases for the tests."""

from pathlib import Path

import torch
import yaml
from conftest import ROOT
from frontends import front_end
from goldens import Golden

from audiossl.methods.passt import PaSST
from audiossl.weights.passt import import_pretrained

TINY = dict(width=24, depth=2, num_heads=2)
PLAIN = dict(  # nothing is drawn
    patchout_time=0,
    patchout_frequency=0,
    gain_db=0,
    roll_samples=0,
    waveform_mixup=0.0,
    mask_bands=0,
    mask_frames=0,
    spectrogram_mixup_alpha=None,
)
TITLES = {  # of what has another name in the authors' files
    **{
        f"head.{n}.{kind}": lambda model, part=part, kind=kind: model.head.get_submodule(part).get_parameter(kind).grad
        for n, part in enumerate(("norm", "linear"))
        for kind in ("weight", "bias")
    },
    "cls_token": lambda model: model.encoder.class_token.grad[:, 0],
    "dist_token": lambda model: model.encoder.class_token.grad[:, 1],
    "new_pos_embed": lambda model: model.encoder.positions.class_table.grad,
    "freq_new_pos_embed": lambda model: model.encoder.positions.frequency.grad,
    "time_new_pos_embed": lambda model: model.encoder.positions.time.grad,
}


def passt(seconds: float | None = 2.56, *, hop_ms: float = 10, num_classes: int = 5, **changes) -> PaSST:
    """Build a small model from the shipped defaults, its start the same every time."""
    settings = yaml.safe_load((ROOT / "conf/model/passt.yaml").read_text())["model"]
    del settings["_target_"]
    torch.manual_seed(0)
    frontend = front_end("passt_mel", seconds=seconds, hop_ms=hop_ms).train()
    short = dict(patchout_time=10, mask_frames=49)
    return PaSST(frontend=frontend, num_classes=num_classes, **(settings | short | TINY | changes))


class PaSSTGolden(Golden):
    """Hold a case of PaSST and our model with its weights."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        given = dict(num_heads=self.config["num_heads"], num_mels=self.config["img_size"][0])
        weights, geometry = import_pretrained(folder / "official.pth", stride=tuple(self.config["stride"]), **given)
        assert geometry.pop("num_mels") == given["num_mels"]
        self.model = passt(seconds=10, **PLAIN | geometry)
        self.model.load_state_dict(weights)

    def same_gradients(self) -> None:
        ours = dict(self.model.named_parameters())
        for name, theirs in self.case["grad_norms"].items():
            gradient = TITLES[name](self.model) if name in TITLES else ours[f"encoder.{name}"].grad
            assert abs(float(gradient.norm()) - theirs) <= 1e-5 + 1e-4 * theirs, name
