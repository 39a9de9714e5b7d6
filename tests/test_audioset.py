"""AudioSet's csv files are read as published, and a file's name means one segment or none."""

import numpy as np
import pytest
from audiosets import write_classes, write_segments

from audiossl.errors import UserError
from audiossl.packing.audioset import parse_stem, possible_times_ms, read_classes, read_segments, split_of

NAMES = [  # stem, id, what the times can mean in ms
    ("--4gqARaEJE", "--4gqARaEJE", None),
    ("Y--4gqARaEJE", "--4gqARaEJE", None),
    ("Yabcdefghij", "Yabcdefghij", None),
    ("YYabcdefghij", "Yabcdefghij", None),
    ("_bcdefghij_", "_bcdefghij_", None),
    ("Y_bcdefghij_", "_bcdefghij_", None),
    ("-0BIyqJj9ZU_30.000", "-0BIyqJj9ZU", {(30_000, None)}),
    ("-0BIyqJj9ZU_30", "-0BIyqJj9ZU", {(30_000, None), (30, None)}),
    ("-0BIyqJj9ZU_30000", "-0BIyqJj9ZU", {(30_000_000, None), (30_000, None)}),
    ("Y-0BIyqJj9ZU_30.000_40.000", "-0BIyqJj9ZU", {(30_000, 40_000)}),
    ("-0BIyqJj9ZU_30000_40000", "-0BIyqJj9ZU", {(30_000_000, 40_000_000), (30_000, 40_000)}),
    ("-0BIyqJj9ZU_30-40", "-0BIyqJj9ZU", {(30_000, 40_000), (30, 40)}),
    ("abcdefghij__0", "abcdefghij_", {(0, None)}),
    ("Yabcdefghij__0", "abcdefghij_", {(0, None)}),
    ("Yabcdefghij_0", "Yabcdefghij", {(0, None)}),
    ("Yabcdefghi_1_30", "abcdefghi_1", {(30_000, None), (30, None)}),
    ("_123456789_1_30", None, None),
    ("abcdefghijk", "abcdefghijk", None),
    ("ABCDEFGHIJK", "ABCDEFGHIJK", None),
    ("abcdefghij", None, None),
    ("Zabcdefghijk", None, None),
    ("abcdefghijk_", None, None),
    ("abcdefghijk_3x", None, None),
    ("abcdefgh.jk", None, None),
    ("abcdéfghijk", None, None),
]


@pytest.mark.parametrize(("stem", "name", "times"), NAMES, ids=[row[0] for row in NAMES])
def test_a_files_name_is_split_in_one_way_only(stem, name, times):
    parsed = parse_stem(stem)
    if name is None:
        assert parsed is None
    else:
        assert parsed[0] == name
        assert (None if parsed[1] is None else possible_times_ms(*parsed[1:])) == times


def test_the_class_list_keeps_its_order_and_the_commas_in_its_names(tmp_path):
    classes = read_classes(write_classes(tmp_path))
    assert len(classes.names) == len(classes.mids) == 527
    assert (classes.names[1], classes.names[131]) == ("Male speech, man speaking", "Bee, wasp, etc.")
    assert classes.ids["/m/07hvw1"] == 526 and classes.mids[526] == "/m/07hvw1"


def test_segments_are_read_in_the_published_syntax(tmp_path):
    classes = read_classes(write_classes(tmp_path))
    rows = [("--4gqARaEJE", 0.0, [74, 0]), ("-zzabcdefgh", 430.5, [526]), ("--4gqARaEJE", 70.0, [1])]
    paths = [
        write_segments(tmp_path, "eval", rows),
        write_segments(tmp_path, "balanced_train", [("Yab_c-fghij", 5, [0])]),
    ]
    found = read_segments(paths, classes)
    assert [found.name(row) for row in range(4)] == [
        "--4gqARaEJE_0",
        "-zzabcdefgh_430500",
        "--4gqARaEJE_70000",
        "Yab_c-fghij_5000",
    ]
    assert np.array_equal(found.end_ms, [10_000, 440_500, 80_000, 15_000])
    assert [found.labels(row).tolist() for row in range(4)] == [[74, 0], [526], [1], [0]]
    assert [found.splits[table] for table in found.table] == ["eval", "eval", "eval", "balanced_train"]
    assert found.rejected == [] and found.notes == []


