"""On ragged shards: ranks stay in step, and a run goes on on other ranks, workers and windows where it was."""

import pytest
from fits import assert_same_run, column, kill_and_go_on, name_of, run, trace
from methods import settings_of
from tiny_shards import RAGGED, data_of, digest, ragged_corpus, train_batches

from audiossl.loading.loader import make_loader

NUM_CLIPS = sum(RAGGED)  # 41, so that steps of four straddle the epochs


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    shards = ragged_corpus(tmp_path_factory.mktemp("ragged"))
    data = ["data=folder", f"data.shards={shards}", "data.validation_clips=0", "frontend.seconds=0.64"]
    small = ["frontend.num_mels=64", "checkpoint.every_steps=1", "optim.eps=1e-4"]
    return [*settings_of("audiomae"), *data, *small]


def stream(folder, num_ranks: int) -> list[str]:
    """Join the clips of all ranks, step by step."""
    ranks = [trace(folder, rank) for rank in range(num_ranks)]
    assert len({len(rows) for rows in ranks}) == 1, "the ranks made unequal numbers of steps"
    return [key for rows in zip(*ranks, strict=True) for row in rows for key in row["keys"].split()]


@pytest.fixture(scope="module")
def two(settings, tmp_path_factory):
    """Train on two ranks, three epochs in steps of four clips."""
    folder = tmp_path_factory.mktemp("two") / "run"
    length = ["trainer.max_steps=null", "trainer.max_epochs=3", "optim.warmup_steps=null", "optim.warmup_ratio=0.1"]
    given = [*settings, "data.batch_size=2", *length]
    run(folder, *given, ranks=2)
    return given, folder


@pytest.mark.faults("X3", "R5")
def test_two_ranks_are_in_the_same_epoch_at_every_step_and_draw_noise_of_their_own(two):
    """A step's clips, over the ranks, are the next of one stream in which each epoch is whole."""
    _, folder = two
    seen = stream(folder, 2)
    assert len(trace(folder)) == -(-3 * NUM_CLIPS // 4)
    for epoch in range(3):
        assert len(set(seen[epoch * NUM_CLIPS : (epoch + 1) * NUM_CLIPS])) == NUM_CLIPS
    hashes = [{row["encoder_input"] for row in trace(folder, rank)} for rank in (0, 1)]
    assert not hashes[0] & hashes[1] and len(hashes[0]) == len(trace(folder))


@pytest.mark.faults("X3")
@pytest.mark.parametrize("length", ["steps", pytest.param("epochs", marks=pytest.mark.slow)])
def test_the_epoch_is_the_same_on_all_ranks_at_every_step(settings, tmp_path, length):
    """41 clips on two ranks, in steps of four; asked of all ranks within each step."""
    given = ["data.batch_size=2", "trainer.max_steps=24"]
    if length == "epochs":
        given = ["data.batch_size=2", "trainer.max_steps=null", "trainer.max_epochs=2"]
        given += ["optim.warmup_steps=null", "optim.warmup_ratio=0.1"]
    both = run(tmp_path, *settings, *given, ranks=2, fault={"do": "compare epochs"})
    said = [[line for line in one.output().splitlines() if line.endswith("on all ranks")] for one in both]
    assert said[0] == said[1] and len(said[0]) == (24 if length == "steps" else 21)
    assert {line.split()[1] for line in said[0]} == {"0", "1", "2"}, said[0]


@pytest.mark.faults("R7", "R5", "R4")
def test_two_ranks_killed_within_and_between_epochs_end_as_if_never_stopped(two, tmp_path):
    given, folder = two
    kill_and_go_on(tmp_path / "killed", *given, at=(7, 10, 21), ranks=2)
    assert_same_run(folder, tmp_path / "killed", 31, ranks=2)


TWO = (2, ["data.batch_size=2"])
MOVES = [(TWO, (1, ["data.batch_size=4"]), (2, ["data.batch_size=2", "data.num_workers=1"]))]
MOVES += [pytest.param((TWO, (4, ["data.batch_size=1"]), (1, ["data.batch_size=4"])), marks=pytest.mark.slow)]
MOVES += [
    pytest.param(((1, ["data.batch_size=4", f"data.num_workers={n}"]) for n in (2, 3, 2)), marks=pytest.mark.slow)
]


@pytest.mark.faults("X9")
@pytest.mark.parametrize("legs", MOVES, ids=["2, 1, 2 ranks", "2, 4, 1 ranks", "2, 3, 2 workers"])
def test_a_run_that_moves_to_other_ranks_and_workers_sees_the_same_global_batches(settings, tmp_path, legs):
    given = [*settings, "trainer.max_steps=12"]
    run(tmp_path / "straight", *given, "data.batch_size=4")
    kill_and_go_on(tmp_path / "moved", *given, at=(4, 8), legs=list(legs))
    losses = [[float.fromhex(loss) for _, loss in column(tmp_path / name, "loss")] for name in ("straight", "moved")]
    assert len(losses[1]) == 12 and losses[1] == pytest.approx(losses[0], rel=1e-6)
    parts = [trace(tmp_path / "moved", rank) for rank in range(4) if (tmp_path / "moved" / name_of(rank)).exists()]
    for whole in trace(tmp_path / "straight"):
        now = [row["keys"].split() for rows in parts for row in rows if row["step"] == whole["step"]]
        assert sorted(key for keys in now for key in keys) == sorted(whole["keys"].split()), whole["step"]


@pytest.mark.faults("R6")
@pytest.mark.parametrize("micro", [1, 3])
def test_a_kill_within_an_accumulation_window_restarts_the_window(settings, tmp_path, micro):
    given = [*settings, "trainer.max_steps=8", "data.batch_size=1", "trainer.accumulate_grad_batches=4"]
    run(tmp_path / "straight", *given)
    run(tmp_path / "killed", *given, fault={"do": "kill", "step": 5, "micro": micro}, expect=-9)
    run(tmp_path / "killed", *given, ckpt="last")
    assert_same_run(tmp_path / "straight", tmp_path / "killed", 8)
    assert len(trace(tmp_path / "killed")) == 32


@pytest.mark.faults("R3")
def test_workers_come_and_go_between_resumes_and_the_sequence_stays(settings, tmp_path):
    """What the killed workers had read ahead comes again, once."""
    given = [*settings, "trainer.max_steps=16", "data.batch_size=4"]
    run(tmp_path / "straight", *given)
    legs = [(1, [f"data.num_workers={number}"]) for number in (2, 0, 1)]
    kill_and_go_on(tmp_path / "killed", *given, at=(5, 11), legs=legs)
    assert_same_run(tmp_path / "straight", tmp_path / "killed", 16)


@pytest.mark.faults("R3")
@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("prefetch", [1, 4])
def test_reading_ahead_and_keeping_workers_changes_no_batch(tmp_path, prefetch, is_kept):
    data = data_of(ragged_corpus(tmp_path / "shards"))
    whole = digest(train_batches(data))
    inner = data.train_loader(rank=0, world_size=1, accumulate=1, start_step=7, max_steps=12, seed=5).loader
    options = dict(num_workers=2, bad_clips=data.bad_clips, timeout_seconds=60.0, is_iterated_often=is_kept)
    loader = make_loader(inner.dataset, inner.batch_sampler, prefetch=prefetch, **options)
    assert digest(loader) == whole[7:]
