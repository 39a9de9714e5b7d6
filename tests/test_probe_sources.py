"""Sources: what they say of a clip is what `embed` says of it, whatever else is in the batch."""

import pytest
import torch
from exported import METHODS, OVERLAPPING, encoder_of, export
from maes import real_clips

from audiossl.errors import UserError
from audiossl.features.source import Source
from audiossl.probes.segments import pool, segments_of
from audiossl.probes.sidebyside import SideBySide
from audiossl.probes.sources import EncoderSource, open_source


def heard(source, seconds=(2.0, 1.1, 0.4)):
    counts = torch.tensor([int(min(s, source.max_seconds or s) * source.rate_hz) for s in seconds])
    waveform = torch.zeros(len(seconds), int(counts.max()))
    for row, clip, count in zip(waveform, real_clips(len(seconds), 6.0), counts.tolist(), strict=True):
        row[:count] = clip[:count]
    return waveform, counts


@pytest.mark.parametrize("padding", ["model", "none"])
@pytest.mark.parametrize("method", [*METHODS, OVERLAPPING])
def test_an_encoder_gives_every_layer_of_every_column_whatever_the_batch(method, padding):
    model = encoder_of(method)
    source = EncoderSource(model, method, padding)
    waveform, counts = heard(source)
    found = source.describe(waveform, counts)
    alone = [
        source.describe(waveform[row : row + 1, :count], counts[row : row + 1]) for row, count in enumerate(counts)
    ]
    for row, one in enumerate(alone):
        mine = found.columns[row][:, found.valid[row]]
        assert torch.allclose(mine, one.columns[0][:, one.valid[0]], atol=1e-5)
        assert mine.shape[1] > 0 and mine.shape[::2] == (source.num_layers, source.width)
    if padding == "model":
        whole = model.embed(waveform, source.rate_hz, num_samples=counts, layers=source.num_layers, overlap=0.0)
        for row in range(len(counts)):
            mine = found.columns[row].transpose(0, 1).flatten(1)[found.valid[row]]
            assert torch.allclose(mine, whole.frames[row, : whole.num_frames[row]], atol=1e-5)
        assert torch.allclose(
            pool(found)[:, -1, 0], model.embed(waveform, source.rate_hz, num_samples=counts).clip, atol=1e-5
        )


def test_a_short_clip_costs_less_without_padding():
    model = encoder_of("audiomae")
    sizes = {}
    for padding in ("model", "none"):
        source = EncoderSource(model, "x", padding)
        sizes[padding] = source.describe(*heard(source, (0.5,))).columns.shape[2]
    assert sizes["none"] < sizes["model"]


def test_the_hash_follows_weights_front_end_and_padding(tmp_path):
    folder = str(export("audiomae", tmp_path / "mae"))
    first, again = open_source(folder), open_source(folder)
    assert first.hash == again.hash and len(first.hash) == 64 and int(first.hash, 16)
    others = [
        open_source(folder, padding="none"),
        open_source(f"untrained:{folder}", seed=7),
        open_source(f"untrained:{folder}", seed=8),
        open_source("logmel"),
        open_source("logmel", moments=True),
        open_source([folder, "logmel"]),
    ]
    moved = open_source(folder)
    with torch.no_grad():
        moved.model.encoder.blocks[0].attn.qkv.weight[0, 0] += 1e-3
    hashes = {first.hash, *(other.hash for other in others), EncoderSource(moved.model, "moved").hash}
    assert len(hashes) == 2 + len(others)
    assert all(isinstance(source, Source) for source in others)


def test_several_side_by_side_say_what_each_says():
    parts = [EncoderSource(encoder_of("audiomae"), "a"), EncoderSource(encoder_of("atst_frame"), "b")]
    together = SideBySide(parts)
    waveform, counts = heard(together)
    found = together.describe(waveform, counts)
    assert found.columns.shape[3] == together.width == sum(part.width for part in parts)
    fine = parts[1].describe(waveform, counts)
    assert torch.equal(found.valid, fine.valid)
    assert torch.allclose(found.columns[..., parts[0].width :], fine.columns[:, -together.num_layers :], atol=1e-6)
    own = parts[0].describe(waveform, counts)
    mine = found.columns[0, -1, found.valid[0], : parts[0].width]
    first, last = own.columns[0, -1, own.valid[0]][[0, -1]]
    assert torch.allclose(mine[0], first) and torch.allclose(mine[-1], last)


def test_segments_cover_a_clip_and_the_last_is_all_audio():
    assert [(s.start, s.stop, s.new_from) for s in segments_of(100, 40)] == [(0, 40, 0), (40, 80, 40), (60, 100, 80)]
    assert [(s.start, s.stop) for s in segments_of(81, 40)] == [(0, 40), (40, 80)]
    assert (
        [(s.start, s.stop) for s in segments_of(30, 40)]
        == [(0, 30)]
        == [(s.start, s.stop) for s in segments_of(30, None)]
    )


@pytest.mark.parametrize("init", ["nowhere/at/all", "untrained:nowhere/at/all", "logmel:nowhere/at/all"])
def test_what_is_no_encoder_is_one_line(init, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nowhere"):
        open_source(init)


def test_a_clip_longer_than_the_model_is_refused():
    source = EncoderSource(encoder_of("audiomae"), "mae")
    samples = int(2 * source.max_seconds * source.rate_hz)
    with pytest.raises(UserError, match="mae: a clip of"):
        source.describe(torch.zeros(1, samples), torch.tensor([samples]))
