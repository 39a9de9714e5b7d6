"""Which configs does a command line ask for, and is every override spelt right?

Overrides are parsed by Hydra's own grammar. Group choices and keys are looked up before anything is composed with them,
so that Hydra's `+`, which adds whatever it is given, cannot smuggle in a misspelt key; each job of a sweep is composed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from audiossl.config.fields import Fields, Spec, read_fields, unknown_key
from audiossl.config.rules import show
from audiossl.config.schema import nearest
from audiossl.errors import UserError

MAX_JOBS = 10_000
MAX_COMPOSED = 100  # beyond it, a sweep's values are checked one at a time instead of in every combination
FREE_HYDRA_SECTIONS = ("callbacks", "sweeper", "launcher", "job_logging", "hydra_logging", "job.env_set")


class Composer:
    """Compose the configs that a command line asks for; use it inside `hydra.initialize_config_dir`.

    After `jobs`, `is_sweep` tells whether Hydra will sweep, `points` lists the overrides of every job of the sweep, and
    `rewritten` maps overrides to what Hydra must be given instead: a key that the signature knows but no YAML sets gets
    a `++`, because struct mode refuses it otherwise, and a glob with braces gets quotes.
    """

    def __init__(self, config_name: str, spec: Spec, search: list[str], is_sweep: bool):
        self.config_name, self.spec, self.search, self.is_sweep = config_name, spec, search, is_sweep
        self.rewritten: dict[str, str] = {}
        self.points: list[tuple[str, ...]] = []
        self.loader = GlobalHydra.instance().config_loader()
        self._options = cache(self._read_options)
        self._base = cache(self._compose_base)

    def jobs(self, texts: list[str]) -> Iterator[DictConfig]:
        """Yield the config of each job, with its `hydra` node; raises `UserError` for the first wrong override."""
        parser = OverridesParser.create(self.loader)
        quoted = [quote_braces(text) for text in texts]
        self.rewritten |= {text: better for text, better in zip(texts, quoted, strict=True) if better != text}
        overrides = parser.parse_overrides(quoted)
        for override in overrides:
            self._check_choice(override)
        texts = [next(_values(override)) for override in overrides]
        first = self._compose(overrides, texts, 0)
        self.is_sweep = self.is_sweep or first.hydra.mode == RunMode.MULTIRUN
        if self.is_sweep:
            params = first.hydra.sweeper.get("params") or {}
            configured = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
            given = {override.get_key_element() for override in overrides}
            overrides = [o for o in configured if o.get_key_element() not in given] + overrides
            self.points = list(combinations(overrides, every=True))
        for override in overrides:
            if override.is_interval_sweep() and is_grid(first):
                raise UserError(
                    f"{override.input_line}: names no values; list them, or choose another hydra/sweeper=..."
                )
            if override.is_sweep_override() and not self.is_sweep:
                raise UserError(f"{override.input_line}: several values are a sweep and need -m (a list is [1,2])")
        for number, job in enumerate(combinations(overrides)):
            yield first if list(job) == texts else self._compose(overrides, list(job), number)

    def _read_options(self, group: str) -> list[str]:
        return self.loader.get_group_options(group, config_name=self.config_name, overrides=self.search)

    def _compose_base(self, chosen: tuple[str, ...]) -> tuple[DictConfig, Fields]:
        base = hydra.compose(self.config_name, overrides=[*self.search, *chosen], return_hydra_config=True)
        settle_runtime(base, 0)
        return base, read_fields(base, self.spec)

    def _compose(self, overrides: list[Override], texts: list[str], number: int) -> DictConfig:
        pairs = list(zip(overrides, texts, strict=True))
        chosen = tuple(text for override, text in pairs if self._options(override.key_or_group))
        base, fields = self._base(chosen)
        for override in overrides:
            if not self._options(override.key_or_group):
                self._check_key(override, base, fields)
        job = [f"++{text}" if o.input_line in self.rewritten else text for o, text in pairs]
        cfg = hydra.compose(self.config_name, overrides=self.search + job, return_hydra_config=True)
        settle_runtime(cfg, number, self.is_sweep)
        return cfg

    def _check_choice(self, override: Override) -> None:
        group = override.key_or_group
        options = self._options(group)
        if not options or override.is_delete():
            return
        value = override.value()
        for choice in override.sweep_iterator() if override.is_sweep_override() else [value]:
            for name in choice if isinstance(choice, list) else [choice]:
                if str(name) not in options:
                    if str(name).startswith("submitit"):
                        raise UserError(
                            f"{group}={name}: is not installed; pip install -e '.[slurm]' -c constraints.txt"
                        )
                    near = ", ".join(nearest(name, options))
                    raise UserError(f"{group}={show(name)}: there is no such {group}; choose one of: {near}")

    def _check_key(self, override: Override, base: DictConfig, fields: Fields) -> None:
        key = override.key_or_group
        fields = fields.with_entry_of(key)
        if override.is_hydra_override():
            inner = key.removeprefix("hydra.")
            is_free = inner.startswith(tuple(f"{section}." for section in FREE_HYDRA_SECTIONS))
            if not is_free and not has_key(base.hydra, inner):
                known = {name: None for name in _flatten(base.hydra, "hydra.")}
                raise unknown_key(key, Fields(known))
        elif not fields.knows(key):
            section, _, name = key.rpartition(".")
            if name in self.spec.code_args.get(section, ()):
                raise UserError(f"{key}: is passed by the program and cannot be configured")
            raise unknown_key(key, fields, tuple(g for g in self.loader.list_groups("") if g != "hydra"))
        elif override.is_delete():
            raise UserError(f"~{key}: a key cannot be taken away; give it another value, or null")
        elif override.type == OverrideType.CHANGE and (not has_key(base, key) or key in fields.tables):
            self.rewritten[override.input_line] = f"++{override.input_line}"


def _values(override: Override) -> Iterator[str]:
    """Write the override once for each value it sweeps over; an interval stands with its start."""
    key = override.get_key_element()
    if override.is_discrete_sweep():
        yield from (f"{key}={text}" for text in override.sweep_string_iterator())
    elif override.is_interval_sweep():
        yield f"{key}={override.value().start}"
    else:
        yield override.input_line


def combinations(overrides: list[Override], every: bool = False) -> Iterator[tuple[str, ...]]:
    """Yield the overrides of each job of a sweep, in Hydra's order.

    Of more than `MAX_COMPOSED` jobs only those that leave the first one in a single place, unless `every`. Raises
    `UserError` beyond `MAX_JOBS`.
    """
    pools, total = [], 1
    for override in overrides:
        pools.append(list(itertools.islice(_values(override), MAX_JOBS + 1)))
        total *= len(pools[-1])
        if total > MAX_JOBS:
            raise UserError(f"{override.input_line}: makes a sweep of more than {MAX_JOBS:,} jobs")
    if every or total <= MAX_COMPOSED:
        yield from itertools.product(*pools)
        return
    first = tuple(pool[0] for pool in pools)
    yield first
    for place, pool in enumerate(pools):
        yield from (first[:place] + (text,) + first[place + 1 :] for text in pool[1:])


def is_grid(config: DictConfig) -> bool:
    """Tell whether the sweeper runs every combination of listed values, instead of choosing as it goes."""
    return str(config.hydra.sweeper._target_).endswith((".PointSweeper", ".BasicSweeper"))


def quote_braces(text: str) -> str:
    """Quote a glob such as `data.shards=DIR/{000..127}.tar`, whose braces Hydra would take for a dictionary's."""
    key, _, value = text.partition("=")
    is_glob = key.endswith("shards") and "{" in value and value[0] not in "{[\"'" and "'" not in value
    return f"{key}='{value}'" if is_glob else text


