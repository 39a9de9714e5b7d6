"""Do long clips get the features that their parts get alone, and what differs between published and corrected?"""

import pytest
import torch

from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.features.chunks import clip_features_in_chunks, frame_features_in_chunks
from audiossl.features.classifier import LinearHead
from audiossl.features.timestamps import frame_features, scene_embedding, timestamp_embedding
from audiossl.parts.positions import interpolate_positions
from audiossl.weights.atst import import_finetuned

CHUNK = 61  # frames, of which 60 make 15 patches
SIZES = dict(num_mels=64, frames=81, patch=(64, 4), stride=(64, 4), width=24, depth=3, num_heads=2, mlp_ratio=4.0)


def encoder(num_class_tokens: int) -> Encoder:
    torch.manual_seed(0)
    model = Encoder(**SIZES, positions="learned", drop_path=0.0, qkv_bias=False, num_class_tokens=num_class_tokens)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # far from the start, where all tokens are alike
    return model.eval()


def spectrogram(frames: int, clips: int = 2) -> torch.Tensor:
    return torch.randn(clips, 1, 64, frames, generator=torch.Generator().manual_seed(frames))


def clip_features(model, clips, num_frames, division="corrected", chunk_frames=CHUNK, with_mean=True):
    sizes = dict(chunk_frames=chunk_frames, num_layers=2, with_mean=with_mean)
    return clip_features_in_chunks(model, clips, torch.as_tensor(num_frames), **sizes, division=division)


def frame_means(model, clips, num_frames, chunk_frames=CHUNK):
    return frame_features_in_chunks(model, clips, torch.as_tensor(num_frames), chunk_frames=chunk_frames, num_layers=2)


@pytest.mark.parametrize(("num_class_tokens", "describe"), [(1, clip_features), (0, frame_means)])
@torch.no_grad()
def test_a_clip_is_the_average_of_its_chunks_encoded_alone(num_class_tokens, describe):
    model, clips, num_frames = encoder(num_class_tokens), spectrogram(170), [170, 100]
    together = describe(model, clips, num_frames)
    for clip, frames, features in zip(clips, num_frames, together, strict=True):
        pieces = [clip[None, ..., start : min(start + CHUNK, frames)] for start in range(0, frames, CHUNK)]
        alone = [describe(model, piece, [piece.shape[-1]], chunk_frames=None) for piece in pieces]
        torch.testing.assert_close(features, torch.cat(alone).mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("division", ["published", "corrected"])
@torch.no_grad()
def test_neither_padding_nor_neighbours_change_a_clip(division):
    model, clips = encoder(1), spectrogram(190)
    alone = clip_features(model, clips[1:, ..., :100], [100], division)
    torch.testing.assert_close(clip_features(model, clips, [190, 100], division)[1:], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_chunk_counts_when_more_than_half_of_it_is_audio():
    model, clips = encoder(1), spectrogram(2 * CHUNK, clips=1)
    first = clip_features(model, clips[..., :CHUNK], [CHUNK])
    half = CHUNK // 2
    torch.testing.assert_close(clip_features(model, clips, [CHUNK + half]), first, rtol=0, atol=1e-6)
    assert (clip_features(model, clips, [CHUNK + half + 1]) - first).abs().max() > 0.01
    nothing = clip_features(model, clips, [0])
    assert nothing.isfinite().all() and not nothing[:, 2 * model.width :].any(), "the mean of no patch is zero"


@torch.no_grad()
def test_the_published_mean_of_a_chunk_is_too_small_by_what_follows_it():
    model, clips = encoder(1), spectrogram(90, clips=1)
    published, corrected = (clip_features(model, clips, [90], division) for division in ("published", "corrected"))
    width = 2 * model.width
    assert torch.equal(published[:, :width], corrected[:, :width]), "class tokens have no such divisor"
    torch.testing.assert_close(published[:, width:], corrected[:, width:] * 15 / 22, rtol=1e-4, atol=1e-6)
    only_class = clip_features(model, clips, [90], with_mean=False)
    assert torch.equal(only_class, corrected[:, :width])


@pytest.mark.parametrize(("num_class_tokens", "describe"), [(1, clip_features), (0, frame_means)])
def test_a_classifier_can_be_trained_through_it(num_class_tokens, describe):
    model = encoder(num_class_tokens)
    features = describe(model, spectrogram(130), [130, 0])
    LinearHead(features.shape[1], 5, pooling="mean")(features).square().sum().backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters()}
    assert all(torch.tensor(list(norms.values())).isfinite()) and norms["patch_embed.proj.weight"] > 0


@torch.no_grad()
def test_a_rest_too_short_for_a_patch_halves_only_the_published_scene():
    model, clips = encoder(0), spectrogram(CHUNK + 3)
    whole, rest = (
        {
            weighting: scene_embedding(model, piece, chunk_frames=CHUNK, num_layers=2, weighting=weighting)
            for weighting in ("published", "corrected")
        }
        for piece in (clips[..., :CHUNK], clips)
    )
    torch.testing.assert_close(rest["published"], whole["published"] / 2)
    torch.testing.assert_close(rest["corrected"], whole["corrected"])
    longer = spectrogram(CHUNK + 20)
    tokens, _ = timestamps(model, longer, "corrected")
    scene = scene_embedding(model, longer, chunk_frames=CHUNK, num_layers=2, weighting="corrected")
    torch.testing.assert_close(scene, tokens.mean(1), rtol=0, atol=1e-5)


def timestamps(model, clips, timing):
    return timestamp_embedding(model, clips, chunk_frames=CHUNK, num_layers=2, hop_ms=10, timing=timing)


@torch.no_grad()
def test_corrected_times_are_the_middle_of_the_frames_and_do_not_drift():
    model, clips = encoder(0), spectrogram(3 * CHUNK)
    features, published = timestamps(model, clips, "published")
    _, corrected = timestamps(model, clips, "corrected")
    assert features.shape == (2, 45, 48) and published.shape == corrected.shape == (2, 45)
    last_chunk = frame_features(model, clips[..., 2 * CHUNK :], num_layers=2)
    torch.testing.assert_close(features[:, 30:], last_chunk)
    assert (corrected[0, 30], published[0, 30]) == (1220 + 15, 1200), "122 frames of 10 ms, then half of 4"
    assert torch.equal(corrected[0, :15] - published[0, :15], torch.full((15,), 15.0))
    with pytest.raises(UserError, match="shorter than one patch"):
        timestamps(model, clips[..., :3], "corrected")


def test_stretched_positions_keep_their_course():
    ramp = torch.linspace(0, 1, 50)[None, :, None].expand(1, 50, 8)
    for columns in (20, 50, 90):
        stretched = interpolate_positions(ramp, columns)
        assert stretched.shape == (1, columns, 8)
        course = torch.linspace(0, 1, columns)[None, :, None].expand(1, columns, 8)
        torch.testing.assert_close(stretched, course, rtol=0, atol=0.03)


def test_a_linear_head_standardises_what_it_is_given():
    head, features = (
        LinearHead(6, 3, pooling="mean"),
        100 + 50 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0)),
    )
    names = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "linear.weight", "linear.bias"}
    assert set(head.state_dict()) == names and not head.linear.bias.any()
    head.linear.weight.data = torch.eye(6)[:3]
    logits = head(features)
    torch.testing.assert_close(logits.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-4)


