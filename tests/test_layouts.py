"""Sets with a layout of their own are read as they are published, and a wrong folder ends in a line that says how."""

from collections import Counter
from pathlib import Path

import labelledsets
import numpy as np
import pytest
from conftest import ROOT

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.labelled.layouts import LAYOUTS, read_layout
from audiossl.sound.files import read

MAKERS = {"desed_real": "desed", "nsynth_pitch": "nsynth_instrument"}


def made(layout: str, root: Path, maker: str | None = None) -> Path:
    getattr(labelledsets, maker or MAKERS.get(layout, layout))(root)
    if layout == "desed_real":
        header = ("filename", "onset", "offset", "event_label")
        strong = ("Ys.wav", 1.0, 2.0, "Cat")
        labelledsets.table(root, "metadata/train/audioset_strong.tsv", header, strong, delimiter="\t")
        labelledsets.sound(root, "audio/train/strong_label_real_16k/Ys.wav")
    return root


def refused(layout: str, root: Path) -> str:
    with pytest.raises(UserError) as error:
        read_layout(layout, root)
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_clip_of_a_published_layout_is_there_labelled_and_in_one_place(layout, tmp_path):
    rows = read_layout(layout, made(layout, tmp_path))
    for row in rows:
        waveform, rate_hz = read(tmp_path / row.filename)
        assert len(waveform) / rate_hz == pytest.approx(0.5, abs=0.06)
        assert (row.split in ("train", "val", "test")) != (row.fold is not None)
        assert row.labels or row.events == () or row.known
    assert len(Counter(row.fold for row in rows)) > 1 or {"train", "test"} <= {row.split for row in rows}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_set_that_is_not_there_says_what_to_download_and_where_it_lies(layout, tmp_path):
    line = refused(layout, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in line and "is missing; " in line
    assert "holds" in line or "put iden_split.txt beside it" in line


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_an_empty_table_or_a_folder_without_audio_is_refused(layout, tmp_path):
    made(layout, tmp_path)
    for path in [p for p in tmp_path.rglob("*") if p.suffix in (".csv", ".tsv", ".txt", ".json", ".jsonl")]:
        content = path.read_bytes()
        path.write_bytes(b"" if path.suffix != ".json" else content[: len(content) // 2])
        assert str(path) in refused(layout, tmp_path)
        path.write_bytes(content)
    for path in [p for p in tmp_path.rglob("*") if p.suffix in (".wav", ".ogg", ".mp3", ".flac")]:
        path.unlink()
    assert str(tmp_path) in refused(layout, tmp_path)


def test_a_layout_that_nobody_reads_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean openmic"):
        read_layout("openmick", Path("."))


def test_speech_commands_hold_each_word_in_the_split_that_its_lists_say(tmp_path):
    rows = read_layout("speech_commands_v2", made("speech_commands_v2", tmp_path))
    assert {row.filename: row.split for row in rows if row.labels == ("yes",)} == {
        "yes/a_nohash_0.wav": "train",
        "yes/b_nohash_0.wav": "val",
        "yes/c_nohash_0.wav": "test",
    }
    assert {row.labels for row in rows} == {("bed",), ("yes",)}


def test_version_one_has_commands_the_unknown_and_silence_and_a_test_archive(tmp_path):
    rows = read_layout("speech_commands_v1", made("speech_commands_v1", tmp_path))
    assert Counter((row.split, *row.labels) for row in rows) == {
        ("train", "yes"): 1,
        ("train", "_unknown_"): 1,
        ("train", "_silence_"): 1,
        ("val", "yes"): 1,
        ("val", "_unknown_"): 1,
        ("test", "yes"): 1,
        ("test", "_unknown_"): 1,
        ("test", "_silence_"): 1,
    }


def test_openmic_keeps_what_was_judged_apart_from_what_is_absent(tmp_path):
    first, second, third = read_layout("openmic", made("openmic", tmp_path))
    assert (first.labels, first.known) == (("piano",), ("flute", "piano"))
    assert (second.labels, second.known) == ((), ("piano",))  # a relevance of one half is no yes
    assert (third.labels, third.split) == (("organ",), "test")


def test_esc10_is_the_tenth_of_esc50_that_its_column_marks(tmp_path):
    rows = read_layout("esc10", made("esc10", tmp_path))
    assert Counter((row.fold, *row.labels) for row in rows) == Counter((f, c) for f in (1, 2) for c in ("dog", "rain"))


def test_nsynth_is_read_by_family_or_by_pitch(tmp_path):
    made("nsynth_pitch", tmp_path)
    assert {row.labels for row in read_layout("nsynth_instrument", tmp_path)} == {("bass",), ("reed",)}
    assert {row.labels for row in read_layout("nsynth_pitch", tmp_path)} == {("060",), ("101",)}


def test_the_weak_clips_that_validate_are_those_that_pandas_draws(tmp_path):
    rows = {row.filename: row for row in read_layout("desed", made("desed", tmp_path))}
    weak = {name: row for name, row in rows.items() if "/weak/" in name}
    # pandas.DataFrame(range(10)).sample(frac=.9, random_state=42).index: 8 1 5 0 7 2 9 4 3
    assert [name for name, row in weak.items() if row.split == "val"] == ["audio/train/weak/Y6.wav"]
    assert all(row.events is None and row.labels == ("Dishes", "Speech") for row in weak.values())
    scape = rows["audio/train/synthetic21_train/soundscapes_16k/1.wav"]
    assert scape.events == ((0.0, 3.0, "Speech"), (2.5, 4.0, "Dog")) and scape.labels == ("Dog", "Speech")
    assert rows["audio/validation/validation/Ysilent.wav"].events == ()


def test_strong_labels_keep_the_classes_that_train_and_evaluation_share(tmp_path):
    rows = {row.filename: row for row in read_layout("audioset_strong", made("audioset_strong", tmp_path))}
    assert rows["audio/Yabcdefghijk_30.000_40.000.wav"].events == ((1.0, 2.0, "Bark"), (4.0, 5.0, "Purr"))
    assert rows["audio/x/-bcdefghijk_0.flac"].events == ()
    assert rows["audio/_bcdefghijk_20000.wav"].events == ((3.0, 4.0, "Bark"), (5.0, 6.0, "Purr"))
    assert len(rows) == 3  # the segment that nobody has is left out


@pytest.mark.parametrize("layout", ["desed", "audioset_strong", "hear"])
def test_an_event_that_ends_before_it_begins_names_the_clip(layout, tmp_path):
    made(layout, tmp_path, "hear_events" if layout == "hear" else None)
    path = {
        "desed": "metadata/train/synthetic21_train/soundscapes.tsv",
        "audioset_strong": "audioset_train_strong.tsv",
        "hear": "fold00.json",
    }[layout]
    old, new = {"desed": ("2.5", "7.5"), "audioset_strong": ("\t1\t2\t", "\t3\t2\t"), "hear": ("500.0", "900.0")}[
        layout
    ]
    content = (tmp_path / path).read_text()
    assert old in content
    (tmp_path / path).write_text(content.replace(old, new))
    assert " lasts from " in refused(layout, tmp_path)


def test_hear_reads_folds_and_events_in_seconds(tmp_path):
    rows = read_layout("hear", made("hear", tmp_path / "folds", "hear_folds"))
    assert Counter(row.fold for row in rows) == {0: 2, 1: 2, 2: 2}
    first, *_ = read_layout("hear", made("hear", tmp_path / "events", "hear_events"))
    assert first.events == ((0.01, 0.75, "61"), (0.5, 0.75, "60")) and first.fold == 0
    splits = read_layout("hear", made("hear", tmp_path / "splits"))
    assert Counter(row.split for row in splits) == {"train": 2, "val": 1, "test": 2}


def test_hear_takes_the_highest_rate_that_is_there(tmp_path):
    made("hear", tmp_path)
    (tmp_path / "48000").rename(tmp_path / "32000")
    assert read_layout("hear", tmp_path)[0].filename.startswith("32000/")
    (tmp_path / "32000" / "valid").rename(tmp_path / "elsewhere")
    assert "is its audio unpacked?" in refused("hear", tmp_path)


def test_beehives_are_tested_in_turn(tmp_path):
    rows = read_layout("hear_beehive", made("hear_beehive", tmp_path))
    assert Counter(row.fold for row in rows) == {0: 2, 1: 2} and all("/test/" in row.filename for row in rows)


def test_arch_splits_tracks_as_its_own_loader_does(tmp_path):
    rows = read_layout("fma_small", made("fma_small", tmp_path))
    assert Counter(row.split for row in rows) == {"train": 16, "val": 3, "test": 2}
    assert {row.labels for row in rows} == {("Rock",), ("Folk",)}
    order = np.random.RandomState(42).permutation(21)  # what scikit-learn's train_test_split draws first
    assert {int(row.filename[-6:-4]) - 1 for row in rows if row.split != "train"} == set(order[:5].tolist())


def test_tags_beyond_the_fifty_and_clips_in_no_split_are_left_out(tmp_path):
    rows = read_layout("magnatagatune", made("magnatagatune", tmp_path))
    assert {row.filename: (row.labels, row.split) for row in rows} == {
        "f/2.mp3": (("guitar", "no vocals"), "train"),
        "f/6.mp3": (("harp",), "val"),
        "f/10.mp3": (("rock",), "test"),
    }


@pytest.mark.faults("C5")
def test_a_clip_that_is_listed_twice_is_refused(tmp_path):
    made("us8k", tmp_path)
    path = tmp_path / "metadata" / "UrbanSound8K.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    assert "is listed twice" in refused("us8k", tmp_path)


@pytest.mark.parametrize(
    ("layout", "path", "old", "new", "says"),
    [
        ("us8k", "metadata/UrbanSound8K.csv", "class\n", "klass\n", "has no column 'class'"),
        (
            "us8k",
            "metadata/UrbanSound8K.csv",
            "3-3-0-0.wav,3,0,4,1,3,",
            "3-3-0-0.wav,3,0,4,1,x,",
            "fold 'x' is not a number",
        ),
        ("fsd50k", "FSD50K.ground_truth/dev.csv", ",val", ",dev", "split 'dev'"),
        ("voxceleb1", "iden_split.txt", "2 id", "4 id", "is not a number 1, 2 or 3 and a path"),
        ("openmic", "partitions/split01_test.csv", "000003_0", "000009_0", "has no label of '000009_0'"),
        ("openmic", "openmic-2018-aggregated-labels.csv", "0.9", "often", "'often' is no relevance"),
        ("medley_solos_db", "Medley-solos-DB_metadata.csv", "validation,", "dev,", "subset 'dev'"),
        ("hear", "task_metadata.json", "scene", "clip", "neither scene nor event"),
        ("tau2020", "evaluation_setup/fold1_evaluate.csv", "tram-lyon-2-2-b.wav", "b.wav", "is its audio unpacked?"),
        ("desed", "metadata/train/synthetic21_train/soundscapes.tsv", "Speech", "", "has no label"),
    ],
)
def test_a_table_that_cannot_be_meant_names_its_file_and_what_is_wrong(layout, path, old, new, says, tmp_path):
    made(layout, tmp_path)
    content = (tmp_path / path).read_bytes().replace(b"\r\n", b"\n").decode()
    assert old in content
    (tmp_path / path).write_text(content.replace(old, new))
    line = refused(layout, tmp_path)
    assert says in line and str(tmp_path) in line


def test_a_table_in_another_encoding_is_refused_without_a_traceback(tmp_path):
    made("us8k", tmp_path)
    (tmp_path / "metadata" / "UrbanSound8K.csv").write_bytes("slice_file_name;é".encode("latin-1"))
    assert "is not text in UTF-8" in refused("us8k", tmp_path)


def test_the_layout_of_esc50_gives_the_labels_and_folds_of_real_clips(tmp_path):
    """The demo's ESC-10 clips, under ESC-50's names and table."""
    index = Index.load(ROOT / "demo" / "shards")
    clips = [clip for clip in range(len(index)) if len(index.label_ids(clip))]
    (tmp_path / "audio").mkdir()
    listed = []
    for clip in clips:
        name = f"{index.key(clip)}.{index.extension(clip)}"
        (tmp_path / "audio" / name).write_bytes(index.read(clip))
        listed.append((name, str(index.fold[clip]), "0", index.labels(clip)[0], "True", "x", "A"))
    header = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
    labelledsets.table(tmp_path, "meta/esc50.csv", header, *listed)
    found = {Path(row.filename).stem: row for row in read_layout("esc10", tmp_path)}
    assert len(found) == len(clips) == 150
    for clip in clips:
        row = found[index.key(clip)]
        assert row.labels == tuple(index.labels(clip)) and row.fold == index.fold[clip]
