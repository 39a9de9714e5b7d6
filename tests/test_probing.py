"""Is a probe's score honest, repeatable, and without a trace in the run that it watches?"""

import random
from copy import deepcopy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import ROOT
from packing import run, tone, write_table
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from audiossl.embeddings import clip_features, evaluating, windows_of
from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.features.statistics import logmel_statistics
from audiossl.heads.accuracy import confidence_interval, knn_accuracy, linear_accuracy
from audiossl.heads.examples import Split
from audiossl.probes.intraining import Probe, ProbeCallback, clip_statistics
from audiossl.spectrogram import KaldiFbank

CHOICES = dict(neighbours=[1, 3, 5], l2_grid=[0.01, 1.0, 100.0], pooling="max")
FOLDS = dict(train_folds=[1, 2, 3], validation_fold=3, test_folds=[4, 5])


@pytest.fixture
def table():
    """Features of four well-separated classes in five folds."""
    rng = np.random.default_rng(0)
    labels, folds = np.arange(400) % 4, np.arange(400) // 4 % 5 + 1
    features = rng.normal(scale=0.3, size=(400, 6))
    features[:, :4] += 3 * np.eye(4)[labels]
    return features, labels, folds


@pytest.fixture
def frontend():
    sizes = dict(rate_hz=16000, window_ms=25, hop_ms=10, num_mels=32, fmin_hz=20, fmax_hz=None)
    return KaldiFbank(**sizes, preemphasis=0.97, mean=-7.0, std=4.6, seconds=0.64)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    sizes = dict(num_mels=32, frames=64, patch=(16, 16), stride=(16, 16), width=16, depth=2, num_heads=2, mlp_ratio=2.0)
    return Encoder(**sizes, positions="corrected", drop_path=0.5)


@pytest.fixture(scope="module")
def probe():
    return Probe(shards=str(ROOT / "demo/shards"), rate_hz=16000, **FOLDS, every_steps=2, batch_size=64, **CHOICES)


def noise_clips(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(-3000, 3000, length).astype(np.int16) for length in lengths]


def random_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_separable_features_are_read_without_a_mistake(table):
    features, labels, folds = table
    split = Split.of_folds(folds, **FOLDS)
    assert knn_accuracy(features, labels, split, neighbours=[1, 3]).accuracy == 1
    assert linear_accuracy(features, labels, split, l2_grid=[0.1, 1.0]).accuracy == 1


def test_shuffled_labels_are_read_at_chance(table):
    features, labels, folds = table
    shuffled = np.random.default_rng(2).permutation(labels)
    split = Split.of_folds(folds, **FOLDS)
    for score in (
        knn_accuracy(features, shuffled, split, neighbours=[5]),
        linear_accuracy(features, shuffled, split, l2_grid=[1.0]),
    ):
        assert 0.1 < score.accuracy < 0.4  # chance is 0.25; 160 test clips


def test_a_linear_score_is_scikit_learns_own(table):
    features, labels, folds = table
    features = features + np.random.default_rng(3).normal(scale=5, size=features.shape)
    split = Split.of_folds(folds, **FOLDS)
    known, test = np.isin(folds, [1, 2, 3]), np.isin(folds, [4, 5])
    scaled = (features - features[known].mean(0)) / features[known].std(0)
    expected = LogisticRegression(C=1 / 3.0, max_iter=2000).fit(scaled[known], labels[known])
    assert linear_accuracy(features, labels, split, l2_grid=[3.0]).accuracy == expected.score(
        scaled[test], labels[test]
    )


def test_the_test_folds_influence_neither_choice_nor_scaling(table):
    features, labels, folds = table
    features = features + np.random.default_rng(3).normal(scale=4, size=features.shape)
    split = Split.of_folds(folds, **FOLDS)
    spoiled, wrong = features.copy(), labels.copy()
    fold5 = folds == 5
    spoiled[fold5] = spoiled[fold5] * 1e4 + 77
    wrong[fold5] = 0
    for head, choices in (
        (knn_accuracy, {"neighbours": [1, 3, 9, 27]}),
        (linear_accuracy, {"l2_grid": [0.1, 10, 1e3]}),
    ):
        clean, after = head(features, labels, split, **choices), head(spoiled, wrong, split, **choices)
        assert clean.chosen == after.chosen
        np.testing.assert_array_equal(clean.correct[folds[split.test] == 4], after.correct[folds[split.test] == 4])


