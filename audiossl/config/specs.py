"""Which config does each command take?

One `Spec` a command: what builds each section of its YAML, and the few keys that mean more to us than to the callable.
Nothing is imported here; `settings.check` reads the signatures.
"""

from __future__ import annotations

from audiossl.config.commands import check_finetuning, check_global_batch, check_probe
from audiossl.config.fields import Spec
from audiossl.config.rules import check_pretraining
from audiossl.sharded.settings import check_sharding, refuse_sharding

PRETRAIN = Spec(
    sections={
        "": {
            "name": "str",
            "seed": "int",
            "ckpt": "str | None",
            "init": "str | None",
            "init_frontend": "Literal['check', 'ignore']",
            "global_batch": "int | None",
            "trace": "bool",
            "dry_run": "bool",
            "root": "Any",
            "run_dir": "str",
            "validate_every_steps": "int",
        },
        "assume": "audiossl.planning.speed.Assumptions",
        "model": None,
        "frontend": None,
        "data": "audiossl.shards.ShardData",
        "optim": "audiossl.optim.OptimSettings",
        "trainer": "lightning.pytorch.Trainer",
        "checkpoint": "audiossl.checkpointing.Checkpointing",
        "swa": "audiossl.running.averaging.Averaging",
        "stopping": "audiossl.running.stopping.EarlyStopping",
        "alarm": "audiossl.running.alarm.CollapseAlarm",
        "logger": "audiossl.running.loggers.build_loggers",
        "probe": "audiossl.probes.intraining.Probe",
        "pictures": {"every_steps": "int", "clips": "int"},
    },
    code_args={
        "model": ("frontend", "num_classes"),
        "data": ("default_rate_hz", "run_dir", "needs_labels"),
        "optim": ("steps_per_epoch",),
        "trainer": (
            "logger",
            "callbacks",
            "plugins",
            "default_root_dir",
            "enable_checkpointing",
            "limit_train_batches",
            "overfit_batches",
            "fast_dev_run",
            "reload_dataloaders_every_n_epochs",
            "check_val_every_n_epoch",
            "barebones",
            "val_check_interval",
            "limit_val_batches",
            "num_sanity_val_steps",
            "use_distributed_sampler",
            "enable_model_summary",
        ),
        "checkpoint": ("folder", "provenance"),
        "swa": ("steps_per_epoch", "max_steps"),
        "stopping": ("metric", "folder"),
        "logger": ("run_dir", "name"),
    },
    types={
        "trainer.max_steps": "| None",
        "trainer.num_nodes": "| None",
        "trainer.precision": "| Literal['auto']",
        "trainer.timeout_seconds": "float",
        "trainer.startup_timeout_seconds": "float",
        "trainer.compile": "bool",
        "trainer.checkpoint_activations": "bool",
        "probe.shards": "| None",
    },
    checks=(check_pretraining, check_global_batch, check_sharding),
)

FINETUNE = Spec(
    sections={
        "": {
            "name": "str",
            "seed": "int",
            "seeds": "list[int] | None",
            "ckpt": "Literal['last', 'must'] | None",
            "init": "str",
            "evaluate": "bool",
            "dry_run": "bool",
            "trace": "bool",
            "root": "Any",
            "run_dir": "str",
            "validate_every_steps": "int",
        },
        "model": None,
        "frontend": {"seconds": "float | Literal['clips'] | None"},
        "task": "audiossl.tasks.load_task",
        "test": "audiossl.tuning.testing.Testing",
        **{
            name: PRETRAIN.sections[name]
            for name in ("data", "optim", "trainer", "checkpoint", "swa", "stopping", "logger")
        },
    },
    code_args={
        **PRETRAIN.code_args,
        "model": ("frontend", "num_classes", "geometry"),
        "data": (
            *PRETRAIN.code_args["data"],
            *("shards", "sources", "split", "validation_clips", "validation_split"),
        ),
    },
    types={
        **{key: text for key, text in PRETRAIN.types.items() if not key.startswith("probe.")},
        "data.mean": "| None",
        "data.std": "| None",
        "model.loss": "| Literal['auto']",
    },
    checks=(check_pretraining, check_finetuning, refuse_sharding),
)

PROBE = Spec(
    sections={
        "": {"name": "str", "init": "str | list[str]", "run_dir": "str"},
        "task": "audiossl.tasks.load_task",
        "probe": "audiossl.probes.run.Settings",
        "heads.linear": {"l2_grid": "list[float]"},
        "heads.knn": {"neighbours": "list[int]"},
        "heads.sgd": "audiossl.heads.fitting.NetSettings",
        "heads.mlp": "audiossl.heads.fitting.NetSettings",
        "heads.attention": "audiossl.heads.fitting.NetSettings",
        "heads.weighted": "audiossl.heads.fitting.NetSettings",
    },
    checks=(check_probe,),
)

SPECS = {"train": PRETRAIN, "finetune": FINETUNE, "probe": PROBE}
