"""Does `python -m audiossl reconstruct` show what a checkpoint makes of any audio file?"""

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import ROOT
from maes import TINY, audiomae
from matplotlib.image import imread

from audiossl.__main__ import main
from audiossl.masking import Masking
from audiossl.reconstruct import reconstruct_clips, write_reconstructions


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with one checkpoint of a tiny model of 128 frames."""
    model = yaml.safe_load((ROOT / "conf/model/audiomae.yaml").read_text()) | TINY | {"norm_target": False}
    frontend = yaml.safe_load((ROOT / "conf/frontend/kaldi_fbank.yaml").read_text())
    frontend |= {"mean": -7.0, "std": 4.6, "seconds": 1.28}
    weights = audiomae(norm_target=False).state_dict()
    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {
        "audiossl": {"config": {"model": model, "frontend": frontend}},
        "state_dict": {f"method.{name}": value for name, value in weights.items()},
    }
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


def sound(path, seconds=2.0, rate=44100, channels=2):
    time = np.arange(int(seconds * rate)) / rate
    mono = 0.3 * np.sin(2 * np.pi * (300 + 200 * time) * time)
    soundfile.write(path, np.stack([mono] * channels, axis=1), rate)
    return path


def command(file, run, *more) -> int:
    return main(["reconstruct", str(file), "--checkpoint", str(run / "checkpoints" / "last.ckpt"), *map(str, more)])


def test_any_file_becomes_a_picture_and_a_sound(run, tmp_path, capsys):
    file = sound(tmp_path / "glide.wav")
    assert command(file, run, "--out", tmp_path / "new" / "folder") == 0
    png, wav = (tmp_path / "new" / "folder" / f"glide.reconstruction.{kind}" for kind in ("png", "wav"))
    assert imread(png).shape[1] == 1800
    waveform, rate = soundfile.read(wav)
    one = 400 + 127 * 160
    assert (rate, len(waveform)) == (16000, 2 * one + 8000)
    assert 0.5 < waveform[:one].std() / (0.3 / 2**0.5) < 1.5
    said = capsys.readouterr().out
    assert "masked error:" in said and " dB" in said and str(png) in said and str(wav) in said


@pytest.mark.parametrize(
    ("mask", "share"), [("time", 0.75), ("frequency", 0.75), ("time+frequency", 0.75), ("random", 0.75)]
)
def test_mask_and_ratio_say_what_is_hidden(mask, share):
    (clip,) = reconstruct_clips(audiomae(), [("n", torch.randn(30000) * 0.1)], masking=Masking(mask, share, None, None))
    hidden = clip.hidden[::16, ::16]
    assert hidden.mean() == pytest.approx(share)
    if mask == "time":
        assert set(hidden.mean(0)) == {0, 1}
    if mask == "frequency":
        assert set(hidden.mean(1)) == {0, 1}


def test_the_same_seed_hides_the_same_patches_and_clips_differ():
    model, clips = audiomae(), [(name, torch.randn(30000)) for name in "ab"]
    first, again, other = (reconstruct_clips(model, clips, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0].filled, again[0].filled)
    assert (first[0].hidden != other[0].hidden).any() and (first[0].hidden != first[1].hidden).any()


def test_what_was_hidden_leaves_no_trace_in_the_reconstruction():
    """Change the sound where a time mask hides it: nothing that is shown as predicted or seen may move."""
    torch.manual_seed(0)
    model, waveform = audiomae(norm_target=True), torch.randn(400 + 127 * 160) * 0.1
    masking = Masking("time", 0.75, None, None)
    (before,) = reconstruct_clips(model, [("n", waveform)], masking=masking)
    # a frame hears 400 samples: stay well inside the widest run of hidden frames, and keep the clip's mean as it was
    edges = np.flatnonzero(np.diff(np.r_[0, before.hidden.all(0), 0]))
    start, stop = max(zip(edges[::2], edges[1::2], strict=True), key=lambda run: run[1] - run[0])
    inside = slice(int(start) * 160 + 400, int(stop) * 160 - 400)
    changed = waveform.clone()
    changed[inside] = waveform[inside].flip(0) * 1.0
    changed[inside][::2] = changed[inside][::2].flip(0)
    (after,) = reconstruct_clips(model, [("n", changed)], masking=masking)
    assert np.abs(after.original - before.original).max() > 1
    np.testing.assert_allclose(after.filled, before.filled, atol=1e-3)


def test_mode_and_random_state_stay_as_they_were(tmp_path):
    model = audiomae().train()
    state = torch.get_rng_state()
    write_reconstructions(model, [("a", torch.randn(9000, generator=torch.Generator().manual_seed(0)))], tmp_path)
    assert model.training and model.encoder.training and torch.equal(torch.get_rng_state(), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reconstruction.png", "reconstruction.wav"]


def test_a_short_clip_is_padded_and_the_padding_is_not_shown(run, tmp_path, capsys):
    assert command(sound(tmp_path / "short.wav", seconds=0.1), run, "--out", tmp_path) == 0
    assert "shorter than one patch, padded to the model's 1.29 s" in capsys.readouterr().out
    (clip,) = reconstruct_clips(audiomae(), [("n", torch.randn(400 + 49 * 160))])
    assert clip.original.shape == clip.filled.shape == clip.hidden.shape == (128, 50)


def test_a_short_clip_that_is_hidden_whole_or_not_at_all_is_said(run, tmp_path, capsys):
    file = sound(tmp_path / "short.wav", seconds=0.1)
    said = []
    for ratio in (0.02, 0.98):
        assert command(file, run, "--out", tmp_path, "--ratio", ratio, "--seed", 1) == 0
        said.append(capsys.readouterr().out)
    assert "none of the clip itself was hidden" in said[0] and "all of the clip was hidden" in said[1]
    assert "nan" not in said[0] + said[1]


def test_start_and_seconds_choose_the_part(run, tmp_path, capsys):
    file = sound(tmp_path / "long.wav", seconds=5.0)
    assert command(file, run, "--out", tmp_path, "--start", 3.5, "--seconds", 0.5) == 0
    assert "0.50 s from 3.5 s of 5.00 s, padded" in capsys.readouterr().out
    assert soundfile.info(tmp_path / "long.reconstruction.wav").duration == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.wav"], "missing.wav: cannot be read: No such file or directory"),
        (["text.wav"], "text.wav: cannot be decoded: "),
        (["fine.wav", "--start", "9"], "--start 9: "),
        (["fine.wav", "--start", "-1"], "--start -1"),
        (["fine.wav", "--ratio", "1.5"], "--ratio 1.5: the share of hidden patches lies between 0 and 1"),
        (["fine.wav", "--mask", "frequency", "--ratio", "0.95"], "--mask frequency --ratio 0.95: hides all of 8 x 8"),
        (["fine.wav", "--ratio", "1e-20"], "--mask random --ratio 1e-20: hides none of 8 x 8"),
        (["fine.wav", "--out", "text.wav"], "text.wav: cannot be written to"),
    ],
)
def test_what_is_wrong_is_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    sound(tmp_path / "fine.wav")
    (tmp_path / "text.wav").write_text("this is not audio")
    assert command(arguments[0], run, *arguments[1:]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_an_unknown_checkpoint_is_one_line(tmp_path, capsys):
    file = sound(tmp_path / "fine.wav")
    assert main(["reconstruct", str(file), "--checkpoint", str(tmp_path / "nothing")]) == 2
    assert "nothing" in (said := capsys.readouterr().err) and said.count("\n") == 1
