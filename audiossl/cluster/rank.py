"""How does one rank of a job leave, so that SLURM ends the others when it fails, and only then?

`srun --kill-on-bad-exit` is what ends the other ranks when one dies; but it takes 75 for bad as well, and would kill a
rank that is still saving because another one is done. So a rank that was asked to leave ends with 0, and rank 0, which
runs on the machine of the batch script, leaves a file that says so.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from audiossl.checkpoints.signals import PREEMPTED, install_early_handlers

LEFT = "AUDIOSSL_LEFT"  # the variable that names the file


def main(argv: list[str]) -> int:
    """Run `argv`, an entry point and its arguments, as `python` would; returns its exit code."""
    try:
        install_early_handlers()
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        if not (error.code is None or isinstance(error.code, int)):
            raise
        code = error.code or 0
    if code != PREEMPTED:
        return code
    if os.environ.get("SLURM_PROCID", "0") == "0":
        Path(os.environ[LEFT]).touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