def published_state(model: Encoder, head: LinearHead) -> dict[str, torch.Tensor]:
    """Name an encoder's and a head's tensors as the authors' fine-tuned files do."""
    ours = model.state_dict()
    table, projection = ours.pop("positions.table"), ours.pop("patch_embed.proj.weight")
    theirs = {
        "pos_embed": torch.cat([ours.pop("positions.class_table"), table], dim=1),
        "cls_token": ours.pop("class_token"),
        "patch_embed.patch_embed.weight": projection.flatten(1),
        "patch_embed.patch_embed.bias": ours.pop("patch_embed.proj.bias"),
        "mask_embed": torch.zeros(1, 1, model.width),
    }
    theirs = {f"encoder.encoder.{key}": value for key, value in (theirs | ours).items()}
    return theirs | {f"head.{key}": value for key, value in head.state_dict().items()}


def test_a_fine_tuned_file_comes_in_whole_or_is_refused(tmp_path):
    model, head = encoder(1), LinearHead(48, 5, pooling="class+mean")
    state = published_state(model, head)
    torch.save({"state_dict": state}, tmp_path / "tuned.ckpt")
    found, found_head, geometry = import_finetuned(tmp_path / "tuned.ckpt", num_heads=2)
    assert geometry["depth"] == 3 and geometry["position_frames"] == 81 and geometry["num_class_tokens"] == 1
    for ours, theirs in ((model.state_dict(), found), (head.state_dict(), found_head)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for changed, complaint in (
        (state | {"head.linear_2.weight": torch.zeros(1)}, "head.linear_2.weight"),
        ({key: value for key, value in state.items() if key != "head.linear.weight"}, "no head.linear.weight"),
        (state | {"encoder.encoder.prompt_embed": torch.zeros(1)}, "no prompt_embed"),
    ):
        with pytest.raises(UserError, match=complaint):
            import_finetuned(changed, num_heads=2)
    with pytest.raises(UserError, match="give num_heads"):
        import_finetuned(state)
