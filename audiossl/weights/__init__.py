"""Weights in and out: the authors' checkpoints, one file a family, and where an encoder may start from."""
