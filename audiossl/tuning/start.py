"""Which encoder is fine-tuned, and how does it hear clips of another length?

Whatever `init` is, a run, an export, a published file or a model of the hub, it becomes one export in the run's folder:
what a fold starts from, and what a resumed run still finds when `init` is long gone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from audiossl.config.settings import instantiate
from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.importing.command import import_weights
from audiossl.importing.lengths import fit_length
from audiossl.pretrained import PretrainedEncoder
from audiossl.probes.sources import open_model, untrained
from audiossl.weights.export import hash_of, write_export
from audiossl.weights.translation import Licence, Settings, Translation

log = logging.getLogger(__name__)

UNTRAINED = "untrained:"
LONGEST_SECONDS = 10.24  # AudioSet's clips
AUTHORS = (".pth", ".pt", ".bin")


def start_of(config: Mapping[str, Any], folder: Path, seed: int) -> Path:
    """Name the export that a training starts from; an untrained one is another for each of several seeds."""
    has_several = config["init"].startswith(UNTRAINED) and config["seeds"]
    return folder / (f"start-seed{seed}.safetensors" if has_several else "start.safetensors")


class Init:
    """Open `init` once, before anything takes long, and let go of it when all that starts from it is written."""

    def __init__(self, init: str):
        self.init = init
        self._model: PretrainedEncoder | None = None

    def open(self) -> PretrainedEncoder:
        """Give the model; raise `UserError` for what cannot be opened."""
        if self._model is None:
            self._model = _opened(self.init.removeprefix(UNTRAINED))
        return self._model

    def close(self) -> None:
        """Keep no model in memory for as long as a training lasts."""
        self._model = None


def write_start(
    config: Mapping[str, Any],
    init: Init,
    path: Path,
    seed: int,
    *,
    clip_seconds: float,
    keep: bool,
) -> None:
    """Fit `init` to the clip length and normalisation that the config asks for, and export it to `path`.

    `clip_seconds` is how long the set's clips usually are, for `frontend.seconds=clips`: see `length_for`.
    `untrained:` before it draws all weights anew, from `seed`. `keep`: an export that a resumed run finds there stays.
    Raises `UserError` for what cannot be opened, or cannot be fitted.
    """
    if keep and path.exists():
        return
    model = init.open()
    if config["init"].startswith(UNTRAINED):
        model = untrained(model, seed)
    chunked = config["model"]["chunk_frames"] is not None
    asked = config["frontend"] | {name: config["data"][name] for name in ("mean", "std")}
    positions = None
    if asked["seconds"] == "clips":
        asked["seconds"] = None if config["evaluate"] else length_for(model, clip_seconds, chunked=chunked)
        positions = kept_positions(model, asked["seconds"])
    given = {name: value for name, value in asked.items() if value is not None}
    model = _fitted(model, given, positions, chunked=chunked) if given else model
    write_export(model.encoder, model.head, model.description, path, attention=model.attention)


def length_for(model: PretrainedEncoder, clip_seconds: float, *, chunked: bool = False) -> float | None:
    """Choose how much of a clip an encoder hears at once, in seconds: all of it, in whole patches; None: as it is.

    So Audio-MAE's published ESC-50 recipe hears 512 frames. It stays as it is where positions were learned and do not
    reach so far, or where it has no length of its own; and it is never longer than 10.24 s or what it was trained with.
    """
    own, geometry = model.frontend.frames, model.encoder.geometry
    if own is None or chunked:
        return None
    hop = model.frontend.hop_samples / model.rate_hz
    (_, patch), (_, stride) = geometry["patch"], geometry["stride"]
    wanted = min(math.ceil(clip_seconds / hop), max(own, round(LONGEST_SECONDS / hop)))
    frames = patch + math.ceil(max(wanted - patch, 0) / stride) * stride
    is_learned = geometry["positions"] in ("learned", "time+frequency")
    if frames == own or (is_learned and frames > geometry["frames"]):
        return None
    return frames * hop


def kept_positions(model: PretrainedEncoder, seconds: float | None) -> str | None:
    """Choose how positions are fitted to a length nobody asked for: each cell keeps its own code where it can.

    Differs: Audio-MAE's fine-tuning numbers the cells anew, which moves codes that the weights were trained with; a
    `frontend.seconds` that is given does the same.
    """
    geometry = model.encoder.geometry
    if seconds is None or geometry["positions"] in ("learned", "time+frequency"):
        return None
    is_shorter = round(seconds * model.rate_hz / model.frontend.hop_samples) <= geometry["frames"]
    return "corrected" if is_shorter else None


def _opened(init: str) -> PretrainedEncoder:
    path = Path(init)
    is_authors = path.is_file() and (path.suffix in AUTHORS or (path.suffix == ".ckpt" and not _is_ours(path)))
    if not is_authors:
        return open_model(init)
    try:
        imported = import_weights(path, Settings())
    except UserError as error:
        raise UserError(f"init={init}: {error}; import it first: python -m audiossl import {init} DIR ...") from error
    found = imported.translation
    for line in (*found.notes, *found.warnings):
        log.warning("%s: %s", init, line)
    head = None if imported.head is None else imported.head.geometry
    description = {"geometry": imported.encoder.geometry, "frontend": found.frontend, "head": head}
    description |= {"format": 2, "audiossl": "", "method": found.method, "mask_padding": found.mask_padding}
    description |= {"frontend_hash": hash_of(found.frontend), "licence": asdict(found.licence), "provenance": None}
    return PretrainedEncoder(imported.encoder, instantiate(found.frontend), imported.head, description).eval()


def _is_ours(path: Path) -> bool:
    from audiossl.weights.reading import read_torch_file

    return "audiossl" in read_torch_file(path)


def _fitted(
    model: PretrainedEncoder, given: dict[str, float], positions: str | None, *, chunked: bool
) -> PretrainedEncoder:
    """Let an encoder hear clips of another length, or of another corpus.

    Positions follow as an import's do, but for clips that are encoded in chunks no longer than they reach.
    """
    weights = dict(model.encoder.state_dict())
    geometry, frontend = dict(model.encoder.geometry), dict(model.description["frontend"])
    licence = Licence(**model.description["licence"]) if model.description.get("licence") else None
    found = Translation(model.description.get("method", ""), weights, geometry, frontend, licence, [])
    if chunked:
        found.frontend |= given
    else:
        fit_length(found, Settings(frontend=given, positions=positions))
    for line in (*found.notes, *found.warnings):
        log.warning("frontend.seconds=%s: %s", given.get("seconds"), line)
    encoder = Encoder(**found.geometry)
    encoder.load_state_dict(found.encoder)
    about = {"geometry": found.geometry, "frontend": found.frontend, "frontend_hash": hash_of(found.frontend)}
    if model.head is not None and "seconds" in given:
        log.warning("frontend.seconds=%s: the classifier was trained on clips of another length", given["seconds"])
    parts = encoder, instantiate(found.frontend), model.head, model.description | about, model.attention
    return PretrainedEncoder(*parts).eval()


def check_classes(model: PretrainedEncoder, classes: list[str], init: str) -> list[int]:
    """Find the classes of a task among those of a classifier: their places in its logits.

    Raises `UserError` for an encoder without classifier and for classes that it does not know.
    """
    if model.head is None:
        raise UserError(f"init={init}: holds no classifier to evaluate; fine-tune it: evaluate=false")
    num_known = model.head.geometry["num_classes"]
    if model.labels is None:
        if num_known != len(classes):
            raise UserError(
                f"init={init}: scores {num_known} classes without names, the task has {len(classes)}; import it with "
                "labels=FILE"
            )
        log.warning("init=%s does not name its classes; the task's are taken to be in its order", init)
        return list(range(num_known))
    place = {name: number for number, name in enumerate(model.labels)}
    if unknown := [name for name in classes if name not in place]:
        raise UserError(
            f"init={init}: does not know the class '{unknown[0]}' ({len(unknown)} of {len(classes)} are unknown to "
            f"it); it knows {', '.join(model.labels[:6])}, ..."
        )
    return [place[name] for name in classes]
