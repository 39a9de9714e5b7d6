"""Self-supervised audio transformers: pre-train, fine-tune and probe them on one core.

Axes: B clips, S samples, F mel bands, T frames, H heads, N patches, K patches kept, P values per patch, D encoder width
(E decoder), C classes. A spectrogram is (B, 1, F, T): frequency before time.
"""

from audiossl.version import __version__

__all__ = ["__version__", "load", "read"]


def load(path):
    """Load an exported encoder with its front end: a run's folder or an `encoder.safetensors`.

    Returns a `PretrainedEncoder`: `audiossl.load("runs/mine")(waveform, rate_hz)` gives tokens (B, n + N, D).
    """
    from audiossl.weights.export import load_encoder

    return load_encoder(path)


def read(path):
    """Read an audio file of any rate, length and number of channels: waveform (S,) in [-1, 1], mono, and rate in Hz."""
    from audiossl.sound.files import read

    return read(path)
