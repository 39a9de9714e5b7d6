"""What do the clips of a corpus sound like, from a sample of them, with how much error?

The sample are the clips whose keys hash lowest, so it is the same set in whatever order the shards stand, the sample of
half a corpus is mostly in the sample of the whole, and two copies of one corpus are measured on the same clips. Sums
are exact (integers, or sorted first): the numbers do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.loading.shardfiles import ShardFiles
from audiossl.packing.writer import counted, start_worker
from audiossl.passports.clipfacts import (
    FIXED_POINT,
    MAX_SECONDS,
    MEL_SCALARS,
    SCALARS,
    Measure,
    Place,
    bare_front_ends,
    front_end_settings,
    in_config,
    measure,
    one_thread,
)
from audiossl.passports.corpusfacts import mixed, percentiles, set_hash
from audiossl.remote.location import RemoteShard
from audiossl.remote.prefetch import remote_shards

WORTH_WORKERS_CLIPS = 64  # starting processes takes longer than measuring fewer
_CHUNK = 8  # clips a worker takes at a time

_worker: dict = {}


def choose(hashes: np.ndarray, num_clips: int | None, seed: int) -> np.ndarray:
    """Choose positions in `hashes`, ascending: the `num_clips` whose keys hash lowest under `seed`, None for all."""
    if num_clips is None or num_clips >= len(hashes):
        return np.arange(len(hashes))
    lot = mixed(hashes ^ mixed(np.array([seed], np.uint64)))
    return np.sort(np.argpartition(lot, num_clips)[:num_clips]) if num_clips else np.zeros(0, np.int64)


def audio_facts(
    index: Index, rows: np.ndarray, hashes: np.ndarray, *, population: int, what: Measure, workers: int, seed: int
) -> dict:
    """Measure clips `rows`, whose keys hash to `hashes`, drawn from `population` clips; sum up in plain types.

    The result names every clip that could not be decoded. Raises UserError when none could.
    """
    front_ends = front_end_settings()
    table = np.full((len(rows), what.num_scalars()), np.nan)
    bands = [np.zeros(settings["num_mels"], np.int64) for settings in front_ends.values()]
    failures = []
    with tqdm(total=len(rows), unit="clip", desc="passport", mininterval=0.5) as bar:
        for position, result in enumerate(counted(_measured(index, rows, what, workers), bar)):
            if isinstance(result, str):
                i = int(rows[position])
                failures.append({"key": index.key(i), "shard": index.shard_path(i).name, "reason": result})
                continue
            table[position] = result[0]
            for total, clip in zip(bands, result[1], strict=True):
                total += clip
    is_good = ~np.isnan(table[:, 0])
    if not is_good.any():
        raise UserError(f"none of the {len(rows)} clips could be decoded; first: {failures[0]['reason']}")
    in_order = np.argsort(hashes[is_good], kind="stable")  # float sums depend on the order, so it is always this one
    table = table[is_good][in_order]
    column = dict(zip(SCALARS, table.T, strict=False))
    facts = {
        "clips": len(rows),
        "seed": seed,
        "hash": set_hash(hashes),
        "rate_hz": what.rate_hz,
        "seconds_at_most": MAX_SECONDS,
        "hours": float(column["seconds"].sum()) / 3600,
        "failures": _failure_facts(failures, len(rows)),
        "levels": level_facts(column),
        "frontends": {},
    }
    share_left = 1 - len(rows) / population
    for number, (name, settings) in enumerate(front_ends.items()):
        first = len(SCALARS) + number * len(MEL_SCALARS)
        mel = dict(zip(MEL_SCALARS, table[:, first : first + len(MEL_SCALARS)].T, strict=True))
        summed = mel_facts(mel, share_left)
        summed |= {"config": in_config(settings, summed), "rate_hz": settings["rate_hz"]}
        summed |= {"fmin_hz": settings["fmin_hz"], "fmax_hz": settings["fmax_hz"] or settings["rate_hz"] / 2}
        frames = float(mel["cells"].sum()) / settings["num_mels"]
        summed["bands"] = [round(total / FIXED_POINT / frames, 4) for total in bands[number].tolist()]
        facts["frontends"][name] = summed
    return facts


def mel_facts(mel: dict[str, np.ndarray], share_left: float) -> dict:
    """Sum up the log-mels of clips: mean and standard deviation over all cells, and the standard errors of both.

    Clips are the unit that is drawn, so the error is that of a ratio of sums over clips, not over cells; it shrinks
    with the share of the corpus that was left out, and is 0 where every clip was measured.
    """
    cells, num_clips = float(mel["cells"].sum()), len(mel["cells"])
    mean = math.fsum(mel["sum"]) / cells
    variance = max(math.fsum(mel["squares"]) / cells - mean**2, 0.0)
    std = math.sqrt(variance)

    def error(deviations: np.ndarray) -> float | None:
        if num_clips < 2:
            return None
        spread = math.sqrt(max(share_left, 0.0) * np.square(deviations).sum() * num_clips / (num_clips - 1))
        return float(spread / cells)

    from_mean = mel["sum"] - mean * mel["cells"]
    from_variance = mel["squares"] - 2 * mean * mel["sum"] + (mean**2 - variance) * mel["cells"]
    error_of_variance = error(from_variance)
    return {
        "mean": mean,
        "std": std,
        "error_of_mean": error(from_mean),
        "error_of_std": None if error_of_variance is None else error_of_variance / (2 * std) if std else 0.0,
        "min": float(mel["min"].min()),
        "max": float(mel["max"].max()),
    }


def level_facts(column: dict[str, np.ndarray]) -> dict:
    """Sum up levels: dB below full scale, shares of all samples, edges of the band in Hz."""
    heard = column["power"] > 0
    weight = column["seconds"] / column["seconds"].sum()
    decibels = {"peak_db": 20 * np.log10(column["peak"][heard]), "rms_db": 10 * np.log10(column["power"][heard])}
    hertz = {name: column[name][~np.isnan(column[name])] for name in ("rolloff_hz", "edge_hz")}
    return {
        **{name: percentiles(values) for name, values in {**decibels, **hertz}.items()},
        **{f"{name}_std": float(values.std()) if len(values) else None for name, values in decibels.items()},
        "histogram_rms_db": _histogram(decibels["rms_db"], np.arange(-100, 4, 2.0)),
        "histogram_peak_db": _histogram(decibels["peak_db"], np.arange(-100, 4, 2.0)),
        "clips_half_empty": float((column["is_half_empty"][heard] > 0).mean()) if heard.any() else None,
        "share_silent": float(column["silent"] @ weight),
        "clips_silent": int((~heard).sum()),
        "share_clipped": float(column["clipped"] @ weight),
        "clips_with_clipping": float((column["clipped"] > 0).mean()),
        "dc": percentiles(np.abs(column["dc"])),
    }


def duplicate_facts(index: Index, rows: np.ndarray, hashes: np.ndarray, num_clips: int | None, seed: int) -> dict:
    """Find clips whose encoded audio is the same, byte for byte, under several keys.

    Copies have the same size and length, so only clips that share both are read: all of them, or groups drawn until
    they hold `num_clips` clips; `share_read` is the share that was, and `extra` the copies beyond the first in it.
    """
    facts = np.stack([index.size[rows], index.num_frames[rows], index.rate_hz[rows]])
    order = np.lexsort(facts)
    starts = np.flatnonzero(np.r_[True, (np.diff(facts[:, order], axis=1) != 0).any(0)])
    lengths = np.diff(np.r_[starts, len(rows)])
    suspects = starts[lengths > 1], lengths[lengths > 1]
    lot = mixed(facts[0, order[suspects[0]]].astype(np.uint64) ^ mixed(np.array([seed], np.uint64)))
    drawn = np.argsort(lot, kind="stable")
    within = np.cumsum(suspects[1][drawn])
    drawn = drawn if num_clips is None else drawn[within <= num_clips]
    found, extra, num_read = [], 0, 0
    for group in tqdm(drawn.tolist(), unit="group", desc="duplicates", delay=2, mininterval=0.5):
        first, length = int(suspects[0][group]), int(suspects[1][group])
        same: dict[bytes, list[int]] = {}
        for position in order[first : first + length].tolist():
            same.setdefault(hashlib.sha256(index.read(int(rows[position]))).digest(), []).append(position)
        num_read += length
        for copies in same.values():
            if len(copies) > 1:
                extra += len(copies) - 1
                found.append(sorted(index.key(int(rows[position])) for position in copies))
    total = int(suspects[1].sum())
    share = num_read / total if total else 1.0
    return {"extra": extra, "share_read": share, "estimate": extra / share if share else None, "keys": sorted(found)}


def _failure_facts(failures: list[dict], num_clips: int) -> dict:
    failures = sorted(failures, key=lambda failure: failure["key"])
    reasons = Counter(" ".join(w for w in f["reason"].split() if not any(map(str.isdigit, w))) for f in failures)
    return {"clips": len(failures), "share": len(failures) / num_clips, "reasons": dict(reasons), "listed": failures}


def _histogram(values: np.ndarray, edges: np.ndarray) -> dict:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return {"first_edge": float(edges[0]), "width": float(edges[1] - edges[0]), "clips": counts.tolist()}


def _measured(index: Index, rows: np.ndarray, what: Measure, workers: int) -> Iterator:
    """Yield `measure` of every clip, in order, with a bounded number of results waiting."""
    remote = remote_shards(index)
    chunks = (_places(index, rows[first : first + _CHUNK]) for first in range(0, len(rows), _CHUNK))
    if workers <= 1 or len(rows) < WORTH_WORKERS_CLIPS:
        front_ends, shards = bare_front_ends(), ShardFiles(remote)
        with one_thread():
            yield from (measure(place, what, front_ends, shards) for chunk in chunks for place in chunk)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (what, remote)) as pool:
        waiting: deque = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_measure_all, chunk))
                if len(waiting) >= 4 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a worker died (memory, or a clip that crashes the decoder); try --workers 1") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _places(index: Index, rows: np.ndarray) -> list[Place]:
    columns = (index.offset[rows], index.size[rows], index.num_frames[rows], index.rate_hz[rows])
    numbers = zip(rows.tolist(), *(column.tolist() for column in columns), strict=True)
    return [Place(row, str(index.shard_path(row)), *others) for row, *others in numbers]


def _start(what: Measure, remote: dict[str, RemoteShard]) -> None:
    import torch

    start_worker()
    torch.set_num_threads(1)
    _worker.update(what=what, front_ends=bare_front_ends(), shards=ShardFiles(remote))


def _measure_all(places: list[Place]) -> list:
    return [measure(place, **_worker) for place in places]
