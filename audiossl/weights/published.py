"""What was published beside the weights: with which front end were they trained, under which licence?

The front ends' values are those of conf/frontend, kept here too because a checkpoint must find them where the package
is installed without its configs (a test compares the two).
"""

from __future__ import annotations

from audiossl.weights.translation import Licence

AUDIOMAE = "audiossl.methods.audiomae.AudioMAE"
KALDI_FBANK = dict(  # conf/frontend/kaldi_fbank.yaml, with AudioSet's statistics
    _target_="audiossl.spectrogram.KaldiFbank",
    rate_hz=16000,
    window_ms=25,
    hop_ms=10,
    num_mels=128,
    fmin_hz=20,
    fmax_hz=None,
    preemphasis=0.97,
    mean=-4.2677393,
    std=4.5689974,
    seconds=10.24,
)
AUDIOMAE_LICENCE = Licence(
    "CC-BY-NC-4.0",
    "https://github.com/facebookresearch/AudioMAE",
    "its LICENSE says CC-BY-NC 4.0, its README CC-BY 4.0: treat as non-commercial",
)
AUDIOMAE_PORT_LICENCE = Licence(
    "CC-BY-4.0",
    "https://huggingface.co/gaunernst/vit_base_patch16_1024_128.audiomae_as2m",
    "as the timm port is tagged; the authors' own LICENSE says CC-BY-NC 4.0",
)

ATST = {1: "audiossl.methods.atst.ATSTClip", 0: "audiossl.methods.atst_frame.ATSTFrame"}  # by class tokens
ATST_DISTILLED = "audiossl.methods.atst_c2f.ATSTC2F"
ATST_MEL = dict(  # conf/frontend/atst_mel.yaml
    _target_="audiossl.spectrogram.AtstMel",
    rate_hz=16000,
    window_ms=64,
    hop_ms=10,
    n_fft=1024,
    num_mels=64,
    fmin_hz=60,
    fmax_hz=7800,
    floor_db=80,
    min_db=-79.6482,
    max_db=50.6842,
    seconds=10.01,
)
ATST_SECONDS = {1: 6.01, 0: 10.01}  # of Clip's and Frame's published chunks, by class tokens
ATST_LICENCE = Licence("MIT", "https://github.com/Audio-WestlakeU/audiossl", "its LICENSE names the checkpoints too")

PASST = "audiossl.methods.passt.PaSST"
PASST_MEL = dict(  # conf/frontend/passt_mel.yaml
    _target_="audiossl.spectrogram.PasstMel",
    rate_hz=32000,
    window_ms=25,
    hop_ms=10,
    n_fft=1024,
    num_mels=128,
    fmin_hz=0,
    fmax_hz=15000,
    fmin_jitter_hz=10,
    fmax_jitter_hz=2000,
    preemphasis=0.97,
    log_offset=0.00001,
    mean=-4.5,
    std=2.5,
    seconds=10,
)
PASST_LICENCE = Licence("CC-BY-4.0", "https://github.com/kkoutini/PaSST", "of the weights; the code is Apache-2.0")
