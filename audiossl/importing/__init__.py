"""Published checkpoints in: recognised by their keys, fitted to a length, reported tensor by tensor."""
