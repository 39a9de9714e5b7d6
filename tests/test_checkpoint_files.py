"""Which file is taken to go on from, what is said of one that is none, and that no file can run code."""

import errno
import functools
import logging
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from toy_training import Toys, straight_weights, toys

from audiossl.checkpoints import atomic
from audiossl.checkpoints.atomic import AtomicCheckpointIO, link_or_copy, sweep
from audiossl.checkpoints.files import describe_file, is_valid, newest_valid, resolve_ckpt
from audiossl.errors import UserError


@pytest.fixture(name="toys", scope="module")
def _toys() -> Toys:
    return toys()


@pytest.fixture(scope="module")
def finished(toys, tmp_path_factory) -> Path:
    """A finished run of 8 steps with checkpoints of steps 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    code, run = toys.run(folder)
    assert code == 0, run.output()
    return folder


def names(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob(pattern))


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy of the finished run, to be damaged; last.ckpt is a link to step 8, as it was."""
    shutil.copytree(finished, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "last.ckpt").unlink()
    link_or_copy(checkpoints / "step=000000008.ckpt", checkpoints / "last.ckpt")
    return tmp_path / "run"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def overwrite_with_html(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>404</html>")


@pytest.mark.faults("P9")
@pytest.mark.parametrize(
    "damage, said",
    [(truncate, "truncated"), (empty, "empty"), (flip_a_bit, "checksum"), (overwrite_with_html, "HTML")],
)
def test_a_damaged_newest_checkpoint_is_renamed_and_the_one_before_taken(run_dir, caplog, damage, said):
    damage(run_dir / "checkpoints" / "step=000000008.ckpt")  # and so last.ckpt, its other name
    with caplog.at_level(logging.INFO):
        path = resolve_ckpt("last", run_dir)
    assert path == run_dir / "checkpoints" / "step=000000006.ckpt"
    assert names(run_dir, "*.corrupt") == ["last.ckpt.corrupt", "step=000000008.ckpt.corrupt"]
    assert re.search(rf"step=000000008.ckpt: skipped, .*{said}", caplog.text)
    assert "resuming from" in caplog.text and "step 6" in caplog.text


@pytest.mark.faults("P9")
def test_a_run_goes_on_from_the_second_newest_when_the_newest_is_damaged(toys, run_dir):
    flip_a_bit(run_dir / "checkpoints" / "step=000000008.ckpt")
    code, run = toys.run(run_dir, ckpt="last")
    assert (code, run.weights()) == (0, straight_weights()), run.output()
    assert run.losses()[0].startswith("7 ")


@pytest.mark.faults("P17")
def test_the_highest_step_is_the_newest_whatever_times_and_names_say(run_dir):
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "last.ckpt").unlink()
    (checkpoints / "step=000000008.ckpt").rename(checkpoints / "copied.ckpt")
    os.utime(checkpoints / "copied.ckpt", (1, 1))
    assert newest_valid(checkpoints) == checkpoints / "copied.ckpt"


@pytest.mark.faults("P10")
def test_without_a_checkpoint_last_starts_aloud_and_must_refuses(tmp_path, caplog):
    assert resolve_ckpt(None, tmp_path) is None
    assert resolve_ckpt("last", tmp_path) is None
    assert "starting from step 0" in caplog.text
    with pytest.raises(UserError, match="ckpt=must: no checkpoint in"):
        resolve_ckpt("must", tmp_path)


@pytest.mark.faults("P9")
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_by_itself(run_dir):
    for path in (run_dir / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no valid checkpoint in .*\.corrupt is an empty file; ckpt=null restarts"):
            resolve_ckpt("last", run_dir)


def write_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, path)


@pytest.mark.faults("C10")
@pytest.mark.parametrize(
    "write, said",
    [
        (lambda path: torch.save({"a.weight": torch.ones(3)}, path), "a state dict"),
        (lambda path: torch.save({"model": {}, "epoch": 3}, path), "without state_dict"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
        (overwrite_with_html, "HTML"),
        (write_safetensors, "safetensors"),
        (lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})), "pickle"),
        (lambda path: path.write_bytes(b"RIFF1234WAVE"), "no torch file"),
        (lambda path: path.mkdir(), "a folder"),
    ],
)
def test_a_path_that_is_no_checkpoint_is_refused_saying_what_it_is(tmp_path, write, said):
    write(tmp_path / "given.ckpt")
    with pytest.raises(UserError, match=f"given.ckpt: cannot resume from it, it is .*{said}"):
        resolve_ckpt(tmp_path / "given.ckpt", tmp_path)