def test_the_choice_is_the_one_that_is_best_on_the_validation_fold(table):
    _, labels, folds = table
    rng = np.random.default_rng(5)
    features = np.eye(4)[labels] + rng.normal(scale=0.7, size=(400, 4))
    features[folds == 2] = np.eye(4)[(labels[folds == 2] + 1) % 4]  # half of the training clips are mislabelled copies
    split = Split.of_folds(folds, **FOLDS)
    scores = {}
    for k in (1, 81, 159):
        head = make_pipeline(StandardScaler(), KNeighborsClassifier(k, metric="cosine"))
        head.fit(features[split.train], labels[split.train])
        scores[k] = head.score(features[split.validation], labels[split.validation])
    chosen = knn_accuracy(features, labels, split, neighbours=list(scores)).chosen
    assert scores[chosen] == max(scores.values()) > min(scores.values())


def test_the_strength_is_the_one_of_least_cross_entropy_on_the_validation_fold(table):
    features, labels, folds = table
    features = features + np.random.default_rng(3).normal(scale=3, size=features.shape)
    split, losses = Split.of_folds(folds, **FOLDS), {}
    for l2 in (0.001, 10.0, 1e5):
        head = make_pipeline(StandardScaler(), LogisticRegression(C=1 / l2, max_iter=2000))
        head.fit(features[split.train], labels[split.train])
        chances = head.predict_proba(features[split.validation])
        losses[l2] = -np.log(chances[np.arange(len(chances)), labels[split.validation]]).mean()
    assert linear_accuracy(features, labels, split, l2_grid=list(losses)).chosen == min(losses, key=losses.get)


def test_the_interval_holds_the_accuracy_and_narrows_with_more_clips():
    few, many = np.arange(40) % 4 > 0, np.arange(4000) % 4 > 0
    (low, high), (low_many, high_many) = confidence_interval(few), confidence_interval(many)
    assert low < low_many < 0.75 < high_many < high
    assert confidence_interval(few) == (low, high)
    assert high - low == pytest.approx(2 * 1.96 * (0.1875 / 40) ** 0.5, abs=0.05)


def test_folds_that_are_trained_on_cannot_be_tested_on():
    with pytest.raises(UserError, match=r"probe.test_folds=\[3\]: \[3\] are trained on"):
        Probe(
            shards="x",
            rate_hz=16000,
            train_folds=[1, 2],
            validation_fold=3,
            test_folds=[3],
            every_steps=1,
            batch_size=1,
            **CHOICES,
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("b1.wav", "dog;rain", 1), "clip b1 has 2 labels; a probe needs exactly one a clip"),
        (("b1.wav", "rain", 4), r"probe.train_folds=\[1, 3\]: without the validation fold no clip is left of rain"),
        (("b1.wav", "rain", 6), r"without the validation fold no clip is left of rain"),
    ],
)
def test_labels_that_cannot_be_probed_are_refused(tmp_path, changed, message):
    rows = {f"{name}{fold}.wav": (label, fold) for name, label in (("a", "dog"), ("b", "rain")) for fold in (1, 3, 4)}
    rows[changed[0]] = changed[1:]
    (tmp_path / "audio").mkdir()
    for name in rows:
        tone(tmp_path / "audio" / name, 16000, 0.5)
    write_table(tmp_path / "audio" / "meta.csv", [("filename", "labels", "fold"), *((k, *v) for k, v in rows.items())])
    assert run(tmp_path / "audio", tmp_path / "shards", "--rate", "16000") == 0
    settings = dict(shards=str(tmp_path / "shards"), rate_hz=16000, every_steps=1, batch_size=1, **CHOICES)
    with pytest.raises(UserError, match=message):
        Probe(**settings, train_folds=[1, 3], validation_fold=3, test_folds=[4])


