"""Labelled sets: what a folder, tsv files and packed shards say, and what they are refused for."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import ROOT

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.labelled.classes import classes_of
from audiossl.pretraining import Pretraining
from audiossl.shards import ShardData
from audiossl.sound.audio import decode
from audiossl.tasks import load_task
from audiossl.tuning.start import check_classes

FOLDER = yaml.safe_load((ROOT / "conf" / "task" / "folder.yaml").read_text())
DEMO = ROOT / "demo" / "shards"


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory) -> Path:
    """Write 24 real clips of four classes, three folds, as files, and three tables of them."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "audio").mkdir()
    index, lines = Index.load(DEMO), []
    for name in ("dog", "rain", "rooster", "sneezing"):
        clips = [clip for clip in range(len(index)) if name in index.labels(clip)][:6]
        for number, clip in enumerate(clips):
            (folder / "audio" / f"{name}-{number}.{index.extension(clip)}").write_bytes(index.read(clip))
            file = f"audio/{name}-{number}.{index.extension(clip)}"
            lines.append((file, name, number % 3, ("train", "train", "test")[number % 3]))
    head = "filename,label,fold,part\n"
    (folder / "meta.csv").write_text(head + "".join(f"{f},{n},{k},{s}\n" for f, n, k, s in lines))
    return folder


@pytest.fixture
def task_of(tmp_path_factory, real_folder):
    cache = tmp_path_factory.getbasetemp() / "cache"

    def load(root=real_folder, **settings):
        root = None if root is None else str(root)
        return load_task(**FOLDER | {"root": root, "cache_dir": str(cache)} | settings)

    return load


