"""Does the preset of ATST's frozen features give the published numbers from waveforms?"""

import numpy as np
import pytest
import torch
from atsts import ATSTGolden, large_cases
from exported import encoder_of, noise

from audiossl.errors import UserError
from audiossl.features.moments import atst_features
from audiossl.pretrained import PretrainedEncoder


@pytest.mark.parametrize("folder", large_cases("atst_frame_features*"))
def test_moments_and_their_times_are_the_published_ones(folder):
    golden = ATSTGolden(folder, "atst_frame")
    method = golden.model.eval()
    model = PretrainedEncoder(method.encoder, method.frontend, None, {"mask_padding": True})
    names = [name for name in golden.expected if name.startswith("api_timestamp.")]
    for name in names:
        waveform = golden.input[f"wav_i16.{name.split('.')[1]}"]
        num_layers = golden.expected[name].shape[-1] // model.width
        found = atst_features(model, waveform, 16000, num_layers=num_layers, rules="published")
        golden.same(found.frames, name)
        times = golden.expected[name.replace("api_timestamp", "api_timestamps_ms")]
        torch.testing.assert_close(found.timestamps_seconds * 1000, times[0].double(), rtol=0, atol=1e-3)
    assert names


@pytest.mark.parametrize("model", ["atst_clip", "atst_frame"])
def test_a_clip_of_one_chunk_is_what_embed_gives_and_a_longer_one_is_its_chunks(model):
    model = encoder_of(model)
    length = model.frontend.samples_for(model.frontend.frames)
    clip = noise(length / 16000, 16000)
    both = np.stack([np.concatenate([clip, clip]), np.full(2 * length, np.nan, np.float32)])
    both[1, :length] = clip
    found = atst_features(model, both, 16000, num_samples=[2 * length, length], rules="corrected")
    pooling = "class+mean" if model.encoder.num_class_tokens else "mean"
    ours = model.embed(clip, 16000, layers=2, pooling=pooling)
    count = ours.frames.shape[1]
    assert found.num_frames.tolist() == [2 * count - 1, count]  # the second chunk lacks a frame of its last patch
    torch.testing.assert_close(found.frames[1, :count], ours.frames[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.clip[1], ours.clip[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.timestamps_seconds[:count], ours.timestamps_seconds, atol=1e-6, rtol=0)
    assert (found.clip[0] - found.clip[1]).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("samples", "message"), [([0.0, np.nan], "clip 0: NaN or Inf samples"), ([], "clip 0: no samples")]
)
def test_what_holds_no_sound_is_refused(samples, message):
    with pytest.raises(UserError, match=message):
        atst_features(encoder_of("atst_frame"), np.array(samples), 16000, rules="published")
