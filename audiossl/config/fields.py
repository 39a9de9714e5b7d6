"""Which keys may a config have, and which must it have?

A section's keys are the parameters of the callable it is bound to, as `schema.py` reads them. A parameter annotated
`dict[str, SomeClass]` is a table: its keys are the user's, such as `data.sources.speech`, and every entry has the
fields of the class. A key that does not exist is answered with the nearest that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from omegaconf import DictConfig, OmegaConf

from audiossl.config.rules import check_pretraining
from audiossl.config.schema import Signature, Type, parse_type, signature, union
from audiossl.errors import UserError

TARGETS = ("audiossl.", "lightning.pytorch.", "torch.optim.", "timm.")  # what a config may build
HYDRA_TARGETS = ("hydra.", "hydra_plugins.", "audiossl.")  # what Hydra may build: launchers, sweepers, callbacks


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
    tables: Mapping[str, Signature] = field(default_factory=dict)

    def with_entry_of(self, key: str) -> Fields:
        """Add the fields of the table's entry that `key` is or lies in, if it does."""
        entry = entry_of(key, self.tables)
        if entry is None or entry in self.types:
            return self
        types, required = entry_fields(entry, self.tables)
        return Fields(self.types | types, self.required | required, self.open, self.tables)

    def is_section(self, key: str) -> bool:
        """Tell whether the mapping at `key` is checked key by key, and not as one value."""
        inside = key in self.tables or key.rpartition(".")[0] in self.tables
        return inside or key not in self.types or f"{key}._target_" in self.types

    def knows(self, key: str) -> bool:
        """Tell whether a key may be given: it is a field, a section, or lies inside a field that takes a mapping."""
        if key in self.types or any(other.startswith(key + ".") for other in self.types):
            return True
        if entry_of(key, self.tables):
            return False
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
    for section, bound in list(spec.sections.items()) + [(key, None) for key, _ in targets_in(cfg)]:
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
    fields = Fields(types, frozenset(required), frozenset(is_open), find_tables(types))
    for table in fields.tables:
        node = OmegaConf.select(cfg, table, throw_on_missing=False)
        for name in node if isinstance(node, DictConfig) else ():
            fields = fields.with_entry_of(f"{table}.{name}")
    return fields


def targets_in(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Walk to every mapping that names a `_target_`: (dotted key, target)."""
    for name in node:
        if prefix + str(name) == "hydra" or OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        child = node[name]
        if isinstance(child, DictConfig):
            if child.get("_target_") is not None:
                yield f"{prefix}{name}", str(child._target_)
            yield from targets_in(child, f"{prefix}{name}.")


def check_target(key: str, target: str, allowed: tuple[str, ...] = TARGETS) -> None:
    """Refuse a `_target_` outside the packages that a config may build from, and what is no class by its name."""
    last = target.rpartition(".")[2]
    is_private = any(part.startswith("_") for part in target.split(".")) and allowed is TARGETS
    is_class = last[:1].isupper()
    if not target.startswith(allowed) or is_private or not is_class:
        own = "; one of your own goes into audiossl/methods/ and conf/model/ (README, Adding a method)"
        raise UserError(
            f"{key}={target}: is not allowed; a config may build classes of {', '.join(a[:-1] for a in allowed)}"
            f"{own if key == 'model._target_' else ''}"
        )


class UnknownKeyError(UserError):
    """Report a key that does not exist; `key` is its dotted name."""

    def __init__(self, key: str, guess: str | None):
        super().__init__(f"{key}: no such key." + (f" Did you mean {guess}?" if guess else " See --cfg job."))
        self.key = key


def unknown_key(key: str, fields: Fields, groups: tuple[str, ...] = ()) -> UnknownKeyError:
    """Word the error for a key that does not exist, with the nearest that does: first the section, then the name."""
    parents = [key[:dot] for dot, letter in enumerate(key) if letter == "."]
    for table in fields.tables:
        if table not in parents and get_close_matches(table, parents, 1, 0.85):
            return UnknownKeyError(key, table)
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


def find_tables(types: dict[str, Type]) -> dict[str, Signature]:
    """Find the tables among dotted keys with their types, and what an entry of each holds."""
    tables = {}
    for key, type_ in types.items():
        for member in type_.members if type_.kind == "union" else (type_,):
            if member.kind == "mapping" and member.members:
                tables[key] = signature(member.members[0])
    return tables


def entry_of(key: str, tables: Iterable[str]) -> str | None:
    """Name the entry that a dotted key is or lies in: "data.sources.speech.shards" -> "data.sources.speech"."""
    table = next((table for table in tables if key.startswith(f"{table}.")), None)
    return None if table is None else ".".join([table, key.removeprefix(f"{table}.").split(".")[0]])


def entry_fields(entry: str, tables: dict[str, Signature]) -> tuple[dict[str, Type], set[str]]:
    """List the fields of an entry, itself among them, by dotted key with their types, and those it must have."""
    found = tables[entry.rpartition(".")[0]]
    types = {entry: Type("mapping")} | {f"{entry}.{name}": type_ for name, type_ in found.types.items()}
    return types, {f"{entry}.{name}" for name in found.required}
