"""Which code, versions and data made this run?"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from audiossl.version import __version__

PACKAGES = ("torch", "torchaudio", "lightning", "hydra-core", "omegaconf", "timm", "numpy", "soundfile", "soxr")


def provenance_of(config: dict[str, Any], corpus_hash: str) -> dict[str, Any]:
    """Collect git commit, package versions, host platform and the hash of the corpus; plain types only."""
    return {
        "audiossl": __version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "corpus_hash": corpus_hash,
        "init": None,
        "licence": None,  # of the weights it started from or was taught by
    }


def git_commit() -> str | None:
    """Give the commit of the checkout this package runs from, with `+changes` when files differ; None outside git."""
    folder = Path(__file__).resolve().parents[2]
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def version_of(name: str) -> str | None:
    """Give the version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
