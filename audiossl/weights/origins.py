"""What did weights hear when they were trained, and whose are they?

An encoder knows a sound only as its own front end showed it: with other windows or mel bands the weights load as well
as ever and mean nothing. So a run that starts from weights compares its front end with theirs, setting by setting, and
their licence goes along. The authors' files hold neither; here is what their papers and repositories say.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import yaml

from audiossl.errors import UserError

log = logging.getLogger(__name__)

PUBLISHED = {"audiomae": "kaldi_fbank", "atst": "atst_mel", "passt": "passt_mel"}  # files of conf/frontend
VARIANTS = {  # of which a file does not tell its own: all that were published, and what AudioSet was normalised by
    "audiomae": {"mean": -4.2677393, "std": 4.5689974},
    "atst": {"window_ms": (64, 40)},
    "passt": {"hop_ms": (10, 5, 3.125)},
}
LICENCES = {
    "audiomae": {
        "name": "CC-BY-NC-4.0",
        "source": "https://github.com/facebookresearch/AudioMAE",
        "note": "by its LICENSE; its README says CC-BY-4.0, so take it as non-commercial until the authors say",
    },
    "atst": {
        "name": "MIT",
        "source": "https://github.com/Audio-WestlakeU/audiossl",
        "note": "its LICENSE names the checkpoints too",
    },
    "passt": {
        "name": "CC-BY-4.0",
        "source": "https://github.com/kkoutini/PaSST",
        "note": "of the weights; the code is Apache-2.0",
    },
}
FREE = ("seconds",)  # how much of a clip is heard, not how
OF_THE_CORPUS = ("mean", "std")  # data sets have their own
IN_TRAINING = ("fmin_jitter_hz", "fmax_jitter_hz")  # augmentation


def published_frontend(family: str) -> dict[str, Any]:
    """Give the settings that a family's published weights heard; a tuple where several were published."""
    from audiossl.config.cli import CONF  # Hydra, which loading an export does without

    text = (CONF / "frontend" / f"{PUBLISHED[family]}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text) | VARIANTS[family]


def check_frontend(source: str, heard: Mapping[str, Any] | None, ours: Mapping[str, Any], *, mode: str) -> None:
    """Compare what the weights of `source` `heard` with the run's front end; None for weights that heard nothing.

    Raises `UserError` for the first setting that differs, with `mode` "check"; "ignore" warns of it. A corpus' mean and
    deviation and what only training draws may differ, with a warning; the clip's length may without.
    """
    for key, theirs in (heard or {}).items():
        allowed = theirs if isinstance(theirs, tuple) else (theirs,)
        if key in FREE or ours.get(key) in allowed:
            continue
        said = f"init={source}: its weights heard frontend.{key}={_show(theirs)}, this run's is {_show(ours.get(key))}"
        if key in OF_THE_CORPUS + IN_TRAINING:
            log.warning("%s; right where a corpus has its own", said)
        elif mode == "ignore":
            log.warning("%s; init_frontend=ignore lets it pass", said)
        else:
            raise UserError(f"{said}; {_way_out(key, allowed[0])}, or init_frontend=ignore to train on regardless")


def join_licences(*licences: dict[str, Any] | None) -> dict[str, Any] | None:
    """Join the licences of all that weights were made from: every one of them holds. None where there are none."""
    known = [licence for n, licence in enumerate(licences) if licence and licence not in licences[:n]]
    if len(known) < 2:
        return known[0] if known else None
    return {
        key: "; ".join(str(one[key]) for one in known if one.get(key)) or None for key in ("name", "source", "note")
    }


def _way_out(key: str, value: Any) -> str:
    if key != "_target_":
        return f"give frontend.{key}={_show(value)}"
    names = {"KaldiFbank": "kaldi_fbank", "AtstMel": "atst_mel", "PasstMel": "passt_mel"}
    name = names.get(str(value).rpartition(".")[2])
    return f"give frontend={name}" if name else f"give frontend._target_={value}"


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " or ".join(map(_show, value))
    return "null" if value is None else str(value)
