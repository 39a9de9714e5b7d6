"""Tables as spreadsheets and scripts leave them are read as they are meant, or refused with file, line and way out."""

import numpy as np
import pytest
import soundfile
from test_tasks import FOLDER

from audiossl.errors import UserError
from audiossl.labelled.tables import read_table
from audiossl.packing.source import read_source
from audiossl.tasks import load_task

USUAL = dict(filename="filename", audio_folder="", label=None, separator=";", split=None, fold=None)


def table(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path, text, **columns):
    return read_table(table(path / "meta.csv", text), **USUAL | columns)


PLAIN = "filename,label,fold\na.wav,dog,1\nb.wav,rain,2\n"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.encode("utf-8-sig"),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", " , "),
        "\n" + PLAIN + "  \n,,\n , , \n",
        'filename,"label","fold"\n"a.wav","dog","1"\n"b.wav","rain","2"'.encode("utf-8-sig"),
        "filename,label,fold,,\na.wav,dog,1.0,,\nb.wav,rain,02,,\n",
    ],
)
def test_a_table_says_the_same_however_it_was_saved(tmp_path, text):
    assert [row[:4] for row in read(tmp_path, text)] == [
        ("a.wav", ("dog",), None, 1), ("b.wav", ("rain",), None, 2)
    ]  # fmt: skip


def test_labels_are_words_and_keep_quotes_commas_and_zeros(tmp_path):
    text = 'filename,label,fold\na.wav,01,1\nb.wav,1.0,\nc.wav,"chèvre, ""Heidi""",3\nd.wav,犬; 1 ;;犬,2\n'
    rows = read(tmp_path, text)
    assert [row.labels for row in rows] == [("01",), ("1.0",), ('chèvre, "Heidi"',), ("犬", "1")]
    assert [row.fold for row in rows] == [1, None, 3, 2]


@pytest.mark.parametrize(
    "text",
    [
        "filename,label\na.wav, dog;rain ;\n",
        "filename,labels\na.wav,dog;;rain\n",
        "filename,label,labels\na.wav,dog;rain,animal\n",
    ],
)
def test_a_cell_holds_the_same_labels_for_a_task_and_for_packing(tmp_path, text):
    soundfile.write(tmp_path / "a.wav", np.zeros(800), 8000)
    (row,), (clip,) = read(tmp_path, text), read_source(tmp_path).clips
    assert row.labels == clip.labels == ("dog", "rain")


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty; its first line names the columns"),
        (b"\xef\xbb\xbf", "is empty"),
        ("filename,label,fold\n", "names columns and no recording"),
        (PLAIN.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (PLAIN.replace(",", ";"), "separated by ';'; save it with commas or tabs"),
        (PLAIN.replace("rain", "chèvre").encode("latin1"), "line 3: label: 'ch\\udce8vre' is not UTF-8"),
        (PLAIN.replace("label,fold", "fold,fold"), "the column 'fold' more than once; rename one"),
        (PLAIN.replace(",1", ",train"), "line 2: fold 'train' is not a number 0, 1, 2 ...; a column of names is"),
        (PLAIN.replace(",2", f",{10**12}"), "line 3: fold '1000000000000' is not a number"),
        (PLAIN.replace(",2", "," + "1" * 5000), "is not a number 0, 1, 2"),
        (PLAIN.replace(",2", ",nan"), "line 3: fold 'nan'"),
        (PLAIN.replace("dog,1", '"dog,1'), "line 2: not a table (unexpected end of data); is a quote left open there"),
        (PLAIN.replace("dog", '"dog" x'), "line 2: not a table"),
        (PLAIN.replace("dog", '"d\nog"'), "line 3: label: 'd\\nog' is no single line of text"),
        (PLAIN.replace("a.wav", '"a\n.wav"'), "'a\\n.wav' is no file below the set's folder"),
        (PLAIN.replace("b.wav", "./a.wav"), "line 3: 'a.wav' is listed twice, first in line 2; give each"),
        (PLAIN.replace("b.wav,", ""), "line 3: 2 values for 3 columns"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_meant_is_one_line_with_its_place(tmp_path, text, said):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert said in str(error.value) and "meta.csv" in str(error.value) and not set(str(error.value)) & set("\n\r\0")


def test_an_open_quote_swallows_no_rows_even_in_a_column_that_is_not_used(tmp_path):
    text = 'filename,label,note\na.wav,dog,"loud\nb.wav,rain,x\nc.wav,rain,x\n'
    with pytest.raises(UserError, match="line 2: not a table"):
        read(tmp_path, text)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    for name in "abcdef":
        noise = np.random.default_rng(ord(name)).normal(size=800) * 0.1
        soundfile.write(folder / f"{name}.wav", noise, 16000)
    return folder


def task_of(folder, text, **settings):
    table(folder / "meta.csv", text)
    return load_task(**FOLDER | {"root": str(folder), "cache_dir": str(folder.parent / "cache")} | settings)


def test_packing_reads_a_table_as_a_task_does(sounds):
    for text in (PLAIN.encode("utf-8-sig"), PLAIN.replace(",", "\t"), PLAIN.replace(",1", ",1.0") + " ,,\n"):
        table(sounds / "meta.csv", text)
        assert [(clip.path, clip.labels, clip.fold) for clip in read_source(sounds).clips] == [
            ("a.wav", ("dog",), 1), ("b.wav", ("rain",), 2)
        ]  # fmt: skip
    for text in (PLAIN.encode("utf-16"), PLAIN.replace("dog", "chèvre").encode("latin1"), PLAIN.replace("dog", '"dog')):
        table(sounds / "meta.csv", text)
        with pytest.raises(UserError, match="meta.csv"):
            read_source(sounds)


SPLITS = "filename,label,part\na.wav,x,1\nb.wav,y,1\nc.wav,x,2\nd.wav,y,2\ne.wav,y,3\nf.wav,y,\n"


def test_splits_may_be_numbers_and_clips_that_are_in_none_are_counted(sounds, caplog):
    task = task_of(sounds, SPLITS, split="part", train_splits=[1], test_splits=[2])
    assert [task.keys[clip] for clip in task.divisions[0].test] == ["c", "d"]
    assert "2 of 6 clips are left out: they are in none of the splits" in caplog.text
    caplog.clear()
    folds = task_of(sounds, SPLITS.replace("part", "fold").replace("e.wav,y,3\n", ""))
    assert [division.name for division in folds.divisions] == ["fold1", "fold2"]
    assert "1 of 5 clips are left out: they are in no fold" in caplog.text


def test_a_list_of_classes_may_begin_with_a_mark_and_must_be_utf8(sounds, tmp_path):
    text = SPLITS.replace(",x,", ",chèvre,")
    how = dict(split="part", train_splits=["1"], test_splits=["2"], classes=str(tmp_path / "names.txt"))
    table(tmp_path / "names.txt", "chèvre\r\ny\r\n".encode("utf-8-sig"))
    assert task_of(sounds, text, **how).classes == ["chèvre", "y"]
    table(tmp_path / "names.txt", "chèvre\ny\n".encode("latin1"))
    with pytest.raises(UserError, match="names.txt: is not UTF-8"):
        task_of(sounds, text, **how)


def test_two_spellings_of_one_label_are_not_two_classes(sounds):
    text = SPLITS.replace("a.wav,x", "a.wav,e\u0301").replace("c.wav,x", "c.wav,\u00e9")
    with pytest.raises(UserError, match="differ in how Unicode spells it"):
        task_of(sounds, text, split="part", train_splits=["1"], test_splits=["2"])
