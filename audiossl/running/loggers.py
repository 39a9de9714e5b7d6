"""Where do a run's numbers go?

Always to `metrics.csv` in the run's folder, which survives a resume (Lightning's CSVLogger starts over and loses the
earlier rows); to TensorBoard by default; to Weights & Biases when asked, offline unless a key is there. A logger that
breaks down is reported once and training goes on.
"""

from __future__ import annotations

import csv
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_only

from audiossl.config.secrets import mask
from audiossl.errors import UserError

log = logging.getLogger(__name__)


class MetricsCsv(Logger):
    """Keep one row a step in `folder/metrics.csv`: floats in full precision, one column a metric.

    Only the last row, which may still grow, is held in memory: it and what follows it are written over. A new column,
    or a number of an earlier step, rewrites the file. `start_at(step)` drops the rows of steps that a resumed run is
    about to do again.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.columns: list[str] = ["step"]
        self._rows: dict[int, dict[str, str]] = {}  # which the file does not have yet, and its last
        self._tail: tuple[int, int] | None = None  # (step, byte offset) of the last row on disk; None: write it anew
        self._read()

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Leave the settings to `config.yaml`, which lies beside this file."""

    @rank_zero_only
    def start_at(self, step: int) -> None:
        """Forget the rows from `step` on: their updates were lost with the run that wrote them."""
        self._rows = {s: row for s, row in self._rows.items() if s < step}
        self._rewrite({s: row for s, row in self._read().items() if s < step})

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = 0 if step is None else int(step)
        row = self._rows.setdefault(step, {"step": str(step)})
        row |= {k: repr(float(v)) for k, v in metrics.items() if k != "epoch"}
        new = [k for k in row if k not in self.columns]
        self.columns += new
        if new or (self._tail is not None and step < self._tail[0]):
            self._tail = None

    @rank_zero_only
    def save(self) -> None:
        if self._tail is None:
            self._rewrite(self._read())
            return
        with open(self.path, "r+", newline="") as file:
            file.seek(self._tail[1])
            self._write_rows(file, self._rows)
            file.truncate()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _read(self) -> dict[int, dict[str, str]]:
        """Give the rows of the file, but for one that a kill has cut; its columns join ours."""
        if not self.path.exists():
            return {}
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            self.columns = list(dict.fromkeys([*(reader.fieldnames or ["step"]), *self.columns]))
            whole = (row for row in reader if (row.get("step") or "").isdigit() and None not in row.values())
            return {int(row["step"]): {k: v for k, v in row.items() if v} for row in whole}

    def _rewrite(self, rows: dict[int, dict[str, str]]) -> None:
        for step, row in self._rows.items():
            rows[step] = rows.get(step, {}) | row
        part = self.path.with_suffix(".csv.part")
        with open(part, "w", newline="") as file:
            csv.DictWriter(file, self.columns).writeheader()
            file.flush()
            self._write_rows(file, rows)
        os.replace(part, self.path)

    def _write_rows(self, file: IO[str], rows: dict[int, dict[str, str]]) -> None:
        writer = csv.DictWriter(file, self.columns)
        for step in sorted(rows):
            file.flush()
            self._tail = (step, file.tell())
            writer.writerow(rows[step])
        self._rows = {step: row for step, row in rows.items() if step == self._tail[0]} if rows else {}


@contextmanager
def _masked_arguments() -> Iterator[None]:
    """Hide secrets of the command line from a backend that notes it (W&B does, as it starts)."""
    given = sys.argv
    sys.argv = mask(given)
    try:
        yield
    finally:
        sys.argv = given


class Guarded(Logger):
    """Pass everything to `inner`; when it fails, say so once and stop using it."""

    def __init__(self, inner: Logger):
        super().__init__()
        self.inner = inner
        self.is_broken = False

    def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self.is_broken:
            return
        try:
            getattr(self.inner, method)(*args, **kwargs)
        except Exception as error:  # whatever a logging backend throws must not cost the run
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.is_broken = True
        log.warning("%s failed and is switched off for this run: %s", type(self.inner).__name__, error)

    @property
    def name(self) -> str | None:
        return type(self.inner).__name__

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> Any:
        if not self.is_broken:
            try:
                with _masked_arguments():
                    return self.inner.experiment
            except Exception as error:
                self._give_up(error)
        return DummyExperiment()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._try("log_hyperparams", params, *args, **kwargs)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._try("log_metrics", metrics, step)

    def save(self) -> None:
        self._try("save")

    def finalize(self, status: str) -> None:
        self._try("finalize", status)

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG in whichever way the backend has."""
        if self.is_broken:
            return
        try:
            if isinstance(self.inner, TensorBoardLogger):
                import matplotlib.image

                self.inner.experiment.add_image(name, matplotlib.image.imread(path)[..., :3], step, dataformats="HWC")
            else:
                self.inner.log_image(name, [str(path)], step)
        except Exception as error:
            self._give_up(error)


def build_loggers(*, tensorboard: bool, wandb: bool, project: str, run_dir: Path, name: str) -> list[Logger]:
    """Make the loggers of a run; the first is always `MetricsCsv`."""
    loggers: list[Logger] = [MetricsCsv(run_dir)]
    if tensorboard:
        loggers.append(Guarded(TensorBoardLogger(run_dir, name="", version="tensorboard")))
    if wandb:
        loggers.append(Guarded(_wandb_logger(project, run_dir, name)))
    return loggers


def _wandb_logger(project: str, run_dir: Path, name: str) -> Logger:
    try:
        import wandb
        from lightning.pytorch.loggers import WandbLogger
    except ImportError:
        raise UserError("logger=wandb: wandb is not installed; pip install wandb") from None
    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists() and rank_zero_only.rank == 0:
        id_file.write_text(secrets.token_hex(4))
    has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
    offline = os.environ.get("WANDB_MODE", "online" if has_key else "offline") != "online"
    if offline:
        log.info("W&B writes offline to %s/wandb; `wandb sync` uploads it later", run_dir)
    identifier = id_file.read_text().strip() if id_file.exists() else None
    settings = dict(id=identifier, resume="allow", mode="offline" if offline else "online")
    return WandbLogger(project=project, name=name, save_dir=run_dir, **settings)


def log_picture(trainer: pl.Trainer, name: str, path: Path) -> None:
    """Hand a PNG to every logger that can show one."""
    for logger in trainer.loggers:
        if isinstance(logger, Guarded):
            logger.log_picture(name, path, trainer.global_step)
