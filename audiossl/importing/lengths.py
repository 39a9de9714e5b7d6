"""How do weights for clips of one length hear clips of another?

Their positions are cut, stretched or computed anew, as the published code does it where it does: Audio-MAE's
(2207.06405) fixed codes are recomputed, which is what its fine-tuning's crop comes to; ATST's (2204.12076) and PaSST's
(2110.05069) learned ones are cut. The front end's own length follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from audiossl.config.settings import instantiate
from audiossl.errors import UserError
from audiossl.parts.positions import interpolate_positions, sincos_table
from audiossl.patches import grid_of
from audiossl.weights.translation import Settings, Translation

FITTING = {"published": "sine-cosine", "corrected": "sine-cosine", "cut": "learned", "interpolated": "learned"}
LONGEST = 1000  # times the length trained on; beyond it is a slip, and tables fill the memory
TABLES = {"learned": "positions.table", "time+frequency": "positions.time"}


def fit_length(found: Translation, settings: Settings) -> None:
    """Put the user's settings into the front end, and make positions fit its length where the user gave one."""
    if strange := sorted(settings.frontend.keys() - found.frontend.keys()):
        known = ", ".join(key for key in found.frontend if key != "_target_")
        raise UserError(f"{strange[0]}: the front end of these weights has no such setting; it has {known}")
    kind = "learned" if found.geometry["positions"] in TABLES else "sine-cosine"
    if settings.positions and FITTING[settings.positions] != kind:
        fitting = " or ".join(name for name, of in FITTING.items() if of == kind)
        raise UserError(f"positions={settings.positions}: these positions are {kind} ones, choose {fitting}")
    found.frontend |= settings.frontend
    bands, own = found.geometry["num_mels"], found.frontend["num_mels"]
    if own != bands:
        raise UserError(f"num_mels={own}: these weights hear {bands} mel bands")
    frames, geometry = instantiate(found.frontend).frames, found.geometry
    rows, columns = _grid(found, geometry["frames"])
    wanted = columns if frames is None else _grid(found, frames)[1]
    if wanted > LONGEST * columns:
        raise UserError(f"seconds={found.frontend['seconds']:g}: more than {LONGEST} times what the weights reach")
    if frames is None or ("seconds" not in settings.frontend and wanted <= columns):  # a shorter hop makes more of it
        if settings.positions and settings.like is None:
            raise UserError(f"positions={settings.positions}: fitted to which length? give seconds")
        return
    is_frame = geometry["positions"] == "learned" and not geometry["num_class_tokens"]
    if wanted == columns and not (is_frame and settings.positions == "interpolated"):
        return  # ATST-Frame's code stretches by a tenth of a column even at its own length
    if kind == "sine-cosine":
        said = _refit_codes(found, rows, columns, wanted, settings.positions or "published")
    else:
        said = _refit_learned(found, columns, wanted, settings.positions)
    geometry["frames"] = frames
    found.notes.append(f"positions reach {frames} frames ({wanted} columns) instead of {columns} columns: {said}")


def _grid(found: Translation, frames: int) -> tuple[int, int]:
    geometry = found.geometry
    return grid_of(geometry["num_mels"], frames, tuple(geometry["patch"]), tuple(geometry["stride"]))


def _refit_codes(found: Translation, rows: int, columns: int, wanted: int, positions: str) -> str:
    """Fit Audio-MAE's fixed codes."""
    name, table = "positions.table", found.encoder["positions.table"]
    if positions == "corrected" and wanted <= columns:
        found.encoder[name] = table[:, :wanted].contiguous()
        return "cut, so that every cell keeps the code it was trained with"
    if positions == "corrected":
        raise UserError(f"positions=corrected keeps every cell's code, and there are {columns} columns, not {wanted}")
    overlapping = found.geometry["stride"] != found.geometry["patch"]
    kind = dict(positions=found.geometry["positions"], overlapping=overlapping)
    found.encoder[name] = sincos_table((rows, wanted), table.shape[-1], **kind)
    shared = min(wanted, columns)
    moved = float((found.encoder[name][:, :shared] - table[:, :shared].float()).abs().amax())
    if moved > 1e-5:
        found.warnings.append(
            f"codes of cells that both lengths have moved by up to {moved:.2g}: the published numbering depends on "
            "the length; positions=corrected keeps them where the clip is shorter"
        )
    return "recomputed for this grid, as the published code's crop does"


def _refit_learned(found: Translation, columns: int, wanted: int, positions: str | None) -> str:
    """Fit ATST's or PaSST's learned vectors along time."""
    name = TABLES[found.geometry["positions"]]
    table = found.encoder[name]
    if positions != "interpolated" and wanted <= columns:
        found.encoder[name] = table[:, :wanted].contiguous()
        return "cut, as published"
    if positions == "cut":
        raise UserError(f"positions=cut cannot make {wanted} columns of {columns}: give positions=interpolated")
    found.encoder[name] = interpolate_positions(table.float(), wanted).contiguous()
    if found.geometry["positions"] == "time+frequency":
        found.warnings.append("the published PaSST only cuts: stretched positions were never trained")
    return f"interpolated (bicubic, scale ({wanted} + .1) / {columns})"


def cut_positions(table: Tensor, rows: int, columns: int, kept_columns: int) -> Tensor:
    """Shorten Audio-MAE's table (1, 1 + rows * columns, D) as its fine-tuning code does: keeps the class token.

    It views the table as (frequency, time) and keeps the first `kept_columns` of the second axis. Their tokens run the
    other way, so a kept row stands for another cell than it was trained for: it is what `sincos_table` gives as
    `published` for the shorter grid. `corrected` tables have no such trouble.
    """
    cells = table[:, 1:].unflatten(1, (rows, columns))[:, :, :kept_columns].flatten(1, 2)
    return torch.cat([table[:, :1], cells], dim=1)
