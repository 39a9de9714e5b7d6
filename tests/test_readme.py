"""What the README and the docs say can be typed."""

import re
import shlex

import hydra
import pytest
from conftest import ROOT

from audiossl.__main__ import COMMANDS
from audiossl.config.cli import CONF
from audiossl.config.overrides import Composer
from audiossl.config.settings import check
from audiossl.config.specs import SPECS

README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
LINES = [
    line.split("  #")[0].strip()
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in block.splitlines()
]
RUNS = [
    (script, line.split(f"{runner} {script}.py")[1])
    for line in LINES
    for script in SPECS
    for runner in ("python", "slurm/run.sbatch")
    if f"{runner} {script}.py" in line
]
LINKING = ("cluster", "data", "faults", "judging", "methods")
NUM_JOBS = {"sweep=masking": 9, "hop_ms": 6, "temporal_support": 10, "mask_ratio": 3}


@pytest.mark.parametrize(("script", "line"), RUNS, ids=[f"{script} {line.strip()}" for script, line in RUNS])
def test_every_run_has_a_valid_config(script, line):
    words = shlex.split(line)
    is_sweep = "-m" in words
    with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name=script):
        composer = Composer(script, SPECS[script], [], is_sweep)
        jobs = list(composer.jobs([word for word in words if word != "-m"]))
        for cfg in jobs:
            check(cfg, SPECS[script])
    assert len(jobs) == (next((n for key, n in NUM_JOBS.items() if key in line), 3) if is_sweep else 1)


def test_each_script_is_shown():
    assert {script for script, _ in RUNS} == set(SPECS)


def test_every_other_command_exists():
    used = {line.split()[3] for line in LINES if line.startswith("python -m audiossl")}
    assert used and used <= set(COMMANDS)


def test_ci_runs_the_readmes_test_command_and_nothing_else():
    command = "pip install -e '.[test]' -c constraints.txt && pytest"
    assert command in LINES
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("\n" + command)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in LINKING)])
def test_every_link_between_our_pages_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert links and all((ROOT / page).parent.joinpath(link).exists() for link in links)


def test_the_map_shows_every_module_in_its_room_and_none_that_is_not_there():
    shown, room = {}, ""
    for line in README.split("\naudiossl/\n")[1].split("\n```")[0].splitlines():
        columns = re.split(r" {2,}", line.strip())
        if not line.startswith(" " * 4):  # a room's first line begins with its name
            room = columns.pop(0)
        shown.setdefault(room if room.endswith("/") else "audiossl/", set()).update(re.findall(r"\w+", columns[0]))
    there = {}
    for path in (ROOT / "audiossl").rglob("*.py"):
        there.setdefault(f"{path.parent.name}/", set()).update({path.stem} - {"__init__", "__main__"})
    del shown["methods/"], there["methods/"]  # their YAML lists those
    assert shown == there
