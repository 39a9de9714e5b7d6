"""Timings as ratios: each file is run as `python -m benchmarks.NAME` in the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
