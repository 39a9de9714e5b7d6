"""Which settings of a command make sense together, and which can it not take at all?"""

from __future__ import annotations

from collections.abc import Mapping

from audiossl.config.rules import show
from audiossl.errors import UserError


def check_global_batch(values: Mapping[str, object]) -> None:
    """Check that devices, `data.batch_size` and accumulation make the `global_batch` that is asked for.

    Devices that are counted later (auto) are checked then. Raises `UserError` with what would make it.
    """
    wanted, devices = values.get("global_batch"), values.get("trainer.devices")
    if wanted is None or not isinstance(devices, int) or devices < 1:
        return
    batch, accumulate = values["data.batch_size"], values["trainer.accumulate_grad_batches"]
    found = devices * batch * accumulate
    if found == wanted:
        return
    ways = []
    if wanted % (devices * batch) == 0:
        ways.append(f"trainer.accumulate_grad_batches={wanted // (devices * batch)}")
    if wanted % (devices * accumulate) == 0:
        ways.append(f"data.batch_size={wanted // (devices * accumulate)}")
    raise UserError(
        f"global_batch={wanted}: trainer.devices={devices} x data.batch_size={batch} x "
        f"trainer.accumulate_grad_batches={accumulate} is {found} clips a step; take "
        f"{' or '.join([*ways, f'global_batch={found} (another recipe: null asks for none)'])}"
    )


def refuse_plan_of(config_name: str) -> None:
    """Raise `UserError` where dry_run=true is asked of a command that cannot be planned."""
    if config_name != "train":
        raise UserError(
            f"dry_run=true: {config_name}.py cannot be planned; how many steps and folds there are is up to the "
            "labelled set. Try a few steps with trainer.max_epochs=null trainer.max_steps=20"
        )


def _check_once(values: Mapping[str, object], *keys: str) -> None:
    for key in keys:
        given = values.get(key)
        if isinstance(given, list) and len(set(given)) < len(given):
            raise UserError(f"{key}={show(given)}: each once")


def check_finetuning(values: Mapping[str, object]) -> None:
    """Check that there is a labelled set, that no fold is trained twice with a seed, and that what is tested exists."""
    _check_once(values, "seeds")
    if values.get("test.weights") == "swa" and values.get("swa.start") is None and not values.get("evaluate"):
        raise UserError("test.weights=swa: nothing is averaged; say from when on with swa.start, or take best or last")
    if values.get("task.root") is None and values.get("task.shards") is None:
        about = values.get("task.about")
        raise UserError(
            f"task.root: give the folder of {values.get('task.name')}, task.root=DIR, or packed shards of it, "
            f"task.shards=DIR{'. ' + str(about) if about else ''}"
        )


def check_probe(values: Mapping[str, object]) -> None:
    """Check what the keys of a probe decide together: nothing is chosen from an empty list, and names come once."""
    for key, value in values.items():
        is_list = key in ("init", "probe.heads", "probe.seeds") or key.startswith("heads.")
        if is_list and isinstance(value, list) and not value:
            raise UserError(f"{key}=[]: name at least one")
    _check_once(values, "probe.heads", "probe.seeds")
