"""Run an entry point within the batch script of a SLURM job: `python -m audiossl.cluster train.py [KEY=VALUE ...]`."""

import sys

from audiossl.cluster.job import main

sys.exit(main(sys.argv[1:]))
