"""What does an encoder have to beat: which colour has a sound, and how does it move?"""

import torch
from torch import Tensor


def logmel_statistics(spectrogram: Tensor) -> Tensor:
    """Describe a clip by mean, deviation, maximum and deviation of the deltas of each mel band: (F, T) -> (4 F,).

    The baseline an encoder has to beat: it knows the colour of a sound and how it moves, and nothing of its shape.
    """
    deltas = spectrogram.diff(dim=1) if spectrogram.shape[1] > 1 else torch.zeros_like(spectrogram)
    moments = [spectrogram.mean(1), spectrogram.std(1, correction=0), spectrogram.amax(1), deltas.std(1, correction=0)]
    return torch.cat(moments)
