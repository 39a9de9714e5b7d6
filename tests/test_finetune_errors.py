"""What a user gets wrong with `finetune.py` is one line that says the way out, and exit code 2."""

from shutil import copytree

import pytest
from finetunes import clips_folder, command, config_of, encoder, events_folder, finish, run
from tunings import MAE

from audiossl.errors import UserError
from audiossl.tuning.runs import fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clips_folder(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    return clips_folder(tmp_path_factory.mktemp("folds"), folds=3)


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    return events_folder(tmp_path_factory.mktemp("events"))


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    return encoder(tmp_path_factory.mktemp("encoder"), MAE)


def refused(place, init, folder, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        run(place / "run", init, folder, *overrides)
    text = str(caught.value)
    assert "\n" not in text and not (place / "run" / "results.json").exists()
    return text


@pytest.mark.faults("C5")
def test_wrong_folds_labels_and_classes_are_named(folder, folds, init, tmp_path):
    assert "there is no fold 7; the set has [1, 2, 3]" in refused(tmp_path, init, folds, "task.folds=[1,7]")
    assert "this set has no folds" in refused(tmp_path, init, folder, "task.folds=[1]")
    said = refused(tmp_path, init, folder, "task.classes=[dog,rain]")
    assert "rooster" in said and "meta.csv" in said or "classes" in said
    said = refused(tmp_path, init, folder, "task.classes=[dog,rain,rooster,siren]")
    assert "siren" in said
    assert "no column" in refused(tmp_path, init, folder, "task.label=species") or "species" in refused(
        tmp_path, init, folder, "task.label=species"
    )


@pytest.mark.faults("C5")
def test_a_task_of_another_type_than_the_head_is_refused(folder, events, init, tmp_path):
    assert "take tuning=events" in refused(tmp_path, init, events)
    assert "model.weak_pooling=attention, or model.level=clip" in refused(tmp_path, init, folder, "tuning=events")
    said = refused(tmp_path, init, folder, "task.kind=multilabel", "model.loss=ce")
    assert "model.loss=ce: is for one label a clip" in said
    assert "test.overlap=null" in refused(tmp_path, init, events, "tuning=events", "test.overlap=null")


def test_an_event_that_ends_before_it_begins_is_named_with_its_line(events, init, tmp_path):
    broken = copytree(events, tmp_path / "set")
    with open(broken / "train.tsv", "a") as file:
        file.write("train/train0.wav\t1.5\t0.5\tdog\n")
    said = refused(tmp_path, init, broken, "tuning=events")
    assert "train.tsv" in said and "1.5" in said and "0.5" in said


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("test.overlap=1", "test.overlap=1"),
        ("test.median_frames=4", "test.median_frames=4"),
        ("test.bootstrap=-1", "test.bootstrap=-1"),
        ("test.thresholds=1.5", "test.thresholds=1.5"),
        ("model.weak_pooling=linear", "linear_softmax"),
    ],
)
def test_values_that_cannot_be_are_named_with_their_key(folder, init, tmp_path, key, said):
    assert said in refused(tmp_path, init, folder, key)


def test_an_encoder_that_is_not_there_is_named(folder, tmp_path):
    packed = f"task.cache_dir={tmp_path / 'packed'}"
    assert "nowhere" in refused(tmp_path, tmp_path / "nowhere", folder, packed)
    assert "nowhere" in refused(tmp_path, f"untrained:{tmp_path / 'nowhere'}", folder, packed)
    assert not (tmp_path / "packed").exists(), "it is said before hours of packing"
    assert not (tmp_path / "run" / "finetune.yaml").exists(), "its folder would count as a run's, and be refused"


def test_the_command_says_one_line_and_ends_with_2(folder, init, tmp_path):
    for arguments, said in (
        (["task=folder"], "init: is missing"),
        ([f"init={init}", "task=esc50"], "github.com/karolpiczak/ESC-50"),
        ([f"init={init}", f"task.rot={folder}"], "Did you mean task.root?"),
        (command(tmp_path / "run", init, folder, "task.folds=[1]"), "this set has no folds"),
    ):
        output = finish(tmp_path, *arguments, expect=2)
        lines = [line for line in output.splitlines() if line.startswith("finetune.py: ")]
        assert len(lines) == 1 and said in lines[0] and "Traceback" not in output, output


def test_a_recipe_of_the_other_command_is_named_as_one(tmp_path):
    output = finish(tmp_path, "experiment=ft_audiomae_esc50", expect=2, program="train.py")
    assert output.strip() == (
        "train.py: experiment=ft_audiomae_esc50: chooses a task, so it is a recipe of finetune.py; run it with that"
    )
    output = finish(tmp_path, "init=x", "task.root=x", "experiment=passt_s_as2m", expect=2)
    assert "a recipe of train.py" in output


def test_a_failed_job_of_a_sweep_does_not_count_as_trained(folder, init, tmp_path):
    config = config_of(tmp_path / "run", init, folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text('{"status": "failed", "error": "out of memory"}')
    assert fit(config | {"ckpt": "last"})["scores"]["score"] >= 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(UserError, match="run: holds a run already; .* go on with ckpt=last"):
        fit(config | {"ckpt": None})
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_checkpoints_are_ranked_by_what_validations_measure(folder, folds, init, tmp_path):
    said = refused(tmp_path, init, folder, "checkpoint.metric=val_acuracy")
    assert said.startswith("checkpoint.metric=val_acuracy: no validation measures it; take val_accuracy, ")
    said = refused(tmp_path, init, folds, "checkpoint.metric=val_mAP")
    assert said.startswith("checkpoint.metric=val_mAP: the set has no clips to validate on")
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("key", "said"),
    [("seeds=[1,2,1]", "each once"), ("test.weights=swa", "nothing is averaged; say from when on with swa.start")],
)
def test_what_would_be_trained_in_vain_is_refused_before(folder, init, tmp_path, key, said):
    output = finish(tmp_path, f"init={init}", f"task.root={folder}", key, expect=2)
    assert output.startswith(f"finetune.py: {key}: {said}") and output.count("\n") == 1
    assert not (tmp_path / "runs").exists()
