"""Is this config right, and if not, which key is wrong?

Every section is bound to a callable, by its own `_target_` or by the command's `Spec`, and the callable's signature
(read by `schema.py`, without importing it) says which keys there are and what they may hold. So a misspelt key, a word
where a number belongs or a forgotten value ends in one line before torch is imported. Secrets are never written, and
`_target_` reaches only a few packages.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from audiossl.errors import UserError
from audiossl.rules import check_pretraining, check_value, show
from audiossl.schema import Type, parse_type, signature, union

TARGETS = ("audiossl.", "lightning.pytorch.", "torch.optim.", "timm.")  # what a config may build
HYDRA_TARGETS = ("hydra.", "hydra_plugins.", "audiossl.")  # what Hydra may build: launchers, sweepers, callbacks
SECRET_KEY = re.compile(
    r"(^|_)(token|password|passwd|passphrase|secret|credentials?|(api|access|private|auth)_?key)$", re.I
)
SECRET_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
MASK = "***"


@dataclass(frozen=True)
class Spec:
    """Say what the config of one command holds.

    Parameters
    ----------
    sections: dotted section -> the callable that takes it ("audiossl.shards.ShardData"), or a table key -> annotation
        ("int | None"), or None where the section names its own `_target_`. "" is the top level, and needs a table.
    code_args: section -> parameters that the code passes, so that the config must not.
    types: dotted key -> annotation, where the config allows another type than the callable ("| None": one more).
    checks: functions of all values by dotted key, raising `UserError`.
    """

    sections: Mapping[str, str | Mapping[str, str] | None]
    code_args: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    checks: tuple[Callable[[Mapping[str, object]], None], ...] = (check_pretraining,)


@dataclass(frozen=True)
class Fields:
    """Hold every dotted key a config may have with its type, those it must have, and the sections open to more."""

    types: dict[str, Type]
    required: frozenset[str] = frozenset()
    open: frozenset[str] = frozenset()

    def knows(self, key: str) -> bool:
        """Tell whether a key may be given: it is a field, a section, or lies inside a field that takes a mapping."""
        if key in self.types or any(other.startswith(key + ".") for other in self.types):
            return True
        parent, _, name = key.rpartition(".")
        if parent in self.open:
            siblings = [k.rpartition(".")[2] for k in self.types if k.rpartition(".")[0] == parent]
            return not get_close_matches(name, siblings, 1, 0.8)
        return (
            parent in self.types
            and self.types[parent].accepts({})
            or (parent not in self.types and self._inside(parent))
        )

    def _inside(self, key: str) -> bool:
        parent = key.rpartition(".")[0]
        return bool(parent) and (parent in self.types and self.types[parent].accepts({}) or self._inside(parent))


def read_fields(cfg: DictConfig, spec: Spec) -> Fields:
    """Collect the fields of every section of a composed config; raises `UserError` for a `_target_` out of bounds."""
    types: dict[str, Type] = {}
    required: set[str] = set()
    is_open: set[str] = set()
    for section, bound in list(spec.sections.items()) + [(key, None) for key, _ in _targets(cfg)]:
        dot = f"{section}." if section else ""
        if bound is None:
            bound = OmegaConf.select(cfg, f"{dot}_target_", throw_on_missing=False)
            if not isinstance(bound, str):
                types.setdefault(section, Type("any"))
                continue
            check_target(f"{dot}_target_", bound)
            types[f"{dot}_target_"] = Type("str")
        if isinstance(bound, str):
            found = signature(bound)
            names, needed = found.types, found.required
            is_open |= {section} if found.is_open else set()
        else:
            names = {name: parse_type(text) for name, text in bound.items()}
            needed = frozenset(names)
        by_code = spec.code_args.get(section, ())
        types.update({dot + name: type_ for name, type_ in names.items() if name not in by_code})
        required |= {dot + name for name in needed if name not in by_code}
    for key, text in spec.types.items():
        added = parse_type(text.removeprefix("|").strip())
        types[key] = union([types[key], added]) if text.startswith("|") and key in types else added
    return Fields(types, frozenset(required), frozenset(is_open))


def _targets(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Walk to every mapping that names a `_target_`: (dotted key, target)."""
    for name in node:
        if prefix + str(name) == "hydra" or OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        child = node[name]
        if isinstance(child, DictConfig):
            if child.get("_target_") is not None:
                yield f"{prefix}{name}", str(child._target_)
            yield from _targets(child, f"{prefix}{name}.")


def check_target(key: str, target: str, allowed: tuple[str, ...] = TARGETS) -> None:
    """Refuse a `_target_` outside the packages that a config may build from; beyond our own, only classes."""
    last = target.rpartition(".")[2]
    is_private = any(part.startswith("_") for part in target.split(".")) and allowed is TARGETS
    is_class = target.startswith("audiossl.") or last[:1].isupper()
    if not target.startswith(allowed) or is_private or not is_class:
        raise UserError(
            f"{key}={target}: is not allowed; a config may build classes of {', '.join(a[:-1] for a in allowed)}"
        )


class UnknownKeyError(UserError):
    """Report a key that does not exist; `key` is its dotted name."""

    def __init__(self, key: str, guess: str | None):
        super().__init__(f"{key}: no such key." + (f" Did you mean {guess}?" if guess else " See --cfg job."))
        self.key = key


