"""Do the words of a comparison name what was done to a corpus, and nothing else?"""

import base64
import json
import re

import numpy as np
import pytest
import yaml
from conftest import ROOT
from passports import DEMO_CLIPS, passport, plain, repack

from audiossl.__main__ import main
from audiossl.index import Index
from audiossl.passport import make_passport
from audiossl.passports.compare import compare
from audiossl.passports.corpusfacts import labelled_hashes, read_sketch, set_hash, sketch
from audiossl.passports.published import published_audioset, with_audioset


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return repack(tmp_path_factory.mktemp("compare") / "shards")


@pytest.fixture(scope="module")
def original(corpus) -> dict:
    return make_passport(Index.load(corpus), num_clips=None)


def told(source: str, other: dict, **options) -> dict[str, str]:
    """Give the words for everything that differs, by subject, an important one marked by `!`."""
    found = compare(make_passport(Index.load(source), num_clips=None), other, **options)
    return {d.subject + "!" * d.is_important: d.text for d in found if d.text}


def test_a_copy_packed_again_is_equal_in_everything_and_exits_with_0(corpus, tmp_path, capsys):
    copy = repack(tmp_path / "copy")
    passport(copy, "--compare", corpus)
    printed = plain(capsys.readouterr().out)
    assert "nothing differs that a model would notice" in printed and " ! " not in printed.split("compared with")[1]


def test_missing_clips_are_counted_named_and_exit_with_1(corpus, tmp_path, capsys):
    part = repack(tmp_path / "part", list(DEMO_CLIPS)[:34])
    passport(part, "--compare", corpus, "--clips", "0", expect=1)
    printed = plain(capsys.readouterr().out)
    missing = Index.load(corpus).key(34)
    assert f"17% of the clips there are missing here (7 of 41, such as {missing}," in printed
    assert "expect another score, a lower one" in printed


def test_a_passport_alone_tells_how_many_clips_are_missing(corpus, original, tmp_path):
    words = told(repack(tmp_path / "part", list(DEMO_CLIPS)[:34]), original)
    assert "17% of the clips there are missing here (7 of 41)" in words["clips!"]
    words = told(repack(tmp_path / "other", [*list(DEMO_CLIPS)[:34], 1, 2]), original)
    assert "5.6% of the clips here are not there (2 of 36)" in words["clips!"]


def test_another_gain_is_told_in_db_with_the_statistics_to_set(original, tmp_path):
    words = told(repack(tmp_path / "quiet", gain_db=-6), original)
    assert set(words) == {"level!", "kaldi_fbank!", "atst_mel!", "passt_mel!", "clips"}
    assert words["level!"].startswith("6.0 dB quieter by the median RMS")
    assert "as the level explains (-6.0 dB would give -1.38); set data.mean=-8.6" in words["kaldi_fbank!"]
    assert "6.00 lower" in words["atst_mel!"]


def test_a_gain_too_small_to_matter_is_equal(original, tmp_path):
    assert set(told(repack(tmp_path / "near", gain_db=-0.3), original)) == {"clips"}


def test_audio_resampled_by_way_of_8_khz_is_told_by_its_band(original, tmp_path):
    words = told(repack(tmp_path / "dull", by_way_of_hz=8000), original)
    assert (
        re.search(r"nothing above 4\.[0-3] kHz", words["bandwidth!"]) and "upsampled from 8 kHz" in words["bandwidth!"]
    )
    assert "the bandwidth differs" in words["kaldi_fbank!"] and "level" not in "".join(words)


def test_other_labels_on_the_same_clips_are_told_by_class(original, tmp_path):
    words = told(
        repack(tmp_path / "labels", labels=lambda key, names: ["x" if n == "rain" else n for n in names]), original
    )
    assert set(words) == {"classes!", "labels!"}
    assert "1 class that has clips there has none here (rain)" in words["classes!"]
    assert "rain 0 clips (there 1)" in words["labels!"] and "x 1 clips (there 0)" in words["labels!"]


def test_labels_swapped_between_two_clips_are_found_though_counts_stay(tmp_path):
    first = repack(tmp_path / "a", range(0, 60))
    names = Index.load(first)
    labelled = [names.key(i) for i in range(60) if names.labels(i)]
    pair = labelled[0], labelled[-1]
    labels = {names.key(i): names.labels(i) for i in range(60)}
    labels[pair[0]], labels[pair[1]] = labels[pair[1]], labels[pair[0]]
    second = repack(tmp_path / "b", range(0, 60), labels=lambda key, _: labels[key])
    assert labels[pair[0]] != labels[pair[1]]
    found = compare(*(make_passport(Index.load(source), num_clips=0) for source in (second, first)))
    words = {d.subject: d for d in found}
    assert words["labels"].is_important and "though as many in each class" in words["labels"].text


def test_undecodable_clips_are_told(original, tmp_path):
    words = told(repack(tmp_path / "broken", broken=(1, 2, 3)), original)
    assert words["decoding!"] == "3 clips (7.3%) cannot be decoded (there 0, 0%)"


def test_two_samples_of_one_corpus_are_equal_within_their_errors(corpus):
    index, subjects = Index.load(corpus), ("level", "kaldi_fbank", "atst_mel", "passt_mel", "clipping")
    some = [make_passport(index, num_clips=20, seed=seed) for seed in range(3)]
    assert len({p["audio"]["frontends"]["kaldi_fbank"]["mean"] for p in some}) == 3
    for one, other in ((some[0], some[1]), (some[1], some[2]), (some[2], some[0])):
        assert not [d for d in compare(one, other) if d.text and d.subject in subjects]


