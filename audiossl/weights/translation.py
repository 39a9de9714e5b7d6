"""What does a translation of somebody else's weights consist of, and what may a user say about it?

Every family's module turns the authors' tensors into a `Translation`: ours, the sizes that shapes tell, the front end
that the weights were trained with, and one `Row` for every tensor of the source, so that nothing is lost in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import Tensor

from audiossl.config.schema import nearest
from audiossl.errors import UserError


class Action(StrEnum):
    """Say what was done with a tensor."""

    USED = "used as is"
    RENAMED = "renamed"
    TRANSPOSED = "transposed"
    REORDERED = "reordered"
    CHANGED = "changed"
    DROPPED = "dropped"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Row:
    """Say what became of one tensor: its name in the source, what was done, our names for it, and why."""

    source: str
    action: Action
    ours: str = ""
    why: str = ""

    @property
    def is_unknown(self) -> bool:
        """Whether nobody knows what the tensor is for."""
        return self.action == Action.UNKNOWN


def row(source: str, key: str, ours: str, action: Action | None = None, why: str = "") -> Row:
    """Report a tensor that is taken; without `action` it is used as is, or renamed where ours differs from `key`."""
    return Row(source, action or (Action.USED if key == ours else Action.RENAMED), ours, why)


@dataclass(frozen=True)
class Licence:
    """Hold under which terms weights were published, and where that is said."""

    name: str
    source: str
    note: str = ""


@dataclass
class Translation:
    """Hold what a checkpoint becomes: tensors for `Encoder(**geometry)` and, if it has one, `LinearHead(**head)`."""

    method: str
    encoder: dict[str, Tensor]
    geometry: dict[str, Any]
    frontend: dict[str, Any]
    licence: Licence
    rows: list[Row]
    head_weights: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Any] | None = None
    mask_padding: bool = False
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Settings:
    """Hold what a user says about an import; everything else is read off the file."""

    num_heads: int | None = None
    part: str | None = None
    stride: tuple[int, int] | None = None
    positions: str | None = None
    like: str | None = None
    labels: Path | None = None
    allow_unknown: bool = False
    overwrite: bool = False
    unsafe_load: bool = False
    frontend: dict[str, Any] = field(default_factory=dict)

    @property
    def num_mels(self) -> int | None:
        """The mel bands that the user gave."""
        return self.frontend.get("num_mels")


NULLABLE, WHOLE = ("seconds", "fmax_hz"), ("rate_hz", "num_mels", "n_fft")
POSITIVE = (*NULLABLE, *WHOLE, "hop_ms", "window_ms")
CHOICES = {
    "part": ("teacher", "student"),
    "like": ("passt", "audiomae"),
    "positions": ("published", "corrected", "cut", "interpolated"),
}


def parse_settings(words: list[str], frontend_keys: Mapping[str, Any]) -> Settings:
    """Read `key=value` words; `frontend_keys` are those of any front end. Raises `UserError` that names the word."""
    settings = Settings()
    own = [key for key in vars(settings) if key != "frontend"]
    known = [*own, *frontend_keys]
    given: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        key = key.removeprefix("frontend.")
        if key in given:
            raise UserError(f"{word}: {key} is given twice")
        given.add(key)
        if not equals or not text:
            raise UserError(f"{word!r}: settings are key=value; the keys are {', '.join(known)}")
        if key not in known:
            raise UserError(
                f"{key}: no setting of import; did you mean {nearest(key, known)[0]}? There are {', '.join(known)}"
            )
        if key in own:
            setattr(settings, key, _own_value(key, text))
        else:
            settings.frontend[key] = _number(key, text)
    return settings


def _own_value(key: str, text: str) -> Any:
    if key in CHOICES:
        if text not in CHOICES[key]:
            raise UserError(f"{key}={text}: choose {', '.join(CHOICES[key])}")
        return text
    if key in ("allow_unknown", "overwrite", "unsafe_load"):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key}={text}: choose true or false")
        return text.lower() == "true"
    if key == "labels":
        return Path(text)
    try:
        numbers = [int(part) for part in text.strip("()[]").split(",")]
        if min(numbers) < 1 or len(numbers) > (2 if key == "stride" else 1):
            raise ValueError
    except ValueError:
        kind = "a whole number, or two: mel bands,frames" if key == "stride" else "a whole number"
        raise UserError(f"{key}={text}: must be {kind}") from None
    return (numbers[0], numbers[-1]) if key == "stride" else numbers[0]


def _number(key: str, text: str) -> int | float | None:
    if text.lower() in ("null", "none") and key in NULLABLE:
        return None
    try:
        number = int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{key}={text}: must be a number")
    if key in WHOLE and not isinstance(number, int):
        raise UserError(f"{key}={text}: must be a whole number")
    if key in POSITIVE and number <= 0:
        raise UserError(f"{key}={text}: must be above 0")
    return number


def count_blocks(theirs: Mapping[str, Tensor], prefix: str = "blocks.") -> int:
    """Count a model's blocks by their numbers in the names, however high those are."""
    return len({key.removeprefix(prefix).split(".")[0] for key in theirs if key.startswith(prefix)})


def heads_of(num_heads: int | None, published: Mapping[int, int], width: int) -> int:
    """Take the user's heads, or those of the published model of this width."""
    if num_heads is None and width not in published:
        raise UserError(
            f"a checkpoint does not tell its heads, and a width of {width} is not a published one: give num_heads"
        )
    return num_heads or published[width]
