"""Runs that DeepSpeed spreads over two ranks: as good as ordinary ones, and as hard to lose."""

import csv
import json
import logging
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from commands import TINY, kill_when, start, train
from tiny_shards import audio, clip, noise, write_shards
from toy_sharded import TEACHER, pairs

import audiossl
from audiossl.__main__ import _run, main
from audiossl.checkpointing import is_valid, newest_valid, resolve_ckpt
from audiossl.errors import UserError
from audiossl.indexing.indexfile import sha256_of
from audiossl.running.build import load_method
from audiossl.sharded.settings import check_sharding
from audiossl.sharded.stage_three import has_whole_weights
from audiossl.sharded.topology import check_layout
from audiossl.weights.reading import read_torch_file

ZERO = "trainer=deepspeed"
STEP = "checkpoints/step=00000000{}.ckpt"


def run(folder: Path, *overrides: str, expect=(0, 0), **more) -> str:
    codes, output = pairs().run(folder, *overrides, **more)
    assert codes == list(expect), output
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "memory.pt", weights_only=True)


def assert_equal(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    differing = [name for name, value in wanted.items() if not torch.equal(found[name], value)]
    assert not differing, differing


def losses(folder: Path) -> list[str]:
    return [line.split(",")[1] for line in (folder / "metrics.csv").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Train six steps by DistributedDataParallel and by ZeRO-2."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "ddp", "trainer=ddp")
    run(folder / "zero", ZERO, "pictures.clips=1", "pictures.every_steps=3")
    return folder


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    """Copy the folders of steps 4 and 6 alone."""
    only_steps = shutil.ignore_patterns("last*", "best*")
    shutil.copytree(runs / "zero" / "checkpoints", tmp_path / "checkpoints", ignore=only_steps)
    return tmp_path


def test_zero_2_trains_as_distributed_data_parallel_does_bit_by_bit(runs):
    assert_equal(weights(runs / "zero"), weights(runs / "ddp"))
    assert losses(runs / "zero") == losses(runs / "ddp") and len(losses(runs / "zero")) == 6
    encoders = [audiossl.load(runs / name) for name in ("zero", "ddp")]
    assert_equal(*(encoder.state_dict() for encoder in encoders))


def test_every_file_of_a_checkpoint_loads_without_objects_and_is_named_by_the_seal(runs):
    folder = runs / "zero" / STEP.format(6)
    sealed = json.loads((folder / "COMPLETE").read_text())
    assert (sealed["step"], sealed["ranks"], sealed["stage"]) == (6, 2, 2)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "COMPLETE"]
    assert {str(path.relative_to(folder)) for path in files} == sealed["files"].keys()
    tensors = [path for path in files if path.suffix == ".pt"]
    assert len(tensors) == 3 and all(torch.load(path, weights_only=True) for path in tensors)
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.startswith("step")) == [
        "step=000000004.ckpt",
        "step=000000006.ckpt",
    ]


