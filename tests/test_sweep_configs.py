"""Every sweep in conf/sweep composes, says how it is run, and has points that train."""

import math
import re
from pathlib import Path

import hydra
import pytest
import yaml
from exported import export
from finetunes import QUICK, clips_folder
from hydra.core.hydra_config import HydraConfig
from matplotlib.image import imread
from test_sweeps import make_job

from audiossl.config import cli
from audiossl.config.overrides import Composer
from audiossl.config.settings import check, plain_config
from audiossl.config.specs import SPECS
from audiossl.sweeps import Summary

SWEEPS = sorted((cli.CONF / "sweep").glob("*.yaml"))
PLACES = ["init=encoder", "task.root=set"]
TWO_STEPS = [
    *("trainer=cpu", "trainer.max_steps=2", "data.batch_size=2", "data.num_workers=0", "data.validation_clips=0"),
    *("pictures.clips=0", "probe=none", "optim.warmup_epochs=null"),
]


def entry_of(path: Path) -> str:
    return re.search(r"python (\w+)\.py -m sweep=" + path.stem, path.read_text())[1]


@pytest.fixture
def points(monkeypatch):
    """Give a function that composes and checks every point of a sweep."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # put back afterwards: Lightning asks whether Hydra runs

    def composed(path: Path, *overrides: str, limit: int | None = None):
        entry = entry_of(path)
        found = []
        with hydra.initialize_config_dir(str(cli.CONF), version_base="1.3", job_name=entry):
            composer = Composer(entry, SPECS[entry], [], is_sweep=False)
            for cfg in composer.jobs([f"sweep={path.stem}", *overrides]):
                check(cfg, SPECS[entry])
                found.append(cfg)
                if len(found) == limit:
                    break
        assert composer.is_sweep
        return found

    return composed


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_composes_and_its_picture_knows_what_is_published(path, points):
    found = points(path, *(PLACES if entry_of(path) != "train" else []), limit=2)
    tree = yaml.safe_load(path.read_text())["hydra"]
    params, look = tree["sweeper"]["params"], Summary(**tree["callbacks"]["summary"]).look
    assert len(found) == 2 and look.x in params and look.title
    values = params[look.x].split(",")
    for curve in look.published:
        assert set(curve.values) & set(values), "not one published value is swept"
        assert all(30 < score < 50 for score in curve.values.values()) and curve.metric == "mAP"
    assert bool(look.published) == ("no curve that we could check" not in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_point_of_a_sweep_composes(path, points):
    found = points(path, *(PLACES if entry_of(path) != "train" else []))
    params = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    assert len(found) == math.prod(len(values.split(",")) for values in params.values()) > 2


def two_steps(path: Path, points, folder: Path, number: int) -> dict:
    """Run a point of a sweep for two steps of two clips."""
    from audiossl.training import fit

    settings = TWO_STEPS
    if path.stem == "epochs":  # 8 epochs of 3 clips are 2 steps of 16, and 40 are 8
        settings = [word for word in TWO_STEPS if "max_steps" not in word and "batch_size" not in word]
        settings += ["data.fraction=0.01", "data.batch_size=16"]
    cfg = points(path, *settings, limit=None if number else 1)[number]
    return fit(plain_config(cfg) | {"run_dir": str(folder), "name": path.stem})


def test_a_point_of_a_sweep_trains(points, tmp_path):
    path = cli.CONF / "sweep" / "decoder_depth.yaml"
    assert two_steps(path, points, tmp_path / "run", 0)["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in SWEEPS if entry_of(p) == "train"], ids=lambda path: path.stem)
def test_the_first_and_the_last_point_of_each_sweep_train(path, points, tmp_path):
    is_large = path.stem in ("encoder_size", "imagenet")  # the last has 300 M weights, or weights from the hub
    for number in (0,) if is_large else (0, -1):
        steps = two_steps(path, points, tmp_path / f"run{number}", number)["steps"]
        assert steps == (8 if path.stem == "epochs" and number else 2)


@pytest.mark.slow
def test_a_point_of_the_sweeps_of_fine_tunings_and_probes_runs(points, tmp_path):
    from audiossl.probes.run import run
    from audiossl.tuning.runs import fit

    encoder, clips = export("audiomae", tmp_path / "mae"), clips_folder(tmp_path / "clips")
    places = [f"init={encoder}", "task=folder", f"task.root={clips}"]
    quick = [setting for setting in QUICK if not setting.startswith("trainer.max_steps")]
    cfg = points(cli.CONF / "sweep" / "masking_finetune.yaml", *places, *quick, "trainer.max_steps=2")[-1]
    assert fit(plain_config(cfg) | {"run_dir": str(tmp_path / "ft")})["status"] == "finished"
    small = ["probe.num_resamples=20", "probe.with_cost=false", "heads.attention.max_epochs=2", "probe.device=cpu"]
    cfg = points(cli.CONF / "sweep" / "temporal_support.yaml", *places, *small, f"probe.cache_dir={tmp_path / 'c'}")[0]
    assert run(plain_config(cfg) | {"run_dir": str(tmp_path / "probe")})["status"] == "finished"


def test_a_published_curve_lies_over_the_sweep_on_an_axis_of_its_own(tmp_path):
    settings = yaml.safe_load((cli.CONF / "sweep" / "encoder_size.yaml").read_text())["hydra"]["callbacks"]["summary"]
    for folder, look in (("plain", {}), ("published", settings)):
        for number, size in enumerate(("tiny", "small", "base")):
            results = {"status": "finished", "seconds": 2, "scores": {"linear": 0.6 + 0.1 * number, "knn": 0.5}}
            make_job(tmp_path / folder / str(number), number, [f"size={size}"], results)
        Summary(**{key: value for key, value in look.items() if key != "_target_"}).summarise(tmp_path / folder, None)
    plain, published = (imread(tmp_path / folder / "summary.png")[..., :3] for folder in ("plain", "published"))
    grey = (abs(published - [0x5B / 255, 0x64 / 255, 0x70 / 255]).max(-1) < 0.02).sum()
    assert grey > 500 > (abs(plain - [0x5B / 255, 0x64 / 255, 0x70 / 255]).max(-1) < 0.02).sum()