def test_log_mel_statistics_are_mean_deviation_maximum_and_movement_of_each_band():
    spectrogram = torch.tensor([[0.0, 2.0, 0.0, 2.0], [1.0, 1.0, 1.0, 5.0]])
    mean, deviation, maximum, movement = logmel_statistics(spectrogram).view(4, 2).tolist()
    assert mean == [1, 2] and maximum == [2, 5]
    assert deviation == pytest.approx([1, 3**0.5]) and movement == pytest.approx([(32 / 9) ** 0.5, (32 / 9) ** 0.5])


def test_windows_cover_a_long_clip_and_pad_a_short_one(frontend):
    length = frontend.samples_for(frontend.frames)
    clips = noise_clips(2 * length + 5000, 3000, length, length + 10)
    windows = list(windows_of(frontend, clips, batch_size=2))
    assert torch.cat([w.clip for w in windows]).tolist() == [0, 0, 0, 1, 2, 3]
    assert torch.cat([w.valid_frames for w in windows]).tolist() == [64, 64, 29, 17, 64, 64]
    assert {w.spectrogram.shape[1:] for w in windows} == {(1, 32, 64)}


def test_features_do_not_depend_on_the_batch_and_are_those_of_the_tokens(encoder, frontend):
    length = frontend.samples_for(frontend.frames)
    clips = noise_clips(length, 2 * length, 3000)
    features = clip_features(encoder, frontend, clips, batch_size=2)
    assert features.shape[0] == 3 and features.dtype == np.float32
    np.testing.assert_allclose(features, clip_features(encoder, frontend, clips, batch_size=5), atol=1e-5)
    encoder.eval()
    tokens = encoder(frontend(torch.from_numpy(clips[0])[None]))[0, 1:].detach()
    np.testing.assert_allclose(features[0], tokens.amax(0), atol=1e-5)


def test_padding_is_no_part_of_the_features(encoder, frontend):
    """What the padded columns' tokens say must not matter: make them enormous."""
    clip = noise_clips(frontend.samples_for(32))

    class Loud(nn.Module):
        grid, width, num_class_tokens = encoder.grid, encoder.width, 1

        def grid_for(self, spectrogram):
            return self.grid

        def forward(self, spectrogram):
            tokens = torch.zeros(len(spectrogram), 1 + 2 * 4, 16).unflatten(1, (9,))
            tokens[:, 1:].view(-1, 2, 4, 16)[:, :, 2:] = 1e6
            return tokens

    for pooling in ("max", "mean", "class"):
        assert not clip_features(Loud(), frontend, clip, batch_size=1, pooling=pooling).any()


def test_tokens_of_all_windows_are_pooled_as_asked(encoder, frontend):
    """Two whole windows and one of three quarters: the last column of it is padding."""
    length = frontend.samples_for(frontend.frames)
    clip = noise_clips(2 * length + frontend.samples_for(48))
    windows = [clip[0][:length], clip[0][length : 2 * length], clip[0][2 * length :]]
    padded = torch.stack([nn.functional.pad(torch.from_numpy(w), (0, length - len(w))) for w in windows])
    samples = torch.tensor([len(window) for window in windows])
    with torch.no_grad(), evaluating(encoder):
        tokens = encoder(frontend(padded, samples))
    audio = torch.cat([tokens[0, 1:], tokens[1, 1:], tokens[2, 1:].unflatten(0, encoder.grid)[:, :3].flatten(0, 1)])
    for pooling, expected in (("max", audio.amax(0)), ("mean", audio.mean(0)), ("class", tokens[:, 0].mean(0))):
        found = clip_features(encoder, frontend, clip, batch_size=2, pooling=pooling)
        np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_class_tokens_of_an_encoder_without_any_are_refused(frontend):
    sizes = dict(num_mels=32, frames=64, patch=(16, 16), stride=(16, 16), width=16, depth=1, num_heads=2, mlp_ratio=2.0)
    frame = Encoder(**sizes, positions="learned", drop_path=0.0, num_class_tokens=0)
    with pytest.raises(UserError, match="probe.pooling=class: this encoder has no class token"):
        clip_features(frame, frontend, noise_clips(9000), batch_size=1, pooling="class")


