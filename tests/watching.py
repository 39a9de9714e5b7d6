"""What a forked run tells of itself while it trains: its memory and open files, and where the ranks are."""

import os
import re
from collections import Counter
from pathlib import Path


def watch(path: Path) -> None:
    """Write after every step, for this process and its loader's workers: kB of memory, open files."""
    from processes import workers

    from audiossl.running.callbacks import Throughput

    ended = Throughput.on_train_batch_end
    file = path.open("a")

    def end(self, trainer, *args):
        ended(self, trainer, *args)
        of = [os.getpid(), *workers(os.getpid())]
        memory = sum(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) for pid in of)
        file.write(f"{trainer.global_step} {memory} {sum(len(os.listdir(f'/proc/{pid}/fd')) for pid in of)}\n")
        file.flush()

    Throughput.on_train_batch_end = end


def compare_epochs() -> None:
    """Gather the ranks' steps and clips at every micro-batch: no clip comes again before all of them have come."""
    from audiossl.pretraining import Pretraining
    from audiossl.running.ranks import Ranks

    begun, ranks, visits = Pretraining.training_step, [], Counter()

    def begin(self, batch, batch_idx):
        ranks[:] = ranks or [Ranks()]
        everywhere = ranks[0].gather(((self.trainer.current_epoch, self.global_step, batch_idx), batch.key))
        assert len(everywhere) == int(os.environ["WORLD_SIZE"]) and len({at for at, _ in everywhere}) == 1, everywhere
        visits.update(key for _, keys in everywhere for key in keys)
        is_whole = len(visits) == self.trainer.datamodule.data.clips_per_epoch
        whole = min(visits.values()) if is_whole else 0
        assert max(visits.values()) <= whole + 1, visits
        print(f"epoch {whole} at step {self.global_step} on all ranks", flush=True)
        return begun(self, batch, batch_idx)

    Pretraining.training_step = begin
