"""dry_run=true: what a run costs, needs and how it is submitted, without training."""

import io
import json

import numpy as np
import pytest
import torch
from commands import TINY
from conftest import ROOT
from maes import audiomae, real_clips

from audiossl.batch import Batch
from audiossl.config.cli import launch
from audiossl.config.specs import SPECS
from audiossl.loading.order import Shuffled, StepSampler
from audiossl.noise import Noise
from audiossl.planning import memory
from audiossl.planning.balance import balance_of
from audiossl.planning.cost import Cost, cost_of, flop_counter
from audiossl.planning.known import Known

ADAMW = {"optimizer": "adamw", "momentum": 0.9}
DEMO = f"data.shards={ROOT / 'demo' / 'shards'}"
SMALL = [text for text in TINY if not text.startswith(("data.batch_size", "trainer", "frontend"))]
PUBLISHED = ["experiment=audiomae_base_as2m", DEMO, *SMALL, "assume.clips=2000000"]


def run(folder, monkeypatch, *overrides: str, program: str = "train") -> tuple[int, list]:
    """Run a command from `folder`, in this process; returns its exit code and what it would have trained."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["train.py"])
    trained = []
    argv = [f"{program}.py", *overrides]
    return launch(program, lambda cfg: trained.append(cfg.name), SPECS[program], argv), trained


@pytest.mark.filterwarnings("ignore")
def test_64_gpus_are_planned_where_there_is_none(tmp_path, monkeypatch, capsys):
    code, trained = run(tmp_path, monkeypatch, *PUBLISHED, "dry_run=true")
    said = capsys.readouterr().out
    assert code == 0 and not trained
    for words in (
        "64 GPUs = 8 nodes x 8",
        "ASSUMED: assume.mfu=0.3 of 312",
        "512 clips",
        "128,907",
        "a worker decodes",
    ):
        assert words in said
    assert f"sbatch --nodes=8 slurm/run.sbatch train.py experiment=audiomae_base_as2m {DEMO} model.width=32" in said
    assert "data.validation_clips=512: only 396 clips are there" in said
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert list(map(str, files)) == ["runs/audiomae_base_as2m/dry_run.json"]
    plan = json.loads((tmp_path / files[0]).read_text())
    assert plan["run"]["epochs"] == pytest.approx(33, rel=1e-4) and plan["run"]["peak_lr"] == 4e-4
    seconds = plan["run"]["steps"] * 512 * plan["clip"]["flops_training"] / (64 * 312e12 * 0.3)
    assert plan["time"]["hours"] == pytest.approx(seconds / 3600)
    assert plan["clip"]["tokens"] == 512 and plan["clip"]["encoded"] == {"encoder": 103}
    code, trained = run(tmp_path, monkeypatch, *PUBLISHED)  # the same folder is free for the run itself
    assert (code, trained) == (0, ["audiomae_base_as2m"])


def test_a_run_that_fits_here_is_timed_and_a_sweep_is_added_up(tmp_path, monkeypatch, capsys):
    common = [*TINY, "-m", "model.mask_ratio=0.6,0.8", "trainer.max_steps=20", "dry_run=true"]
    assert run(tmp_path, monkeypatch, *common, "hydra.sweep.dir=runs/swept")[0] == 0
    found = json.loads((tmp_path / "runs" / "swept" / "dry_run.json").read_text())
    speeds = [job["speed"] for job in found["jobs"]]
    assert [speed["steps"] for speed in speeds] == [10, 10] and all(speed["mfu"] is None for speed in speeds)
    assert found["total"]["hours"] == sum(20 * 4 / speed["clips_per_second"] / 3600 for speed in speeds)
    assert found["jobs"][0]["clip"]["encoded"]["encoder"] > found["jobs"][1]["clip"]["encoded"]["encoder"]
    assert "model.mask_ratio=0.8" in capsys.readouterr().out


def test_what_jobs_share_is_found_once_and_speed_is_measured_for_the_first_settings_alone():
    known, asked = Known(2), []

    def measured(name, rate):
        return lambda: (asked.append(name) or rate, 10)

    costs = {name: Cost(None, {}, 0, flops, 0, 0) for name, flops in (("a", 10), ("b", 20), ("c", 40))}
    assert known.speed(["a"], costs["a"], measured("a", 6.0)) == (6.0, 10)
    assert known.speed(["b"], costs["b"], measured("b", 1.0)) == (1.0, 10)
    assert known.speed(["c"], costs["c"], measured("c", 9.0)) == ((60 + 20) / 2 / 40, None)
    assert known.speed(["a"], costs["a"], measured("a", 8.0)) == (6.0, 10) and asked == ["a", "b"]


def test_what_will_go_wrong_is_said(tmp_path, monkeypatch, capsys):
    wrong = [
        "assume.memory_gb=0.02",
        "data.batch_size=512",
        "global_batch=null",
        "assume.mfu=1",
        "checkpoint.keep_last=100000000",
    ]
    code, _ = run(tmp_path, monkeypatch, *PUBLISHED, *wrong, "dry_run=true")
    said = capsys.readouterr().out
    assert code == 0 and "will hardly fit into 20.0 MB: data.batch_size=" in said
    assert "checkpoints need" in said and "the devices wait for sound: data.num_workers=" in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.devices=64", "trainer.num_nodes=3"], "does not divide by trainer.num_nodes=3"),
        (["optim.warmup_ratio=null", "optim.warmup_steps=500", "trainer.max_steps=20"], "is longer than"),
        (["assume.mfu=1.5"], "assume.mfu=1.5: must be above 0 and at most 1"),
        (["assume.mfus=1"], "Did you mean assume.mfu?"),
    ],
)
def test_what_the_run_would_refuse_is_refused(overrides, words, tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, *TINY, "dry_run=true", *overrides)[0] == 2
    assert words in capsys.readouterr().err and not list(tmp_path.rglob("dry_run.json"))


def test_fine_tuning_says_that_it_cannot_be_planned(tmp_path, monkeypatch, capsys):
    wanted = ["init=x", "task.root=x", "dry_run=true"]
    assert run(tmp_path, monkeypatch, *wanted, program="finetune")[0] == 2
    assert "dry_run=true: finetune.py cannot be planned" in capsys.readouterr().err


def test_attention_is_counted_on_a_cpu_too():
    query, key, value = (torch.randn(2, 4, 50, 16, requires_grad=True) for _ in range(3))
    with flop_counter() as forward:
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    with flop_counter() as backward:
        mixed.sum().backward()
    products = 2 * 2 * 4 * 50 * 50 * 16  # one matrix product of all heads
    assert forward.get_total_flops() == 2 * products
    assert backward.get_total_flops() == 5 * products  # logits anew, then four gradients


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_what_is_kept_for_the_backward_pass_grows_by_as_much_with_every_clip(half):
    method, clips = audiomae(), real_clips(4, 1.28)
    cost = cost_of(method, samples=clips.shape[1], num_classes=None, half=half)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held: no address comes twice
        return tensor

    own = {t.untyped_storage().data_ptr() for t in (*method.parameters(), *method.buffers())}
    batch = Batch(clips, torch.full((4,), clips.shape[1]), rows=torch.arange(4))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=half is not None):
        loss = method(batch, generator=Noise.for_batch(0, 0, 4))["loss"]
    found = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    assert loss.isfinite() and found == pytest.approx(cost.fixed_bytes + 4 * cost.saved_bytes, rel=0.03)


def test_weights_optimiser_state_and_checkpoint_are_as_large_as_said():
    method = audiomae()
    optimizer = torch.optim.AdamW(method.parameters())
    method(Batch(real_clips(1, 1.28), rows=torch.arange(1)), generator=Noise.for_batch(0, 0, 1))["loss"].backward()
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state_dict()["state"].values() for t in s.values() if t.ndim)
    sizes = memory.sizes_of(method)
    assert 4 * sizes.trained * memory.state_slots(ADAMW) == state
    file = io.BytesIO()
    torch.save({"state_dict": method.state_dict(), "optimizer": optimizer.state_dict()}, file)
    assert memory.checkpoint_bytes(method, sizes, ADAMW) == pytest.approx(len(file.getvalue()), rel=0.25)
    assert memory.checkpoint_bytes(method, sizes, {"optimizer": "sgd", "momentum": 0.0}) < 4 * sizes.whole * 1.5


@pytest.mark.parametrize(("strategy", "shared"), [("ddp", ()), ("deepspeed_stage_1", ("optimiser state",)),
    ("deepspeed_stage_2", ("optimiser state", "gradients")),
    ("deepspeed_stage_3", ("optimiser state", "gradients", "weights"))])  # fmt: skip
def test_zero_shares_out_what_its_stage_says(strategy, shared):
    method = audiomae()
    sizes, cost = memory.sizes_of(method), cost_of(method, samples=20480, num_classes=None, half=None)
    settled = dict(batch_size=2, optim=ADAMW, strategy=strategy, is_half=False, remembered_bytes=0)
    alone, four = (memory.memory_of(sizes, cost, devices=devices, **settled) for devices in (1, 4))
    for name, size in alone.items():
        assert four[name] == (size // 4 if name in shared else size), name
    assert four.get("DDP's buckets", 0) == (alone["weights"] if strategy == "ddp" else 0)


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 1), (3, 2)])
def test_the_balance_is_that_of_the_loader(devices, workers, accumulate):
    order, shard = Shuffled(101, seed=3), np.arange(101) // 17
    found = balance_of(order, shard, devices=devices, workers=workers, batch_size=4, accumulate=accumulate)
    clips, shards = {}, {}
    for rank in range(devices):
        how = dict(order=order, batch_size=4, accumulate=accumulate, rank=rank, world_size=devices)
        sampler = StepSampler(**how, max_steps=40, start_step=0)
        for worker in range(max(workers, 1)):
            seen = [
                c for n in range(worker, len(sampler), max(workers, 1)) for _, turn, c in sampler.batch(n) if not turn
            ]
            clips[rank, worker], shards[rank, worker] = len(seen), len(set(shard[seen].tolist()))
    assert found.clips_per_worker == (min(clips.values()), max(clips.values())) and sum(clips.values()) == 101
    assert found.shards_per_worker == (min(shards.values()), max(shards.values()))
    assert (found.workers, found.shards) == (len(clips), 6)