def unknown_key(key: str, fields: Fields, groups: tuple[str, ...] = ()) -> UnknownKeyError:
    """Word the error for a key that does not exist, with the nearest that does: first the section, then the name."""
    section, _, name = key.rpartition(".")
    sections = {k.rpartition(".")[0] for k in fields.types} - {""}
    known = sorted({*fields.types, *sections, *groups})
    if section and section not in sections:
        near = get_close_matches(section, sorted(sections), 1, 0.7)
        section = near[0] if near else section
        inside = [k for k in known if k.rpartition(".")[0] == section]
        match = get_close_matches(f"{section}.{name}", inside, 1, 0.75) or near
    else:
        match = get_close_matches(key, [k for k in known if k.rpartition(".")[0] == section], 1, 0.75)
    by_name = {k.rpartition(".")[2]: k for k in known}
    match = match or [by_name[n] for n in get_close_matches(name, by_name, 1, 0.75)]
    match = match or get_close_matches(key, known, 1, 0.6)
    return UnknownKeyError(key, match[0] if match else None)


def check(cfg: DictConfig, spec: Spec) -> None:
    """Check a composed config: keys, required values, types, values, and what several keys decide together.

    Raises `UserError` for the first fault, in one line that names the key. The `hydra` node is Hydra's, but for the
    `_target_`s in it.
    """
    for key, target in _targets(cfg.hydra, "hydra.") if "hydra" in cfg else ():
        check_target(f"{key}._target_", target, HYDRA_TARGETS)
    fields = read_fields(cfg, spec)
    values = dict(_leaves(cfg, fields))
    for key, value in values.items():
        if not fields.knows(key):
            section, _, name = key.rpartition(".")
            if name in spec.code_args.get(section, ()):
                raise UserError(f"{key}: is passed by the program and cannot be configured")
            raise unknown_key(key, fields)
        type_ = fields.types.get(key)
        if type_ and not type_.accepts(value):
            raise UserError(f"{key}={show(value)}: must be {type_.describe(value)}{_hint(type_, value)}")
        check_value(key, value)
    for section in spec.sections:
        if section and not isinstance(OmegaConf.select(cfg, section), DictConfig):
            raise UserError(f"{section}: is missing; the config needs this section")
    for key in sorted(fields.required - values.keys()):
        raise UserError(f"{key}: is missing; set it in the YAML, or with {key}=VALUE")
    for function in spec.checks:
        function(values)


def _hint(type_: Type, value: object) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"; write {int(value)}"
    if type(value) in (int, float, bool) and "text" in type_.describe():
        return "; put it into quotes inside quotes: \"'...'\""
    if value == "":
        return "; nothing was given" + (", null stands for none" if type_.accepts(None) else "")
    return ""


def _leaves(node: DictConfig, fields: Fields, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk to every resolved value by its dotted key; a field that takes a mapping is a value as a whole."""
    for name in node:
        key = f"{prefix}{name}"
        if key == "hydra":
            continue
        try:
            if OmegaConf.is_missing(node, name):
                raise UserError(f"{key}: is missing; give {key}=VALUE")
            value = node[name]
            if isinstance(value, DictConfig) and not (key in fields.types and key + "._target_" not in fields.types):
                yield from _leaves(value, fields, key + ".") if len(value) else [(key, {})]
                continue
            if SECRET_KEY.search(str(name)) and isinstance(value, str) and not OmegaConf.is_interpolation(node, name):
                raise UserError(f"{key}: a secret must not stand in a config; write {key}='${{oc.env:VARIABLE}}'")
            is_tree = isinstance(value, DictConfig | ListConfig)
            yield key, OmegaConf.to_container(value, resolve=True) if is_tree else value
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: {str(error).splitlines()[0]}") from error


def mask(tree: Any, name: str = "") -> Any:
    """Replace secrets by ***: values of keys that look like one, passwords in URLs, values of secret variables."""
    if isinstance(tree, dict):
        return {key: mask(value, str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [mask(item, name) for item in tree]
    if not isinstance(tree, str):
        return tree
    if SECRET_KEY.search(name) and tree:
        return MASK
    for variable, secret in os.environ.items():
        if len(secret) >= 8 and SECRET_KEY.search(variable):
            tree = tree.replace(secret, MASK)
    return SECRET_URL.sub(MASK, tree)


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a config into plain dicts, lists and scalars, with secrets masked: the form that is written down."""
    tree = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tree, dict)
    return mask({key: value for key, value in tree.items() if key != "hydra"})


def instantiate(section: DictConfig | Mapping[str, Any], target: str | None = None, /, **code_args: Any) -> Any:
    """Build the object of a section: import its `_target_` (or `target`) and call it with the section's keys.

    Mappings inside that have a `_target_` are built first. `code_args` come on top. Raises `UserError` when the target
    is not allowed: the object must be defined in the package that its name begins with.
    """
    tree = OmegaConf.to_container(section, resolve=True) if isinstance(section, DictConfig) else dict(section)
    target = tree.pop("_target_", None) or target
    check_target("_target_", str(target))
    arguments = {k: instantiate(v) if isinstance(v, dict) and "_target_" in v else v for k, v in tree.items()}
    module, _, name = target.rpartition(".")
    function = getattr(importlib.import_module(module), name, None)
    home = getattr(function, "__module__", "")
    if not (inspect.isclass(function) or inspect.isfunction(function)) or home.split(".")[0] != target.split(".")[0]:
        raise UserError(f"_target_={target}: is not a class or function of {target.split('.')[0]}")
    return function(**arguments, **code_args)