def large(hashes: np.ndarray, like: dict) -> dict:
    return like | {
        "clips": len(hashes),
        "keys_sketch": sketch(hashes),
        "hashes": like["hashes"] | {"keys": set_hash(hashes)},
    }


@pytest.mark.parametrize("share", [0.83, 0.5, 0.02])
def test_a_sketch_of_many_keys_tells_what_is_missing_to_some_percent(original, share):
    keys = np.random.default_rng(1).integers(0, 2**64, 200_000, dtype=np.uint64)
    part = keys[: round(share * len(keys))]
    words = {d.subject: d for d in compare(large(part, original), large(keys, original))}["clips"]
    number = int(words.text.split("(")[1].split(" of ")[0].replace(",", ""))
    assert number == pytest.approx((1 - share) * len(keys), abs=0.03 * len(keys))
    assert words.text.startswith("about ") and words.is_important
    assert len(read_sketch(sketch(keys))) == 4096


def test_a_hash_of_labels_knows_no_order_of_clips_labels_or_vocabulary():
    hashes = np.array([5, 9], np.uint64)
    first = labelled_hashes(hashes, ["a", "b", "c"], np.array([0, 2, 1]), np.array([2, 1]))
    second = labelled_hashes(hashes[::-1], ["c", "b", "a"], np.array([1, 0, 2]), np.array([1, 2]))
    assert set_hash(first) == set_hash(second)
    moved = labelled_hashes(hashes, ["a", "b", "c"], np.array([0, 2, 1]), np.array([1, 2]))
    assert set_hash(moved) != set_hash(first)


def test_the_published_figures_are_those_of_the_configs_and_each_has_a_source():
    known = published_audioset()
    audioset = yaml.safe_load((ROOT / "conf" / "data" / "audioset.yaml").read_text())["data"]
    atst = yaml.safe_load((ROOT / "conf" / "frontend" / "atst_mel.yaml").read_text())
    passt = yaml.safe_load((ROOT / "conf" / "frontend" / "passt_mel.yaml").read_text())
    assert (known["kaldi_mean"], known["kaldi_std"]) == (audioset["mean"], audioset["std"])
    assert (known["atst_min_db"], known["atst_max_db"]) == (atst["min_db"], atst["max_db"])
    assert (known["passt_mean"], known["passt_std"]) == (passt["mean"], passt["std"])
    entries = yaml.safe_load((ROOT / "audiossl" / "passports" / "audioset.yaml").read_text())
    assert all(set(entry) == {"value", "source"} and len(entry["source"]) > 10 for entry in entries.values())


def as_audioset(original: dict, **changes) -> dict:
    """Dress a passport up as one of a whole AudioSet, then change it."""
    labels = original["labels"] | {"classes": 527, "classes_without_a_clip": 0, "labels": 4_000_000}
    durations = original["durations"] | {"share_below_10_s": 0.0, "seconds": dict(p50=10.0)}
    kaldi = original["audio"]["frontends"]["kaldi_fbank"] | dict(mean=-4.25, std=4.6)
    passt = original["audio"]["frontends"]["passt_mel"] | dict(mean=-4.4, std=2.6)
    audio = {"frontends": original["audio"]["frontends"] | {"kaldi_fbank": kaldi, "passt_mel": passt}}
    whole = original | {"clips": 2_084_320, "labels": labels, "durations": durations, "audio": audio}
    return whole | {name: whole[name] | v if isinstance(v, dict) else v for name, v in changes.items()}


def test_against_audioset_only_what_departs_from_what_is_published_is_told(original):
    def words(**changes):
        return {d.subject: d.text for d in with_audioset(as_audioset(original, **changes)) if d.is_important}

    assert not words()
    assert words(clips=1_729_986)["clips"].startswith("17% of the clips are missing (1,729,986 of the 2,084,320")
    assert "12 classes have no clip" in words(labels={"classes_without_a_clip": 12})["classes"]
    assert "3% are shorter" not in words(durations={"share_below_10_s": 0.01}).get("durations", "")
    assert "13% are shorter than 10 s" in words(durations={"share_below_10_s": 0.13})["durations"]
    untouched = with_audioset(as_audioset(original) | {"audio": original["audio"]})
    kaldi = next(d for d in untouched if d.subject == "kaldi_fbank")
    assert kaldi.is_important and "3.36 lower (-7.629; Audio-MAE's copy -4.268" in kaldi.text


def test_the_demo_is_no_audioset_and_a_passport_can_be_compared_without_its_shards(original, tmp_path, capsys):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(original))
    assert main(["passport", str(path), "--compare", "audioset"]) == 1
    printed = plain(capsys.readouterr().out)
    assert "41 of the 2,084,320 segments published" in printed and "AudioSet has 527: other labels" in printed
    assert main(["passport", str(path), "--compare", str(path)]) == 0
    assert list(tmp_path.iterdir()) == [path], "reading a passport writes nothing"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', "[" * 100_000, "\x00\xff"])
def test_what_is_no_passport_is_one_line(corpus, tmp_path, content, capsys):
    (tmp_path / "p.json").write_text(content, encoding="latin-1")
    assert main(["passport", str(tmp_path / "p.json")]) == 2
    assert "p.json is no passport" in capsys.readouterr().err


def test_a_passport_names_no_clip_and_holds_no_path(corpus, original):
    text, index = json.dumps(original), Index.load(corpus)
    assert not any(index.key(i) in text for i in range(len(index))) and str(index.path.parent) not in text
    assert len(base64.b64decode(original["keys_sketch"])) == 8 * len(index)
