"""`embed` and `tag` as a user types them: odd files, killed commands, and what they leave."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import environment, kill_when
from conftest import ROOT
from exported import METHODS, encoder_of, export, noise, write
from packing import read_table, unpack_demo

import audiossl
from audiossl.__main__ import main
from audiossl.features.classifier import LinearHead
from audiossl.features.store import groups_of
from audiossl.sound import ffmpeg
from audiossl.tag import average, tag

REASONS = {  # of the files that `odd_files` writes, those that cannot be used
    "truncated.wav": "cut: ",
    "truncated.flac": "cannot be decoded: ",
    "truncated.ogg": "no samples",
    "nan.wav": "NaN or Inf samples",
    "inf.wav": "NaN or Inf samples",
    "far_too_loud.wav": "samples reach ",
    "no_samples.wav": "no samples",
    "zero_bytes.wav": "zero bytes",
    "text.wav": "cannot be decoded: ",
    "sound.m4a": ffmpeg.MISSING,
}


def odd_files(folder: Path) -> Path:
    """Write a file of each kind that a stranger's folder may hold, named after what it is."""
    folder.mkdir()
    sound = noise(1.5, 16000)
    write(folder / "eight_channels.wav", np.stack([sound] * 8, 1), 16000)
    write(folder / "rate_192_khz.flac", noise(1.5, 192000), 192000)
    write(folder / "rate_4_khz.wav", noise(1.5, 4000), 4000)
    write(folder / "one_sample.wav", sound[:1], 16000)
    write(folder / "silence.wav", np.zeros(40000), 44100)
    for name in ("wav", "flac", "ogg"):
        whole = write(folder / f"whole.{name}", sound, 16000).read_bytes()
        (folder / f"truncated.{name}").write_bytes(whole[: len(whole) * 2 // 3])
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        write(folder / f"{name}.wav", np.where(np.arange(24000) == 20000, value, sound), 16000, subtype="FLOAT")
    write(folder / "far_too_loud.wav", sound * 1e30, 16000, subtype="FLOAT")
    write(folder / "no_samples.wav", sound[:0], 16000)
    (folder / "zero_bytes.wav").touch()
    (folder / "text.wav").write_text("This is no audio.\n" * 99)
    (folder / "sound.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    return folder


def run(*arguments: object, cwd: Path, **extra: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "audiossl", *map(str, arguments)]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = environment(PYTHONPATH=path, **extra)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an encoder of each method, and `odd` files."""
    place = tmp_path_factory.mktemp("place")
    for model in METHODS:
        export(model, place / model)
    odd_files(place / "odd")
    return place


@pytest.mark.parametrize("model", METHODS)
def test_each_odd_file_gives_finite_features_or_a_line_in_the_ledger(place, tmp_path, model, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", "")  # where no ffmpeg is
    out = tmp_path / "x.npz"
    assert main(["embed", "--encoder", model, "odd", "--out", str(out), "--frames"]) == 0
    rejected = {Path(name).name: reason for name, reason in read_table(tmp_path / "x.npz.rejected.csv").items()}
    assert rejected.keys() == REASONS.keys()
    assert all(rejected[name].startswith(start) and "\n" not in rejected[name] for name, start in REASONS.items())
    assert f"{len(REASONS)} could not be used" in capsys.readouterr().err
    features = np.load(out)
    names = [Path(name).name for name in features["files"]]
    assert sorted(names) == sorted({path.name for path in (place / "odd").iterdir()} - REASONS.keys())
    assert np.isfinite(features["clip"]).all() and np.isfinite(features["frames"]).all()
    assert len(features["offsets"]) == len(names) + 1 and (np.diff(features["offsets"]) > 0).all()
    whole = features["clip"][names.index("whole.wav")]
    np.testing.assert_allclose(features["clip"][names.index("eight_channels.wav")], whole, atol=1e-4)


@pytest.mark.parametrize("name", [*REASONS, "notes.txt", "gone.wav", "odd_*.none", "empty"])
def test_where_nothing_can_be_embedded_one_line_names_it_and_the_command_fails(
    place, tmp_path, name, capfd, monkeypatch
):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "notes.txt").write_text("Dear diary,\n\ntoday I recorded a bird.\n")
    (tmp_path / "empty").mkdir()
    path = place / "odd" / name if name in REASONS else tmp_path / name
    assert main(["embed", "--encoder", str(place / "audiomae"), str(path), "--out", str(tmp_path / "x.npz")]) == 2
    line = capfd.readouterr().err.strip().split("\r")[-1].splitlines()[-1]
    assert line.startswith(f"audiossl embed: nothing could be embedded: {path}: ") and "Traceback" not in line
    assert not list(tmp_path.glob("x.npz")) and not list(tmp_path.glob("*.partial"))


def test_what_the_file_holds_is_what_python_gives(place, tmp_path, monkeypatch):
    files = [write(tmp_path / f"{seconds}.wav", noise(seconds, 24000), 24000) for seconds in (0.3, 7.7, 2)]
    (tmp_path / "list.txt").write_text("0.3.wav\n7.7.wav\n\n2.wav\n")
    arguments = ["--encoder", "atst_clip", tmp_path / "list.txt", "--frames", "--layers", 2, "--pooling", "class+mean"]
    monkeypatch.chdir(place)
    assert main(["embed", *map(str, arguments), "--out", str(tmp_path / "x.npz")]) == 0
    features, model = np.load(tmp_path / "x.npz"), audiossl.load(place / "atst_clip")
    assert features["files"].tolist() == [str(path) for path in files]
    about = json.loads(str(features["about"]))
    assert (about["layers"], about["pooling"]) == ([0, 1], "class+mean") and about["description"]["frontend"]
    for row, path in enumerate(files):
        expected = model.embed(path, layers=2, pooling="class+mean")
        some = slice(*features["offsets"][row : row + 2])
        np.testing.assert_allclose(features["clip"][row], expected.clip[0], atol=1e-5)
        np.testing.assert_allclose(features["frames"][some], expected.frames[0], atol=1e-5)
        np.testing.assert_array_equal(features["timestamps_seconds"][some], expected.timestamps_seconds)


@pytest.fixture(scope="module")
def many(place) -> Path:
    """Real clips, and files that are none, in more groups than one."""
    (place / "many").mkdir()
    unpack_demo(place / "many", 3)
    (place / "many" / "1-bad.wav").write_text("no audio")
    files = sorted(path for path in (place / "many").iterdir() if path.suffix != ".csv")
    assert len(groups_of([path.stat().st_size for path in files])) >= 3
    return place / "many"


def test_a_killed_command_goes_on_where_it_was_and_ends_with_the_same_file(place, many, tmp_path, monkeypatch, capsys):
    settings = ["--encoder", "audiomae", "many", "--frames"]
    assert run("embed", *settings, "--out", tmp_path / "whole.npz", cwd=place).returncode == 0
    command = [sys.executable, "-m", "audiossl", "embed", *settings, "--out", str(tmp_path / "x.npz")]
    env = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    process = subprocess.Popen(command, cwd=place, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    first = tmp_path / "x.npz.partial" / "group-000000.npz"
    assert kill_when(process, first) == -9 and not (tmp_path / "x.npz").exists()
    monkeypatch.chdir(place)
    assert main(["embed", *settings, "--pooling", "max", "--out", str(tmp_path / "x.npz")]) == 2
    assert "begun with other settings (pooling: mean -> max)" in capsys.readouterr().err
    resumed = run("embed", *settings, "--out", tmp_path / "x.npz", cwd=place)
    assert resumed.returncode == 0 and "embed:   0%" not in resumed.stderr  # the first group was not made again
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    ledgers = [(tmp_path / f"{name}.npz.rejected.csv").read_text() for name in ("x", "whole")]
    assert ledgers[0] == ledgers[1] and ledgers[0].count("\n") == 2
    assert not (tmp_path / "x.npz.partial").exists()


def test_a_finished_file_is_left_alone(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    settings = ["embed", "--encoder", "audiomae", "odd/whole.wav", "--out", str(tmp_path / "x.npz")]
    assert main(settings) == 0
    before = (tmp_path / "x.npz").read_bytes()
    assert main(settings) == 0 and "was complete already" in capsys.readouterr().out
    assert main([*settings, "--rows", "concat"]) == 2
    assert "features made otherwise (rows: mean -> concat)" in capsys.readouterr().err
    assert (tmp_path / "x.npz").read_bytes() == before


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(place, many, tmp_path):
    settings = f"-m audiossl embed --encoder audiomae many --frames --out {tmp_path}/x.npz"
    full = f"ulimit -f 8; exec {sys.executable} {settings}"  # kB a file
    env = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    done = subprocess.run(["bash", "-c", full], cwd=place, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "x.npz").exists()
    assert done.stderr.splitlines()[-1].endswith("x.npz: File too large; the same command goes on where it was")
    assert run(*settings.split()[2:], cwd=place).returncode == 0


def test_a_reader_that_has_seen_enough_is_no_error(place, many):
    env = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", PYTHONUNBUFFERED="")
    command = f"{sys.executable} -m audiossl tag --encoder passt many many odd/whole.wav | true"
    done = subprocess.run(["bash", "-c", command], cwd=place, env=env, capture_output=True, text=True, timeout=200)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_hdf5_holds_the_same(place, many, tmp_path):
    h5py = pytest.importorskip("h5py")
    for out in ("x.npz", "x.h5"):
        main(["embed", "--encoder", str(place / "passt"), str(many), "--frames", "--out", str(tmp_path / out)])
    features = np.load(tmp_path / "x.npz")
    with h5py.File(tmp_path / "x.h5") as stored:
        assert stored["files"].asstr()[:].tolist() == features["files"].tolist()
        for name in ("clip", "frames", "offsets", "timestamps_seconds"):
            np.testing.assert_array_equal(stored[name][:], features[name])


WRONG = [
    (["--out", "x.csv"], "--out x.csv: the name of an .npz, .h5, .hdf5 file"),
    (["--out", "x.npz", "--layers", "1,x"], "--layers 1,x: last"),
    (["--out", "x.npz", "--layers", "9"], "layers=9: last"),
    (["--out", "x.npz", "--device", "gpu"], "--device gpu: not here"),
    (["--out", "x.npz", "--batch-size", "0"], "--batch-size 0: at least 1"),
    (["--out", "x.npz", "--overlap", "1"], "overlap=1.0: windows share"),
    (["--out", "no/place/../../odd/whole.wav/x.npz"], "cannot be written to"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_a_wrong_setting_is_one_line(place, options, message, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["embed", "--encoder", "audiomae", "odd/whole.wav", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0


def test_tagging_prints_the_top_classes_and_averages_windows(place, tmp_path, capsys):
    sound = noise(6.0, 32000)
    path = write(tmp_path / "long.wav", sound, 32000, subtype="FLOAT")
    done = run("tag", "--encoder", "passt", path, tmp_path / "gone.wav", "--top", 3, cwd=place)
    assert done.returncode == 0 and f"{tmp_path / 'gone.wav'}: no such file" in done.stderr
    name, *rows = done.stdout.splitlines()
    printed = {label: float(value) for label, value in (row.split() for row in rows)}
    model = encoder_of("passt")
    length = model.frontend.samples_for(model.frontend.frames)
    starts = [0, length // 2, length, 192000 - length]  # 16 columns each: the last begins where a column does
    windows = torch.stack([torch.from_numpy(sound)[start:][:length] for start in starts])
    with torch.no_grad():
        scores = model.logits(model.frontend(windows)).sigmoid()
    assert name == str(path) and len(printed) == 3 and list(printed.values()) == sorted(printed.values(), reverse=True)
    low, high = scores.amin(0), scores.amax(0)
    for label, value in printed.items():
        place_of = model.labels.index(label)
        assert low[place_of] - 2e-3 <= value <= high[place_of] + 2e-3
    tag = ["tag", "--encoder", str(place / "passt"), str(path)]
    assert main([*tag, "--windows", "--top", "1"]) == 0
    by_window = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in by_window] == ["0.00", "1.28", "2.56", "3.52"]
    assert main([*tag, "--exclusive", "--top", "99"]) == 0
    exclusive = capsys.readouterr().out.splitlines()[1:]
    assert sum(float(row.split()[1]) for row in exclusive) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("model", "file", "message"),
    [
        ("audiomae", "odd/whole.wav", "--encoder audiomae: has no classifier"),
        ("passt", "odd/nan.wav", "nothing could be tagged: odd/nan.wav: NaN or Inf samples"),
        ("passt", "odd/far_too_loud.wav", "odd/far_too_loud.wav: samples reach"),
    ],
)
def test_what_cannot_be_tagged_is_one_line(place, model, file, message, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["tag", "--encoder", model, file]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_lines_of_python_in_the_readme_embed_a_file(place, tmp_path, monkeypatch, capsys):
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)]
    assert len(lines.strip().splitlines()) <= 5
    (tmp_path / "audiomae").symlink_to(place / "audiomae")
    write(tmp_path / "clip.wav", noise(7.3, 11025), 11025)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})  # noqa: S102 - the README's own
    assert capsys.readouterr().out.startswith("torch.Size([1, 24]) torch.Size([1, 45, 24]) tensor(")


def test_a_head_that_scores_moments_is_averaged_over_them():
    model = copy.deepcopy(encoder_of("atst_frame"))
    model.head = LinearHead(model.width, 4, pooling="tokens", norm="layer").eval()
    torch.nn.init.normal_(model.head.linear.weight)
    clip = torch.from_numpy(noise(1.0, 16000))
    (window,) = tag(model, [clip], overlap=0.5, batch_size=2)
    moments = model.embed(clip, 16000).frames[0]
    with torch.no_grad():
        expected = model.head(moments).sigmoid().mean(0)
    assert window.weight == len(moments)
    torch.testing.assert_close(average([window, window]), expected, rtol=0, atol=1e-5)


PEAK = """
import resource, sys
import audiossl
model = audiossl.load(sys.argv[1])
found = model.embed(sys.argv[2], with_frames=False, overlap=0.0)
print(int(found.num_frames[0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["audiomae", "atst_frame", "passt"])
def test_an_hour_takes_the_memory_of_a_minute(place, tmp_path, model):
    peaks, minute = {}, noise(60, 48000)
    for minutes in (1, 60):
        with soundfile.SoundFile(tmp_path / f"{minutes}.wav", "w", 48000, 1) as file:
            for _ in range(minutes):
                file.write(minute)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, place / model, tmp_path / f"{minutes}.wav"],
            env=environment(PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        num_frames, peaks[minutes] = map(int, done.stdout.split())
        assert num_frames > minutes * 60
    print(f"{model}: {peaks[1]} MB for a minute, {peaks[60]} MB for an hour")
    assert peaks[60] < peaks[1] + 60
