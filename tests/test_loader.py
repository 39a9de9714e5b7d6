"""Workers that die or hang are named, and Lightning resumes where it stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from processes import descendants, end_within, processes, workers
from tiny_shards import audio, clip, data_of, long_loader, noise, ragged_corpus, write_shards

from audiossl.errors import UserError
from audiossl.loading.loader import make_loader


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return ragged_corpus(tmp_path_factory.mktemp("corpus"))


def test_signals_meant_for_the_trainer_stop_neither_workers_nor_fork_server(corpus):
    batches = long_loader(corpus)
    next(batches)
    pids = workers()
    assert len(pids) == 2
    fork_server = descendants(os.getpid())[pids[0]]
    for name in ("TERM", "USR1", "INT"):  # from another process than the trainer, as SLURM sends them
        subprocess.run(["kill", f"-{name}", *map(str, [fork_server, *pids])], check=True)
    assert len([next(batches) for _ in range(200)]) == 200 and workers() == pids
    batches.close()
    assert end_within(10, workers)


@pytest.mark.faults("D14")
def test_a_killed_worker_is_a_clear_error_within_15_seconds(corpus):
    batches = long_loader(corpus)
    next(batches)
    victim = workers()[0]
    os.kill(victim, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"worker.* exited unexpectedly.*memory.*data.num_workers"):
        for _ in batches:
            continue
    assert time.monotonic() - started < 15
    del batches
    assert end_within(15, workers)


@pytest.mark.faults("D9")
def test_a_read_that_hangs_is_an_error_that_names_the_shard_and_leaves_no_worker(tmp_path):
    data = data_of(write_shards(tmp_path / "stalled", [[clip("a", audio(noise(0, 900)), 900)]]))
    path = data.index.shard_path(0)
    path.unlink()
    os.mkfifo(path)  # to open it is to wait for a writer, like a file system that is away
    inner = data.train_loader(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=3, seed=0).loader
    loader = make_loader(
        inner.dataset, inner.batch_sampler, num_workers=1, bad_clips=data.bad_clips, timeout_seconds=1.0
    )
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no batch within 1 s: a worker hangs .*shard-000000.tar"):
        list(loader)
    assert end_within(10, workers) and time.monotonic() - started < 20


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
if __name__ == "__main__":
    from tiny_shards import long_loader
    batches = long_loader({shards!r})
    next(batches)
    print("running", flush=True)
    for _ in batches:
        pass
"""


def test_workers_do_not_outlive_a_killed_trainer(corpus, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), shards=corpus))
    trainer = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout.readline() == "running\n"
        family = set(descendants(trainer.pid))
        assert len(workers(trainer.pid)) == 2
    finally:
        trainer.kill()
        trainer.wait()
    assert end_within(15, lambda: family & set(processes()))


def test_a_worker_imports_neither_lightning_nor_hydra():
    program = (
        "import sys, audiossl.loading.loader; print(*{'lightning', 'hydra', 'timm', 'torchaudio'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "\n"


class Toy(pl.LightningModule):
    """One weight, and a list of what was trained on."""

    def __init__(self, shards: str, max_steps: int, num_workers: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.data, self.max_steps, self.seen = data_of(shards, num_workers=num_workers), max_steps, []

    def train_dataloader(self):
        trainer = self.trainer
        return self.data.train_loader(
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            start_step=trainer.global_step,
            max_steps=self.max_steps,
            seed=1,
        )

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch.to(device)

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, batch_idx, tuple(batch.key), batch.waveform.sum().item()))
        return (self.weight - batch.waveform.float().mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(toy: Toy, folder: Path, stop_at: int, accumulate: int, ckpt: str | None = None) -> Toy:
    trainer = pl.Trainer(
        max_steps=stop_at,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[pl.callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=-1)],
    )
    trainer.fit(toy, ckpt_path=ckpt, weights_only=True)
    return toy


@pytest.mark.faults("R3")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "step", [3, 10, 11]
)  # inside an epoch of 41 clips in batches of 4, and at both sides of its end
def test_lightning_resumes_with_exactly_the_batches_that_were_left(corpus, tmp_path, num_workers, accumulate, step):
    straight = fit(Toy(corpus, 14, 0), tmp_path / "straight", 14, accumulate)
    assert len(straight.seen) == 14 * accumulate
    first = fit(Toy(corpus, 14, num_workers), tmp_path / "first", step, accumulate)
    second = fit(
        Toy(corpus, 14, num_workers), tmp_path / "second", 14, accumulate, str(tmp_path / "first" / "last.ckpt")
    )
    assert first.seen + second.seen == straight.seen
    assert second.weight.item() == straight.weight.item()
