"""Two hundred kills at random within one epoch: is a clip lost, heard twice, and does anything grow?"""

import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from fits import assert_same_run, config_of, run, start, trace
from methods import settings_of
from tiny_shards import many_clips

from audiossl.checkpoints.files import newest_valid, step_of

KILLS, STEPS, CLIPS = 200, 2000, 4000
PLACES = ("training_step", "backward", "update", "callback", "logger")
FLAT = 0.05


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    shards = many_clips(tmp_path_factory.mktemp("shards"), CLIPS)
    data = ["data=folder", f"data.shards={shards}", "data.validation_clips=0", "frontend.seconds=0.16"]
    length = [f"trainer.max_steps={STEPS}", "data.batch_size=2", "checkpoint.every_steps=1"]
    return [*settings_of("audiomae"), *data, *length]


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    run(folder / "run", *settings, fault={"watch": str(folder / "watched")}, seconds=600)
    return folder


def assert_flat(series: np.ndarray, what: str) -> None:
    """Compare the mean of each tenth of a series with the whole's median."""
    tenths = [float(part.mean()) for part in np.array_split(series, 10)]
    print(f"{what}:", *(f"{mean:.6g}" for mean in tenths))
    middle = float(np.median(series))
    assert max(tenths) <= (1 + FLAT) * middle and min(tenths) >= (1 - FLAT) * middle, f"{what}: {tenths}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.faults("R10")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_memory_and_open_files_stay_flat_over_an_epoch(settings, straight, tmp_path, num_workers):
    watched = straight / "watched"
    if num_workers:
        watched = tmp_path / "watched"
        more = ["data.num_workers=1", "checkpoint.every_steps=50"]
        run(tmp_path / "run", *settings, *more, fault={"watch": str(watched)}, seconds=600)
    table = np.loadtxt(watched)
    assert len(table) == STEPS
    for column, what in ((1, "kB of memory"), (2, "open files")):
        assert_flat(table[STEPS // 20 :, column], what)  # what is made in the first steps stays


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.faults("R10")
def test_two_hundred_kills_at_random_within_an_epoch_lose_no_clip_and_leave_nothing_behind(
    settings, straight, tmp_path
):
    """Anywhere within a step or at a moment of its own; steps of two clips, a checkpoint a step."""
    drawn, folder, done = random.Random(0), tmp_path / "run", 0
    seen = []  # for each process: peak memory, open files; for what it left: bytes of the checkpoint, files
    for number in range(KILLS):
        fault = {"do": "kill", "step": done + drawn.randrange(1, 16), "watch": str(tmp_path / f"watched{number}")}
        fault |= {"at": drawn.choice(PLACES), "after": drawn.choice([0.0, drawn.random() / 20 + 1e-4])}
        (one,) = start(folder, *settings, fault=fault, ckpt="last" if number else None)
        assert one.wait() == -signal.SIGKILL, one.output()[-4000:]
        newest = newest_valid(folder / "checkpoints")
        last = int(Path(fault["watch"]).read_text().splitlines()[-1].split()[0])
        assert step_of(newest) >= max(last - 1, done), "a step that was saved is gone"
        done = step_of(newest)
        watched = np.loadtxt(fault["watch"], ndmin=2)
        names = [path for path in folder.rglob("*") if not re.fullmatch(r"run\d+\.\w+", path.name)]
        seen.append((watched[:, 1].max(), watched[-1, 2], newest.stat().st_size, len(names)))
    run(folder, *settings, ckpt="must", seconds=600)
    assert_same_run(straight / "run", folder, STEPS)
    keys = [key for row in trace(folder) for key in row["keys"].split()]
    assert len(keys) == len(set(keys)) == CLIPS == config_of(*settings)["trainer"]["max_steps"] * 2
    memory, open_files, size, _ = np.array(seen).T
    assert_flat(memory, "kB of memory")
    assert_flat(size, "bytes of a checkpoint")
    assert open_files.max() <= np.loadtxt(straight / "watched")[:, 2].max(), "a process has not opened every shard yet"
    assert max(files for *_, files in seen) - min(files for *_, files in seen) <= 3, "litter"
