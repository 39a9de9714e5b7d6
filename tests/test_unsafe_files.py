"""No file that we are given runs code, by any way in; and every file that we write can be read without running any."""

import os
import re
import sys
from pathlib import Path
from shutil import copytree

import fits
import numpy as np
import pytest
import soundfile
import torch
from commands import TINY
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from imports import official
from methods import settings_of

from audiossl import load
from audiossl.__main__ import main
from audiossl.checkpoints.atomic import AtomicCheckpointIO
from audiossl.config.cli import launch
from audiossl.config.fields import check_target
from audiossl.config.settings import plain_config
from audiossl.config.specs import SPECS
from audiossl.errors import UserError
from audiossl.running.build import load_method
from audiossl.running.provenance import provenance_of

sys.path.insert(0, str(ROOT))


class Payload:
    """Make a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


SMALL = (*settings_of("audiomae"), "data.batch_size=2", "data.fraction=0.1", "data.validation_clips=0")


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """Train for two steps."""
    folder = tmp_path_factory.mktemp("honest") / "run"
    fits.run(folder, *SMALL, "trainer.max_steps=2")
    return folder


@pytest.fixture
def evil(honest, tmp_path) -> tuple[Path, Path]:
    """Put a payload beside the weights of a run: its folder, without an export, and what the payload would make."""
    content = torch.load(honest / "checkpoints" / "last.ckpt", weights_only=True)
    path, marker = tmp_path / "evil" / "checkpoints" / "last.ckpt", tmp_path / "ran"
    path.parent.mkdir(parents=True)
    torch.save(content | {"payload": Payload(marker)}, path)
    return path, marker


def run_main(*words) -> str:
    assert main([str(word) for word in words]) == 2
    return ""


def command(name: str, *words: str) -> str:
    module = __import__(name)
    assert launch(name, module.run, SPECS[name], argv=[f"{name}.py", *words]) == 2
    return ""


def ways(path: Path, folder: Path) -> dict:
    """List every public way to a checkpoint: each must end with a user's error, raised or printed."""
    run, small = path.parent.parent, [*TINY, f"hydra.run.dir={folder}/new"]
    pack = ["task=folder", f"task.root={folder}/set"]
    commands = {
        "ckpt=FILE": lambda: command("train", *small, f"ckpt='{path}'"),
        "ckpt=last": lambda: command("train", *TINY, f"hydra.run.dir={run}", "ckpt=last"),
        "init=FILE": lambda: command("train", *small, f"init='{path}'"),
        "init=RUN": lambda: command("train", *small, f"init='{run}'"),
        "teacher": lambda: command("train", "model=atst_c2f", "trainer=cpu", small[-1], f"model.teacher={path}"),
        "finetune": lambda: command("finetune", f"init='{path}'", *pack, "trainer=cpu", *small[-1:]),
        "evaluate": lambda: command("finetune", f"init='{path}'", *pack, "evaluate=true", "trainer=cpu", *small[-1:]),
        "probe": lambda: command("probe", f"init='{path}'", *pack, *small[-1:]),
        "load": lambda: load(path),
        "load_method": lambda: load_method(path),
        "import": lambda: run_main("import", path, folder / "out"),
        "export": lambda: run_main("export", path, folder / "out"),
        "export RUN": lambda: run_main("export", run, folder / "out", "layout=audiomae"),
        "reconstruct": lambda: run_main("reconstruct", folder / "set/a.wav", "--checkpoint", path, "--out", folder),
        "embed": lambda: run_main("embed", folder / "set/a.wav", "--encoder", path, "--out", folder / "f.npz"),
        "tag": lambda: run_main("tag", folder / "set/a.wav", "--encoder", path),
        "detect": lambda: run_main("detect", folder / "set/a.wav", "--encoder", path),
    }
    return commands


WAYS = list(ways(Path("a/b/c"), Path()))
NO_WAY = "nothing lets a run resume from it|another kind is never opened here"
OUT = re.compile(f"python -m audiossl import FILE DIR unsafe_load=true|{NO_WAY}")
SET = [(label, split) for split in ("train", "val", "test") for label in ("x", "y")]


