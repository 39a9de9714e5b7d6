"""Wrong command lines and configs end in one line that names the key and the way out, before torch is imported."""

import os
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
from conftest import ROOT
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from audiossl.config.cli import launch
from audiossl.config.overrides import Composer
from audiossl.config.schema import parse_type, signature
from audiossl.config.secrets import mask
from audiossl.config.settings import check, instantiate, plain_config
from audiossl.config.specs import PRETRAIN
from audiossl.errors import UserError

APP = """
import json, sys
from pathlib import Path
from audiossl.config.cli import launch
from audiossl.errors import UserError
from audiossl.config.settings import plain_config
from audiossl.config.specs import PRETRAIN

def run(cfg):
    assert not {"torch", "lightning", "timm"} & set(sys.modules)
    config = plain_config(cfg)
    folder = Path(config["run_dir"])
    match config["name"]:
        case "mistaken":
            raise UserError("a file is\\nmissing")
        case "crashing":
            raise ValueError("boom")
        case "preempted":
            raise SystemExit(75)
    if config["seed"] == 13:
        raise ValueError("unlucky")
    (folder / "metrics.csv").write_text("step,loss\\n")
    scores = {"knn": 0.4, "linear": config["model"]["mask_ratio"] - 0.1}
    results = {"status": "finished", "loss": 0.5, "seconds": 1.0, "scores": scores}
    (folder / "results.json").write_text(json.dumps(results))
    print("trained for", config["trainer"]["max_steps"], config["trainer"].get("max_time"))

if __name__ == "__main__":
    sys.exit(launch("train", run, PRETRAIN))
"""