@pytest.mark.faults("C10", "P9")
def test_a_missing_path_and_a_truncated_one_are_refused_naming_them(run_dir):
    with pytest.raises(UserError, match="nowhere.ckpt: no such file"):
        resolve_ckpt("nowhere.ckpt", run_dir)
    truncate(run_dir / "checkpoints" / "step=000000006.ckpt")
    with pytest.raises(UserError, match="step=000000006.ckpt: cannot resume from it, it is truncated"):
        resolve_ckpt(run_dir / "checkpoints" / "step=000000006.ckpt", run_dir)


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.faults("S1", "S2")
@pytest.mark.parametrize("force", ["0", "1"])
def test_a_checkpoint_never_runs_code(tmp_path, monkeypatch, force):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    path, marker = tmp_path / "checkpoints" / "step=000000001.ckpt", tmp_path / "ran"
    path.parent.mkdir()
    torch.save({"state_dict": {}, "global_step": 1, "payload": Payload(marker)}, path)
    with pytest.raises(UserError, match="step=000000001.ckpt.*could run code.*mkdir"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(UserError, match="could run code"):
        resolve_ckpt(path, tmp_path)
    assert "could run code" in is_valid(path) and "could run code" in describe_file(path)
    assert newest_valid(path.parent) is None
    assert not marker.exists()


@pytest.mark.faults("S3")
@pytest.mark.parametrize(
    "value",
    [
        OmegaConf.create({"a": 1}),
        Path("x"),
        functools.partial(print),
        np.float64(1),
        np.ones(2),
        torch.nn.Linear(1, 1),
        dict,
        errno,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_loaded_again_is_refused_when_saved_naming_its_place(tmp_path, value):
    path = tmp_path / "step=000000001.ckpt"
    with pytest.raises(UserError, match=re.escape("checkpoint['hyper_parameters']['deep'][1]")):
        AtomicCheckpointIO().save_checkpoint({"hyper_parameters": {"deep": [0, value]}}, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults("S3")
def test_all_that_may_be_saved_is_loaded_as_it_was(tmp_path):
    value = {"a": [1, 2.5, True, None, 1j, "s", b"b", {3}, (4,)], 5: torch.Size([2]), "t": torch.arange(3.0)}
    value |= {"d": torch.float16, "device": torch.device("cpu"), "p": torch.nn.Parameter(torch.ones(2))}
    AtomicCheckpointIO().save_checkpoint(value, tmp_path / "x.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(loaded.pop("t"), value.pop("t")) and torch.equal(loaded.pop("p"), value.pop("p"))
    assert loaded == value


@pytest.mark.faults("P4")
@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOSPC, errno.EIO, errno.EXDEV])
def test_no_failure_to_save_is_swallowed_and_the_old_file_stays(tmp_path, monkeypatch, function, number):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, function, lambda *arguments: fail())
        with pytest.raises(UserError, match=f"last.ckpt: not saved, {re.escape(os.strerror(number))}") as caught:
            AtomicCheckpointIO().save_checkpoint({"step": 2, "t": torch.ones(1000)}, path)
    if number in (errno.ENOSPC, errno.EDQUOT):
        assert re.search(r"about 4000 bytes needed, \d+ free", str(caught.value))
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_going_on_from_an_earlier_step_sets_the_later_checkpoints_aside(toys, run_dir):
    code, run = toys.run(run_dir, ckpt=str(run_dir / "checkpoints" / "step=000000003.ckpt"), keep_last=1)
    assert (code, run.weights()) == (0, straight_weights()), run.output()
    aside = ["last.ckpt.superseded", "step=000000006.ckpt.superseded", "step=000000008.ckpt.superseded"]
    assert names(run_dir, "*.superseded") == aside
    assert names(run_dir, "*.ckpt") == ["last.ckpt", "step=000000008.ckpt"]


@pytest.mark.faults("S13")
def test_files_follow_the_umask_and_hold_the_provenance(finished):
    path = finished / "checkpoints" / "last.ckpt"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert AtomicCheckpointIO().load_checkpoint(path)["audiossl"] == {"config": {"seed": 7}}


def test_last_is_a_copy_where_there_are_no_hard_links(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "last").write_bytes(b"old")

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(atomic.os, "link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "last")
    assert (tmp_path / "last").read_bytes() == b"new"
    assert not (tmp_path / "last").samefile(tmp_path / "a")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.faults("P1")
def test_only_part_files_of_dead_processes_are_swept(tmp_path):
    host = os.uname().nodename
    dead = tmp_path / f".tmp-{host}-{2**22 + 5}-0a1b.part"
    alive = tmp_path / f".tmp-{host}-{os.getppid()}-0a1b.part"
    elsewhere, abandoned = tmp_path / ".tmp-node-7-1-0a1b.part", tmp_path / ".tmp-node-8-1-0a1b.part"
    for path in (dead, alive, elsewhere, abandoned):
        path.write_bytes(b"x")
    os.utime(abandoned, (1, 1))
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, elsewhere])
