"""`python -m audiossl COMMAND`: what one does with audio, shards and checkpoints outside of a training run."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys

from audiossl.errors import UserError
from audiossl.version import __version__

COMMANDS = {
    "pack": ("audiossl.pack", "pack a folder of audio into tar shards with an index"),
    "index": ("audiossl.index", "index somebody's webdataset shards"),
    "passport": ("audiossl.passport", "say what is in a corpus, and how it differs from another"),
    "import": ("audiossl.importing.command", "turn published weights into an encoder of ours"),
    "embed": ("audiossl.embed", "write the features of audio files, by a frozen encoder, into one file"),
    "tag": ("audiossl.tag", "name what is heard in audio files, by an encoder with a classifier"),
    "sweep": ("audiossl.sweeps", "say how far a sweep has come, and how to run what is left of it"),
    "compare": ("audiossl.probes.compare", "set the results of probes side by side"),
    "detect": ("audiossl.detect", "say what happens when in audio files, by a classifier of moments"),
    "reconstruct": ("audiossl.reconstruct", "mask an audio file and let a checkpoint fill the gaps"),
    "export": ("audiossl.weights.exporting", "hand an encoder on: a folder, or a file for the authors' code"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; wrong input is one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["audiossl", *arguments[:1]])
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more when it leaves
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m audiossl", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, what) in COMMANDS.items():
        sub = commands.add_parser(name, help=what, description=what)
        if name in arguments[:1]:
            importlib.import_module(module).add_arguments(sub)
    args = parser.parse_args(arguments)
    return importlib.import_module(COMMANDS[args.command][0]).main(args)


if __name__ == "__main__":
    sys.exit(main())