def run_app(folder: Path, *arguments: str, app: Path | None = None, **environ: str) -> subprocess.CompletedProcess:
    """Run a command line in `folder` on the repository's own configs, with a run that trains nothing."""
    if app is None:
        app = folder / "app.py"
        app.write_text(APP)
    environ = {k: v for k, v in os.environ.items() if "RANK" not in k} | {"PYTHONPATH": str(ROOT)} | environ
    command = [sys.executable, str(app), *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Give a function that passes arguments to `launch` and returns the one line they are refused with."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments: str) -> str:
        def never(cfg):
            raise AssertionError("the run was started")

        assert launch("train", never, PRETRAIN, argv=["train.py", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("train.py: ") and error.count("\n") == 1 and list(tmp_path.glob("runs*")) == []
        return error.removeprefix("train.py: ").rstrip()

    return refuse


TYPOS = """
trainer.max_step=5             trainer.max_steps
+trainer.max_step=5            trainer.max_steps
++trainer.max_step=5           trainer.max_steps
~trainer.max_step              trainer.max_steps
trainr.max_steps=1             trainer.max_steps
trainer.presicion=32-true      trainer.precision
trainer.acumulate_grad_batches=2  trainer.accumulate_grad_batches
trainer.gradient_clip_va=2     trainer.gradient_clip_val
model.maskratio=0.7            model.mask_ratio
model.decoder_dept=2           model.decoder_depth
+model.num_head=4              model.num_heads
frontend.hopms=5               frontend.hop_ms
frontend.num_mel=64            frontend.num_mels
optim.warmup_step=10           optim.warmup_steps
optim.weigth_decay=0.1         optim.weight_decay
data.batchsize=8               data.batch_size
data.shard=x                   data.shards
checkpoint.keep_lst=1          checkpoint.keep_last
data=mix data.sources.a.weigth=1  data.sources.a.weight
data=mix data.sources.a.shard=x   data.sources.a.shards
data=mix data.source.a.shards=x   data.sources
data.samplng=passt             data.sampling
sed=1                          seed
expriment=audiomae_base_as2m   experiment
max_steps=10                   trainer.max_steps
logger.wanb=true               logger.wandb
trainr.x=1                     trainer
hydra.run.dirr=x               hydra.run.dir
"""


@pytest.mark.faults("C1")
@pytest.mark.parametrize("row", TYPOS.split("\n")[1:-1])
def test_misspelt_key_is_refused_with_the_nearest_key(refused, row):
    *overrides, meant = row.split()
    key = overrides[-1].split("=")[0].lstrip("+~")
    assert refused(*overrides) == f"{key}: no such key. Did you mean {meant}?"


SOURCES = """
data.sources={a:{shards:x,fracton:1}}              data.sources.a.fracton: no such key. Did you mean data.sources.a.f
data.sources.a.weight=1                            data.sources.a.shards: is missing
data.sources.a=1                                   data.sources.a=1: must be a mapping
data.sources=2                                     data.sources=2: must be a mapping or null
data.sources={a:{shards:x,weight:big}}             data.sources.a.weight=big: must be a number or null
data.sources={a:{shards:x,weight:0}}               data.sources.a.weight=0: must be above 0
data.sources={a:{shards:x,fraction:2}}             data.sources.a.fraction=2: must be above 0 and at most 1
data.sources={a:{shards:x,weight:1},b:{shards:y}}  data.sources.b.weight=null: give every source a weight, or none
data.sources={a:{shards:x}} data.shards=y          data.shards=y: data.sources say where the shards are
data.sources={}                                    data.shards=null: say where the shards are, or mix corpora
"""


@pytest.mark.faults("C2")
@pytest.mark.parametrize("row", SOURCES.split("\n")[1:-1])
def test_a_mistake_inside_a_source_is_named(refused, row):
    overrides, error = row.split("  ", 1)
    assert refused("data=mix", *overrides.split()).startswith(error.strip())


VALUES = """
optim.lr=fast                     must be a number or null
optim.lr=0                        must be above 0
optim.lr=-1e-3                    must be above 0
optim.lr=nan                      must be a number or null
optim.lr=inf                      must be a number or null
optim.lr=1e99                     must be above 0 and at most 100
optim.betas=[0.9]                 must be a list of 2
optim.betas=[0.9,1.5]             must be at least 0 and below 1
optim.weight_decay=-0.1           must be at least 0
optim.weight_decay=               must be a number; nothing was given
optim.warmup_steps=2300           is longer than trainer.max_steps=1800
trainer.max_steps=abc             must be a whole number or null
trainer.max_steps=0               must be at least 1
trainer.timeout_seconds=0         must be above 0
trainer.startup_timeout_seconds=-1 must be above 0
trainer.max_steps=-5              must be at least 1
trainer.max_steps=1e3             must be a whole number or null; write 1000
trainer.max_steps=1e99            must be a whole number or null
trainer.max_steps=99999999999999999999999  must be a whole number
trainer.max_steps=                must be a whole number or null; nothing was given, null stands for none
trainer.max_steps=null            give one of them
trainer.precision=bf16-mixd       must be one of bf16-mixed, 16-mixed
trainer.accumulate_grad_batches=0 must be at least 1
trainer.accumulate_grad_batches=1.5  must be a whole number
trainer.gradient_clip_val=big     must be a number or null
trainer.log_every_n_steps=0       must be at least 1
trainer.detect_anomaly=maybe      must be true or false
data.batch_size=4.5               must be a whole number
data.batch_size=0                 must be at least 1
data.num_workers=-1               must be at least 0
data.padding=circular             must be one of cyclic, zeros
data.shards=                      must be text or null; nothing was given
model.depth=-3                    must be at least 1
model.depth=true                  must be a whole number
model.mask_ratio=1                must be at least 0 and below 1
model.mask_ratio=1.2              must be at least 0 and below 1
model.mask_ratio=-0.1             must be at least 0 and below 1
model.mask_ratio=0                hides none of the 8 x 16 patches
model.mask_ratio=0.999            hides all of the 8 x 16 patches
model.mask=randum                 must be one of random, frequency, time
model.positions=right             must be one of
model.norm_target=1               must be true or false
model.num_heads=5                 does not divide model.width=192; model.num_heads=4 would
model.stride=null                 must be a whole number
data.fraction=0                   must be above 0 and at most 1
data.draws_per_epoch=0            must be at least 1
data.sampling=pass                must be one of passt, atst, audiomae or null
data.sampling=passt               holds each once, whatever its weight
data.shuffle_shards=0             must be at least 1
frontend.num_mels=100             100 mel bands do not divide into patches of 16; 96 or 112 would
frontend.seconds=2.5              250 frames do not divide into patches of 16; 2.4 or 2.56 would
frontend.seconds=0.1              10 frames are less than one patch of 16; give at least 0.16
frontend.hop_ms=7                 is 365.71 frames of frontend.hop_ms=7
frontend.hop_ms=0                 must be above 0
frontend.fmax_hz=9000             lies above 8000 Hz
seed=-1                           must be from 0
name=3                            must be text
trace=yes please                  must be true or false
"""


@pytest.mark.faults("C2", "C3")
@pytest.mark.parametrize("row", VALUES.split("\n")[1:-1])
def test_wrong_value_is_refused_with_its_key_and_rule(refused, row):
    override, rule = (part.strip() for part in row.split("  ", 1)) if "  " in row else row.split(" ", 1)
    error = refused(override)
    assert rule in error and ("=" in error.split(":")[0])
    changed, named = override.split("=")[0], error.split("=")[0]
    assert changed == named or changed in error or named == "frontend.seconds"


@pytest.mark.faults("C6")
def test_group_choice_is_refused_with_all_choices_nearest_first(refused):
    assert refused("model=audiomea").startswith("model=audiomea: there is no such model; choose one of: audiomae")
    assert refused("size=tny").split(": ")[2].split(", ")[0] == "tiny"
    assert "choose one of: audiomae_base_as2m" in refused("+experiment=audiomae_base")
    assert refused("trainer=null").startswith("trainer=null: there is no such trainer")


@pytest.mark.faults("C1")
def test_misspelt_key_in_a_users_yaml_file_names_the_file(refused, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    path = tmp_path / "mine" / "experiment" / "long.yaml"
    path.write_text("# @package _global_\ntrainer:\n  max_step: 5\n")
    error = refused("-cd", "mine", "experiment=long")
    assert error == f"{path}: trainer.max_step: no such key. Did you mean trainer.max_steps?"
    path.write_text("# @package _global_\nseeed: 5\n")
    assert refused("-cd", "mine", "experiment=long") == f"{path}: seeed: no such key. Did you mean seed?"
    path.write_text("# @package _global_\ntrainer: [\n")
    assert "long.yaml" in refused("-cd", "mine", "experiment=long")


@pytest.mark.faults("S11")
@pytest.mark.parametrize("line", ["a: " + "x" * 1_000_001, "a: &a [x]\nb: [" + "*a," * 60 + "]"], ids=["huge", "bomb"])
def test_yaml_that_would_fill_the_memory_is_refused(refused, tmp_path, line):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "big.yaml").write_text(line)
    assert "big.yaml: " in refused("-cd", "mine")


def test_what_the_program_passes_cannot_be_configured(refused):
    assert refused("+trainer.callbacks=[]") == "trainer.callbacks: is passed by the program and cannot be configured"
    assert "cannot be taken away" in refused("~trainer.max_steps")
    assert refused("~trainer") == "trainer: is missing; the config needs this section"


def test_several_values_without_m_and_endless_sweeps_are_refused(refused):
    assert "need -m" in refused("model.mask_ratio=0.7,0.8")
    assert "more than 10,000 jobs" in refused("-m", "seed=range(0,999999999)")
    assert refused("-m", "model.mask_ratio=0.7,1.5").startswith("model.mask_ratio=1.5: must be")


@pytest.mark.faults("S4")
def test_target_outside_the_allowed_packages_is_refused(refused):
    assert "model._target_=os.system: is not allowed" in refused("model._target_=os.system")
    assert "is not allowed" in refused("+hydra.callbacks.x._target_=os.system")
    assert "leads out of its package" in refused("model._target_=audiossl.config.cli.Path")


@pytest.mark.faults("S4")
@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "pathlib.Path.touch",
        "logging.os.system",
        "torch.hub.load",
        "audiossl.config.cli.os.system",
        "audiossl.config.cli.Path",
        "audiossl.config.cli.hydra",
        "lightning.pytorch.core.saving.load_hparams_from_yaml",
    ],
)
def test_instantiate_builds_nothing_outside_the_allowed_packages(target, tmp_path):
    with pytest.raises((UserError, ModuleNotFoundError)):
        instantiate({"_target_": target, "self": str(tmp_path / "made")})
    assert not list(tmp_path.iterdir())


def test_instantiate_passes_config_and_code_arguments():
    inner = {"_target_": "audiossl.config.schema.Type", "kind": "int"}
    built = instantiate(OmegaConf.create({"kind": "list", "members": inner}), "audiossl.config.schema.Type")
    assert built.kind == "list" and built.members.accepts(3)
    assert instantiate({"_target_": "audiossl.config.schema.Type"}, kind="bool").accepts(True)


def test_signature_is_read_through_imports_and_aliases_without_importing_them():
    trainer = signature("lightning.pytorch.Trainer").types
    assert trainer["precision"].accepts("bf16-mixed") and not trainer["precision"].accepts("bf17")
    assert trainer["max_steps"].accepts(5) and not trainer["max_steps"].accepts(True)
    assert signature("audiossl.optim.OptimSettings").required >= {"lr", "betas"}
    with pytest.raises(UserError, match="no such class"):
        signature("audiossl.optim.Optimm")


def test_annotations_accept_what_they_say():
    table = {
        "int | None": ([3, None], [3.0, True, "3", 2**60]),
        "float": ([3, 3.5], [float("nan"), "3", None]),
        "Literal['a', 4]": (["a", 4], ["4", 4.0]),
        "list[int]": ([[1, 2], []], [[1.5], 1]),
        "tuple[float, float]": ([[1, 2]], [[1], [1, 2, 3]]),
        "Optional[Union[int, str]]": ([1, "a", None], [1.5, ""]),
    }
    for annotation, (good, bad) in table.items():
        type_ = parse_type(annotation)
        assert all(map(type_.accepts, good)) and not any(map(type_.accepts, bad)), annotation


@pytest.mark.faults("S9")
def test_secrets_are_refused_in_the_config_run_as_they_are_and_masked_for_writing(refused, monkeypatch):
    assert refused("+logger.token=planted-1").startswith("logger.token: no such key")
    monkeypatch.setenv("MY_API_KEY", "planted-22")
    cfg = OmegaConf.create(
        {
            "token": "planted-1",
            "note": "key ${oc.env:MY_API_KEY}!",
            "url": "https://me:planted-3@host/x",
            "deep": [{"wandb_api_key": "planted-4", "num_tokens": 5, "key": "dog-1"}],
        }
    )
    assert plain_config(cfg)["note"] == "key planted-22!" and plain_config(cfg)["url"] == "https://me:planted-3@host/x"
    plain = mask(plain_config(cfg))
    assert "planted" not in str(plain)
    assert plain["note"] == "key ***!" and plain["deep"][0]["num_tokens"] == 5 and plain["deep"][0]["key"] == "dog-1"


@pytest.mark.faults("C1")
def test_the_error_comes_within_three_seconds_and_as_the_only_line(tmp_path):
    started = time.perf_counter()
    done = run_app(tmp_path, "+trainer.max_step=5", app=ROOT / "train.py")
    assert time.perf_counter() - started < 3
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "runs").exists()
    assert done.stderr == "train.py: trainer.max_step: no such key. Did you mean trainer.max_steps?\n"


