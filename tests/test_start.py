"""What a fine-tuning starts from: any encoder, fitted to how long the set's clips are."""

import pytest
import torch
from exported import encoder_of, export

from audiossl.errors import UserError
from audiossl.features.levels import free_length
from audiossl.pretrained import PretrainedEncoder
from audiossl.tuning.start import Init, length_for, start_of, write_start
from audiossl.weights.export import load_encoder


def config_of(init, *, seconds="clips", chunk_frames=None, evaluate=False, **changes) -> dict:
    given = dict(frontend={"seconds": seconds}, data={"mean": None, "std": None}, model={"chunk_frames": chunk_frames})
    return given | dict(init=str(init), ckpt=None, seeds=None, evaluate=evaluate) | changes


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {model: export(model, folder / model) for model in ("audiomae", "atst_frame", "passt")}


def starting_point(config, folder, seed, *, clip_seconds):
    folder.mkdir(exist_ok=True)
    path = start_of(config, folder, seed)
    write_start(config, Init(config["init"]), path, seed, clip_seconds=clip_seconds, keep=config["ckpt"] is not None)
    return load_encoder(path)


def started(exports, tmp_path, model="audiomae", clip_seconds=1.0, **changes):
    config = config_of(exports[model], **changes)
    return starting_point(config, tmp_path / "run", 0, clip_seconds=clip_seconds)


def test_an_encoder_hears_whole_patches_of_what_the_clips_last(exports, tmp_path):
    own = load_encoder(exports["audiomae"])
    stride = own.encoder.stride[1]
    for seconds in (0.33, 0.5, 1.7):
        frames = started(exports, tmp_path, clip_seconds=seconds).frontend.frames
        assert frames % stride == 0 and 0 <= frames - seconds * 100 < stride
    assert started(exports, tmp_path, clip_seconds=500.0).frontend.frames == 1024


@pytest.mark.parametrize("model", ["atst_frame", "passt"])
def test_learned_positions_are_cut_and_never_stretched_of_themselves(model):
    loaded = encoder_of(model)
    loaded = PretrainedEncoder(loaded.encoder, free_length(loaded.frontend), loaded.head, loaded.description)
    reach = loaded.encoder.geometry["frames"]
    hop = loaded.frontend.hop_samples / loaded.rate_hz
    assert length_for(loaded, 0.5 * reach * hop) is None  # it has no length of its own
    loaded.frontend.frames = reach
    assert 0.5 * reach <= round(length_for(loaded, 0.5 * reach * hop) / hop) < 0.5 * reach + loaded.encoder.stride[1]
    assert length_for(loaded, 5.0 * reach * hop) is None


def test_the_blocks_weights_stay_as_they_were_and_positions_fit(exports, tmp_path):
    own, fitted = load_encoder(exports["audiomae"]), started(exports, tmp_path, seconds=0.64)
    before, after = own.encoder.state_dict(), fitted.encoder.state_dict()
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == ["positions.table"]
    spectrogram = fitted.frontend(torch.randn(2, 16_000) * 0.1)
    assert fitted.encoder(spectrogram).shape[1] == 1 + fitted.encoder.grid[0] * fitted.encoder.grid[1]


def test_chunks_keep_the_positions_whatever_the_clips_last(exports, tmp_path):
    own = load_encoder(exports["atst_frame"])
    reach = own.encoder.geometry["frames"]
    kept = started(exports, tmp_path, "atst_frame", seconds=3.0 * reach / 100, chunk_frames=reach)
    assert kept.encoder.geometry == own.encoder.geometry and kept.frontend.frames == 3 * reach
    assert torch.equal(kept.encoder.state_dict()["positions.table"], own.encoder.state_dict()["positions.table"])


def test_what_is_only_evaluated_hears_as_it_was_trained(exports, tmp_path):
    own, kept = load_encoder(exports["passt"]), started(exports, tmp_path, "passt", evaluate=True, clip_seconds=0.3)
    assert kept.description == own.description and kept.head is not None


def test_from_scratch_only_the_weights_are_others(exports, tmp_path):
    own = load_encoder(exports["audiomae"])
    for seed, folder in ((1, "a"), (2, "b")):
        config = config_of(f"untrained:{exports['audiomae']}", seconds=None)
        fresh = starting_point(config, tmp_path / folder, seed, clip_seconds=1.0)
        assert fresh.encoder.geometry == own.encoder.geometry
        assert not torch.equal(fresh.encoder.blocks[0].attn.qkv.weight, own.encoder.blocks[0].attn.qkv.weight)
        own = fresh  # the other seed draws others again


def test_a_run_that_goes_on_finds_its_start_where_init_is_gone(exports, tmp_path):
    first = started(exports, tmp_path, seconds=0.64)
    again = starting_point(config_of("gone", ckpt="last"), tmp_path / "run", 0, clip_seconds=9.0)
    assert again.description == first.description
    with pytest.raises(UserError, match="gone"):
        starting_point(config_of("gone"), tmp_path / "other", 0, clip_seconds=9.0)
