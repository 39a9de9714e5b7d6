"""A classifier that learned when things happen from labels of clips: its attention goes where its head goes."""

import numpy as np
import pytest
import soundfile
import torch
from finetunes import clips_folder, run
from tunings import FRAME, batch, export_of, tuning

from audiossl import load
from audiossl.__main__ import main
from audiossl.detect import score_moments
from audiossl.errors import UserError
from audiossl.tag import average, tag
from audiossl.weights.export import read_export

LABELS = ["dog", "rain", "rooster"]


@pytest.fixture(scope="module")
def weak():
    method = tuning(FRAME, level="frame", pooling="columns", weak_pooling="attention", num_classes=3, mask_padding=True)
    torch.nn.init.normal_(method.attention.linear.weight)
    torch.nn.init.normal_(method.head.linear.weight)
    return method.eval()


@pytest.fixture
def exported(weak, tmp_path):
    (tmp_path / "encoder").mkdir()
    about = dict(vocabulary=LABELS, mask_padding=True)
    return export_of(weak, tmp_path / "encoder", **about, **weak.listening)


def of_model(model, given):
    spectrogram = model.frontend(given.waveform, num_samples=given.num_samples)
    return model.clip_logits(spectrogram, 1 + (given.num_samples - 400).clamp(min=0) // 160)


@torch.no_grad()
def test_logits_of_clips_are_the_fine_tunings_own_to_the_bit(weak, exported, tmp_path):
    given = batch(num_classes=3, num_samples=torch.tensor([15600, 9000, 4000, 15600]))
    expected = weak.clip_logits(given)
    assert torch.equal(of_model(load(exported), given), expected)
    load(exported).save_pretrained(tmp_path / "again")
    assert torch.equal(of_model(load(tmp_path / "again"), given), expected)
    plain = load(exported)
    plain.description["weak_pooling"] = "average"
    plain.attention = None
    assert (of_model(plain, given) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_tag_and_detect_hear_what_the_fine_tuning_hears(weak, exported, tmp_path, capsys):
    model, given = load(exported), batch(1, num_classes=3)
    (found,) = tag(model, [given.waveform[0]], overlap=0.5, batch_size=4)
    torch.testing.assert_close(average([found]), weak.clip_logits(given)[0].sigmoid())
    moments, _ = score_moments(model, [given.waveform[0]], overlap=0.5, batch_size=4)
    np.testing.assert_allclose(moments, weak.logits(given)[0].sigmoid()[: len(moments)], rtol=0, atol=1e-6)
    soundfile.write(tmp_path / "a.wav", given.waveform[0].numpy(), 16000)
    assert main(["tag", "--encoder", str(exported), str(tmp_path / "a.wav")]) == 0
    assert set(LABELS) < set(capsys.readouterr().out.split())


def test_an_export_without_its_attention_says_so(weak, exported, tmp_path):
    model = load(exported)
    model.attention = None
    model.save_pretrained(tmp_path / "older")
    assert "attention" not in read_export(tmp_path / "older" / "encoder.safetensors")[0]
    older = load(tmp_path / "older")
    assert older.weak_pooling == "none"
    (found,) = tag(older, [batch(1).waveform[0]], overlap=0.5, batch_size=4)
    assert found.probabilities.shape == (3,)
    with pytest.raises(UserError, match="scores moments.*labels of clips.*weak_pooling=max"):
        run(tmp_path / "run", tmp_path / "older", clips_folder(tmp_path / "set"), "evaluate=true")
