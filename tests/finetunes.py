"""Fine-tunings of seconds: small labelled folders of real clips, a small encoder, and `finetune.py` on them."""

import io
import json
from functools import cache
from pathlib import Path

import commands
import numpy as np
import soundfile
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors import safe_open
from tunings import MAE, QUIET, export_of, tuning
from warm import Process

from audiossl.index import Index
from audiossl.sound.audio import resample
from audiossl.tuning.runs import fit

CLASSES = ["dog", "rain", "rooster"]
RATE_HZ = 16000
QUICK = [
    "frontend.seconds=null",
    "trainer=cpu", "trainer.max_steps=4", "trainer.max_epochs=null", "trainer.log_every_n_steps=1",
    "data.batch_size=8", "data.num_workers=0", "validate_every_steps=2",
    "checkpoint.every_steps=2", "test.bootstrap=20", "test.batch_size=8", "optim.lr=1.0e-2",
    *(f"model.augment.{key}={value}" for key, value in QUIET.items()),
]  # fmt: skip


@cache
def recordings(name: str, seconds: float = 1.0) -> list[np.ndarray]:
    """Read the demo set's clips of a class: the loudest part (S,) of each, at 16 kHz."""
    demo, found = Index.load(ROOT / "demo" / "shards"), []
    for clip in [clip for clip in range(len(demo)) if name in demo.labels(clip)][:12]:
        samples, rate_hz = soundfile.read(io.BytesIO(demo.read(clip)), dtype="float32")
        samples, half = resample(samples, rate_hz, RATE_HZ), round(seconds * RATE_HZ / 2)
        middle = int(np.clip(np.abs(samples).argmax(), half, len(samples) - half))
        found.append(samples[middle - half : middle + half])
    return found


def clips_folder(folder: Path, *, seconds: float = 1.0, folds: int | None = None, column: str = "label") -> Path:
    """Write 12 real clips of each of three classes, with folds 1, 2, .. or splits: four train, four val, four test."""
    (folder / "audio").mkdir(parents=True)
    lines = [f"filename,{column},{'fold' if folds else 'split'}"]
    for name in CLASSES:
        for number, samples in enumerate(recordings(name, seconds)):
            soundfile.write(folder / "audio" / f"{name}{number}.wav", samples, RATE_HZ)
            part = 1 + number % folds if folds else ("train", "val", "test")[number % 3]
            lines.append(f"audio/{name}{number}.wav,{name},{part}")
    (folder / "meta.csv").write_text("\n".join(lines) + "\n")
    return folder


def events_folder(folder: Path, *, seconds: float = 2.0) -> Path:
    """Write clips of faint noise in which recordings begin and end, and their events as DCASE does."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6), ("test", 6)):
        (folder / split).mkdir(parents=True)
        lines = ["filename\tonset\toffset\tevent_label"]
        for number in range(count):
            clip = rng.normal(size=round(seconds * RATE_HZ)).astype(np.float32) * 1e-3
            for name in rng.permutation(CLASSES[:2])[: 1 + number % 2]:
                onset = round(float(rng.uniform(0, seconds - 0.6)), 2)
                sound, start = recordings(name, 0.5)[number % 12], round(onset * RATE_HZ)
                clip[start : start + len(sound)] += sound / (np.abs(sound).max() + 1e-3) * 0.5
                lines.append(f"{split}/{split}{number}.wav\t{onset:.2f}\t{onset + 0.5:.2f}\t{name}")
            soundfile.write(folder / split / f"{split}{number}.wav", clip.clip(-1, 1), RATE_HZ)
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def encoder(folder: Path, geometry: dict = MAE, **changes) -> Path:
    """Export a small encoder of .96 s that nobody has trained, with a head of five classes that do not count."""
    folder.mkdir(parents=True, exist_ok=True)
    return export_of(tuning(geometry, **changes), folder)


def config_of(run: Path, init: Path | str, task: Path, *overrides: str) -> dict:
    """Compose `finetune.py`'s config for a run of seconds."""
    given = [f"init='{init}'", f"task.root='{task}'", f"task.cache_dir='{run.parent / 'cache'}'", f"run_dir='{run}'"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("finetune", overrides=[*given, f"root={ROOT}", "name=toy", *QUICK, *overrides])
    return {key: value for key, value in OmegaConf.to_container(config, resolve=True).items() if key != "hydra"}


def run(folder: Path, init: Path | str, task: Path, *overrides: str) -> dict:
    """Fine-tune in this process."""
    return fit(config_of(folder, init, task, *overrides))


def start(cwd: Path, *arguments: str, program: str = "finetune.py", **extra: str) -> Process:
    """Start `python finetune.py ...`."""
    return commands.start(*arguments, cwd=cwd, script=ROOT / program, **extra)


def command(run: Path, init: Path | str, task: Path, *overrides: str) -> list[str]:
    """Say a run of seconds on the command line."""
    given = [f"init={init}", f"task.root={task}", f"task.cache_dir={run.parent / 'cache'}", f"hydra.run.dir={run}"]
    return [*given, *QUICK, *overrides]


def finish(cwd: Path, *arguments: str, expect: int = 0, program: str = "finetune.py", **extra: str) -> str:
    process = start(cwd, *arguments, program=program, **extra)
    output = process.communicate(timeout=280)[0]
    assert process.returncode == expect, f"exit code {process.returncode}\n{output[-5000:]}"
    return output


def predictions(folder: Path) -> dict:
    """Read what a fold said of its test clips."""
    with safe_open(folder / "predictions.safetensors", "numpy") as file:
        about = json.loads(file.metadata()["audiossl"])
        return about | {name: file.get_tensor(name) for name in file.keys()}


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())
