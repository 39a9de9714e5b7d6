"""What does a checkpoint make of a sound of which it hears only a part?

`python -m audiossl reconstruct FILE --checkpoint RUN` hides patches of any audio file's log-mel, lets the model fill
them in, and writes a picture and a sound: the original, then the reconstruction, both by way of the log-mel, so that
what differs between them is the model's doing and not Griffin-Lim's. Training ends with the same for a few clips.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from audiossl.embeddings import evaluating, valid_frames
from audiossl.errors import UserError
from audiossl.masking import Masking
from audiossl.noise import Noise
from audiossl.plots import Reconstruction, reconstruction_figure
from audiossl.sound.audio import AudioError, decode, probe, resample
from audiossl.sound.inversion import waveform_from_log_mel, write_wav

MASKS = ("random", "time", "frequency", "time+frequency")


def reconstruct_clips(
    method: nn.Module, clips: Sequence[tuple[str, Tensor]], *, seed: int = 0, masking: Masking | None = None
) -> list[Reconstruction]:
    """Hide and fill in each of `clips`: pairs of a name and a waveform (S,) at the method's rate.

    A clip longer than the front end's frames is cut, a shorter one padded as in training; what is padding is left out
    of the result. `masking` replaces the method's own. Mode and random state of the caller stay as they were.
    """
    masking = method.masking if masking is None else masking
    with evaluating(method):
        return [_reconstruct(method, name, waveform, masking, seed, i) for i, (name, waveform) in enumerate(clips)]


@torch.no_grad()
def _reconstruct(
    method: nn.Module, name: str, waveform: Tensor, masking: Masking, seed: int, number: int
) -> Reconstruction:
    frontend, device = method.frontend, method.frontend.window.device
    waveform = waveform[: frontend.samples_for(frontend.frames)]
    num_samples = torch.tensor([len(waveform)])
    spectrogram = frontend(waveform[None].to(device), num_samples)
    keep = masking.keep(Noise.for_batch(seed, number, 1, device), method.encoder.grid_for(spectrogram))
    result = method.reconstruct(spectrogram, keep=keep)
    bands, frames = result["hidden"].shape[-2:]  # overlapping patches may leave out a remainder
    frames = min(frames, int(valid_frames(frontend, num_samples)))

    def of_clip(tensor: Tensor) -> Tensor:
        return tensor[0, 0, :bands, :frames].cpu()

    is_guessed = method.norm_target and not method.level_weight
    return Reconstruction(
        name=name,
        original=of_clip(frontend.denormalise(spectrogram)).numpy(),
        filled=of_clip(frontend.denormalise(result["filled"])).numpy(),
        hidden=of_clip(result["hidden"]).numpy(),
        hop_seconds=frontend.hop_samples / frontend.rate_hz,
        fmin_hz=frontend.fmin_hz,
        fmax_hz=frontend.fmax_hz,
        note="level and spread of each patch guessed from visible ones" if is_guessed else "",
    )


def write_reconstructions(
    method: nn.Module,
    clips: Sequence[tuple[str, Tensor]],
    folder: Path | str,
    *,
    seed: int = 0,
    masking: Masking | None = None,
    name: str = "reconstruction",
) -> list[Reconstruction]:
    """Write `name`.png and `name`.wav to `folder` and return what they show; see `reconstruct_clips`.

    The wav plays original, then reconstruction, clip after clip, at the front end's rate.
    """
    shown = reconstruct_clips(method, clips, seed=seed, masking=masking)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        reconstruction_figure(shown, Path(folder) / f"{name}.png")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from error
    log_mels = [torch.from_numpy(values) for clip in shown for values in (clip.original, clip.filled)]
    parts = [waveform_from_log_mel(log_mel, method.frontend, seed=seed) for log_mel in log_mels]
    write_wav(Path(folder) / f"{name}.wav", parts, method.frontend.rate_hz)
    return shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("file", type=Path, help="any audio file: rate, channels and length do not matter")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's folder, or a .ckpt file")
    parser.add_argument("--mask", choices=MASKS, help="what to hide; as in training by default")
    parser.add_argument("--ratio", type=float, help="how much to hide, 0.8 for example; as in training by default")
    parser.add_argument("--seed", type=int, default=0, help="which patches to hide")
    parser.add_argument("--start", type=float, default=0.0, help="seconds into the file")
    parser.add_argument("--seconds", type=float, help="take no more than this; what the model takes in by default")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for NAME.reconstruction.png and .wav")


def main(args: argparse.Namespace) -> int:
    """Run the command; raises `UserError` for what the user can mend."""
    from audiossl.running.build import load_method

    _check_audio(args.file, args.start, args.seconds)
    method, _ = load_method(args.checkpoint)
    if not hasattr(method, "reconstruct"):
        raise UserError(f"{args.checkpoint}: {type(method).__name__} fills no gaps; give an Audio-MAE run")
    masking = _masking(method, args.mask, args.ratio)
    waveform, length = _read(args.file, args.start, args.seconds, method.frontend)
    clips = [(args.file.stem, waveform)]
    name = f"{args.file.stem}.reconstruction"
    (clip,) = write_reconstructions(method, clips, args.out, seed=args.seed, masking=masking, name=name)
    rate = method.frontend.rate_hz
    taken = len(waveform) / rate
    print(f"{args.file}: {taken:.2f} s from {args.start:g} s of {length:.2f} s, {_padding(taken, method)}")
    print(f"masked error: {_error(clip)}")
    print(f"picture: {args.out / name}.png\nsound:   {args.out / name}.wav (original, then reconstruction)")
    return 0


def _masking(method: nn.Module, mask: str | None, ratio: float | None) -> Masking:
    own = method.masking
    if mask is None and ratio is None:
        return own
    if ratio is not None and not 0 < ratio < 1:
        raise UserError(f"--ratio {ratio:g}: the share of hidden patches lies between 0 and 1, 0.8 for example")
    chosen = Masking(own.mask if mask is None else mask, own.ratio if ratio is None else ratio, None, None)
    rows, columns = grid = method.encoder.grid
    try:
        kept = chosen.num_kept(grid)
    except UserError:
        kept = 0
    if kept in (0, rows * columns):
        what = "none" if kept else "all"
        raise UserError(f"--mask {chosen.mask} --ratio {chosen.ratio:g}: hides {what} of {rows} x {columns} patches")
    return chosen


def _error(clip: Reconstruction) -> str:
    if not clip.hidden.any():
        return "none of the clip itself was hidden, only padding; another --seed hides other patches"
    flat = "all of the clip was hidden" if clip.hidden.all() else f"{clip.guess_db:.1f} dB for a flat guess"
    return f"{clip.error_db:.1f} dB, mean over the hidden cells ({flat})"


def _padding(taken: float, method: nn.Module) -> str:
    frontend, patch = method.frontend, method.encoder.patch[1]
    full = frontend.samples_for(frontend.frames) / frontend.rate_hz
    if taken >= full - 1e-6:
        return "the model's whole window"
    is_tiny = taken < frontend.samples_for(patch) / frontend.rate_hz
    return f"{'shorter than one patch, ' if is_tiny else ''}padded to the model's {full:.2f} s"


def _check_audio(path: Path, start: float, seconds: float | None) -> None:
    if start < 0 or (seconds is not None and seconds <= 0):
        raise UserError(f"--start {start:g} --seconds {seconds}: a start is not negative, a length more than 0")
    try:
        length = probe(path).seconds
    except AudioError as error:
        raise UserError(f"{path}: {error}") from error
    if start >= length:
        raise UserError(f"--start {start:g}: {path} ends after {length:.2f} s")


def _read(path: Path, start: float, seconds: float | None, frontend: nn.Module) -> tuple[Tensor, float]:
    """Decode what the model takes in; return it at the front end's rate, and the file's length in seconds."""
    full = frontend.samples_for(frontend.frames)
    wanted = full if seconds is None else min(full, max(1, round(seconds * frontend.rate_hz)))
    info = probe(path)
    first = int(start * info.rate_hz)
    frames = min(info.num_frames - first, -(-wanted * info.rate_hz // frontend.rate_hz))
    try:
        waveform, rate_hz = decode(path, first, frames)
    except AudioError as error:
        raise UserError(f"{path}: {error}") from error
    return torch.from_numpy(resample(waveform, rate_hz, frontend.rate_hz))[:wanted], info.seconds
