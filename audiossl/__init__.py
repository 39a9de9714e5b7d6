"""Self-supervised audio transformers: pre-train, fine-tune and probe them on one core.

Axes: B clips, S samples, F mel bands, T frames, H heads, N patches, K patches kept, P values per patch, D encoder width
(E decoder), C classes. A spectrogram is (B, 1, F, T): frequency before time.
"""

from audiossl.version import __version__

__all__ = ["__version__", "load", "read"]


def load(source, revision=None):
    """Load an exported encoder with its front end: a run's folder, an `encoder.safetensors`, `user/name` on the hub.

    Returns a `PretrainedEncoder`: `audiossl.load("runs/mine")(waveform, rate_hz)` gives tokens (B, n + N, D). What lies
    here goes before a model of that name on the HuggingFace hub, of which `revision` is a branch, tag or commit.
    Raises `UserError` naming what is missing, broken, or cannot be reached.
    """
    from audiossl.weights.export import load_encoder
    from audiossl.weights.hub import find_export

    return load_encoder(find_export(source, revision=revision))


def read(path):
    """Read an audio file of any rate, length and number of channels: waveform (S,) in [-1, 1], mono, and rate in Hz."""
    from audiossl.sound.files import read

    return read(path)