@pytest.mark.faults("S1", "S2")
@pytest.mark.parametrize("way", WAYS)
def test_a_payload_runs_by_no_way_in_and_the_file_is_named(evil, tmp_path, way, monkeypatch, capsys):
    """Also where the environment tells torch to load whatever comes."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    rows = [f"{name}.wav,{label},{split}" for name, (label, split) in zip("abcdef", SET, strict=True)]
    for row in rows:
        soundfile.write(tmp_path / "set" / row.split(",")[0], np.zeros(16000), 16000)
    (tmp_path / "set" / "meta.csv").write_text("\n".join(["filename,label,split", *rows]) + "\n")
    path, marker = evil
    try:
        ways(path, tmp_path)[way]()
        said = capsys.readouterr().err
    except UserError as error:
        said = str(error)
    assert not marker.exists()
    assert str(path) in said and OUT.search(said), said  # which file, and the way to allow it or that there is none


@pytest.mark.faults("S1")
def test_who_asks_for_it_lets_a_file_run_code_and_is_warned(tmp_path, capsys, caplog):
    """Of `import` alone, which makes of it a file that cannot."""
    state, heads = official("mae_pt_esc512")
    torch.save({"model": state, "payload": Payload(tmp_path / "ran")}, tmp_path / "theirs.pth")
    words = ("import", str(tmp_path / "theirs.pth"), str(tmp_path / "ours"), f"num_heads={heads}")
    assert main([*words]) == 2 and not (tmp_path / "ran").exists()
    assert "unsafe_load=true" in capsys.readouterr().err
    assert main([*words, "unsafe_load=true"]) == 0 and (tmp_path / "ran").exists()
    assert "whatever code is in it runs now" in caplog.text
    load(tmp_path / "ours")


EXPERIMENTS = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
RECIPES = [("finetune" if path.stem.startswith("ft_") else "train", path.stem) for path in EXPERIMENTS]
RECIPES += [("train", f"model={path.stem}") for path in sorted((ROOT / "conf" / "model").glob("*.yaml"))]


@pytest.mark.faults("S3")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe[1])
def test_the_config_of_every_recipe_is_of_types_that_a_checkpoint_may_hold(recipe, tmp_path, monkeypatch):
    """Checked as it is saved; what is saved is then read without running code. R1 does the same for whole runs."""
    name, chosen = recipe
    overrides = [chosen if "=" in chosen else f"experiment={chosen}", "run_dir=x", "name=x", f"root={ROOT}"]
    extra = ["init=x", "task.root=x"] if name == "finetune" else ["data.shards=x"]
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = plain_config(compose(name, overrides=[*overrides, *extra]))
    content = {"audiossl": {"config": config, "provenance": provenance_of(config, "0" * 64)}}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True) == content


PLANTED = ["os.system", "pathlib.Path.touch", "logging.os.system", "torch.hub.load", "subprocess.Popen"]
PLANTED += ["audiossl.checkpoints.atomic.try_to_remove", "audiossl.checkpointing.Checkpointing", "audiossl.errors.os"]


@pytest.mark.faults("S4")
@pytest.mark.parametrize("target", PLANTED)
@pytest.mark.parametrize("place", ["model", "frontend", "inside", "in a list"])
def test_a_checkpoints_config_builds_nothing_but_what_we_list(honest, tmp_path, target, place):
    """Nothing at all is built where one of the targets is refused."""
    content = torch.load(honest / "checkpoints" / "last.ckpt", weights_only=True)
    config = content["audiossl"]["config"]
    victim = tmp_path / "victim"
    planted = {"_target_": target, "self": str(victim), "path": str(victim), "folder": str(victim)}
    if place in ("model", "frontend"):
        config[place] = planted
    else:
        config["model"]["width"] = planted if place == "inside" else [1, {"deep": planted}]
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="_target_="):
        load_method(tmp_path / "x.ckpt")
    assert not victim.exists()


@pytest.mark.faults("S4")
def test_hyper_parameters_that_name_an_instantiator_are_passed_over(honest, tmp_path):
    """Lightning would follow `_instantiator` and `_class_path`; a run that resumes never asks."""
    copytree(honest, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        planted = {"_instantiator": "os.mkdir", "_class_path": "os.mkdir", "path": str(tmp_path / "x")}
        content["hyper_parameters"] = planted
        path.unlink()
        torch.save(content, path)
    fits.run(tmp_path / "run", *SMALL, "trainer.max_steps=3", ckpt="last")
    assert not (tmp_path / "x").exists()


@pytest.mark.faults("S4")
def test_a_package_of_the_users_own_is_refused_with_the_place_where_a_method_goes():
    with pytest.raises(UserError, match=r"theirs\.Method: is not allowed; .* into audiossl/methods/ and conf/model/"):
        check_target("model._target_", "theirs.Method")
    with pytest.raises(UserError, match=r"timm$"):
        check_target("frontend._target_", "theirs.FrontEnd")