def test_a_run_folder_that_exists_is_not_written_over(tmp_path):
    assert run_app(tmp_path, "name=a").returncode == 0
    again = run_app(tmp_path, "name=a")
    assert again.returncode == 2 and "runs/a: holds a run already" in again.stderr and "ckpt=last" in again.stderr
    assert run_app(tmp_path, "name=a", "ckpt=last").returncode == 0
    assert run_app(tmp_path, "name=a", RANK="1").returncode == 0, "only the first process checks"


def test_exit_codes_pass_through_hydra(tmp_path):
    mistaken = run_app(tmp_path, "name=mistaken")
    assert (mistaken.returncode, mistaken.stderr) == (2, "app.py: a file is missing\n")
    crashing = run_app(tmp_path, "name=crashing")
    assert crashing.returncode == 1 and "Traceback" in crashing.stderr and "ValueError: boom" in crashing.stderr
    assert run_app(tmp_path, "name=preempted").returncode == 75


def test_trainer_arguments_that_no_yaml_sets_can_be_given_without_a_plus(tmp_path):
    done = run_app(tmp_path, "trainer.max_steps=150", "trainer.max_time=00:01:00:00")
    assert done.returncode == 0 and "trained for 150 00:01:00:00" in done.stdout


def test_the_arguments_of_lightnings_child_processes_are_understood(tmp_path):
    arguments = ('hydra.run.dir="runs/a b"', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null")
    done = run_app(tmp_path, "trainer.max_steps=150", *arguments, LOCAL_RANK="1")
    assert done.returncode == 0 and (tmp_path / "runs" / "a b" / "results.json").exists()


# finetune.py and probe.py have their own tests: test_task_configs, test_recipes, test_probe_command
OTHERS = ("sweep", "task", "tuning", "protocol")
SHIPPED = [p for p in sorted((ROOT / "conf").glob("*/*.yaml")) if p.parent.name not in OTHERS and p.stem[:3] != "ft_"]


@pytest.mark.faults("C11")
@pytest.mark.parametrize("path", SHIPPED)
def test_every_shipped_config_passes_the_checks(path, monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # put back afterwards: Lightning asks whether Hydra runs
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3", job_name="train"):
        composer = Composer("train", PRETRAIN, [], is_sweep=False)
        group, name = path.parent.name, path.stem
        asked = [f"{group}={name}"]
        if group in ("model_size", "model_data"):  # comes of itself with its two choices
            model, _, other = name.rpartition("_")
            asked = [f"model={model}", f"{group.removeprefix('model_')}={other}"]
        for cfg in composer.jobs([*asked, "data.shards=x"]):
            check(cfg, PRETRAIN)
            assert cfg.data.shards == "x" and cfg.hydra.runtime.choices[group] == name


def test_hydras_own_flags_work_untouched(tmp_path):
    shown = run_app(tmp_path, "--cfg", "job", "trainer.max_steps=150", app=ROOT / "train.py")
    assert shown.returncode == 0 and "max_steps: 150" in shown.stdout
    assert "\nGroups:\n" in run_app(tmp_path, "--help", app=ROOT / "train.py").stdout


def test_checking_a_config_imports_neither_torch_nor_lightning():
    heavy = "{'torch', 'lightning', 'timm'}"
    code = (
        f"import sys, audiossl.config.cli, audiossl.config.specs, audiossl.sweeps; print(*{heavy} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "" and done.returncode == 0
