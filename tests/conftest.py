"""Shared fixtures: the golden cases of the published code, and real audio."""

import logging
import os
import re
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # two test processes on two cores, a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("AUDIOSSL_SHARED", ROOT.parent / "shared"))  # the full golden set, where there is one


def golden_cases(pattern: str) -> list[Path]:
    """List the case folders matching `pattern`: those committed, and all of the full set where it is present."""
    found = {}
    for folder in (ROOT / "tests" / "golden", SHARED / "golden"):
        for case in sorted(folder.glob(pattern)):
            found.setdefault(case.name, case)
    assert found, f"no golden case matches {pattern}"
    return list(found.values())


def pytest_addoption(parser):
    parser.addoption("--faults", metavar="IDS", help="tests of these faults only: R1,P2 (docs/faults.md)")


def faults_of(item: pytest.Item) -> list[str]:
    """List the ids of the faults that a test is of."""
    return [name for marker in item.iter_markers("faults") for name in marker.args]


def pytest_collection_modifyitems(config, items):
    """Put files that run whole trainings first: each goes to one worker, and a long one at the end keeps one idle."""
    wanted = {name.strip() for name in (config.getoption("--faults") or "").split(",") if name.strip()}
    for item in items:
        item.user_properties.append(("faults", " ".join(faults_of(item))))
    if wanted:
        left_out = [item for item in items if not wanted & set(faults_of(item))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if wanted & set(faults_of(item))]
    runs = re.compile(r"^from (commands|finetunes|methods|processes|toy_\w+) import", re.MULTILINE)
    is_long = {path: bool(runs.search(path.read_text())) for path in {item.path for item in items}}
    items.sort(key=lambda item: not is_long[item.path])


def pytest_report_teststatus(report):
    """Say with -v of which faults a test is."""
    ids = dict(getattr(report, "user_properties", ())).get("faults")  # a file that cannot be collected has none
    if ids and report.when == "call" and report.passed:
        return "passed", ".", f"PASSED ({ids})"
    return None


def pytest_collection_finish(session):
    """List the tests of each fault: `pytest -m faults --collect-only`."""
    if not session.config.option.collectonly or "faults" not in session.config.option.markexpr:
        return
    found: dict[str, dict[str, None]] = {}
    for item in session.items:
        for name in faults_of(item):
            found.setdefault(name, {})[item.nodeid.partition("[")[0]] = None
    print()
    for name in sorted(found, key=lambda name: (name[0], int(name[1:]))):
        print(f"{name:4}", f"\n{'':5}".join(found[name]))
    print()


def pytest_make_parametrize_id(config, val, argname):
    return val.name if isinstance(val, Path) else None


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def handlers_of_a_command_end_with_its_test():
    """Take away the log handlers that a command has set up in this process: their stream is closed after the test."""
    before = logging.root.handlers[:]
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            logging.root.removeHandler(handler)


@pytest.fixture(scope="session")
def folder_shards(tmp_path_factory) -> Path:
    """Pack 40 real clips into FLAC shards, as a user with a folder of audio would."""
    from commands import pack_folder

    return pack_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> Path:
    """Make a key and a certificate for localhost, once."""
    from servers import make_certificate

    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def fused(monkeypatch):
    """Take the optimiser that GPUs have, which the CPU has too: a look at a step is then put off."""
    from audiossl import optim

    monkeypatch.setattr(optim, "FUSED_ON", ("cuda", "cpu"))
