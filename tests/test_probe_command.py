"""`python probe.py` and `python -m audiossl compare` as a user runs them, on real recordings."""

import csv
import json

import numpy as np
import pytest
from commands import train
from conftest import ROOT
from exported import export
from labelled_clips import write_folder, write_meta

from audiossl.__main__ import main

SMALL = ["probe.num_resamples=50", "probe.with_cost=false", "probe.device=cpu", "heads.linear.l2_grid=[0.1,10.0]"]


def probe(*arguments: str, cwd, expect: int = 0) -> str:
    env = dict(XDG_CACHE_HOME=str(cwd / "cache"), HF_HUB_OFFLINE="1")
    return train(*arguments, cwd=cwd, expect=expect, script=ROOT / "probe.py", **env)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    write_folder(folder / "small", per_class=8)
    export("audiomae", folder / "mae")
    export("atst_frame", folder / "atst")
    return folder


@pytest.fixture(scope="module")
def task(place):
    return ["task=folder", f"task.root={place / 'small'}", "task.name=small", "+task.published.theirs=99.0"]


def test_one_command_sets_encoder_untrained_twin_and_log_mel_side_by_side(place, task):
    everything = ["probe.heads=[linear,knn,sgd,attention,weighted]", "probe.seeds=[0,1]"]
    quick = [f"heads.{head}.max_epochs=3" for head in ("sgd", "attention", "weighted")]
    output = probe(*task, "init=mae", *SMALL, *everything, *quick, cwd=place)
    folder = place / "runs" / "probe_small_mae"
    found = json.loads((folder / "results.json").read_text())
    assert [row["role"] for row in found["rows"]] == ["encoder"] * 5 + ["untrained"] * 5 + ["log-mel"] * 5
    for row in found["rows"]:
        assert row["low"] <= row["score"] <= row["high"] and set(row["folds"]) == {"fold1", "fold2"}
        assert row["score"] == pytest.approx(np.mean(list(row["folds"].values())))
        assert (row["std"] is None) == (row["head"] in ("linear", "knn"))
        assert len(row["chosen"]) == 2 * len(row["seeds"])
    with open(folder / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["score"]) for line in lines] == [row["score"] for row in found["rows"]]
    page = (folder / "results.md").read_text()
    assert "theirs 99.0" in page and "log-mel statistics" in page and page.count("\n| ") == 2 + 15
    assert all((folder / name).stat().st_size > 5000 for name in ("results.png", "confusion.png"))
    assert "log-mel statistics" in output and "theirs 99.0" in output
    again = probe(*task, "init=mae", *SMALL, *everything, *quick, cwd=place)
    assert "features from the cache" in again and "features computed" not in again
    assert json.loads((folder / "results.json").read_text())["scores"] == found["scores"]
    refused = probe(*task, "init=mae", *SMALL, *quick, "probe.heads=[knn]", cwd=place, expect=2)
    assert "holds results of other settings (probe.heads, probe.seeds)" in refused


def test_a_sweep_of_the_temporal_support_ends_with_a_table_and_a_plot(place, task):
    sweep = ["-m", "protocol=temporal_support", "probe.temporal_support=0.5,1", "init=mae,atst"]
    quick = ["heads.attention.max_epochs=2", "probe.seeds=[0]", "probe.num_resamples=20", "probe.with_cost=true"]
    probe(*sweep, *task, *SMALL[2:], *quick, "hydra.sweep.dir=sweep", cwd=place)
    page = (place / "sweep" / "support.md").read_text()
    assert page.count("\n| ") == 2 + 8 and (place / "sweep" / "support.png").stat().st_size > 10_000
    rows = [json.loads(path.read_text())["rows"][0] for path in sorted((place / "sweep").glob("*/results.json"))]
    assert {row["support_seconds"] for row in rows} == {0.5, 1.0} and {row["source"] for row in rows} == {"mae", "atst"}
    assert all(row["gflops"] > 0 and row["clips_per_second"] > 0 for row in rows)
    halves, wholes = ([r["segments"] for r in rows if r["support_seconds"] == s] for s in (0.5, 1.0))
    assert halves == [2 * number for number in wholes]


