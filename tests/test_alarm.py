"""A run made to collapse is stopped with step and values; a healthy one of the same length is left alone."""

import logging
import re
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from commands import environment, metrics, train
from conftest import ROOT
from methods import settings_of
from test_pretraining import QUIET, demo_data, loader, module_for
from toy_teacher import COLLAPSING, HEALTHY, NARROWING, WIDTH, learn

from audiossl.running.alarm import CollapseAlarm

PATIENCE, LOW = 10, 0.25 / WIDTH**0.5  # of `toy_teacher.learn`


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    """Run into a collapse once: the folder, the rows of its steps, the alarm's words."""
    folder = tmp_path_factory.mktemp("collapsed")
    return folder, *learn(folder, COLLAPSING)


def looks_collapsed(row) -> bool:
    return row["loss"] < 0.1 and min(row["student_std"], row["teacher_std"]) < LOW


def rung_at(said: str) -> int:
    return int(re.match(r"step (\d+): the features have collapsed", said)[1])


def test_a_collapse_stops_the_run_at_the_first_step_that_ends_the_patience(collapsed):
    _, rows, said = collapsed
    streaks = [all(map(looks_collapsed, rows[end - PATIENCE : end])) for end in range(PATIENCE, len(rows) + 1)]
    assert streaks.count(True) == 1 and streaks[-1] and len(rows) < 60
    assert rung_at(said) == len(rows) - 1


def test_the_alarm_names_the_values_and_what_to_do(collapsed):
    _, rows, said = collapsed
    assert f"loss={rows[-1]['loss']:.3g} is below alarm.loss=0.1" in said
    assert f"student_std={rows[-1]['student_std']:.3g}" in said and "(alarm.std_share=0.25 of 1/sqrt(16))" in said
    assert "lower the learning rate" in said and "momentum of the teacher" in said and "\n" not in said


def test_checkpoints_from_before_stay_and_the_step_that_rang_is_none(collapsed):
    folder, rows, _ = collapsed
    steps = sorted(int(path.stem.split("=")[1]) for path in (folder / "checkpoints").glob("step=*.ckpt"))
    assert steps == list(range(5, len(rows), 5))
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == steps[-1]


def test_a_healthy_run_of_the_same_length_is_left_alone(tmp_path):
    rows, said = learn(tmp_path, HEALTHY)
    assert said is None and len(rows) == 60
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and min(row["teacher_std"] for row in rows) > LOW


def test_a_resumed_run_rings_at_the_same_step_with_the_same_words(collapsed, tmp_path):
    folder, rows, said = collapsed
    within = (len(rows) - 1) // 5 * 5  # saved within the last ten steps, so part of the count is in the file
    again, words = learn(tmp_path, COLLAPSING, ckpt=folder / "checkpoints" / f"step={within:09d}.ckpt")
    assert words == said and again == rows[within:]


def test_a_warning_is_said_once_and_the_run_goes_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="audiossl.running.alarm"):
        rows, said = learn(tmp_path, COLLAPSING, action="warn")
    assert said is None and len(rows) == 60
    warnings = [record.getMessage() for record in caplog.records if record.name == "audiossl.running.alarm"]
    starts = [i for i, row in enumerate(rows) if looks_collapsed(row) and (i == 0 or not looks_collapsed(rows[i - 1]))]
    long = [i for i in starts if all(map(looks_collapsed, rows[i : i + PATIENCE])) and i + PATIENCE <= len(rows)]
    assert [rung_at(text) for text in warnings] == [i + PATIENCE - 1 for i in long] and long


def test_features_that_fall_onto_one_line_ring_though_their_std_is_healthy(tmp_path):
    rows, said = learn(tmp_path, NARROWING)
    assert "the effective rank has fallen away (" in said and "loss=" not in said
    highest = max(row["teacher_rank"] for row in rows)
    assert f"teacher_rank={rows[-1]['teacher_rank']:.3g} was {highest:.3g}" in said
    low = [row["teacher_rank"] - 1 < 0.1 * (highest - 1) for row in rows]
    assert rung_at(said) == len(rows) - 1 and low.count(True) <= PATIENCE < len(rows) - 5


def test_two_ranks_stop_together_where_one_process_does(collapsed, tmp_path):
    """Health is measured over both ranks' clips, so it is that of one process with twice the batch."""
    command = [sys.executable, str(ROOT / "tests" / "toy_teacher.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-4000:]
    steps, said = re.search(r"^(\d+) (step \d+: the features .*)$", done.stdout, re.M).groups()
    assert int(steps) == len(collapsed[1]) and rung_at(said) == rung_at(collapsed[2])


def test_a_method_that_logs_no_health_is_not_judged():
    data, alarm = demo_data(), CollapseAlarm(action="stop", loss=1e9, std_share=1.0, rank_share=1.0, patience=1)
    trainer = pl.Trainer(max_steps=2, callbacks=[alarm], **QUIET)
    trainer.fit(module_for(data, 2), loader(data, 2))
    assert trainer.global_step == 2 and alarm.state_dict() == {"steps": {"std": 0, "rank": 0}, "highest": {}}


def test_a_real_run_that_is_made_to_collapse_rings_and_a_healthy_one_of_the_same_length_does_not(tmp_path):
    common = [*settings_of("atst_clip"), "data.num_workers=0", "data.batch_size=8", "trainer.max_steps=60"]
    common += ["trainer=cpu", "probe=none", "alarm.patience=10", "trainer.log_every_n_steps=1"]
    ruined = ["optim.lr=0.02", "optim.weight_decay=20", "model.momentum=0.5", "hydra.run.dir=ruined"]
    said = train(*common, *ruined, cwd=tmp_path, expect=2)
    found = re.search(r"step (\d+): the features have collapsed: for 10 steps .*=.*; lower the learning rate", said)
    step = int(found[1])
    rows = metrics(tmp_path / "ruined")
    assert 10 <= step < 59 and int(rows[-1]["step"]) == step
    train(*common, "hydra.run.dir=healthy", cwd=tmp_path)
    healthy, ruined = (float(r[-1]["teacher_rank"]) for r in (metrics(tmp_path / "healthy"), rows))
    assert healthy > 2 * ruined
