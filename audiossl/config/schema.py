"""What does a callable accept, without importing it?

The config is checked before torch is imported, so a class's parameters and their types are read from its source file
with `ast`. The signature is the schema: there is no second list of keys to keep in step. Imports and type aliases are
followed from file to file, so `lightning.pytorch.Trainer` and its `_PRECISION_INPUT` resolve too.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

from audiossl.errors import UserError

LARGEST = 2**53  # beyond it a count is a slip, and a float is no longer exact
SCALARS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}


@dataclass(frozen=True)
class Type:
    """Say what a value may be: `kind` is a scalar's name, any, mapping, list (of members[0]), tuple, literal, union."""

    kind: str
    members: tuple = ()

    def accepts(self, value: object) -> bool:
        """Tell whether a plain YAML value fits; whole numbers pass as floats, nothing else is converted."""
        match self.kind:
            case "any":
                return True
            case "union":
                return any(member.accepts(value) for member in self.members)
            case "literal":
                return any(type(value) is type(choice) and value == choice for choice in self.members)
            case "list":
                return isinstance(value, list | tuple) and all(self.members[0].accepts(item) for item in value)
            case "tuple":
                fits = isinstance(value, list | tuple) and len(value) == len(self.members)
                return fits and all(m.accepts(item) for m, item in zip(self.members, value, strict=True))
            case "mapping":
                return isinstance(value, dict)
            case "int":
                return type(value) is int and abs(value) <= LARGEST
            case "float":
                return type(value) in (int, float) and math.isfinite(value)
            case "bool":
                return type(value) is bool
            case "str":
                return isinstance(value, str) and value != ""
        return value is None

    def describe(self, value: object = None) -> str:
        """Word the rule; the choices of a literal come nearest to `value` first."""
        if self.kind == "literal":
            return "one of " + ", ".join(map(str, nearest(value, dict.fromkeys(map(str, self.members)))))
        if self.kind == "list":
            return "a list, each item " + self.members[0].describe(value)
        if self.kind == "tuple":
            return f"a list of {len(self.members)}: " + ", ".join(m.describe() for m in self.members)
        if self.kind == "union":
            members = [m for m in self.members if m.kind != "int" or Type("float") not in self.members]
            return " or ".join(dict.fromkeys(member.describe(value) for member in members))
        return SCALARS.get(self.kind, {"mapping": "a mapping"}.get(self.kind, "anything"))


ANY = Type("any")


def union(members: list[Type]) -> Type:
    """Join types; literals melt into one so that their choices are listed together."""
    flat = [m for member in members for m in (member.members if member.kind == "union" else (member,))]
    choices = tuple(choice for member in flat if member.kind == "literal" for choice in member.members)
    rest = list(dict.fromkeys(member for member in flat if member.kind != "literal"))
    flat = ([Type("literal", choices)] if choices else []) + rest
    return flat[0] if len(flat) == 1 else ANY if ANY in flat else Type("union", tuple(flat))


def nearest(word: object, words) -> list[str]:
    """Sort `words` by likeness to `word`, most alike first."""
    return sorted(words, key=lambda other: (-SequenceMatcher(None, str(word), other).ratio(), other))


@dataclass(frozen=True)
class Signature:
    """Hold the keyword parameters of a callable: types by name, which must be given, and whether it has **kwargs."""

    types: dict[str, Type]
    required: frozenset[str]
    is_open: bool = False