def test_any_results_stand_side_by_side(place, task, capsys):
    for init in ("mae", "[mae,atst]"):
        probe(*task, f"init={init}", *SMALL, "probe.heads=[knn]", f"hydra.run.dir={place}/c{len(init)}", cwd=place)
    capsys.readouterr()
    assert main(["compare", str(place / "c3"), str(place / "c10"), "--out", str(place / "both")]) == 0
    page = (place / "both" / "compare.md").read_text()
    assert "mae + atst" in page and "small (accuracy)" in page and "small, published: theirs 99.0." in page
    assert (place / "both" / "compare.png").stat().st_size > 5000
    assert main(["compare", str(place / "small")]) == 2
    assert "holds no results.json" in capsys.readouterr().err


FAULTS = {
    "a misspelt key": (["probe.heds=[knn]"], "probe.heds"),
    "a head that does not exist": (["probe.heads=[knnn]"], "probe.heads"),
    "a fold that is not there": (["task.folds=[7]"], "there is no fold 7"),
    "an unknown label": (["task.classes=[dog,rain]"], "is not in task.classes"),
    "no encoder there": (["init=nowhere/encoder", "task.cache_dir=unpacked"], "nowhere/encoder"),
    "class tokens that are not there": (["init=atst", "probe.pooling=class"], "no class token"),
    "more layers than there are": (["probe.layers=99", "task.cache_dir=unpacked"], "probe.layers=99"),
    "a support of nothing": (["probe.temporal_support=0"], "probe.temporal_support"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_user_can_mend_is_one_line(place, task, fault):
    arguments, words = FAULTS[fault]
    init = [] if any(argument.startswith("init=") for argument in arguments) else ["init=mae"]
    output = probe(*task, *init, *SMALL, *arguments, f"name={fault.replace(' ', '_')}", cwd=place, expect=2)
    (line,) = [line for line in output.splitlines() if line.startswith("probe.py: ")]
    assert words in line and "Traceback" not in output
    assert not (place / "unpacked").exists(), "it is said before hours of packing"


def test_a_set_of_one_class_is_one_line(place):
    lonely = write_folder(place / "lonely", per_class=2)
    with open(lonely / "meta.csv", newline="") as file:
        rows = [(row["filename"], "dog", row["fold"]) for row in csv.DictReader(file)]
    write_meta(lonely, rows)
    output = probe("task=folder", f"task.root={lonely}", "init=mae", *SMALL, "name=lonely", cwd=place, expect=2)
    assert "nothing to tell apart" in output and "Traceback" not in output


def test_events_are_scored_moment_by_moment_and_refuse_heads_for_clips(place):
    noisy = place / "noisy"
    (noisy / "audio").mkdir(parents=True)
    with open(place / "small" / "meta.csv", newline="") as file:
        clips = list(csv.DictReader(file))
    for number, split in enumerate(("train", "val", "test")):
        lines = []
        for clip in clips[number::3]:
            name = clip["filename"].rpartition("/")[2]
            (noisy / "audio" / name).write_bytes((place / "small" / clip["filename"]).read_bytes())
            lines.append(f"{name}\t0.0\t2.0\t{clip['label']}")
        (noisy / f"{split}.tsv").write_text("\n".join(["filename\tonset\toffset\tevent_label", *lines]) + "\n")
    common = ["task=folder", f"task.root={noisy}", "task.name=noisy", *SMALL, "init=atst"]
    probe(*common, "probe.heads=[linear]", cwd=place)
    found = json.loads((place / "runs" / "probe_noisy_atst" / "results.json").read_text())
    assert found["task"]["kind"] == "events" and len(found["rows"]) == 3
    assert all("psds1" in row["numbers"] and 0 <= row["numbers"]["frame_mAP"] <= 1 for row in found["rows"])
    output = probe(*common, "probe.heads=[attention]", "name=other", cwd=place, expect=2)
    assert "asks when something is heard" in output
