"""A machine without locale, home, network, or a folder to write in: a run as ever, or one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from fits import assert_same_run, run, start
from methods import settings_of
from processes import IMPOSSIBLE, NO_NAMESPACE

SETTINGS = (*settings_of("audiomae"), "data.batch_size=2", "data.fraction=0.1", "data.validation_clips=4")
SETTINGS += ("trainer.max_steps=2",)


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("usual") / "run"
    run(folder, *SETTINGS)
    return folder


MACHINES = {
    "neither locale nor home nor proxy": (
        {"LC_ALL": "C", "LANG": "C", "HOME": "/nonexistent", "http_proxy": "http://127.0.0.1:9"},
        {},
    ),
    "HOME unset": ({"HOME": None, "USER": None, "XDG_CACHE_HOME": None}, {}),
    "no network": ({}, {"no network": True}),
    "a current folder that is read-only": ({"TMPDIR": None}, {"read-only": "here"}),
}


@pytest.mark.faults("C12")
@pytest.mark.parametrize("name", MACHINES)
def test_a_run_on_an_odd_machine_is_a_run_as_ever(usual, tmp_path, name):
    environment, fault = MACHINES[name]
    (tmp_path / "here").mkdir()
    fault = fault | ({"read-only": str(tmp_path / "here")} if "read-only" in fault else {})
    folder = tmp_path / "ein Ordner, ünïcode 音"
    (one,) = start(folder, *SETTINGS, environment=environment, fault=fault or None)
    if (code := one.wait(120)) == NO_NAMESPACE:
        pytest.skip(IMPOSSIBLE)
    assert code == 0, one.output()
    assert_same_run(usual, folder, 2)
    assert (folder / "encoder.safetensors").exists() and (folder / "results.json").exists()


@pytest.mark.faults("C12", "C7")
@pytest.mark.parametrize("where", ["a read-only folder", "a file"])
def test_where_no_run_can_be_written_the_command_ends_in_one_line_before_torch_is_imported(tmp_path, where):
    """`runs/` in the current folder is where a run goes that is not told otherwise."""
    prepare = f"from processes import stand_in_read_only; stand_in_read_only(Path({str(tmp_path)!r}))"
    if where == "a file":
        (tmp_path / "runs").touch()
        prepare = ""
    program = f"""import runpy, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
{prepare}
sys.argv = ["train.py", "trainer=cpu"]
try:
    runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
finally:
    assert "torch" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    if done.returncode == NO_NAMESPACE:
        pytest.skip(IMPOSSIBLE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "runs/audiomae_tiny_demo: cannot be written, " in done.stderr and "hydra.run.dir=" in done.stderr