@pytest.mark.faults("X11")
def test_x11_signalled_killed_within_a_save_and_robbed_of_a_file_all_ranks_go_on_from_the_same_step(runs, tmp_path):
    """X11: rank 1 is signalled after step 3; killed -9 while it writes step 6; then its file of step 4 is lost."""
    run(tmp_path, ZERO, fault={"rank": 1, "signal": "SIGTERM", "step": 3}, expect=(75, 75))
    run(tmp_path, ZERO, "ckpt=last", fault={"rank": 1, "kill": "mid-write", "save": 2}, expect=(1, -9))
    for place in (STEP.format(4), "checkpoints/last.ckpt"):  # which share their files
        (tmp_path / place / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    output = run(tmp_path, ZERO, "ckpt=last")
    assert "step=000000006.ckpt: skipped, it is incomplete: it has no COMPLETE" in output
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing; renamed" in output
    set_aside = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.ckpt.*"))
    assert set_aside == ["last.ckpt.corrupt", "step=000000004.ckpt.corrupt", "step=000000006.ckpt.incomplete"]
    assert_equal(weights(tmp_path), weights(runs / "zero"))
    assert losses(tmp_path) == losses(runs / "zero")


@pytest.mark.faults("X11")
def test_x11_killed_within_its_first_save_a_run_starts_again(copy, caplog):
    """X11: what was never whole is no loss, while a checkpoint that was and is no more stops the run."""
    for step in (4, 6):
        (copy / STEP.format(step) / "COMPLETE").unlink()
    assert resolve_ckpt("last", copy) is None and caplog.text.count("incomplete: it has no COMPLETE") == 2
    assert "starting from step 0" in caplog.text


@pytest.mark.faults("X11")
@pytest.mark.slow
@pytest.mark.parametrize("trial", range(7))
@pytest.mark.parametrize("rank, point", [(0, "mid-write"), (1, "mid-write"), (0, "before the seal")])
def test_x11_no_kill_within_a_save_leaves_an_unloadable_newest_checkpoint(runs, tmp_path, rank, point, trial):
    """X11: 0 of 21 unloadable; a third of them die within their first save."""
    fault = {"rank": rank, "kill": point, "save": 1 + trial % 3}
    codes, output = pairs().run(tmp_path, ZERO, fault=fault)
    assert codes[rank] == -9 and codes[1 - rank] not in (0, -9), output
    run(tmp_path, ZERO, "ckpt=last")
    assert_equal(weights(tmp_path), weights(runs / "zero"))


@pytest.mark.faults("X11")
def test_x11_another_number_of_ranks_or_another_stage_is_refused_with_the_way_out(runs):
    """X11: world 2 -> 1."""
    ckpt = runs / "zero" / STEP.format(6)
    check_layout(ckpt, "deepspeed", 2)
    for strategy, ranks in (("deepspeed_stage_2", 1), ("deepspeed_stage_1", 2), ("ddp", 2)):
        with pytest.raises(UserError, match=f"2 ranks of .*stage_2, now .*audiossl convert {ckpt} OUT"):
            check_layout(ckpt, strategy, ranks)
    with pytest.raises(UserError, match="an ordinary checkpoint.*trainer.strategy=ddp.*init="):
        check_layout(runs / "ddp" / STEP.format(6), "deepspeed", 2)


class Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def plant(folder: Path, name: str, marker: Path) -> None:
    """Put a pickle that makes a folder into a rank's file, under a seal that fits."""
    path = folder / "checkpoint" / name
    content = torch.load(path, weights_only=True) | {"extra": Touch(marker)}
    torch.save(content, path)
    sealed = json.loads((folder / "COMPLETE").read_text())
    sealed["files"][f"checkpoint/{name}"] = [path.stat().st_size, sha256_of(path)]
    (folder / "COMPLETE").write_text(json.dumps(sealed))


@pytest.mark.faults("S1", "S2")
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_s1_a_planted_pickle_is_refused_on_every_way_in(copy, monkeypatch, name, caplog):
    """S1, S2 for DeepSpeed's folders: resume, init, convert, method, encoder; torch's own way out is not ours."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, marker = copy / STEP.format(6), copy / "executed"
    plant(folder, name, marker)
    ways = {
        "resume": lambda: resolve_ckpt(folder, copy),
        "init and method": lambda: load_method(folder),
        "convert": lambda: main_raising("convert", str(folder), str(copy / "out")),
        "read": lambda: read_torch_file(folder),
    }
    for way, load in ways.items():
        with pytest.raises(UserError, match=f"{name} holds Python objects, which could run code"):
            load()
        assert not marker.exists(), way
    with caplog.at_level(logging.WARNING):
        assert newest_valid(copy / "checkpoints") == copy / STEP.format(4)
    assert f"{name} holds Python objects" in caplog.text and not marker.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(copy / (STEP + ".corrupt").format(6) / "checkpoint" / name, weights_only=True)


def main_raising(command: str, *arguments: str) -> None:
    """Run a command in this process, with its error as an exception."""
    _run([command, *arguments])


@pytest.mark.faults("X11")
def test_x11_any_damage_is_found_and_named(copy):
    """X11: a byte turned, a file cut, a file too many, a seal cut."""
    states = copy / STEP.format(6) / "checkpoint" / "mp_rank_00_model_states.pt"
    content = states.read_bytes()
    states.write_bytes(content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:])
    assert is_valid(copy / STEP.format(6)) == f"damaged: the SHA-256 of checkpoint/{states.name} is wrong"
    states.write_bytes(content[:1000])
    assert is_valid(copy / STEP.format(6)).startswith(f"damaged: checkpoint/{states.name} has 1000 bytes, not ")
    states.write_bytes(content)
    assert is_valid(copy / STEP.format(6)) is None
    (states.parent / "mp_rank_01_model_states.pt").write_bytes(content)
    assert "mp_rank_01_model_states.pt, which no rank wrote" in is_valid(copy / STEP.format(6))
    (copy / STEP.format(4) / "COMPLETE").write_text('{"format": 1, "step"')
    assert "COMPLETE: damaged" in is_valid(copy / STEP.format(4))


def test_the_converter_gives_what_an_ordinary_run_would_have_saved_and_one_goes_on_from_it(runs, copy, capsys):
    """Weights, moments and step of the checkpoint after four steps; two more steps end where all six did."""
    shutil.rmtree(copy / STEP.format(6))
    out = copy / "out"
    assert main(["convert", str(copy), str(out)]) == 0
    assert f"init={out}" in capsys.readouterr().out
    found, wanted = (read_torch_file(folder / STEP.format(4)) for folder in (out, runs / "ddp"))
    assert_equal(found["state_dict"], wanted["state_dict"])
    ours, theirs = (checkpoint["optimizer_states"][0] for checkpoint in (found, wanted))
    assert [group["params"] for group in ours["param_groups"]] == [g["params"] for g in theirs["param_groups"]]
    for number, state in theirs["state"].items():
        assert_equal(ours["state"][number], state)
    assert audiossl.load(out).description["provenance"]["steps"] == 4
    run(out, "trainer=cpu", "data.batch_size=8", "ckpt=last", ranks=1, expect=[0])
    for name, value in weights(runs / "ddp").items():
        torch.testing.assert_close(weights(out)[name], value, rtol=0, atol=1e-3)
    assert main(["convert", str(runs / "zero"), str(out)]) == 2
    assert main(["convert", str(runs / "ddp"), str(copy / "new")]) == 2


def test_zero_3_ends_with_the_encoder_and_the_pictures_of_an_ordinary_run(runs, tmp_path):
    run(tmp_path, ZERO, "trainer.strategy=deepspeed_stage_3", "pictures.clips=1")
    assert_equal(audiossl.load(tmp_path).state_dict(), audiossl.load(runs / "ddp").state_dict())
    whole = read_torch_file(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert_equal({k.removeprefix("method."): v for k, v in whole.items()}, weights(runs / "ddp"))
    assert (tmp_path / "reconstruction.png").exists()
    assert losses(tmp_path) == losses(runs / "ddp")


def test_zero_3_refuses_what_needs_all_weights_on_a_rank():
    config = {"trainer": {"strategy": "deepspeed_stage_3"}, "swa": {"start": None}}
    method = torch.nn.Linear(1, 1)
    assert not has_whole_weights(config, method)
    with pytest.raises(UserError, match="swa.start averages"):
        has_whole_weights(config | {"swa": {"start": 0.5}}, method)
    method.after_step = lambda step, max_steps: None
    assert has_whole_weights(config | {"trainer": {"strategy": "deepspeed"}}, method)
    with pytest.raises(UserError, match="Linear has a teacher .*; take stage 1 or 2"):
        has_whole_weights(config, method)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_the_other_stages_resume_to_the_same_bits(runs, tmp_path, stage):
    strategy = f"trainer.strategy=deepspeed_stage_{stage}"
    run(tmp_path, ZERO, strategy, fault={"rank": 0, "signal": "SIGTERM", "step": 3}, expect=(75, 75))
    run(tmp_path, ZERO, strategy, "ckpt=last")
    assert_equal(audiossl.load(tmp_path).state_dict(), audiossl.load(runs / "ddp").state_dict())
    assert losses(tmp_path) == losses(runs / "ddp")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, changes, tolerance",
    [
        (dict(model=TEACHER), [], 1e-6),
        (dict(model=TINY), ["trainer.accumulate_grad_batches=2", "data.batch_size=2"], 1e-5),
        (dict(model=TINY), ["trainer.gradient_clip_val=0.5"], 1e-5),
        (dict(model=TINY), ["trainer.precision=bf16-mixed"], 0.0),
    ],
    ids=["teacher", "accumulated", "clipped", "bf16"],
)
def test_zero_2_stays_close_to_distributed_data_parallel(tmp_path, model, changes, tolerance):
    """Accumulated or clipped gradients are rounded in another order: losses of six steps within a part in 1e5."""
    run(tmp_path / "ddp", *changes, "trainer=ddp", **model)
    run(tmp_path / "zero", *changes, ZERO, **model)
    found, wanted = ([float(loss) for loss in losses(tmp_path / name)] for name in ("zero", "ddp"))
    assert found == pytest.approx(wanted, rel=tolerance, abs=0)
    assert main(["convert", str(tmp_path / "zero"), str(tmp_path / "out")]) == 0
    whole = read_torch_file(tmp_path / "out" / STEP.format(6))
    assert_equal({k.removeprefix("method."): v for k, v in whole["state_dict"].items()}, weights(tmp_path / "zero"))
    wanted = read_torch_file(tmp_path / "ddp" / STEP.format(6))["optimizer_states"][0]["state"]
    assert wanted.keys() == whole["optimizer_states"][0]["state"].keys()


@pytest.mark.slow
def test_micro_batches_weigh_what_they_hold_where_clips_are_bad(tmp_path):
    """Every third clip is unreadable: two accumulated micro-batches of each rank hide different numbers of patches."""
    made = [clip(f"c{i:02d}", audio(noise(i, 6000)) if i % 3 else b"no audio", 6000) for i in range(48)]
    shards = f"data.shards={write_shards(tmp_path / 'corpus', [made])}"
    changes = [shards, "data.max_bad_fraction=0.9", "data.validation_clips=0", "data.batch_size=2"]
    changes += ["trainer.accumulate_grad_batches=2", "trainer.max_steps=4"]
    run(tmp_path / "ddp", *changes, "trainer=ddp")
    run(tmp_path / "zero", *changes, ZERO)
    rows = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("ddp", "zero")]
    for column in ("loss", "grad_norm"):
        wanted, found = ([float(row[column]) for row in table if row[column]] for table in rows)
        assert len(found) == 4 and found == pytest.approx(wanted, rel=1e-4), column


@pytest.mark.gpu
def test_on_gpus_a_run_is_signalled_resumed_and_converted_as_a_user_does(tmp_path):
    """Lightning's own launch, NCCL, bf16: never run where this was written."""
    settings = [word for word in TINY if word != "trainer=cpu"]
    settings += [ZERO, "trainer.accelerator=gpu", f"trainer.devices={torch.cuda.device_count()}", "name=mine"]
    settings += ["hydra.run.dir=mine", "trainer.max_steps=400", "checkpoint.every_steps=20"]
    process = start(*settings, cwd=tmp_path)
    assert (
        kill_when(process, tmp_path / "mine" / "checkpoints" / "step=000000020.ckpt" / "COMPLETE", signal.SIGTERM) == 75
    )
    train(*settings, "ckpt=must", cwd=tmp_path)
    assert main(["convert", str(tmp_path / "mine"), str(tmp_path / "whole")]) == 0
    assert_equal(audiossl.load(tmp_path / "whole").state_dict(), audiossl.load(tmp_path / "mine").state_dict())


def test_settings_that_deepspeed_cannot_serve_are_refused(monkeypatch):
    good = {"trainer.strategy": "deepspeed_stage_2", "trainer.precision": "auto"}
    check_sharding(good)
    check_sharding({"trainer.strategy": "ddp", "trainer.precision": "16-mixed"})
    for change, said in (
        ({"trainer.strategy": "deepspeed_stage_2_offload"}, "deepspeed_stage_3, or ddp"),
        ({"trainer.precision": "16-mixed"}, "takes 32-true or bf16-mixed"),
        ({"trainer.gradient_clip_algorithm": "value"}, "clips by norm only"),
    ):
        with pytest.raises(UserError, match=said):
            check_sharding(good | change)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install -e '.\[deepspeed\]' -c constraints.txt"):
        check_sharding(good)
