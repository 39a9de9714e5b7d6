"""Is a model whose encoder embeds only the patches it keeps the same as one that embeds all and drops?"""

import pytest
import torch

from audiossl.encoder import Encoder
from audiossl.masking import smallest
from audiossl.patches import patches_at, patchify

SIZES = dict(num_mels=32, width=24, depth=2, num_heads=3, mlp_ratio=2.0, drop_path=0.0)


@pytest.mark.parametrize("stride, positions", [(8, "corrected"), (5, "learned"), (6, "time+frequency")])
def test_embedding_kept_patches_equals_embedding_all_and_dropping(stride, positions):
    """Outputs and all gradients; overlapping patches, a clip shorter than the table and part of it padding included."""
    torch.manual_seed(0)
    encoder = Encoder(frames=90, patch=(8, 8), stride=(stride, stride), positions=positions, **SIZES)
    clips = torch.randn(3, 1, 32, 72)
    rows, columns = encoder.grid_for(clips)
    keep = smallest(torch.rand(3, rows * columns), rows * columns // 3)
    valid = torch.rand(3, rows * columns) > 0.3
    spare = encoder.grid[1] - columns
    assert spare > 0
    found, gradients = [], []
    for encoded in (
        encoder(clips, keep, valid=valid, first_column=spare),
        encoder.encode(encoder.embed(clips), keep, valid=valid, first_column=spare),
    ):
        encoder.zero_grad()
        encoded.square().sum().backward()
        found.append(encoded)
        gradients.append({n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys() and "patch_embed.proj.weight" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-5, msg=name)


def test_kept_patches_are_those_of_the_whole_grid():
    clips = torch.randn(2, 1, 20, 33)
    whole = patchify(clips, (6, 5), (4, 3))
    keep = smallest(torch.rand(2, whole.shape[1]), 7)
    assert torch.equal(patches_at(clips, keep, (6, 5), (4, 3)), whole[torch.arange(2)[:, None], keep])