def rewritten(folder: Path, tmp_path: Path, change) -> Path:
    """Copy a set, its table changed."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "meta.csv").write_text(change((copy / "meta.csv").read_text()))
    return copy


def test_a_folder_with_a_table_is_divided_by_its_folds(task_of):
    task = task_of()
    assert (task.kind, task.metric, task.classes) == ("multiclass", "accuracy", ["dog", "rain", "rooster", "sneezing"])
    assert [division.name for division in task.divisions] == ["fold0", "fold1", "fold2"]
    for division in task.divisions:
        assert len(division.test) == 8 and len(division.train) == 16 and not set(division.test) & set(division.train)
    assert sorted(np.concatenate([division.test for division in task.divisions])) == list(range(24))
    for clip, key in enumerate(task.keys):
        assert task.classes[task.labels[clip][0]] == key.partition("-")[0]
    assert (task.targets.sum(1) == 1).all()


def test_the_audio_is_the_files_own(task_of, real_folder):
    task = task_of()
    for clip in (0, 11, 23):
        (path,) = (real_folder / "audio").glob(f"{task.keys[clip]}.*")
        waveform, rate_hz = decode(path.read_bytes())
        assert np.abs(task.waveform(clip, rate_hz) - waveform).max() <= 1 / 32768
    assert task.seconds == pytest.approx([5] * 24, abs=0.01)
    assert len(task_of(clip_seconds=1.5).waveform(0, 8000)) == 12_000


@pytest.mark.parametrize("rates_hz", [(8000, 8000), (8000, 11025)], ids=["one rate", "several"])
def test_a_clip_is_heard_in_testing_as_it_is_in_training(task_of, tmp_path, rates_hz):
    """At twice its rate: the bands above 4 kHz hold what the resampling leaves there."""
    folder = tmp_path / "phone"
    folder.mkdir()
    rng, lines = np.random.default_rng(0), ["filename,label,split"]
    for number in range(4):
        rate_hz = rates_hz[number % 2]
        noise = np.convolve(rng.normal(0, 0.1, rate_hz), np.ones(4) / 4, "same")
        soundfile.write(folder / f"{number}.wav", noise, rate_hz)
        lines.append(f"{number}.wav,{'ab'[number % 2]},{'train' if number < 2 else 'test'}")
    (folder / "meta.csv").write_text("\n".join(lines))
    task = task_of(folder)
    index = task.shards_of(task.divisions[0], tmp_path / "index.safetensors")
    data = yaml.safe_load((ROOT / "conf" / "data" / "folder.yaml").read_text())["data"]
    data |= dict(shards=str(index), split="train", num_workers=0, batch_size=2)
    data = ShardData(**data, default_rate_hz=16_000, run_dir=None, needs_labels=True)
    loader = data.train_loader(
        rank=0, world_size=1, accumulate=1, start_step=0, max_steps=1, seed=0, crop_samples=data.rate_hz
    )
    method = torch.nn.Module()
    method.frontend = SimpleNamespace(rate_hz=16_000)
    runner = Pretraining(method, optim=None, max_steps=1, batch_size=2, waveform_rate_hz=data.rate_hz, seed=0)
    (batch,) = loader
    heard = runner.prepare(batch)
    for key, trained in zip(heard.key, heard.waveform.numpy(), strict=True):
        tested = task.waveform(task.keys.index(key), 16_000)
        spectra = [np.abs(np.fft.rfft(waveform)[4400:]).mean() for waveform in (trained, tested)]
        assert np.abs(trained - tested).max() < 1e-6 and spectra[0] == pytest.approx(spectra[1], rel=0.05)


def test_next_folds_and_shares_validate(task_of):
    for division, held_out in zip(task_of(validation="next").divisions, task_of().divisions[1:], strict=False):
        assert np.array_equal(division.validation, held_out.test)
        assert len({*division.train, *division.validation, *division.test}) == 24
    shares = task_of(validation=0.3).divisions[0]
    assert 0 < len(shares.validation) < 16 and not set(shares.validation) & {*shares.train, *shares.test}


def test_a_column_of_names_is_a_split(task_of):
    task = task_of(split="part")
    assert [d.name for d in task.divisions] == [""] and len(task.divisions[0].test) == 8
    by_hash = task_of(split="part", test_splits=["test"], train_splits=["train"], validation=0.2)
    assert np.array_equal(by_hash.divisions[0].test, task.divisions[0].test)


def test_the_loader_takes_a_division_with_the_tasks_labels(task_of, tmp_path):
    task = task_of(fold="fold", validation="next")
    division = task.divisions[1]
    index = Index.load(task.shards_of(division, tmp_path / "fold1.safetensors"))
    assert index.vocabulary == task.classes and len(index) == 24
    of_split = {"train": division.train, "val": division.validation, "test": division.test}
    for split, clips in of_split.items():
        assert sorted(index.key(clip) for clip in index.select(split=split)) == sorted(task.keys[c] for c in clips)
    for clip in range(len(index)):
        assert index.labels(clip) == [index.key(clip).partition("-")[0]]
    data = yaml.safe_load((ROOT / "conf" / "data" / "folder.yaml").read_text())["data"]
    data |= dict(shards=str(index.path), split="train", validation_split="val", num_workers=0, batch_size=4)
    loader = ShardData(**data, default_rate_hz=16_000, run_dir=None, needs_labels=True, ).train_loader(
        rank=0, world_size=1, accumulate=1, start_step=0, max_steps=2, seed=0, crop_samples=8000
    )  # fmt: skip
    for batch in loader:
        names = [task.classes[int(row.argmax())] for row in batch.target]
        assert names == [key.partition("-")[0] for key in batch.key]


def test_packed_shards_are_a_task_by_themselves_and_with_a_table(task_of, tmp_path):
    task = task_of(None, shards=str(DEMO))
    assert len(task) == 150 and len(task.classes) == 10 and len(task.divisions) == 5
    table = tmp_path / "own.csv"
    quiet = {"rain", "sea_waves", "crackling_fire"}
    lines = [f"{key}.flac,{'quiet' if task.classes[ids[0]] in quiet else 'loud'},{number % 5}"
             for number, (key, ids) in enumerate(zip(task.keys, task.labels, strict=True))]  # fmt: skip
    table.write_text("filename,label,fold\n" + "\n".join(lines))
    other = task_of(None, shards=str(DEMO), metadata=str(table))
    assert other.classes == ["loud", "quiet"] and other.keys == task.keys and other.hash != task.hash


def test_the_hash_changes_with_labels_divisions_and_audio_only(task_of, real_folder, tmp_path):
    same = task_of().hash
    assert task_of(name="other", published={"us": 1.0}).hash == same
    assert task_of(split="part").hash != same
    changed = rewritten(real_folder, tmp_path, lambda text: text.replace("dog-0.ogg,dog", "dog-0.ogg,rain"))
    assert (changed / "meta.csv").read_text() != (real_folder / "meta.csv").read_text()
    assert task_of(changed).hash != same


EVENTS = "filename\tonset\toffset\tevent_label\n"


def sed_folder(folder: Path, **tables: str) -> Path:
    (folder / "audio").mkdir(parents=True)
    for name in ("a", "b", "c"):
        soundfile.write(folder / "audio" / f"{name}.wav", np.random.default_rng(1).normal(0, 0.1, 8000), 8000)
    for name, text in tables.items():
        (folder / f"{name}.tsv").write_text(EVENTS + text)
    return folder


def test_dcase_tables_give_events_by_split(task_of, tmp_path):
    folder = sed_folder(
        tmp_path / "sed",
        train="a.wav\t0.1\t0.5\tdog\na.wav\t0.2\t0.9\tcat\nc.wav\t\t\t\n",
        test="b.wav\t0.3\t0.4\tdog\n",
    )
    task = task_of(folder)
    assert task.kind == "events" and task.metric == "event_f1" and task.classes == ["cat", "dog"]
    events = dict(zip(task.keys, task.events, strict=True))
    assert events == {"a": [(0.1, 0.5, 1), (0.2, 0.9, 0)], "b": [(0.3, 0.4, 1)], "c": []}
    assert [task.keys[clip] for clip in task.divisions[0].test] == ["b"]
    assert task.targets[task.keys.index("a")].tolist() == [1, 1] and task.targets[task.keys.index("c")].sum() == 0


def test_of_a_clip_that_is_cut_the_events_are_cut_too(task_of, tmp_path):
    tables = dict(
        train="a.wav\t0.1\t0.5\tdog\na.wav\t0.2\t0.9\tcat\na.wav\t0.6\t0.7\tdog\n", test="b.wav\t0.3\t0.4\tdog\n"
    )
    task = task_of(sed_folder(tmp_path / "sed", **tables), clip_seconds=0.6)
    assert task.events[task.keys.index("a")] == [(0.1, 0.5, 1), (0.2, 0.6, 0)]


def test_events_past_the_end_of_their_recording_are_named(task_of, tmp_path, caplog):
    tables = dict(train="a.wav\t0.1\t1.2\tdog\nb.wav\t0.2\t0.9\tcat\n", test="c.wav\t0.3\t9.0\tdog\nc.wav\t7\t8\tcat\n")
    task_of(sed_folder(tmp_path / "sed", **tables))
    (said,) = [record.getMessage() for record in caplog.records if "after their recording" in record.getMessage()]
    assert said.startswith("2 events end ") and said.endswith("nothing is heard: audio/c.wav: dog, 0.3 to 9 s of 1 s")


@pytest.mark.parametrize(
    "line, said",
    [
        ("a.wav\t0.5\t0.2\tdog\n", "train.tsv line 2: dog ends at 0.2 s, not after its onset at 0.5 s"),
        ("a.wav\t-0.5\t0.2\tdog\n", "line 2: dog has onset '-0.5', offset '0.2': give seconds from the clip's start"),
        ("a.wav\t0.5\tinf\tdog\n", "line 2: dog has onset '0.5', offset 'inf': give seconds from the clip's start"),
        ("a.wav\t0.5\tlate\tdog\n", "train.tsv line 2: onset '0.5', offset 'late': give seconds"),
        ("a.wav\t0.5\t0.7\t\n", "train.tsv line 2: an event without a label"),
        ("a.wav\t0.5\n", "train.tsv line 2: 2 values for 4 columns"),
        ("../../a.wav\t0.5\t0.7\tdog\n", "is no file below the set's folder"),
    ],
)
def test_events_that_cannot_be_are_refused_by_line(task_of, tmp_path, line, said):
    folder = sed_folder(tmp_path / "sed", train=line, test="b.wav\t0.3\t0.4\tdog\n")
    with pytest.raises(UserError) as error:
        task_of(folder)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.faults("C5")
@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(folds=[7]), "task.folds=[7]: there is no fold 7; the set has [0, 1, 2]"),
        (dict(folds=[1, 1]), "task.folds=[1, 1]: name at least one, each once"),
        (dict(folds=[]), "task.folds=[]: name at least one, each once"),
        (dict(label="lable"), "no column 'lable'; it has filename, label, fold, part"),
        (dict(fold="part"), "is not a number 0, 1, 2 ...; a column of names is a split: task.split=COLUMN"),
        (dict(split="part", test_splits=["eval"]), "task.test_splits=['eval']: there is no split 'eval'"),
        (dict(classes=["dog", "rain"]), "the label 'rooster' is not in task.classes"),
        (dict(classes=["dog", "rain", "rooster", "sneezing", "whale"]), "no clip to train on is of class 'whale'"),
        (dict(kind="events"), "does not say when; it needs tsv files"),
        (dict(metric="event_f1"), "task.metric=event_f1: a multiclass task is judged by accuracy"),
        (dict(validation=1.5), "task.validation=1.5: a share of the training clips"),
        (dict(test=0.5), "exclude each other"),
        (dict(root="/nowhere", about="Fetch it."), "task.root=/nowhere: no such folder. Fetch it."),
        (dict(metadata="labels.csv"), "no such file; name the table of labels with task.metadata"),
        (dict(shards="x"), "give the set's folder, or packed shards"),
    ],
)
def test_what_cannot_be_meant_is_one_line_that_names_the_key(task_of, settings, said):
    with pytest.raises(UserError) as error:
        task_of(**settings)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.faults("C5")
def test_several_labels_need_a_multilabel_task(task_of, real_folder, tmp_path):
    folder = rewritten(real_folder, tmp_path, lambda text: text.replace("dog-0.ogg,dog", "dog-0.ogg,dog;rain"))
    assert task_of(folder).kind == "multilabel" and task_of(folder).metric == "mAP"
    with pytest.raises(UserError, match="has 2 labels, and a multiclass task needs one each"):
        task_of(folder, kind="multiclass")


@pytest.mark.faults("C5")
def test_labels_that_are_not_what_is_asked_are_refused_before_the_audio_is_packed(task_of, tmp_path):
    for settings in (dict(kind="events"), dict(metric="psds1"), dict(classes=["dog", "rain"])):
        with pytest.raises(UserError):
            task_of(cache_dir=str(tmp_path / "cache"), **settings)
    assert not (tmp_path / "cache").exists()


@pytest.mark.faults("C5")
def test_a_class_list_that_lacks_one_of_527_is_refused_with_both_counts():
    names = [f"class{number}" for number in range(527)]
    columns = SimpleNamespace(names=names, labels=SimpleNamespace(ids=np.arange(527)), known=None)
    with pytest.raises(UserError, match=r"'class526' is not in task.classes \(526 classes, .* 527, 1 of them unknown"):
        classes_of(columns, names[:-1], "labels.csv")
    head = SimpleNamespace(geometry={"num_classes": 526})
    with pytest.raises(UserError, match="scores 526 classes without names, the task has 527"):
        check_classes(SimpleNamespace(head=head, labels=None), names, "x")
    with pytest.raises(UserError, match=r"the class 'class526' \(1 of 527 are unknown to it\)"):
        check_classes(SimpleNamespace(head=head, labels=names[:-1]), names, "x")


@pytest.mark.faults("C5")
def test_missing_files_are_named_and_too_many_of_them_stop(task_of, real_folder, tmp_path):
    folder = rewritten(real_folder, tmp_path, lambda text: text)
    gone = next((folder / "audio").glob("dog-1.*"))
    gone.unlink()
    with pytest.raises(UserError, match=r"1 of 24 recordings cannot be used, such as audio/dog-1.* \(no such file\)"):
        task_of(folder)
    assert len(task_of(folder, max_bad_fraction=0.1)) == 23


def test_packing_says_how_much_goes_where_and_begins_only_where_there_is_room(task_of, real_folder, tmp_path, caplog):
    caplog.set_level("INFO")
    num_bytes = sum(path.stat().st_size for path in (real_folder / "audio").iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=num_bytes // 2))
        said = "packing its 24 files once takes about .* MB in .*tasks, where .* MB are free; .*task.cache_dir=DIR"
        with pytest.raises(UserError, match=f"{said}.*audiossl pack .* --out SHARDS.*task.shards=SHARDS"):
            task_of(cache_dir=str(tmp_path))
    assert not list(tmp_path.glob("tasks/*/shard-*"))
    task = task_of(cache_dir=str(tmp_path))
    (said,) = [record.getMessage() for record in caplog.records if "packing" in record.getMessage()]
    assert "24 files" in said and str(tmp_path / "tasks") in said and "free" in said
    estimate, packed = float(said.split("about ")[1].split()[0]) * 1e6, task.index.shards[0].stat().st_size
    assert packed == pytest.approx(estimate, rel=0.1) and "MB" in said
    caplog.clear()
    task_of(cache_dir=str(tmp_path))
    assert "packing" not in caplog.text
