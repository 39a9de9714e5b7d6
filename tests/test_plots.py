"""Do the pictures show what they say?"""

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from audiossl.plots import Reconstruction, loss_figure, reconstruction_figure, sweep_figure


@pytest.fixture
def clips():
    rng = np.random.default_rng(0)
    hidden = np.kron(rng.random((8, 16)) < 0.8, np.ones((16, 16), bool))
    original = rng.normal(-8, 2, (128, 256))
    filled = np.where(hidden, -5.0, original)
    return [Reconstruction(name, original, filled, hidden, 0.01, 20, 8000) for name in ("speech", "rain")]


def panels(figure):
    return [axis for axis in figure.axes if axis.images and axis.get_label() != "<colorbar>"]


def test_a_reconstruction_has_three_panels_a_clip_in_seconds_and_hz(clips, tmp_path):
    figure = reconstruction_figure(clips, tmp_path / "r.png")
    assert len(panels(figure)) == 6 and imread(tmp_path / "r.png").shape[2] == 4
    for axis in panels(figure):
        assert axis.get_xlim() == pytest.approx((0, 2.56))
    first, last = panels(figure)[0], panels(figure)[-1]
    assert (first.get_title(), first.get_ylabel(), last.get_xlabel()) == ("speech", "frequency (Hz)", "time (s)")
    assert [t.get_text() for t in first.get_yticklabels()] == ["100", "250", "500", "1k", "2k", "4k", "8k"]


def test_frequency_ticks_lie_on_the_bands_that_hear_them(clips):
    from audiossl.sound.mel import kaldi_mel_matrix

    axis = panels(reconstruction_figure(clips))[0]
    heard = kaldi_mel_matrix(128, 512, 16000, 20, 8000)
    for hz, position in zip((1000, 2000, 4000), axis.get_yticks()[3:6], strict=True):
        band = int(heard[:, hz * 512 // 16000].argmax())
        assert abs(position - (band + 0.5)) < 0.6


def test_the_middle_panel_shows_nothing_that_was_hidden(clips):
    original, seen, filled = (axis.images[0].get_array() for axis in panels(reconstruction_figure(clips))[:3])
    hidden = clips[0].hidden
    assert np.ma.getmaskarray(seen)[hidden].all() and not np.ma.getmaskarray(seen)[~hidden].any()
    np.testing.assert_allclose(filled[~hidden], original[~hidden])
    assert np.ptp(filled[hidden]) < 1e-9


def test_all_panels_share_one_scale_below_the_loudest_cell(clips):
    images = [axis.images[0] for axis in panels(reconstruction_figure(clips))]
    assert {image.get_clim() for image in images} == {(-80, 0)}
    assert images[0].get_array().max() == pytest.approx(0)
    gap = (clips[0].original[0, 0] - clips[0].original.max()) * 10 / np.log(10)
    assert images[0].get_array()[0, 0] == pytest.approx(gap)


def test_the_lines_are_the_border_between_hidden_and_visible_cells(clips):
    figure = reconstruction_figure(clips[:1])
    lines = [c for c in panels(figure)[2].collections]
    horizontal, vertical = (len(c.get_segments()) for c in lines)
    hidden = clips[0].hidden
    assert horizontal == (hidden[1:] != hidden[:-1]).sum() and vertical == (hidden[:, 1:] != hidden[:, :-1]).sum()


def test_errors_are_in_db_over_hidden_cells_only(clips):
    clip = clips[0]
    expected = np.abs(-5.0 - clip.original[clip.hidden]).mean() * 10 / np.log(10)
    assert clip.error_db == pytest.approx(expected)
    assert 0 < clip.guess_db < clip.error_db


def test_a_guessed_level_is_said_in_the_title(clips):
    from dataclasses import replace

    figure = reconstruction_figure([replace(clips[0], note="level guessed")])
    assert "level guessed" in panels(figure)[2].get_title()


def test_the_loss_picture_holds_both_losses(tmp_path):
    steps = list(range(200))
    loss = [2 / (1 + s / 20) for s in steps]
    axis = loss_figure(steps, loss, [(50, 0.7), (150, 0.4)], tmp_path / "loss.png").axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("optimiser step", "loss")
    assert axis.get_legend().get_texts()[-1].get_text() == "validation"
    np.testing.assert_array_equal(axis.lines[-1].get_xydata(), [(50, 0.7), (150, 0.4)])
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_an_empty_or_tiny_run_still_has_a_loss_picture(tmp_path):
    loss_figure([], [], [], tmp_path / "none.png")
    axis = loss_figure([0, 1], [1.0, float("nan")], [], tmp_path / "two.png").axes[0]
    assert axis.get_ylim()[1] == pytest.approx(1.1)


def test_a_sweep_has_a_line_for_each_value_of_the_second_key_in_the_order_of_the_first(tmp_path):
    rows = [dict(ratio=r, hop=h, score=r * h) for h in (10, 5) for r in (0.9, 0.7, 0.8)] + [dict(ratio=0.8, hop=5)]
    axis = sweep_figure(rows, x="ratio", y="score", line="hop", path=tmp_path / "s.png").axes[0]
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["hop = 10", "hop = 5"]
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [(0.7, 7), (0.8, 8), (0.9, 9)])
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0.7", "0.8", "0.9"]


def test_a_sweep_over_words_keeps_their_order():
    rows = [dict(mask=m, score=s) for m, s in (("random", 0.8), ("time", 0.7), ("frequency", 0.6))]
    axis = sweep_figure(rows, x="mask", y="score").axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["random", "time", "frequency"]
    assert [y for _, y in axis.lines[0].get_xydata()] == [0.8, 0.7, 0.6]


def test_pictures_leave_matplotlibs_settings_alone(clips):
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    reconstruction_figure(clips)
    loss_figure([0, 1], [1.0, 0.5], [])
    assert dict(matplotlib.rcParams) == before and matplotlib.get_backend() == backend