def has_key(cfg: DictConfig, key: str) -> bool:
    """Tell whether a dotted key stands in a config, whatever its value."""
    for name in key.split("."):
        if not isinstance(cfg, DictConfig) or name not in list(cfg.keys()):
            return False
        cfg = cfg._get_node(name)
    return True


def _flatten(node: DictConfig, prefix: str) -> Iterator[str]:
    for name in node:
        child = node._get_node(name)
        yield f"{prefix}{name}"
        if isinstance(child, DictConfig) and not (child._is_missing() or child._is_none()):
            yield from _flatten(child, f"{prefix}{name}.")


def written_in(cfg: DictConfig, key: str) -> str:
    """Name the YAML file that sets a key, among those the config was composed from; "" when none is found."""
    name = re.compile(rf"^\s*{re.escape(key.rpartition('.')[2])}\s*:", re.MULTILINE)
    stems = [f"{group}/{choice}" for group, choice in cfg.hydra.runtime.choices.items()]
    for source in reversed([s.path for s in cfg.hydra.runtime.config_sources if s.schema == "file"]):
        for path in (Path(source, f"{stem}.yaml") for stem in [*stems, cfg.hydra.job.config_name]):
            if path.is_file() and name.search(path.read_text(encoding="utf-8")):
                return str(path)
    return ""


def settle_runtime(cfg: DictConfig, number: int, is_sweep: bool = False) -> str:
    """Fill in what Hydra knows only when a job starts, so that `${hydra:...}` resolves; returns the job's folder."""
    with read_write(cfg.hydra), read_write(cfg.hydra.runtime), open_dict(cfg.hydra):
        cfg.hydra.job.num = number
        cfg.hydra.job.id = str(number)
        cfg.hydra.runtime.output_dir = "."
        HydraConfig.instance().set_config(cfg)
        folder = str(cfg.hydra.run.dir)
        if is_sweep or cfg.hydra.mode == RunMode.MULTIRUN:
            folder = f"{cfg.hydra.sweep.dir}/{cfg.hydra.sweep.subdir}"
        cfg.hydra.runtime.output_dir = folder
        HydraConfig.instance().set_config(cfg)
    return folder
