"""What does one clip sound like, in numbers: its level, its bandwidth, and its log-mel by every front end?

A clip is decoded whole, with the loader's checks, and goes through the product's own front ends without their
normalisation: what comes out is the log-mel that `data.mean` and `data.std` describe. Only sums leave this module, so a
corpus of any size can be added up exactly and in any order.

Differs: the loader rounds a resampled waveform to 16 bits before the front end; here it is not rounded. Where a corpus
holds empty bands (the demo's upsampled speech) that raises the mean by some hundredths.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf

from audiossl.config.cli import CONF
from audiossl.config.settings import instantiate
from audiossl.loading.clips import MP3_SLACK_FRAMES
from audiossl.loading.shardfiles import ShardFiles
from audiossl.sound import audio, waveform
from audiossl.sound.audio import AudioError
from audiossl.sound.frontend import FrontEnd

FIRST = "kaldi_fbank"
MAX_SECONDS = 60.0  # of a clip that are measured: the first ones
SILENCE_SECONDS = 0.05  # zeros shorter than this are a waveform that crosses zero
ROLLOFF = 0.99
OFTEN = 0.05  # of the frames
HALF_EMPTY = 0.55  # of the band: what upsampling from half the rate, and its filter, leave
SCALARS = ("seconds", "peak", "power", "dc", "silent", "clipped", "rolloff_hz", "edge_hz", "is_half_empty")
MEL_SCALARS = ("cells", "sum", "squares", "min", "max")
FIXED_POINT = 2.0**20  # sums of bands are added as integers, which no order changes
_FFT = 1024
_ROUNDING_POWER = 2.0**-30 / 12  # of a waveform rounded to 16 bits
_ABOVE_ROUNDING = 16.0  # 12 dB: dither is up to 5 dB above rounding, its loudest frames as much again


class Place(NamedTuple):
    """Say where a clip's bytes lie and what the index believes of them."""

    row: int
    shard: str
    offset: int
    size: int
    num_frames: int
    rate_hz: int


@dataclass(frozen=True)
class Measure:
    """Say what is measured: at which rate waveforms come to the front ends (None: resample to each one's own)."""

    rate_hz: int | None

    def num_scalars(self) -> int:
        return len(SCALARS) + len(MEL_SCALARS) * len(front_end_settings())


def front_end_settings() -> dict[str, dict]:
    """Read the settings of conf/frontend by name, Audio-MAE's first; what refers to the data's statistics is unset."""
    files = sorted((CONF / "frontend").glob("*.yaml"), key=lambda path: (path.stem != FIRST, path.stem))
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}


def bare_front_ends() -> dict[str, FrontEnd]:
    """Build every front end so that it returns the log-mel as it is, of all frames a clip has."""
    built = {}
    for name, settings in front_end_settings().items():
        whole = OmegaConf.create({"frontend": settings | {"seconds": None}, "data": {"mean": 0.0, "std": 0.5}})
        built[name] = instantiate(whole.frontend).eval()
        built[name].centre, built[name].scale = 0.0, 1.0
    return built


def in_config(settings: dict, facts: dict) -> dict[str, float]:
    """Spell statistics in the keys and units of a front end's config: mean and std, or the bounds of its decibels."""
    if "min_db" in settings:
        return {"frontend.min_db": facts["min"], "frontend.max_db": facts["max"]}
    group = "data" if str(settings["mean"]).startswith("${data.") else "frontend"
    return {f"{group}.mean": facts["mean"], f"{group}.std": facts["std"]}


def measure(
    place: Place, what: Measure, front_ends: dict[str, FrontEnd], shards: ShardFiles
) -> tuple[np.ndarray, list[np.ndarray]] | str:
    """Measure a clip: `SCALARS` then `MEL_SCALARS` of each front end (float64), and each one's sums by band (int64).

    Returns the reason where it cannot be decoded.
    """
    try:
        clip = read_clip(place, shards)
    except AudioError as error:
        return str(error)
    scalars, bands = list(levels(clip, place.rate_hz)), []
    for front_end in front_ends.values():
        with torch.inference_mode():
            heard = _at_rate(clip, place.rate_hz, what.rate_hz, front_end.rate_hz)
            log_mel = front_end(heard)[0, 0].double()  # (F, T)
        scalars += [log_mel.numel(), log_mel.sum().item(), log_mel.square().sum().item()]
        scalars += [log_mel.min().item(), log_mel.max().item()]
        bands.append(np.rint(log_mel.sum(1).numpy() * FIXED_POINT).astype(np.int64))
    return np.array(scalars), bands


