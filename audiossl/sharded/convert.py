"""`python -m audiossl convert`: from a folder of many DeepSpeed ranks to a checkpoint that any run goes on from."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from audiossl.checkpointing import AtomicCheckpointIO
from audiossl.errors import UserError
from audiossl.running.build import load_method
from audiossl.sharded.folders import is_sharded
from audiossl.sharded.whole import read_whole
from audiossl.weights.export import export_encoder
from audiossl.weights.reading import newest_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", type=Path, help="a step=N.ckpt folder, or a run's folder: its newest complete one")
    parser.add_argument("out", type=Path, help="a new folder, which then looks like a run: checkpoints/, encoder")


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for one, and says so
    for line in convert(args.folder, args.out):
        print(line)
    return 0


def convert(folder: Path, out: Path) -> list[str]:
    """Write `out`/checkpoints/step=N.ckpt and `out`/encoder.safetensors; give what was written, in words.

    Optimiser state included, so that a run of any number of ranks without DeepSpeed resumes from it. Raises
    `UserError` for what is no complete folder of DeepSpeed ranks, and where `out` holds a run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    source = folder if is_sharded(folder) else newest_checkpoint(folder)
    if not is_sharded(source):
        raise UserError(f"{source}: an ordinary checkpoint already, nothing to convert")
    if (out / "checkpoints").exists() or (out / "encoder.safetensors").exists():
        raise UserError(f"{out}: holds a run already; give another folder")
    content = read_whole(source, with_optimizer=True)
    target = out / "checkpoints" / f"step={content['global_step']:09d}.ckpt"
    AtomicCheckpointIO().save_checkpoint(content, target)
    said = content["audiossl"]
    provenance = said["provenance"] | {"steps": content["global_step"]}
    method, config = load_method(target)
    export = out / "encoder.safetensors"
    export_encoder(method, config, export, vocabulary=provenance.get("vocabulary"), provenance=provenance)
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    return [
        f"{target}: step {content['global_step']}, {len(content['state_dict'])} tensors and the optimiser's state",
        f"{export}: the encoder, for audiossl.load({str(out)!r})",
        f"go on with trainer.strategy=ddp: hydra.run.dir={out} ckpt=last; or start anew from it: init={out}",
    ]
