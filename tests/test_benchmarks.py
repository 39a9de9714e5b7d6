"""Every benchmark runs at a tiny size, prints its table and leaves json and png; the GPU script runs them all."""

import importlib
import json

import pytest
import torch

from benchmarks import on_gpu, recipes
from benchmarks.common import Report, Spread, Turns, parser_of, prepared, take_turns

HERE = ("frontend", "embed")  # probing has a test of its own, the others start processes
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def threads_stay_as_they_are():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(name, folder, capsys, *options):
    importlib.import_module(f"benchmarks.{name}").main(["--quick", *options, "--out", str(folder)])
    found = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.png").read_bytes().startswith(PNG)
    assert found["benchmark"] == name and found["quick"] and found["device"] and found["command"].endswith(str(folder))
    assert len(capsys.readouterr().out.splitlines()) >= 2 + len(found["rows"])
    return found


@pytest.mark.parametrize("name", HERE)
def test_a_benchmark_runs_in_seconds_at_a_tiny_size(name, tmp_path, capsys):
    assert rows_of(name, tmp_path, capsys)["rows"]


def test_all_layers_in_one_pass_are_those_of_a_pass_for_each(tmp_path, capsys):
    rows = rows_of("probing", tmp_path, capsys)["rows"]
    assert {row["passes"] for row in rows} == {2, 4} and all(row["difference"] < 1e-5 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name, fact", {"loader": "overlap", "scale": "two_ranks", "pack": "writer_clips"}.items())
def test_a_benchmark_with_processes_of_its_own_runs_at_a_tiny_size(name, fact, tmp_path, capsys):
    found = rows_of(name, tmp_path, capsys)
    assert found["rows"] and found[fact]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["order", "tasks", "resident"])
def test_a_benchmark_of_large_and_of_small_corpora_runs_at_a_tiny_size(name, tmp_path, capfd):
    assert len(rows_of(name, tmp_path, capfd)["rows"]) >= 2


@pytest.mark.slow
def test_all_parts_of_the_step_are_in_one_json(tmp_path, capsys):
    given = ["--batch", "1", "--methods", "audiomae", "passt"]
    rows = rows_of("step", tmp_path, capsys, *given)["rows"]
    assert [row["part"] for row in rows] == ["step"] * 2 + ["count"] * 2 + ["patchout"] + ["decoder"] * 2
    assert all(row["rate"][0] > 0 and 0 < row["mfu"] < 2 for row in rows[:2])
    assert all(row["bytes_a_clip"][1] < row["bytes_a_clip"][0] for row in rows[2:4])
    assert all(row["flops"] > 1 for row in rows[4:])


@pytest.mark.slow
def test_the_script_for_a_gpu_machine_runs_all_of_them_on_a_cpu(tmp_path, capsys):
    assert on_gpu.main(["--dry-run", "--minutes", "8", "--out", str(tmp_path)]) == 0
    summary = (tmp_path / "SUMMARY.md").read_text()
    assert all(f"- {job.title}: done" in summary for job in on_gpu.JOBS) and "torchaudio kaldi.fbank" in summary
    lines = [line for line in summary.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in lines] == ["step", *recipes.EXPERIMENTS]
    assert all(len(line.split("|")) == len(lines[0].split("|")) and float(line.split()[3]) > 0 for line in lines[1:])


def test_what_a_gpu_machine_must_be_brought_is_pinned(capsys):
    assert on_gpu.main(["--wheels"]) == 0
    brought = dict(line.split("==") for line in capsys.readouterr().out.splitlines())
    assert {"hydra-core", "einops", "matplotlib", "rich", "soundfile"} <= brought.keys() and not on_gpu.missing()


def test_a_benchmark_without_time_is_ended_and_the_summary_says_so(tmp_path, capsys):
    assert on_gpu.main(["--dry-run", "--minutes", "0.01", "--only", "frontend", "--out", str(tmp_path)]) == 0
    assert "- frontend: no time left" in (tmp_path / "SUMMARY.md").read_text()


def test_variants_take_turns_and_the_first_rounds_do_not_count():
    called = []
    ways = {name: lambda name=name: called.append(name) or 4.0 for name in "ab"}
    turns = take_turns(ways, rounds=3, warm_up=2)
    assert called == list("abbaabbaab") and [len(turns[name].wall) for name in "ab"] == [3, 3]


def test_ratios_are_of_turns_and_not_of_medians():
    fast, slow = Turns([1.0, 2.0, 4.0], [1.0] * 3), Turns([3.0, 8.0, 20.0], [2.0] * 3)
    assert fast.times_as_fast_as(slow) == Spread(4.0, 3.0, 5.0)
    assert f"{fast.times_as_fast_as(slow):.1f}" == "4.0 (3.0..5.0)" and fast.rate("cpu") == Spread(1.0, 1.0, 1.0)


def test_rows_are_in_the_json_as_soon_as_they_are_printed(tmp_path, capsys):
    report = Report(prepared(parser_of("some", "doc"), ["--out", str(tmp_path)]), {"what": 4, "ms": 8})
    report.row(["first", "1.0"], taken=Spread(1.0, 0.5, 2.0))
    assert json.loads((tmp_path / "some.json").read_text())["rows"] == [{"taken": [1.0, 0.5, 2.0]}]
    report.table({"how": 4}, part="second")
    report.row(["so"], number=2)
    assert json.loads((tmp_path / "some.json").read_text())["rows"][1] == {"part": "second", "number": 2}
    assert report.markdown().splitlines() == ["| how |", "| --- |", "| so |"]
