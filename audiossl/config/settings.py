"""Is this config right, and if not, which key is wrong?

Every section is bound to a callable, by its own `_target_` or by the command's `Spec`, and the callable's signature
(read by `schema.py`, without importing it) says which keys there are and what they may hold. So a misspelt key, a word
where a number belongs or a forgotten value ends in one line before torch is imported. `_target_` reaches only
modules and dataclasses of a few packages.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from audiossl.config.fields import HYDRA_TARGETS, Fields, Spec, check_target, read_fields, targets_in, unknown_key
from audiossl.config.rules import check_value, show
from audiossl.config.schema import Type
from audiossl.config.secrets import SECRET_KEY
from audiossl.errors import UserError


def check(cfg: DictConfig, spec: Spec) -> None:
    """Check a composed config: keys, required values, types, values, and what several keys decide together.

    Raises `UserError` for the first fault, in one line that names the key. The `hydra` node is Hydra's, but for the
    `_target_`s in it.
    """
    for key, target in targets_in(cfg.hydra, "hydra.") if "hydra" in cfg else ():
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
    filled = {table for table in fields.tables if any(key.startswith(f"{table}.") for key in values)}
    filled |= {key for key in fields.required if f"{key}._target_" in values}
    for key in sorted(fields.required - values.keys() - filled):
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
            if isinstance(value, DictConfig) and fields.is_section(key):
                yield from _leaves(value, fields, key + ".") if len(value) else [(key, {})]
                continue
            if SECRET_KEY.search(str(name)) and isinstance(value, str) and not OmegaConf.is_interpolation(node, name):
                raise UserError(f"{key}: a secret must not stand in a config; write {key}='${{oc.env:VARIABLE}}'")
            is_tree = isinstance(value, DictConfig | ListConfig)
            yield key, OmegaConf.to_container(value, resolve=True) if is_tree else value
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: {str(error).splitlines()[0]}") from error


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a config into plain dicts, lists and scalars: what runs, secrets and all.

    Whoever writes any of it down masks it (`secrets.mask`).
    """
    tree = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items() if key != "hydra"}


def instantiate(section: DictConfig | Mapping[str, Any], target: str | None = None, /, **code_args: Any) -> Any:
    """Build the object of a section: import its `_target_` (or `target`) and call it with the section's keys.

    Mappings inside that have a `_target_` are built first. `code_args` come on top. Raises `UserError` when any target
    in it, however deep, is not one of `find_target`'s, and then nothing is built: the section may be of a stranger's
    checkpoint.
    """
    tree = OmegaConf.to_container(section, resolve=True) if isinstance(section, DictConfig) else dict(section)
    return _build({"_target_": target} | tree, code_args, {name: find_target(name) for name in _targets(tree, target)})


def _targets(tree: Any, default: str | None = None) -> Iterator[str]:
    """Walk to every target in a tree of mappings and lists."""
    if isinstance(tree, Mapping):
        if "_target_" in tree or default:
            yield str(tree.get("_target_") or default)
        for value in tree.values():
            yield from _targets(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _targets(value)


def _build(tree: Mapping[str, Any], code_args: Mapping[str, Any], classes: Mapping[str, type]) -> Any:
    arguments = {
        key: _build(value, {}, classes) if isinstance(value, dict) and "_target_" in value else value
        for key, value in tree.items()
        if key != "_target_"
    }
    return classes[str(tree["_target_"])](**arguments, **code_args)


def find_target(target: str) -> type:
    """Import the class at a dotted path, of an allowed package, defined there, and a module of torch or a dataclass.

    A class of another kind, or a function, might do anything when it is called with a stranger's arguments.
    """
    from torch import nn

    check_target("_target_", target)
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    home = getattr(found, "__module__", "").split(".")[0]
    if not inspect.isclass(found) or home != target.split(".")[0]:
        raise UserError(f"_target_={target}: is not a class of {target.split('.')[0]}")
    if not (issubclass(found, nn.Module) or dataclasses.is_dataclass(found)):
        raise UserError(f"_target_={target}: is neither a module of torch nor a dataclass, so no config may build it")
    return found
