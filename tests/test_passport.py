"""Does a passport say what is in the shards: exactly from the index, and of the audio what numpy and torch say too?"""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
import yaml
from commands import environment
from conftest import ROOT
from matplotlib.image import imread
from packing import DEMO
from passports import passport, plain, reordered, repack
from test_index import million_rows
from tiny_shards import audio, clip, noise, write_shards

from audiossl.__main__ import main
from audiossl.index import Index
from audiossl.passport import make_passport
from audiossl.passports.clipfacts import levels
from audiossl.passports.corpusaudio import choose, mel_facts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return repack(tmp_path_factory.mktemp("passport") / "shards")


@pytest.fixture(scope="module")
def measured(corpus) -> dict:
    return make_passport(Index.load(corpus), num_clips=None)


def test_counts_are_those_of_the_index(measured, corpus):
    index = Index.load(corpus)
    assert (measured["clips"], measured["shards"]) == (41, 4)
    assert measured["hours"] == pytest.approx(index.seconds.sum() / 3600)
    assert measured["hashes"]["corpus"] == index.corpus_hash
    assert measured["audio_bytes"] == index.size.sum()
    labels = [label for i in range(41) for label in index.labels(i)]
    assert measured["labels"]["counts"] == {name: labels.count(name) for name in index.vocabulary}
    rates, counts = np.unique(index.rate_hz, return_counts=True)
    assert measured["rates_hz"] == dict(zip(map(str, rates.tolist()), counts.tolist(), strict=True))
    durations = measured["durations"]
    assert durations["seconds"]["p50"] == pytest.approx(np.median(index.seconds))
    assert sum(durations["histogram"]["clips"]) == 41
    assert durations["share_below_10_s"] == pytest.approx(np.mean(index.seconds < 9.99))


def test_a_multi_label_corpus_is_summed_up_by_class_and_by_clip(tmp_path):
    sound = audio(noise(0, 800))
    names = [["a", "b"], ["a"], [], ["a", "b", "c"]]
    rows = [(f"k{i}", sound, "flac", 800, 8000, some, "train") for i, some in enumerate(names)]
    facts = make_passport(Index.load(write_shards(tmp_path / "s", [rows])), num_clips=0)["labels"]
    assert facts["counts"] == {"a": 3, "b": 2, "c": 1} and facts["imbalance"] == 3
    assert facts["clips_by_number_of_labels"] == {"0": 1, "1": 1, "2": 1, "3": 1}
    assert (facts["labels"], facts["labels_per_clip"], facts["classes_without_a_clip"]) == (6, 1.5, 0)


def test_the_demo_sets_mean_and_std_are_those_of_its_config(tmp_path, capsys):
    data = yaml.safe_load((ROOT / "conf" / "data" / "demo.yaml").read_text())["data"]
    found = passport(str(DEMO), "--split", "train", "--clips", "all", out=tmp_path / "demo.json")
    kaldi = found["audio"]["frontends"]["kaldi_fbank"]
    assert (round(kaldi["mean"], 3), round(kaldi["std"], 3)) == (data["mean"], data["std"])
    assert kaldi["config"] == {"data.mean": kaldi["mean"], "data.std": kaldi["std"]}
    assert f"data.mean={kaldi['mean']:.4f}" in capsys.readouterr().out
    assert kaldi["error_of_mean"] == 0, "every clip was measured"


def test_the_kaldi_statistics_are_those_of_torchaudio_over_the_decoded_clips(tmp_path):
    shards = repack(tmp_path / "s", [i for i in range(361) if Index.load(DEMO).rate_hz[i] == 16000])
    index, cells = Index.load(shards), []
    for i in range(len(index)):
        wave = torch.from_numpy(soundfile.read(io.BytesIO(index.read(i)), dtype="float32")[0])[None]
        settings = dict(htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.0)
        cells.append(torchaudio.compliance.kaldi.fbank(wave - wave.mean(), sample_frequency=16000, **settings).double())
    cells = torch.cat(cells)
    found = make_passport(index)["audio"]["frontends"]["kaldi_fbank"]
    assert found["mean"] == pytest.approx(cells.mean().item(), abs=1e-4)
    assert found["std"] == pytest.approx(cells.std(correction=0).item(), abs=1e-4)
    assert (found["min"], found["max"]) == pytest.approx((cells.min().item(), cells.max().item()), abs=1e-2)
    np.testing.assert_allclose(found["bands"], cells.mean(0), atol=1e-3)


def test_levels_equal_their_definitions():
    rate_hz = 16000
    wave = (0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate_hz) / rate_hz) + 0.25).astype(np.float32)
    seconds, peak, power, dc, silent, clipped, rolloff_hz, edge_hz, _ = levels(wave, rate_hz)
    assert (seconds, silent, clipped) == (1, 0, 0)
    assert (peak, power, dc) == pytest.approx((0.75, 0.125 + 0.0625, 0.25), abs=1e-4)
    assert rolloff_hz == pytest.approx(1000, abs=40)
    wave[:4000], wave[5000:5400] = 0, 1.5
    assert levels(wave, rate_hz)[4:6] == pytest.approx((0.25, 0.025))
    assert np.isnan(levels(np.zeros(4000, np.float32), rate_hz)[6])


@pytest.mark.parametrize("workers", [2, 3])
def test_no_number_depends_on_the_number_of_workers(corpus, measured, workers, monkeypatch):
    monkeypatch.setattr("audiossl.passports.corpusaudio.WORTH_WORKERS_CLIPS", 1)
    assert make_passport(Index.load(corpus), num_clips=None, workers=workers) == measured


