"""What stands between the command line and a run?

`launch` composes the config (every job's, in a sweep) and checks it, all before Hydra makes a folder and before torch
is imported; a user's mistake is one line on stderr and exit code 2. What is right is handed to `hydra.main`. Exit
codes: 0 only for a finished run, 1 for a failure with its traceback or a sweep with a failed job, 2 for a user's error;
75 (pre-empted, can be resumed) and 130 (interrupted) come from the run, and end a sweep.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser  # the parser that hydra.main itself uses; there is no public one
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from audiossl.cluster.submitted import ask_for_our_signal, comes_back
from audiossl.config.commands import refuse_plan_of
from audiossl.config.fields import Spec, UnknownKeyError
from audiossl.config.overrides import Composer, written_in
from audiossl.config.secrets import mask, mask_log, mask_said, mask_what_hydra_wrote
from audiossl.config.settings import check, plain_config
from audiossl.errors import UserError
from audiossl.planning.jobs import is_first_process
from audiossl.sweeping.plan import array_task, check_sweep, folder_name, is_ours
from audiossl.sweeping.status import forget_failure

Run = Callable[[DictConfig], int | None]
REPOSITORY = Path(__file__).resolve().parents[2]
CONF = REPOSITORY / "conf"
OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)
OmegaConf.register_new_resolver("basename", lambda init: basename(init), replace=True)
OmegaConf.register_new_resolver("sweep_folder", folder_name, use_cache=True, replace=True)
MAX_YAML_BYTES = 1_000_000
MAX_YAML_ALIASES = 50  # a few dozen nested ones fill the memory
MADE_BY_A_RUN = ("config.yaml", "finetune.yaml", "checkpoints", "metrics.csv")
OTHERS_RECIPE = re.compile(r"In '(experiment|sweep)/([^']+)': Could not override '(\w+)'")
OTHERS_GROUP = re.compile(r"^Could not override '([^']+)'\. No match in the defaults list")
GROUPS = {
    "probe.py": ("protocol",),
    "finetune.py": ("task", "tuning"),
    "train.py": ("model", "model_size", "model_data", "frontend", "data", "probe"),
}


def launch(config_name: str, run: Run, spec: Spec, argv: Sequence[str] | None = None, conf: Path = CONF) -> int:
    """Check the command line and the config, call `run` with it under Hydra, and return the exit code.

    `run` gets the composed config without its `hydra` node, once, or once a job of a sweep (`-m`), and returns its exit
    code. `--help`, `--cfg`, `--info` and shell completion go to Hydra untouched. An exception that is no `UserError`
    leaves through `SystemExit(1)` after its traceback, secrets masked; in a sweep the other jobs still run.
    """
    argv = list(sys.argv if argv is None else argv)
    argv = argv[:1] + sorted(argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))  # wherever it stands
    program = Path(argv[0]).name
    codes: list[int] = []
    planned: list[tuple[list[str], dict[str, Any]]] = []
    try:
        args = get_args_parser().parse_args(argv[1:])
        if args.experimental_rerun:
            raise UserError("--experimental-rerun: runs code from a pickle; give the overrides again instead")
        if not (args.help or args.hydra_help or args.cfg or args.info or args.shell_completion):
            rewritten = _check(config_name, args, spec, conf, Path(program).stem, planned=planned)
            if planned:
                return _plan(program, config_name, planned)
            argv = [rewritten.get(argument, argument) for argument in argv]
        elif args.cfg and not args.info:  # shown as it would be run; what is wrong with it is Hydra's to say
            with contextlib.suppress(UserError):
                rewritten = _check(config_name, args, spec, conf, Path(program).stem, is_shown=True)
                argv = [rewritten.get(argument, argument) for argument in argv]
        sys.argv = argv
        ask_for_our_signal()
        task = _job(run, program, codes)
        hydra.main(version_base="1.3", config_path=str(conf), config_name=config_name)(task)()
    except UserError as error:
        _complain(program, error)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `--help | head` has seen enough; Python would complain once more when it leaves
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return next((code for code in codes if code), 0)


def basename(init: str | Sequence[str]) -> str:
    """Name what an encoder is read from, for a folder: the last part of a path, several joined by +."""
    parts = [init] if isinstance(init, str) else list(init)
    last = (re.split(r"[/\\]", str(part).rstrip("/").removesuffix("/encoder.safetensors"))[-1] for part in parts)
    kinds = (str(part).partition(":")[0] + "-" if ":" in str(part) and "/" in str(part) else "" for part in parts)
    return re.sub(r"[^\w.+-]+", "-", "+".join(f"{kind}{name}" for kind, name in zip(kinds, last, strict=True)))


def _complain(program: str, error: Exception) -> None:
    print(f"{program}: {mask_said(' '.join(str(error).split()))}", file=sys.stderr)


def _job(run: Run, program: str, codes: list[int]) -> Callable[[DictConfig], None]:
    """Wrap `run` so that a user's error is one line, and a failing job of a sweep does not end the others."""

    @functools.wraps(run)
    def job(cfg: DictConfig) -> None:
        is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        folder = Path(HydraConfig.get().runtime.output_dir)
        mask_what_hydra_wrote()
        for handler in logging.getLogger().handlers:
            handler.addFilter(mask_log)
        try:
            if is_sweep and is_first_process():
                forget_failure(folder)
            with comes_back(cfg, folder):
                codes.append(run(cfg) or 0)
            return
        except UserError as error:
            _complain(program, error)
            codes.append(1 if is_sweep else 2)
            problem: Exception = error
        except Exception as error:
            print(mask_said(traceback.format_exc()), file=sys.stderr)
            if not is_sweep:
                raise SystemExit(1) from error
            codes.append(1)
            problem = error
        if is_sweep:
            message = mask_said(" ".join(f"{type(problem).__name__}: {problem}".split())[:500])
            part = folder / "results.json.part"  # other tasks of an array may be reading
            part.write_text(json.dumps({"status": "failed", "error": message}), encoding="utf-8")
            part.replace(folder / "results.json")

    return job


