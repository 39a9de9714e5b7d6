"""What reads classes off an encoder's features?

One linear layer behind a batch normalisation without weights of its own, so that a learning rate means the same for
every block, width and encoder. The head of ATST's linear evaluation and fine-tuning (2204.12076, 2306.04186).
"""

from __future__ import annotations

from torch import Tensor, nn

from audiossl.parts.batchnorm import BatchNorm1d


class LinearHead(nn.Module):
    """Score features (B, width_in) for every class: (B, num_classes) logits.

    Batch statistics are those of all ranks. The names of the state dict are the published ones, `norm.*` and
    `linear.*`; weights start normal of deviation .01, biases at 0.
    """

    def __init__(self, width_in: int, num_classes: int):
        super().__init__()
        self.norm = BatchNorm1d(width_in, affine=False)
        self.linear = nn.Linear(width_in, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features))