def read_clip(place: Place, shards: ShardFiles) -> np.ndarray:
    """Decode a clip, mono float32, at most its first 60 s; raise AudioError where the loader would skip it."""
    data = shards.read(place.shard, place.offset, place.size)
    found = audio.probe(data)
    if found.rate_hz != place.rate_hz:
        raise AudioError(f"has {found.rate_hz} Hz where the index says {place.rate_hz} Hz")
    if found.num_frames < place.num_frames - MP3_SLACK_FRAMES:
        raise AudioError(f"cut: {found.num_frames} of {place.num_frames} frames")
    longest = int(MAX_SECONDS * place.rate_hz)
    if found.num_frames > longest:
        audio.decode(data, found.num_frames - 1, 1)  # a cut shows at the end
        return audio.decode(data, 0, longest)[0]
    return audio.decode(data)[0]


def levels(clip: np.ndarray, rate_hz: int) -> tuple[float, ...]:
    """Give `SCALARS` of a waveform (S,): peak, mean square and mean in units of full scale, shares of its samples."""
    rounded = audio.to_int16(clip)
    values = clip.astype(np.float64)
    rolloff_hz, edge_hz = bandwidth(values, rate_hz)
    shares = (
        _zeros_in_runs(rounded == 0, round(SILENCE_SECONDS * rate_hz)),
        (np.abs(rounded.astype(int)) >= 32767).sum(),
    )
    silent, clipped = (float(share) / len(clip) for share in shares)
    power, peak = float(np.square(values).mean()), float(np.abs(values).max())
    is_half_empty = float(edge_hz < HALF_EMPTY * rate_hz / 2)
    return len(clip) / rate_hz, peak, power, float(values.mean()), silent, clipped, rolloff_hz, edge_hz, is_half_empty


def bandwidth(values: np.ndarray, rate_hz: int) -> tuple[float, float]:
    """Give the frequency below which 99 % of the energy lies, and the highest one that is louder than rounding.

    The second is the edge of what was recorded: a clip upsampled from 8 kHz has its edge at 4 kHz, whatever its rate
    now. It must be louder in 5 % of the frames, so that one clipped sample does not count as a recorded band. NaN for
    a waveform without energy.
    """
    whole = len(values) // _FFT * _FFT
    frames = values[:whole].reshape(-1, _FFT) if whole else np.pad(values, (0, _FFT - len(values)))[None]
    window = np.hanning(_FFT)
    spectrum = np.fft.rfft((frames - frames.mean(1, keepdims=True)) * window)
    power = spectrum.real**2 + spectrum.imag**2
    summed = np.cumsum(power.sum(0))
    if not summed[-1] > 0:
        return float("nan"), float("nan")
    hz = rate_hz / _FFT
    rolloff = int(np.searchsorted(summed, ROLLOFF * summed[-1]))
    often = np.quantile(power, 1 - OFTEN, axis=0)
    smooth = np.convolve(often, np.ones(5) / 5, mode="same")
    loud = np.flatnonzero(smooth > _ABOVE_ROUNDING * _ROUNDING_POWER * np.square(window).sum())
    return rolloff * hz, float(loud[-1] * hz) if len(loud) else 0.0


def _at_rate(clip: np.ndarray, from_hz: int, by_way_of_hz: int | None, to_hz: int) -> torch.Tensor:
    """Resample as a run does: soxr to the rate that the loader delivers, and from there on the device."""
    delivered_hz = to_hz if by_way_of_hz is None else by_way_of_hz
    delivered = torch.from_numpy(audio.resample(clip, from_hz, delivered_hz))[None]
    return waveform.resample(delivered, delivered_hz, to_hz)


def _zeros_in_runs(is_zero: np.ndarray, shortest: int) -> int:
    """Count the zeros that stand in runs of at least `shortest`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_zero, [False]]).astype(np.int8)))
    lengths = edges[1::2] - edges[::2]
    return int(lengths[lengths >= shortest].sum())


@contextmanager
def one_thread():
    """Compute with one thread: sums come out the same whatever the machine and the number of processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