@dataclass
class Module:
    """Hold one parsed source file: its top-level names, and the modules it imports everything from."""

    name: str
    is_package: bool
    names: dict[str, ast.AST] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    def absolute(self, node: ast.ImportFrom) -> str:
        """Name the module of a possibly relative import."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - node.level + self.is_package]
        return ".".join(parts + ([node.module] if node.module else []))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for block in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                yield from _statements(getattr(node, block, []))


def _source_file(name: str) -> Path | None:
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)  # a top-level name: finds the file, imports nothing
    if spec is None or (spec.submodule_search_locations is None and rest):
        return None
    if spec.submodule_search_locations is None:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations:
        path = Path(folder, *rest)
        for candidate in (path / "__init__.py", path.with_name(path.name + ".py")):
            if candidate.is_file():
                return candidate
    return None


@cache
def _module(name: str) -> Module | None:
    path = _source_file(name)
    if path is None:
        return None
    module = Module(name, path.name == "__init__.py")
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            module.names[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and node.value is not None:
                    module.names[target.id] = node.value
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*":
                    module.stars.append(module.absolute(node))
                else:
                    module.names[alias.asname or alias.name] = node
    return module


def _find(module_name: str, name: str, depth: int = 0) -> tuple[Module, ast.AST] | None:
    """Follow imports to the node that defines `name`, and the module it stands in."""
    module = _module(module_name)
    if module is None or depth > 12:
        return None
    node = module.names.get(name)
    if isinstance(node, ast.ImportFrom):
        original = next(a.name for a in node.names if (a.asname or a.name) == name)
        return _find(module.absolute(node), original, depth + 1)
    if isinstance(node, ast.Name) and node.id != name:
        return _find(module_name, node.id, depth + 1)
    if node is not None:
        return module, node
    return next((hit for star in module.stars if (hit := _find(star, name, depth + 1))), None)


def parse_type(annotation: str | ast.AST | None, module: str = "", depth: int = 0) -> Type:
    """Reduce an annotation to a `Type`; what cannot be told without importing accepts anything."""
    if isinstance(annotation, str):
        annotation = ast.parse(annotation, mode="eval").body
    match annotation:
        case ast.Constant(value=None):
            return Type("None")
        case ast.Constant(value=str(text)):
            return parse_type(text, module, depth)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return union([parse_type(left, module, depth), parse_type(right, module, depth)])
        case ast.Subscript(value=value, slice=index):
            return _parse_subscript(ast.unparse(value).split(".")[-1], index, module, depth)
        case ast.Name(id=name) if name in SCALARS:
            return Type(name)
        case ast.Name(id="Path" | "PathLike"):
            return Type("str")
        case ast.Name(id="dict" | "Mapping" | "Callable" | "timedelta"):
            return Type("mapping")
        case ast.Name(id="list" | "tuple"):
            return Type("list", (ANY,))
        case ast.Name(id=name) if module and depth < 8:
            found = _find(module, name)
            if found and isinstance(found[1], ast.ClassDef):
                return Type("mapping")  # an object: the config can only give it as {_target_: ...}
            return parse_type(found[1], found[0].name, depth + 1) if found else ANY
    return ANY


def _parse_subscript(name: str, index: ast.AST, module: str, depth: int) -> Type:
    items = list(index.elts) if isinstance(index, ast.Tuple) else [index]
    if name == "Literal":
        choices = [parse_type(i, module, depth) for i in items if not isinstance(i, ast.Constant)]
        return union([Type("literal", tuple(i.value for i in items if isinstance(i, ast.Constant))), *choices])
    if name in ("Optional", "Union"):
        members = [parse_type(item, module, depth) for item in items]
        return union(members + ([Type("None")] if name == "Optional" else []))
    if name in ("list", "tuple", "Sequence", "Iterable", "List", "Tuple"):
        types = [parse_type(i, module, depth) for i in items if not (isinstance(i, ast.Constant) and i.value is ...)]
        return (
            Type("tuple", tuple(types))
            if len(types) == len(items) and name in ("tuple", "Tuple")
            else Type("list", (union(types),))
        )
    if name in ("dict", "Mapping") and module.startswith("audiossl.") and isinstance(items[-1], ast.Name):
        found = _find(module, items[-1].id)
        if found and isinstance(found[1], ast.ClassDef):
            return Type("mapping", (f"{found[0].name}.{found[1].name}",))  # of entries that this class describes
    return Type("mapping") if name in ("dict", "Dict", "Mapping", "Callable", "type") else ANY


def _of_function(node: ast.FunctionDef, module: str, is_method: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    is_given = [False] * (len(positional) - len(arguments.defaults)) + [True] * len(arguments.defaults)
    pairs = list(zip(positional, is_given, strict=True))[is_method:]
    pairs += [(a, d is not None) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    types = {a.arg: parse_type(a.annotation, module) for a, _ in pairs}
    return Signature(types, frozenset(a.arg for a, has in pairs if not has), arguments.kwarg is not None)


def _of_class(node: ast.ClassDef, module: Module) -> Signature:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _of_function(item, module.name, is_method=True)
    types, required = {}, set()
    for base in node.bases:
        found = _find(module.name, ast.unparse(base)) if isinstance(base, ast.Name) else None
        if found and isinstance(found[1], ast.ClassDef):
            inherited = _of_class(found[1], found[0])
            types, required = {**inherited.types, **types}, required | inherited.required
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation):
                types[item.target.id] = parse_type(item.annotation, module.name)
                required.discard(item.target.id)
                required |= {item.target.id} if item.value is None else set()
    return Signature(types, frozenset(required))


@cache
def signature(target: str) -> Signature:
    """Read the keyword parameters of the class or function at a dotted path.

    Raises `UserError` when there is none. Imports are followed, and must end in the package that the name begins with.
    """
    module_name, _, name = target.rpartition(".")
    found = _find(module_name, name) if module_name and name.isidentifier() else None
    if found is None or not isinstance(found[1], ast.ClassDef | ast.FunctionDef):
        raise UserError(f"_target_={target}: there is no such class or function")
    module, node = found
    if module.name.split(".")[0] != target.split(".")[0]:
        raise UserError(f"_target_={target}: leads out of its package, to {module.name}.{name}")
    return _of_class(node, module) if isinstance(node, ast.ClassDef) else _of_function(node, module.name, False)
