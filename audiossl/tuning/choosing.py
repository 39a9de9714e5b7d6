"""Which weights of a fine-tuning are the best, and which are tested?

Validations rank checkpoints by one number; the weights of the best, the last ones or their average are tested.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audiossl.checkpoints.files import lower_is_better
from audiossl.errors import UserError
from audiossl.finetuning import FineTuning
from audiossl.running.build import load_method
from audiossl.weights.export import parts_of, read_export

if TYPE_CHECKING:
    from audiossl.tasks import Task

BEST = re.compile(r"best-step=(\d+)-(.+)=(-?[\d.e+-]+|inf)\.ckpt")
VALIDATED = re.compile(r"val_loss|val_(accuracy|mAP|auc|d_prime)(_\w+)?")  # with the name of an average behind it


def metric_of(config: dict[str, Any], task: Task, *, has_validation: bool) -> str:
    """Choose what ranks checkpoints: what the task is judged by, as far as a validation knows it.

    Raises `UserError` for a number that no validation of it logs, and where one is asked of a set without validation.
    """
    given = config["checkpoint"]["metric"]
    if given is not None and not VALIDATED.fullmatch(given):
        raise UserError(
            f"checkpoint.metric={given}: no validation measures it; take val_accuracy, val_mAP, val_auc, val_d_prime "
            "or val_loss"
        )
    for key, value in (("stopping.patience", config["stopping"]["patience"]), ("checkpoint.metric", given)):
        if value is not None and not has_validation:
            raise UserError(
                f"{key}={value}: the set has no clips to validate on; hold some out with task.validation=0.1"
            )
    if given is not None or not has_validation:
        return given or "val_loss"
    return "val_accuracy" if task.metric == "accuracy" else "val_mAP"


def chosen(folder: Path, weights: str, engine: dict[str, Any]) -> FineTuning:
    """Load the weights to test from a trained fold: best, last or swa; `engine` is its config.

    Without a checkpoint that was best in validation, best is the last. Raises `UserError` where nothing was averaged.
    """
    metric = engine["checkpoint"]["metric"]
    checkpoints = folder / "checkpoints"
    name = re.sub(r"[^\w.-]", "_", metric)
    found = [(path, BEST.fullmatch(path.name)) for path in checkpoints.glob("best-*.ckpt")]
    sign = -1 if lower_is_better(metric) else 1
    best = [(sign * float(m[3]), -int(m[1]), path) for path, m in found if m and m[2] == name]
    has_best = weights == "best" and best and metric.startswith("val_")
    method, _ = load_method(max(best)[2] if has_best else folder, engine)
    if weights == "swa":
        average = folder / "encoder_swa.safetensors"
        if not average.exists():
            raise UserError("test.weights=swa: nothing was averaged; set swa.start")
        _, tensors = read_export(average)
        for name, own in parts_of(tensors).items():
            if own:
                getattr(method, name).load_state_dict(own)
    return method
