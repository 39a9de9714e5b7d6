"""Checkpoints as their authors write them, made of golden tensors, for the tests of the import."""

import contextlib
import io
import json
from pathlib import Path

import torch
from conftest import ROOT, SHARED, golden_cases

import audiossl
from audiossl.__main__ import main
from audiossl.weights.reading import read_torch_file


def cases_with_weights(patterns: tuple[str, ...]) -> list[Path]:
    """List the golden cases that hold a checkpoint: those committed, and all of the full set where it is present."""
    found = {}
    for folder in (ROOT / "tests" / "golden", SHARED / "golden"):
        for pattern in patterns:
            for case in sorted(folder.glob(pattern)):
                if any((case / f"official.{kind}").exists() for kind in ("pth", "ckpt")):
                    found.setdefault(case.name, case)
    return list(found.values())


def official(pattern: str) -> tuple[dict[str, torch.Tensor], int]:
    """Read the tensors of the first golden case of a pattern, under the authors' names, and its number of heads."""
    case = cases_with_weights((pattern,))[0]
    config = json.loads((case / "case.json").read_text())["config"]
    content = read_torch_file(next(p for p in (case / "official.pth", case / "official.ckpt") if p.exists()))
    state = content.get("state_dict", content.get("model", content))
    return dict(state), (config.get("arch_replaced_by") or config)["num_heads"]


def under(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def renamed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def atst_head(width: int, classes: int, *, normed: bool = True) -> dict[str, torch.Tensor]:
    """Make a classifier as ATST's fine-tuning saves it."""
    generator = torch.Generator().manual_seed(3)
    head = {"linear.weight": torch.randn(classes, width, generator=generator), "linear.bias": torch.arange(classes) / 9}
    if normed:
        mean, var = torch.randn(width, generator=generator), torch.rand(width, generator=generator) + 0.5
        head |= {"norm.running_mean": mean, "norm.running_var": var, "norm.num_batches_tracked": torch.tensor(7)}
    return head


def run(*words: object) -> tuple[int, str, str]:
    """Run `audiossl import ...` in this process: (exit code, what it printed, what it printed of errors)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["import", *map(str, words)])
    return code, out.getvalue(), err.getvalue()


def refused(tmp_path: Path, *words: object, target: str = "ours") -> str:
    """Run an import that must fail; give its one line."""
    code, _, err = run(*words[:1], tmp_path / target, *words[1:])
    assert code == 2 and err.count("\n") == 1, err
    assert not (tmp_path / target).exists() and not list(tmp_path.glob(f".{target}.*"))
    return err


def imported(content: object, tmp_path: Path, *words: str, name: str = "theirs.ckpt"):
    """Save `content`, import it, and load it: (model, the report of the file's tensors, what was printed)."""
    source, target = tmp_path / name, tmp_path / f"ours-{len(list(tmp_path.iterdir()))}"
    torch.save(content, source)
    code, out, err = run(source, target, *words)
    assert code == 0, err
    return audiossl.load(target), json.loads((target / "import_report.json").read_text()), out


def example(pattern: str) -> Path:
    return next(path for path in golden_cases(pattern)[0].glob("official.*"))
