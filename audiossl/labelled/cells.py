"""What stands in the lines of a table that somebody made, in a spreadsheet or by a script?

Comma- or tab-separated, quoted or not, with a byte order mark or without, whatever ends its lines. A cell that cannot
be meant is refused with its line: above all a quote left open, which would swallow the rows behind it in silence.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from audiossl.errors import UserError

MAX_FOLD = 2**31 - 1  # an index keeps folds in 32 bits
CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
NOT_UTF8 = re.compile(r"[\ud800-\udfff]")  # what surrogateescape makes of such bytes
UTF16 = (b"\xff\xfe", b"\xfe\xff")

Line = tuple[int, dict[str, str]]


@contextmanager
def open_table(path: Path) -> Iterator[tuple[list[str], Iterator[Line]]]:
    """Open a table: its columns, and the number and the cells, by column, of every line that is not blank.

    Cells come without blanks around them; columns without a name are left out. Raises `UserError`, at once or when the
    lines are taken, for a file that is no table, naming its line.
    """
    with open(path, "rb") as file:
        if file.read(2) in UTF16:
            raise UserError(f"{path}: is UTF-16; save it as UTF-8, which spreadsheets call 'CSV UTF-8'")
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        rows = _rows(path, csv.reader(file, delimiter="\t" if "\t" in first else ",", strict=True))
        header = next(rows, (0, []))[1]
        if not any(header):
            raise UserError(f"{path}: is empty; its first line names the columns, such as filename,label,fold")
        if len(header) == 1 and ";" in header[0]:
            raise UserError(f"{path}: its cells are separated by ';'; save it with commas or tabs between them")
        if repeated := [name for name, times in Counter(filter(None, header)).items() if times > 1]:
            raise UserError(f"{path} has the column '{repeated[0]}' more than once; rename one")
        yield list(filter(None, header)), _lines(path, header, rows)


def lines_of(path: Path) -> Iterator[Line]:
    """Yield the lines of a table as `open_table` does."""
    with open_table(path) as (_, lines):
        yield from lines


def fold_of(text: str, where: str, way_out: str = "") -> int | None:
    """Read the number of a fold, None for an empty cell; pandas writes 1.0 for 1 where others are missing.

    Raises `UserError` that begins with `where` and ends with `way_out`.
    """
    if not text:
        return None
    whole = re.fullmatch(r"(\d{1,10})(?:\.0*)?", text)
    if not whole or int(whole[1]) > MAX_FOLD:
        raise UserError(f"{where} '{text[:40]}' is not a number 0, 1, 2 ...{way_out}")
    return int(whole[1])


def plain(text: str, where: str) -> str:
    """Give a cell that is a name, or raise `UserError` where it is no line of text."""
    if CONTROL.search(text):
        raise UserError(f"{where}: {text[:60]!r} is no single line of text; is a quote left open there?")
    if NOT_UTF8.search(text):
        raise UserError(f"{where}: {text[:60]!r} is not UTF-8; save the table as UTF-8")
    return text


def _rows(path: Path, rows: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines that are not blank, with their numbers; one that cannot be read is named by where it begins."""
    number = 0
    try:
        for values in rows:
            values = [value.strip() for value in values]
            if any(values):
                yield rows.line_num, values
            number = rows.line_num
    except csv.Error as error:
        why = "is a quote left open there, or not doubled within quotes?"
        raise UserError(f"{path} line {number + 1}: not a table ({error}); {why}") from error


def _lines(path: Path, header: list[str], rows: Iterator[tuple[int, list[str]]]) -> Iterator[Line]:
    for number, values in rows:
        if len(values) != len(header):
            raise UserError(f"{path} line {number}: {len(values)} values for {len(header)} columns")
        yield number, {name: value for name, value in zip(header, values, strict=True) if name}
