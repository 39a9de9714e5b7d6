"""One case of the published code."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


class Golden:
    """Hold what went in, what came out and how exact it is; each family adds our model with the case's weights."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.case = json.loads((folder / "case.json").read_text())
        self.config = self.case["config"]
        self.input = load_file(folder / "input.safetensors")
        self.expected = load_file(folder / "expected.safetensors")

    def bound(self, name: str) -> float:
        """Ten times the published code's own rounding; 1e-5 where the case does not tell it."""
        told = self.case.get("tolerance", {}).get(name, 1e-6)
        return 10 * (told if isinstance(told, float) else told["max_abs_diff_f32_vs_f64"])

    def same(self, ours: torch.Tensor, name: str) -> None:
        torch.testing.assert_close(ours, self.expected[name], rtol=0, atol=self.bound(name))
