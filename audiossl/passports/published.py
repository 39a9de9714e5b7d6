"""How does a corpus compare with what is published of AudioSet?

Only what papers and published code state is compared (`audioset.yaml` names the source of each figure). There is no
error of sampling in those, and nobody says which copy of AudioSet they were measured on.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from audiossl.passports.difference import IMPORTANT_SHARE, IMPORTANT_STDS, SURE, Difference, percent

NOT_AUDIOSET = 0.5  # of its clips: with fewer this is a part of it, or another corpus


def with_audioset(passport: dict) -> list[Difference]:
    """Compare a passport with the published figures."""
    known = published_audioset()
    found = [_clips(passport, known), _classes(passport["labels"], known), _durations(passport["durations"], known)]
    if evaluation := passport["splits"].get("eval"):
        found.append(_evaluation(evaluation, known))
    if "audio" not in passport:
        return [*found, Difference("audio", "not measured (--clips 0); nothing is said about log-mels")]
    front_ends = passport["audio"]["frontends"]
    found.append(_kaldi(front_ends["kaldi_fbank"], known))
    found.append(_passt(front_ends["passt_mel"], known))
    found.append(_atst(front_ends["atst_mel"], known))
    return found


def published_audioset() -> dict[str, float]:
    """Read the published figures by name."""
    text = Path(__file__).with_name("audioset.yaml").read_text(encoding="utf-8")
    return {name: entry["value"] for name, entry in yaml.safe_load(text).items()}


def _clips(passport: dict, known: dict) -> Difference:
    share = passport["clips"] / known["clips"]
    if abs(1 - share) < 1e-3:
        return Difference("clips")
    if share > 1:
        return Difference(
            "clips", f"{passport['clips']:,}, more than the {known['clips']:,} published: not AudioSet alone", True
        )
    counts = f"{passport['clips']:,} of the {known['clips']:,} segments published"
    if share < NOT_AUDIOSET:
        text = f"{counts} ({percent(share)}): a part of AudioSet, or another corpus"
        return Difference("clips", f"{text}; {_scores(known)}", True)
    text = f"{percent(1 - share)} of the clips are missing ({counts}; no laboratory has all)"
    return Difference("clips", f"{text}: expect a lower mAP; {_scores(known)}", 1 - share > IMPORTANT_SHARE)


def _scores(known: dict) -> str:
    half, tenth, hundredth = (known[f"map_of_{part}"] for part in ("half", "tenth", "hundredth"))
    parts = f"{half} on half, {tenth} on a tenth, {hundredth} on a hundredth"
    return f"Audio-MAE reports {known['map_of_all']} mAP fine-tuned on all of it, {parts}"


def _classes(labels: dict, known: dict) -> Difference:
    used = labels["classes"] - labels["classes_without_a_clip"]
    if used == known["classes"]:
        return Difference("classes")
    if not labels["labels"]:
        return Difference("classes", "no labels: enough to pre-train, not to fine-tune", True)
    missing = known["classes"] - used
    if used < known["classes"] / 2 or missing < 0:
        return Difference(
            "classes", f"{used:,} classes have clips, AudioSet has {known['classes']}: other labels", True
        )
    word = "class has" if missing == 1 else "classes have"
    return Difference(
        "classes", f"{missing} {word} no clip: a mean over {known['classes']} classes cannot be formed", True
    )


def _durations(durations: dict, known: dict) -> Difference:
    short, median = durations["share_below_10_s"], durations["seconds"]["p50"]
    words = []
    if abs(median - known["seconds"]) > 0.1:
        words.append(f"half of the clips are longer than {median:.2f} s, AudioSet's have {known['seconds']:g} s")
    if short > 0.02:
        words.append(f"{percent(short)} are shorter than 10 s: they are padded where the published runs had sound")
    return Difference("durations", "; ".join(words), bool(words))


def _evaluation(clips: int, known: dict) -> Difference:
    sizes = f"Audio-MAE evaluated on {known['eval_clips_audiomae']:,}, PaSST on {known['eval_clips_passt']:,}"
    text = f"{clips:,} clips in split eval; {sizes}: scores on different copies are not comparable to 0.3 mAP"
    differs = clips not in (known["eval_clips_audiomae"], known["eval_clips_passt"])
    return Difference("evaluation", text if differs else "")


def _kaldi(here: dict, known: dict) -> Difference:
    mean, std = known["kaldi_mean"], known["kaldi_std"]
    shift = here["mean"] - mean
    is_near = abs(shift) <= max(IMPORTANT_STDS * std, SURE * (here["error_of_mean"] or 0))
    if is_near and abs(here["std"] - std) <= max(IMPORTANT_STDS * std, SURE * (here["error_of_std"] or 0)):
        return Difference("kaldi_fbank")
    text = (
        f"mean of the log-mel {abs(shift):.2f} {'higher' if shift > 0 else 'lower'} ({here['mean']:.3f}; Audio-MAE's "
        f"copy {mean:.3f}, ATST's authors {known['kaldi_mean_atst_repository']:.3f}), standard deviation "
        f"{here['std']:.3f} ({std:.3f}): another level, another front end or other sounds; "
        f"set data.mean={here['mean']:.4f} data.std={here['std']:.4f}"
    )
    return Difference("kaldi_fbank", text, True)


def _passt(here: dict, known: dict) -> Difference:
    mean, std = known["passt_mean"], known["passt_std"]
    if abs(here["mean"] - mean) <= 0.5 * std and 0.5 <= here["std"] / std <= 2:
        return Difference("passt_mel")
    shifted, spread = (here["mean"] - mean) / (2 * std), here["std"] / (2 * std)
    text = (
        f"(x + 4.5) / 5 brings these log-mels to mean {shifted:.2f} and standard deviation {spread:.2f} where 0 and "
        f"0.5 are meant; for training from scratch frontend.mean={here['mean']:.4f} frontend.std={here['std']:.4f}"
    )
    return Difference("passt_mel", text)


def _atst(here: dict, known: dict) -> Difference:
    low, high = known["atst_min_db"], known["atst_max_db"]
    if here["min"] >= low and here["max"] <= high:
        return Difference("atst_mel")
    bounds = f"the published bounds, {low:.1f} to {high:.1f} dB"
    text = f"{here['min']:.1f} to {here['max']:.1f} dB leave {bounds}: values beyond -1 and 1"
    return Difference("atst_mel", text)