def test_unknown_labels_and_repeated_segments_are_rejected_with_the_place(tmp_path):
    classes = read_classes(write_classes(tmp_path))
    rows = [("aaaaaaaaaaa", 0, [0]), ("bbbbbbbbbbb", 0, [0, "/m/nope"]), ("aaaaaaaaaaa", 0, [1])]
    paths = [write_segments(tmp_path, "eval", rows), write_segments(tmp_path, "mine", [("aaaaaaaaaaa", 0, [74])])]
    found = read_segments(paths, classes)
    assert sorted(found.rejected) == [
        ("aaaaaaaaaaa_0", "segment is listed before, in eval_segments.csv"),
        ("aaaaaaaaaaa_0", "segment is listed before, in eval_segments.csv"),
        ("bbbbbbbbbbb_0", "eval_segments.csv line 5: '/m/nope' is not in class_labels_indices.csv"),
    ]
    assert found.order.tolist() == [0]


def test_a_table_with_fewer_rows_than_it_announces_is_noted(tmp_path):
    path = write_segments(tmp_path, "eval", [("aaaaaaaaaaa", 0, [0]), ("bbbbbbbbbbb", 0, [0])])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    found = read_segments([path], read_classes(write_classes(tmp_path)))
    assert found.notes == ["eval_segments.csv announces 2 segments and holds 1: cut, or filtered?"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('aaaaaaaaaaa, 0.000, 10.000, "/m/09x0r', "line 4: unexpected end of data"),
        ("aaaaaaaaaaa, 0.000, 10.000, /m/09x0r,/m/04rlf", "line 4: 5 values"),
        ("aaaaaaaaaaa, 0.000", "line 4: 2 values"),
        ('aaaaaaaaaa, 0.000, 10.000, "/m/09x0r"', "line 4: 'aaaaaaaaaa' is no id of 11"),
        ('aaaaaaaaaaa, 10.000, 10.000, "/m/09x0r"', "line 4: start 10.000, end 10.000"),
        ('aaaaaaaaaaa, nan, 10.000, "/m/09x0r"', "line 4: "),
        ('aaaaaaaaaaa, 0.000, 1e99, "/m/09x0r"', "line 4: "),
        ('aaaaaaaaaaa, 0.000, 10.000, ""', "line 4: no label"),
        ("", "has no segments"),
    ],
)
def test_a_row_that_cannot_be_read_is_one_line_naming_file_and_line(tmp_path, row, message):
    path = write_segments(tmp_path, "eval", [])
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_segments([path], read_classes(write_classes(tmp_path)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("index,mid\n0,/m/a\n", "not with index,mid,display_name"),
        ("index,mid,display_name\n0,/m/a,A\n2,/m/b,B\n", "are not 0, 1, 2"),
        ("index,mid,display_name\n0,/m/a,A\n0,/m/b,B\n", "line 3"),
        ("index,mid,display_name\n0,/m/a,A\n1,/m/a,B\n", "'/m/a' more than once"),
        ("index,mid,display_name\n0,/m/a,A\n1,/m/b,A\n", "'A' more than once"),
        ("index,mid,display_name\n0,/m/a,A,B\n", "line 2"),
        ("index,mid,display_name\n", "is it whole"),
    ],
)
def test_a_class_list_that_cannot_be_meant_is_refused(tmp_path, table, message):
    (tmp_path / "classes.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / "classes.csv")


def test_the_split_is_the_name_of_the_table(tmp_path):
    names = {"balanced_train_segments.csv": "balanced_train", "eval_segments.csv": "eval", "mine.csv": "mine"}
    assert {name: split_of(tmp_path / name) for name in names} == names