def _plan(program: str, config_name: str, planned: list[tuple[list[str], dict[str, Any]]]) -> int:
    """Answer dry_run=true, without Hydra's folders and logs; one process speaks for all."""
    refuse_plan_of(config_name)
    if not is_first_process():
        return 0
    from audiossl.planning.dryrun import show

    return show(program, planned)


def _check(
    config_name: str,
    args: Namespace,
    spec: Spec,
    conf: Path,
    job_name: str,
    is_shown: bool = False,
    planned: list[tuple[list[str], dict[str, Any]]] | None = None,
) -> dict[str, str]:
    """Compose and check the config of every job; returns the overrides that Hydra must be given differently.

    The overrides and configs of jobs that are only to be planned (dry_run=true) are put into `planned`.
    """
    conf = Path(args.config_path).resolve() if args.config_path else conf
    extra = Path(args.config_dir).resolve() if args.config_dir else None
    for folder in filter(None, (conf, extra)):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of configs")
        _check_yaml_files(folder)
    search = [f"hydra.searchpath=[file://{extra}]"] if extra else []
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3", job_name=job_name):
            composer = Composer(args.config_name or config_name, spec, search, args.multirun)
            for number, cfg in enumerate(composer.jobs(args.overrides)):
                try:
                    check(cfg, spec)
                except UnknownKeyError as error:  # no override is it: a file has it, or a mapping given
                    where = written_in(cfg, error.key)
                    raise UserError(f"{where}: {error}" if where else str(error)) from error
                if cfg.get("dry_run") and planned is not None:
                    planned.append((mask(list(cfg.hydra.overrides.task)), plain_config(cfg)))
                    continue
                if composer.is_sweep:
                    _check_devices(cfg)
                if number == 0 and not is_shown and is_first_process():
                    _check_folder(cfg, composer)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(first_lines(error)) from error
    finally:
        HydraConfig.instance().cfg = None
    return composer.rewritten


def first_lines(error: Exception) -> str:
    """Put what Hydra says of a command line into a line, without its advice that leads nowhere here."""
    text = f"{error}\n{error.__cause__ or ''}" if isinstance(error, HydraException) else str(error)
    if recipe := OTHERS_RECIPE.search(text):
        kind, name, group = recipe.groups()
        what = "recipe" if kind == "experiment" else kind
        program = next((program for program, groups in GROUPS.items() if group in groups), "another command")
        return f"{kind}={name}: chooses a {group}, so it is a {what} of {program}; run it with that"
    if other := OTHERS_GROUP.search(text):
        return f"{other[1]}: cannot be chosen with this command; leave it out (--help lists what can)"
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^") and "hydra.cc" not in line]
    return "; ".join(lines[: 6 if isinstance(error, yaml.YAMLError) else 2])


def _check_yaml_files(folder: Path) -> None:
    """Refuse files so large, or with so many aliases, that reading them would fill the memory."""
    for path in (*folder.glob("*.yaml"), *folder.glob("*/*.yaml"), *folder.glob("*/*/*.yaml")):
        if path.stat().st_size > MAX_YAML_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for a config")
        if len(re.findall(r"(?<=[\s\[,:])\*\w+", path.read_text(encoding="utf-8"))) > MAX_YAML_ALIASES:
            raise UserError(f"{path}: has more than {MAX_YAML_ALIASES} YAML aliases (*name)")


def _check_devices(cfg: DictConfig) -> None:
    """Refuse several devices in a sweep, unless srun starts a task for each: in array jobs, and by submitit."""
    devices = cfg.get("trainer", {}).get("devices", 1)
    if devices in (1, "auto"):
        return
    launcher = cfg.hydra.launcher
    tasks = launcher.get("tasks_per_node", 1) * launcher.get("nodes", 1)
    if array_task(cfg) is not None:
        tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks == 1:
        raise UserError(
            f"trainer.devices={devices} with -m: Lightning would start the sweep anew on every device; sweep on one "
            "device, or on SLURM: sbatch --array=..., or hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=N"
        )
    if tasks != devices:
        raise UserError(f"trainer.devices={devices}: each point of the sweep has {tasks} tasks; take as many devices")


def _check_folder(cfg: DictConfig, composer: Composer) -> None:
    """Refuse to write over a run that exists, unless `ckpt` says that it goes on."""
    is_sweep = composer.is_sweep
    folder = Path(cfg.hydra.sweep.dir if is_sweep else cfg.hydra.run.dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give another folder with name=... or hydra.run.dir=...")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        key = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
        raise UserError(f"{folder}: cannot be written, {there} takes no files; write elsewhere: {key}=...")
    if is_sweep and is_ours(cfg):
        check_sweep(cfg, composer.points)
        return
    if cfg.get("ckpt") is not None:
        return
    if is_sweep and (folder / "multirun.yaml").exists():
        raise UserError(f"{folder}: holds a sweep already; give another hydra.sweep.dir=..., or go on with ckpt=last")
    if not is_sweep and any((folder / name).exists() for name in MADE_BY_A_RUN):
        raise UserError(f"{folder}: holds a run already; give this one a name=..., or go on with ckpt=last")
