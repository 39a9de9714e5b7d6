"""The budget that keeps this a house: sizes of files and functions, and rules that a reader relies on."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

# a signature is not counted: the constructors that YAML fills have a line a setting, 30 of them in `ShardData`
# schema.py (270) reads every form of annotation in one place; splitting it would part the grammar from its words
FILE_LINES, FUNCTION_LINES, CONFIG_DEPTH = 270, 50, 3
# what a reader looks for by name lies flat, the rest in a room
FLAT_MODULES, ROOM_MODULES = 32, 16
SOURCES = sorted([*(ROOT / "audiossl").rglob("*.py"), *ROOT.glob("*.py")])


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_file_outgrows_its_room():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := p.read_text().count("\n")) > FILE_LINES}
    assert not long, f"more than {FILE_LINES} lines: {long}"


def test_no_function_outgrows_a_page():
    long = {
        f"{p.relative_to(ROOT)}:{f.name}": n
        for p in SOURCES
        for f in functions(p)
        if (n := f.end_lineno - f.body[0].lineno + 1) > FUNCTION_LINES
    }
    assert not long, f"more than {FUNCTION_LINES} lines: {long}"


def test_no_room_is_so_full_that_nothing_is_found():
    rooms = Counter(path.parent.relative_to(ROOT) for path in SOURCES if not path.stem.startswith("__"))
    allowed = {Path("audiossl"): FLAT_MODULES}
    full = {str(room): count for room, count in rooms.items() if count > allowed.get(room, ROOM_MODULES)}
    assert not full, f"group them: {full}"
    assert all(len(room.parts) <= 2 for room in rooms), "a package in a package is a cupboard in a room"


def test_every_room_and_what_lies_in_it_is_installed():
    """setuptools passes over a folder without `__init__.py`, and over data that `package-data` leaves out."""
    rooms = {path.parent for path in SOURCES} - {ROOT}
    assert all((room / "__init__.py").exists() for room in rooms)
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {path for name, globs in data.items() for g in globs for path in ROOT.joinpath(*name.split(".")).glob(g)}
    assert shipped == {*(ROOT / "audiossl").rglob("*.yaml")}


def test_every_module_opens_with_what_it_is_for():
    silent = [
        str(p.relative_to(ROOT))
        for p in SOURCES
        if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent


def depth(value) -> int:
    return 1 + max((depth(v) for v in value.values()), default=0) if isinstance(value, dict) else 0


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_configs_stay_flat(path):
    value = {k: v for k, v in (yaml.safe_load(path.read_text()) or {}).items() if k not in ("defaults", "hydra")}
    assert depth(value) <= CONFIG_DEPTH


def test_methods_know_neither_lightning_nor_hydra():
    for path in (ROOT / "audiossl" / "methods").glob("*.py"):
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert not imported & {"lightning", "pytorch_lightning", "hydra", "omegaconf"}, path


@pytest.mark.faults("S10")
def test_the_lightning_releases_that_were_malware_are_excluded():
    assert '"lightning>=2.6.6,<3"' in (ROOT / "pyproject.toml").read_text()
    assert "lightning==2.6.6\n" in (ROOT / "constraints.txt").read_text()


def test_ruff_finds_nothing():
    command = [sys.executable, "-m", "ruff"]
    for what in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(command + what, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