def test_computing_features_leaves_modes_and_random_states_alone(encoder, frontend):
    encoder.train()
    encoder.blocks[0].eval()
    modes, states = [m.training for m in encoder.modules()], random_states()
    first = clip_features(encoder, frontend, noise_clips(9000, 30000), batch_size=2)
    assert [m.training for m in encoder.modules()] == modes and random_states() == states
    np.testing.assert_array_equal(first, clip_features(encoder, frontend, noise_clips(9000, 30000), batch_size=2))
    assert all(p.grad is None for p in encoder.parameters())


def test_the_baseline_of_the_demo_set_is_far_above_chance_and_repeats(probe, frontend):
    states = random_states()
    scores = probe.baseline(frontend)
    assert random_states() == states and scores == probe.baseline(frontend)
    assert scores["linear"] > 0.4 and scores["linear_low"] < scores["linear"] < scores["linear_high"]
    folds = probe.folds[probe.split.test]
    both = np.average(
        [scores["linear_fold4"], scores["linear_fold5"]], weights=[(folds == 4).sum(), (folds == 5).sum()]
    )
    assert both == pytest.approx(scores["linear"])


def test_statistics_of_a_clip_leave_its_padding_out(frontend):
    short = noise_clips(frontend.samples_for(20))
    log_mel = frontend.denormalise(frontend(torch.from_numpy(short[0])[None]))[0, 0, :, :20]
    np.testing.assert_allclose(clip_statistics(frontend, short, batch_size=1)[0], logmel_statistics(log_mel), atol=1e-5)


def test_a_front_end_of_another_rate_is_refused(probe, encoder, frontend):
    frontend.rate_hz = 32000
    with pytest.raises(UserError, match="probe.rate_hz=16000 but frontend.rate_hz=32000"):
        probe.run(encoder, frontend)


class Toy(pl.LightningModule):
    """Moves an encoder a little with dropout in every step, from the global random state."""

    def __init__(self, encoder, frontend):
        super().__init__()
        self.method = nn.Module()
        self.method.encoder, self.method.frontend = encoder, frontend
        self.losses = []

    def training_step(self, batch, index):
        tokens = self.method.encoder(batch + torch.rand(()))
        loss = (tokens * torch.linspace(-1, 1, tokens.shape[-1])).mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.method.encoder.parameters(), lr=0.01)


class Recorder(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows += [(step, metrics["probe/linear"])] if "probe/linear" in metrics else []


def train(encoder, frontend, callbacks, max_steps, ckpt=None):
    torch.manual_seed(0)
    module, logger = Toy(encoder, frontend), Recorder()
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = pl.Trainer(
        **quiet, accelerator="cpu", max_steps=max_steps, logger=logger, callbacks=callbacks, accumulate_grad_batches=2
    )
    batches = torch.utils.data.DataLoader(torch.ones(64, 1, 32, 64), batch_size=4)
    trainer.fit(module, batches, ckpt_path=ckpt, weights_only=True)
    return trainer, module, logger


def test_a_watched_run_is_the_run_that_nobody_watched(probe, encoder, frontend):
    _, alone, _ = train(deepcopy(encoder), frontend, [], 5)
    _, watched, logger = train(encoder, frontend, [ProbeCallback(probe=probe)], 5)
    assert watched.losses == alone.losses and len(set(alone.losses)) == 10
    assert [step for step, _ in logger.rows] == [0, 2, 4, 5]


def test_a_resumed_run_keeps_its_history_and_logs_where_it_starts(probe, encoder, frontend, tmp_path):
    callback = ProbeCallback(probe=probe)
    trainer, _, _ = train(encoder, frontend, [callback], 4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = ProbeCallback(probe=probe)
    _, _, logger = train(encoder, frontend, [resumed], 6, tmp_path / "last.ckpt")
    assert list(resumed.history) == [0, 2, 4, 6] and resumed.baseline == callback.baseline
    assert logger.rows[0] == (4, callback.history[4]["linear"]) and [step for step, _ in logger.rows] == [4, 6]
    table = resumed.table()
    assert [row["name"] for row in table["rows"]] == ["log-mel statistics", "encoder, step 0", "encoder, step 6"]
    assert table["folds"] == [4, 5] and table["linear"] == resumed.history[6]["linear"]
    assert all(len(row["cells"]) == 4 for row in table["rows"])
