"""Does every encoder take part in HEAR, and does PaSST with the published numbers?"""

import functools

import pytest
import torch
from atsts import build, large_cases
from frontends import front_end, settings
from goldens import Golden
from maes import audiomae, real_clips
from omegaconf import OmegaConf
from passts import passt
from torch.nn import functional

from audiossl import hear
from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.features.classifier import LinearHead, pool_tokens
from audiossl.features.levels import windows_around
from audiossl.features.timestamps import scene_embedding, timestamp_embedding
from audiossl.pretrained import PretrainedEncoder
from audiossl.spectrogram import resample
from audiossl.weights.export import describe, write_export
from audiossl.weights.passt import import_pretrained

MAKERS = {  # the front end an encoder was trained with, and the method
    "passt": ("passt_mel", dict(seconds=2.56), lambda: passt()),
    "passt_5ms": ("passt_mel", dict(seconds=2.56, hop_ms=5), lambda: passt(hop_ms=5, mask_frames=0)),
    "atst_clip": ("atst_mel", dict(seconds=1.01), lambda: build("atst_clip", seconds=1.01, position_frames=101)),
    "atst_frame": ("atst_mel", dict(seconds=1.01), lambda: build("atst_frame", seconds=1.01, position_frames=101)),
    "audiomae": ("kaldi_fbank", dict(seconds=1.28), lambda: audiomae(128)),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export small encoders, each once, and give the path: `exported("passt")`, `exported("passt", has_head=False)`."""

    @functools.cache
    def export(name: str, has_head: bool = True) -> str:
        frontend, changes, make = MAKERS[name]
        method, folder = make(), tmp_path_factory.mktemp(name)
        head = getattr(method, "head", None) if has_head else None
        plain = OmegaConf.to_container(settings(frontend, **changes), resolve=True)
        extra = {"mask_padding": name.startswith("atst"), "licence": None, "provenance": None}
        path = folder / "encoder.safetensors"
        write_export(method.encoder, head, describe(method.encoder, head, plain, None) | extra, path)
        return str(folder)

    return export


def sounds(model, count: int = 2, seconds: float = 1.5) -> torch.Tensor:
    return resample(real_clips(count, seconds), 16000, model.sample_rate)


def published(folder) -> tuple[Golden, dict]:
    """Read a case; for each of its modules, our encoder with its weights and front end."""
    golden = Golden(folder)
    given = dict(num_heads=golden.config["num_heads"], num_mels=golden.config["img_size"][0])
    weights, geometry = import_pretrained(folder / "official.pth", stride=tuple(golden.config["stride"]), **given)
    patch, classes = geometry.pop("patch"), geometry.pop("num_classes")
    sizes = dict(frames=geometry.pop("position_frames"), patch=(patch, patch), positions="time+frequency")
    sizes |= dict(stride=(geometry.pop("stride"), geometry.pop("stride_time")), drop_path=0.0)
    encoder = Encoder(num_class_tokens=2 if geometry.pop("distilled") else 1, **sizes, **geometry)
    head = LinearHead(geometry["width"], classes, pooling="class", norm="layer")
    for part, module in (("encoder.", encoder), ("head.", head)):
        module.load_state_dict({k.removeprefix(part): v for k, v in weights.items() if k.startswith(part)})
    models = {}
    for name, said in golden.case["modules"].items():
        seconds, hop_ms = said["max_window_samples"] / 32000, said["stft_hop"] / 32
        frontend = front_end("passt_mel", hop_ms=hop_ms, seconds=seconds)
        models[name] = PretrainedEncoder(encoder, frontend, head, {}).eval()
    return golden, models


@pytest.mark.parametrize("folder", large_cases("passt_hear_*"))
def test_passt_describes_moments_and_scenes_as_published(folder):
    golden, models = published(folder)
    audio = golden.input["wav_i16"]
    names = {tuple(name.split(".")[:2]) for name in golden.expected}
    for module, mode in names:
        scene_hop_ms = golden.case["modules"][module]["scene_hop_samples"] / 32
        reader = hear.level_reader(models[module], module=module, mode=mode, scene_hop_ms=scene_hop_ms)
        model = hear.HearModel(reader)
        golden.same(hear.get_scene_embeddings(audio, model), f"{module}.{mode}.scene")
        if f"{module}.{mode}.timestamp_embeddings" in golden.expected:
            embeddings, times = hear.get_timestamp_embeddings(audio, model)
            golden.same(embeddings, f"{module}.{mode}.timestamp_embeddings")
            torch.testing.assert_close(times, golden.expected[f"{module}.{mode}.timestamps_ms"], rtol=0, atol=1e-3)


EVERY = [("passt", f"module={module}") for module in hear.MODULES if not module.startswith("hop")]
EVERY += [("passt", "mode=embed_only"), ("passt", "mode=logits"), ("passt_5ms", "module=hop160base2lvlmel")]
EVERY += [("atst_clip", "rules=published"), ("atst_frame", "num_layers=1"), ("audiomae", "num_layers=2")]
EVERY += [(name, "batch_seconds=3") for name in MAKERS]


@pytest.mark.parametrize(("name", "choices"), EVERY)
def test_every_encoder_passes_the_checks_of_the_hear_validator(exported, name, choices):
    model = hear.load_model(f"{exported(name)}?{choices}")
    assert isinstance(model, torch.nn.Module) and model.sample_rate in (16000, 22050, 32000, 44100, 48000)
    assert type(model.scene_embedding_size) is type(model.timestamp_embedding_size) is int
    for seconds in (1.07, 1.98, 4.0):
        audio = torch.rand(2, int(seconds * model.sample_rate)) * 2 - 1
        embeddings, times = hear.get_timestamp_embeddings(audio, model)
        assert embeddings.shape == (2, times.shape[1], model.timestamp_embedding_size) and len(times) == 2
        assert embeddings.dtype == times.dtype == torch.float32 and embeddings.isfinite().all()
        steps = times.diff(dim=1)
        assert steps.min() > 0 and (steps - steps.mean()).abs().max() < 1
        assert times.min() <= steps.mean() and times.max() <= 1000 * seconds
        assert times.max() >= 1000 * seconds - 2 * steps.mean()
    scenes = hear.get_scene_embeddings(torch.rand(4, int(2.74 * model.sample_rate)) * 2 - 1, model)
    assert scenes.shape == (4, model.scene_embedding_size)
    assert scenes.dtype == torch.float32 and scenes.isfinite().all()


@pytest.mark.parametrize("module", ["base", "base2level", "base2levelmel"])
def test_in_batches_a_window_is_described_as_it_is_alone(exported, module):
    model = hear.load_model(f"{exported('passt')}?module={module}")
    parts, frontend = model.reader.model, front_end("passt_mel", seconds=None)
    audio = sounds(model, seconds=0.7)

    def alone(samples, describe):
        padded = functional.pad(audio[:, None], (samples // 2, samples // 2), mode="reflect")[:, 0]
        starts = range(0, padded.shape[1] - samples + 1, 1600)
        return torch.stack([describe(padded[:, start : start + samples]) for start in starts], dim=1)

    def all_levels(window):
        features = pool_tokens(parts.tokens(frontend(window)), "class", 2)
        return torch.cat([parts.head(features), features], dim=1)

    expected = [alone(5120, all_levels)]
    expected += [] if module == "base" else [alone(25600 if module == "base2level" else 20480, all_levels)]
    expected += [alone(1920, lambda window: frontend(window).flatten(1))] if module == "base2levelmel" else []
    with torch.no_grad():
        torch.testing.assert_close(model.moments(audio)[0], torch.cat(expected, dim=-1), rtol=0, atol=2e-4)


def test_a_long_scene_is_the_mean_of_overlapping_windows(exported):
    model = hear.load_model(exported("passt"), scene_hop_ms=500)
    parts, audio, length = model.reader.model, sounds(model, seconds=4), int(2.56 * 32000)
    padded = functional.pad(audio[:, None], (length // 2, length // 2), mode="reflect")[:, 0]
    windows = [padded[:, start : start + length] for start in range(0, audio.shape[1] + 1, 16000)]
    features = [pool_tokens(parts(window, 32000), "class", 2) for window in windows]
    expected = torch.stack([torch.cat([parts.head(some), some], dim=1) for some in features]).mean(0)
    torch.testing.assert_close(hear.get_scene_embeddings(audio, model), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("samples", [1, 2, 300, 2559, 12801])
def test_what_is_shorter_than_half_a_window_is_mirrored_again(exported, samples):
    model = hear.load_model(f"{exported('passt')}?module=base2levelmel")
    audio = sounds(model)[:, :samples]
    windows = windows_around(audio, 5120, 1600)
    there_and_back = torch.cat([audio, audio.flip(1)[:, 1:-1]], dim=1)
    repeated = there_and_back.repeat(1, 12000 // there_and_back.shape[1] + 1)
    torch.testing.assert_close(windows[:, 0, 2560:], repeated[:, :2560], rtol=0, atol=0)
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.isfinite().all() and times.shape == (2, samples // 1600 + 1)
    assert hear.get_scene_embeddings(audio, model).isfinite().all()


@pytest.mark.parametrize("name", ["atst_clip", "atst_frame", "audiomae"])
@pytest.mark.parametrize("samples", [1, 100, 700])
def test_a_recording_shorter_than_a_patch_still_has_a_moment(exported, name, samples):
    model = hear.load_model(exported(name))
    embeddings, times = hear.get_timestamp_embeddings(sounds(model)[:, :samples], model)
    assert times.shape == (2, 1) and embeddings.isfinite().all()
    assert hear.get_scene_embeddings(sounds(model)[:, :samples], model).isfinite().all()


@pytest.mark.parametrize("name", MAKERS)
def test_how_much_goes_through_at_once_changes_nothing(exported, name):
    few, many = (hear.load_model(exported(name), batch_seconds=seconds) for seconds in (0.3, 1000))
    audio = sounds(few, count=3, seconds=5)
    for get in (hear.get_scene_embeddings, lambda *some: hear.get_timestamp_embeddings(*some)[0]):
        torch.testing.assert_close(get(audio, few), get(audio, many), rtol=0, atol=2e-5)


def test_atst_keeps_to_its_authors_rules_where_it_is_asked_to(exported):
    model = hear.load_model(f"{exported('atst_frame')}?rules=published")
    audio = sounds(model, seconds=2.5)
    mel = front_end("atst_mel", seconds=None)(audio)
    rules = dict(chunk_frames=101, num_layers=2)
    with torch.no_grad():
        scene = scene_embedding(model.reader.model.encoder, mel, **rules, weighting="published")
        moments = timestamp_embedding(model.reader.model.encoder, mel, **rules, hop_ms=10, timing="published")
    torch.testing.assert_close(hear.get_scene_embeddings(audio, model), scene, rtol=0, atol=1e-6)
    torch.testing.assert_close(hear.get_timestamp_embeddings(audio, model), moments, rtol=0, atol=1e-6)


def test_audiomaes_columns_come_from_the_window_whose_middle_is_nearest(exported):
    model = hear.load_model(exported("audiomae"))
    audio, parts = sounds(model, seconds=3.7), model.reader.model
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    step, length = 16 * 160, 400 + 127 * 160
    torch.testing.assert_close(times[0], (torch.arange(times.shape[1]) * 16 + 7.5) * 10 + 12.5)
    for start, columns in ((0, range(0, 6)), (8, range(10, 14))):  # of windows of 8 columns, every 4
        window = audio[:, start * step : start * step + length]
        tokens = parts.tokens(parts.frontend(window))[:, 1:].unflatten(1, parts.encoder.grid).mean(1)
        for column in columns:
            torch.testing.assert_close(embeddings[:, column], tokens[:, column - start], rtol=0, atol=1e-5)


def test_a_probe_can_be_trained_on_embeddings(exported):
    model = hear.load_model(exported("passt"))
    for embeddings in (model(sounds(model)), hear.get_timestamp_embeddings(sounds(model), model)[0]):
        assert not embeddings.requires_grad
        probe = torch.nn.Linear(embeddings.shape[-1], 3)
        probe(embeddings).square().sum().backward()
        assert probe.weight.grad.abs().sum() > 0


def test_without_a_classifier_there_are_features_only(exported):
    path = exported("passt", has_head=False)
    model, whole = hear.load_model(path), hear.load_model(exported("passt"))
    assert model.scene_embedding_size == 24
    audio = sounds(model)
    torch.testing.assert_close(model(audio), whole(audio)[:, 5:], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="mode=logits: this encoder has no classifier"):
        hear.load_model(f"{path}?mode=logits")


def test_several_encoders_stand_side_by_side(exported):
    paths = f"{exported('atst_frame')}?num_layers=1", f"{exported('passt')}?mode=embed_only"
    both, (frame, event) = hear.load_model(",".join(paths)), map(hear.load_model, paths)
    assert both.sample_rate == 32000 and both.scene_embedding_size == both.timestamp_embedding_size == 48
    audio = sounds(both)
    embeddings, times = hear.get_timestamp_embeddings(audio, both)
    own, own_times = hear.get_timestamp_embeddings(audio, event)
    assert torch.equal(times, hear.get_timestamp_embeddings(resample(audio, 32000, 16000), frame)[1])
    for moment in (0, 5, 20):
        nearest = min(range(own.shape[1]), key=lambda i, t=float(times[0, moment]): abs(float(own_times[0, i]) - t))
        torch.testing.assert_close(embeddings[:, moment, 24:], own[:, nearest], rtol=0, atol=1e-6)
    torch.testing.assert_close(hear.get_scene_embeddings(audio, both)[:, 24:], event(audio), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("passt", "?module=base3level", "module=base3level: choose one of base, base2level"),
        ("passt", "?module=hop160base", "front end has a hop of 320 samples"),
        ("passt", "?mode=features", "mode=features: choose all"),
        ("passt", "?mode", "comes name=value"),
        ("passt", "?scene_ms=9000", "windows of 9000 ms for an encoder whose positions reach 2650 ms"),
        ("atst_frame", "?mode=logits", "mode=logits: ATST has no such choice; it has num_layers, rules"),
        ("atst_clip", "?num_layers=3", "num_layers=3: this encoder has 2 blocks"),
        ("atst_clip", "?rules=mine", "rules=mine: choose published or corrected"),
        ("audiomae", "?rules=published", "has no such choice; it has num_layers, batch_seconds"),
    ],
)
def test_a_choice_that_does_not_exist_is_named(exported, name, choices, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        hear.load_model(exported(name) + choices)


@pytest.mark.parametrize("name", ["passt", "atst_clip", "atst_frame", "audiomae"])
def test_no_encoder_answers_with_nan(exported, name):
    model = hear.load_model(exported(name))
    audio = sounds(model)
    for broken, message in ((float("nan"), "1: NaN or Inf"), (1e30, "1: features are not finite")):
        audio[1, 5000:9000] = broken
        for get in (hear.get_scene_embeddings, hear.get_timestamp_embeddings):
            with pytest.raises(UserError, match=message):
                get(audio, model)


def test_wrong_paths_and_audio_end_in_one_line(exported):
    with pytest.raises(UserError, match="--model PATH"):
        hear.load_model()
    model = hear.load_model(exported("passt"))
    with pytest.raises(UserError, match="HEAR wants"):
        hear.get_scene_embeddings(torch.zeros(32000), model)
    with pytest.raises(UserError, match="give float in"):
        hear.get_scene_embeddings(torch.zeros(1, 32000, dtype=torch.int64), model)
    for nothing in (torch.zeros(2, 0), torch.zeros(0, 2)):
        with pytest.raises(UserError, match="without a single sample"):
            hear.get_timestamp_embeddings(nothing, model)
