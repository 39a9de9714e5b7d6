"""What does someone who finds an encoder want to know before using it?

What it is, the lines that use it, what it hears, on what and by which code it was trained, and what one may do with it.
All of it is read off the export's description; what the description does not know, the card says so.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import yaml

HUB_LICENCES = {"MIT": "mit", "Apache-2.0": "apache-2.0", "CC-BY-4.0": "cc-by-4.0", "CC-BY-NC-4.0": "cc-by-nc-4.0"}
PAPERS = {
    "AudioMAE": ("Audio-MAE", "2207.06405"),
    "ATSTClip": ("ATST-Clip", "2204.12076"),
    "ATSTFrame": ("ATST-Frame", "2306.04186"),
    "ATSTC2F": ("ATST-C2F", "2306.04186"),
    "PaSST": ("PaSST", "2110.05069"),
}
SUPERVISED = ("ATSTC2F", "PaSST")


def model_card(description: dict[str, Any], repo_id: str | None = None) -> str:
    """Write the model card (README.md, Markdown with a YAML head) of an export; `repo_id` is what the example loads."""
    parts = [_head(description), _what(description), _use(description, repo_id), _hearing(description)]
    return "\n\n".join([*parts, _training(description), _licence(description)]) + "\n"


def _head(description: dict[str, Any]) -> str:
    task = "audio-classification" if description.get("vocabulary") else "feature-extraction"
    head = {"library_name": "audiossl", "pipeline_tag": task, "tags": ["audio", _method(description)[0].lower()]}
    licence = description.get("licence")
    if licence:
        known = HUB_LICENCES.get(licence["name"])
        head |= {"license": known} if known else {"license": "other", "license_name": _short(licence["name"])}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _method(description: dict[str, Any]) -> tuple[str, str | None]:
    name = str(description.get("method") or "encoder").rpartition(".")[2]
    return PAPERS.get(name, (name, None))


def _what(description: dict[str, Any]) -> str:
    (name, paper), sizes = _method(description), description["geometry"]
    source = f" ([arXiv:{paper}](https://arxiv.org/abs/{paper}))" if paper else ""
    patch, stride = (" x ".join(map(str, sizes[key])) for key in ("patch", "stride"))
    lines = [
        f"# {name} encoder\n",
        f"A vision transformer over log-mel patches, trained by {name}{source}: {sizes['depth']} blocks of width "
        f"{sizes['width']} with {sizes['num_heads']} heads, patches of {patch} (mel bands x frames) at a stride of "
        f"{stride}, {sizes.get('num_class_tokens', 1)} class token(s), positions: {sizes['positions']}.",
    ]
    if str(description.get("method")).rpartition(".")[2] in SUPERVISED:
        lines.append("It LEARNED FROM LABELS: compare it with methods that do.")
    if head := description.get("head"):
        names = description.get("vocabulary") or []
        some = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
        lines.append(f"Its classifier scores {head['num_classes']} classes{some}; encoder.json names them.")
        if (pooling := description.get("weak_pooling", "none")) != "none":
            lines.append(f"It scores moments; `clip_logits` pools those of a clip ({pooling}), as in training.")
    return "\n".join(lines)


def _use(description: dict[str, Any], repo_id: str | None) -> str:
    width, rate = description["geometry"]["width"], description["frontend"]["rate_hz"]
    return f"""## Use

```python
import audiossl  # pip install from audiossl's repository

model = audiossl.load({(repo_id or "the/folder/of/this/file")!r})
found = model.embed("clip.wav")  # any length and rate; or embed(waveform, rate_hz)
print(found.clip.shape, found.frames.shape)  # (1, {width}), (1, moments, {width})
```

Any rate will do (it is resampled to {rate} Hz). The front end is part of the model: what another one shows it means
nothing to it."""


def _hearing(description: dict[str, Any]) -> str:
    settings = description["frontend"]
    rows = [f"| {key} | {_show(value)} |" for key, value in settings.items() if key != "_target_"]
    name = str(settings.get("_target_")).rpartition(".")[2]
    title = f"## What it hears\n\n{name}, hash `{description.get('frontend_hash', 'unknown')}`:"
    return "\n".join([title, "", "| setting | value |", "|---|---|", *rows])


def _training(description: dict[str, Any]) -> str:
    corpus, provenance = description.get("corpus") or {}, description.get("provenance") or {}
    facts = {
        "shards": _names_only(corpus.get("shards")),
        "corpus hash": (provenance.get("corpus_hash") or "")[:16] or None,
        "mean and deviation of its log-mel": _pair(corpus.get("mean"), corpus.get("std")),
        "started from": _names_only(provenance.get("init")),
        "steps": provenance.get("steps"),
        "clips a step": provenance.get("global_batch"),
        "audiossl": description.get("audiossl"),
        "commit": provenance.get("git"),
        "torch": (provenance.get("versions") or {}).get("torch"),
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    rest = "" if provenance else "\n\nNo more is recorded of its training."
    return "## How it was trained\n\n" + "\n".join(lines) + rest


def _licence(description: dict[str, Any]) -> str:
    licence = description.get("licence")
    if licence is None:
        said = "None is recorded: no weights that have one went into it. Who trained it has to name one."
    else:
        note = f" ({licence['note']})" if licence.get("note") else ""
        said = f"{licence['name']}{note}, from the weights it was made from: {licence.get('source') or 'unknown'}."
    return f"## Licence\n\n{said}"


def _names_only(value: Any) -> str | None:
    """Keep the ends of paths: whole ones are of no use elsewhere and may tell more than one wants."""
    if isinstance(value, dict):
        return ", ".join(value)
    if isinstance(value, list):
        return ", ".join(str(_names_only(one)) for one in value)
    return None if value is None else " ".join("/".join(PurePath(w).parts[-2:]) for w in str(value).split(" "))


def _pair(mean: Any, std: Any) -> str | None:
    return None if mean is None else f"{_show(mean)}, {_show(std)}"


def _short(value: Any) -> str | None:
    return None if value is None else str(value).replace("; ", "-and-")[:60]


def _show(value: Any) -> str:
    return "null" if value is None else str(value)