def test_no_number_depends_on_the_order_of_shards_and_clips(corpus, tmp_path):
    first = make_passport(Index.load(corpus), num_clips=20)
    second = make_passport(Index.load(reordered(tmp_path / "other", corpus)), num_clips=20)
    assert first["hashes"].pop("corpus") != second["hashes"].pop("corpus")
    for name in ("shards", "shard_bytes", "splits"):
        first.pop(name), second.pop(name)
    assert first == second


def test_the_sample_of_a_part_lies_within_the_sample_of_the_whole():
    hashes = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    whole = hashes[choose(hashes, 500, seed=3)]
    part = hashes[:2500][choose(hashes[:2500], 500, seed=3)]
    assert len(whole) == 500 and np.isin(whole[np.isin(whole, hashes[:2500])], part).all()
    assert len(np.intersect1d(whole, hashes[choose(hashes, 500, seed=4)])) < 100


def test_the_standard_error_is_the_spread_of_means_over_samples():
    generator = np.random.default_rng(0)
    cells = generator.integers(50, 150, 400).astype(float)
    level = generator.normal(-5, 2, 400)
    clips = {"cells": cells, "sum": cells * level, "squares": cells * (level**2 + 3), "min": level, "max": level}
    means, errors = [], []
    for _ in range(2000):
        some = generator.choice(400, 100, replace=False)
        found = mel_facts({name: values[some] for name, values in clips.items()}, share_left=0.75)
        means.append(found["mean"])
        errors.append(found["error_of_mean"])
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


def test_clips_that_cannot_be_decoded_are_counted_and_listed(tmp_path, capsys):
    shards = repack(tmp_path / "s", broken=(3, 17))
    found = passport(shards, "--list", "1")["audio"]
    failures, index = found["failures"], Index.load(shards)
    assert failures["clips"] == 2 and sum(failures["reasons"].values()) == 2 and len(failures["listed"]) == 1
    broken = {(index.key(i), index.shard_path(i).name) for i in (3, 17)}
    assert (failures["listed"][0]["key"], failures["listed"][0]["shard"]) in broken
    assert found["frontends"]["kaldi_fbank"]["mean"] < 0 and "not decodable 2 (4.88%)" in plain(capsys.readouterr().out)


def test_a_corpus_of_which_nothing_can_be_decoded_is_one_line(tmp_path, capsys):
    shards = write_shards(tmp_path / "s", [[clip("a", b"no audio at all", 800), clip("b", b"neither", 800)]])
    assert main(["passport", shards]) == 2
    assert "none of the 2 clips could be decoded" in capsys.readouterr().err


def test_the_same_bytes_under_several_keys_are_duplicates(tmp_path):
    one, two, other = audio(noise(0, 1600)), audio(noise(1, 1600)), audio(noise(2, 1600))
    rows = [clip(key, data, 1600) for key, data in zip("abcdef", (one, two, one, other, one, two), strict=True)]
    found = make_passport(Index.load(write_shards(tmp_path / "s", [rows[:2], rows[2:]])))["audio"]["duplicates"]
    assert found["keys"] == [["a", "c", "e"], ["b", "f"]] and found["extra"] == 3 and found["share_read"] == 1


def test_an_upsampled_corpus_is_told_by_the_edge_of_its_band(tmp_path):
    clips = [i for i in range(361) if Index.load(DEMO).rate_hz[i] == 32000][:24]
    for name, by_way_of_hz in (("whole", None), ("from8k", 8000)):
        found = make_passport(Index.load(repack(tmp_path / name, clips, by_way_of_hz=by_way_of_hz)))["audio"]["levels"]
        if by_way_of_hz:
            assert 3000 < found["edge_hz"]["p95"] < 4400 and found["clips_half_empty"] > 0.9
        else:
            assert found["edge_hz"]["p95"] > 13_000 and found["clips_half_empty"] == 0


def test_the_picture_and_a_table_of_80_columns_come_with_it(corpus, tmp_path):
    out = tmp_path / "p.json"
    command = [sys.executable, "-m", "audiossl", "passport", corpus, "--clips", "6", "--out", out]
    done = subprocess.run(command, cwd=ROOT, env=environment(COLUMNS="80"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[1:-1])) <= 80
    assert "clip/s" in done.stderr and "a sample of 6 clips" in done.stdout
    assert imread(tmp_path / "p.png").shape[:2] == (814, 1320)
    assert json.loads(out.read_text())["audio"]["frontends"]["kaldi_fbank"]["error_of_mean"] > 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--split", "nowhere"], "split 'nowhere' is not in"),
        (["--workers", "0"], "--workers 0: must be 1 or more"),
        (["--out", "p.txt"], "--out p.txt: must be a .json file"),
        (["--rate", "5"], "--rate 5: Hz between"),
        (["--clips", "0", "--compare", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--clips", "0", "--compare", str(ROOT / "pyproject.toml")], "matches|shards|index|pyproject"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(corpus, options, words, capsys):
    import re

    assert main(["passport", corpus, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("audiossl passport: ") and re.search(words, error)


INDEX_ONLY = """
import re, sys, time
start = time.monotonic()
from audiossl.__main__ import main
assert main(["passport", sys.argv[1], "--clips", "0", "--out", sys.argv[2]]) == 0
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print("took", time.monotonic() - start, int(peak.group(1)) / 1e6)
"""


@pytest.mark.slow
def test_two_million_rows_without_audio_take_under_15_s_and_1_gb(tmp_path):
    million_rows(tmp_path, 2_000_000)
    command = [sys.executable, "-c", INDEX_ONLY, str(tmp_path), str(tmp_path / "p.json")]
    printed = subprocess.check_output(command, cwd=ROOT, text=True)
    _, seconds, gigabytes = printed.splitlines()[-1].split()
    assert json.loads((tmp_path / "p.json").read_text())["clips"] == 2_000_000
    assert float(seconds) < 15
    assert float(gigabytes) < 1
