"""What does it save to describe a set at all layers and supports together, and not once for each of them?

`python -m benchmarks.probing`. Ours is the probes' own code: for each temporal support every clip is read once, its
segments go through the encoder in batches, and all blocks' features are pooled on the way. Naive is a pass for each
layer and support: a network that ends at that layer, one segment at a time. Both describe the same clips of the demo
and take turns; the largest difference between their features stands in the last column. One read for all supports would
save decoding alone (segments of another length are another forward pass), which is not built.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import yaml
from matplotlib.figure import Figure
from tqdm import tqdm

from audiossl.config.settings import instantiate
from audiossl.encoder import Encoder
from audiossl.index import Index
from audiossl.pretrained import PretrainedEncoder
from audiossl.probes.blocks import describe_block
from audiossl.probes.segments import Wanted, segment_samples
from audiossl.probes.sources import EncoderSource
from audiossl.sound.audio import decode, resample
from benchmarks import ROOT
from benchmarks.common import Report, Spread, Turns, parser_of, prepared, progress, take_turns


class DemoClips:
    """Read clips of the demo set, as a task does."""

    def __init__(self):
        self.index = Index.load(ROOT / "demo" / "shards")

    def waveform(self, clip: int, rate_hz: int) -> np.ndarray:
        """Decode and resample a clip: (S,) float32."""
        return resample(*decode(self.index.read(clip)), rate_hz)


def model_of(size: str, depth: int | None) -> PretrainedEncoder:
    """Build an Audio-MAE encoder of a size in conf/size, for clips of 2.56 s, with random weights."""
    sizes = yaml.safe_load((ROOT / "conf" / "size" / f"{size}.yaml").read_text())
    sizes |= {} if depth is None else {"depth": depth}
    frontend = yaml.safe_load((ROOT / "conf" / "frontend" / "kaldi_fbank.yaml").read_text())
    frontend = instantiate(frontend | dict(seconds=2.56, mean=-4.27, std=4.57))
    places = dict(num_mels=128, frames=frontend.frames, patch=(16, 16), stride=(16, 16), positions="published")
    encoder = Encoder(**places, **sizes, mlp_ratio=4.0, drop_path=0.0, num_class_tokens=1)
    return PretrainedEncoder(encoder, frontend, None, {"frontend": {}})


def ending_at(model: PretrainedEncoder, num_layers: int) -> PretrainedEncoder:
    """Cut a network off after some of its blocks; the last norm follows, as it does for each layer of ours."""
    shorter = copy.deepcopy(model)
    shorter.encoder.blocks = shorter.encoder.blocks[:num_layers]
    return shorter


def pooled(source: EncoderSource, clips: range, support: float, wanted: Wanted, batch_size: int) -> np.ndarray:
    """Describe clips by the probes' code: (segments, layers, poolings, D)."""
    length = segment_samples(source, support)
    with ThreadPoolExecutor(1) as readers, tqdm(disable=True) as bar:
        block = describe_block(source, DemoClips(), clips, length, wanted, batch_size, readers, bar)
    return np.load(BytesIO(block))["pooled"]


def main(argv: list[str] | None = None) -> None:
    """Let both ways describe the same clips."""
    parser = parser_of("probing", __doc__, rounds=2)
    parser.add_argument("--size", default="tiny", help="of conf/size (%(default)s)")
    parser.add_argument("--depth", type=int, help="blocks; default: the size's own")
    parser.add_argument("--supports", nargs="+", type=float, default=[0.64, 1.28, 2.56], help="seconds")
    parser.add_argument("--clips", type=int, default=8, help="of the demo (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="segments at once (%(default)s)")
    arguments = prepared(parser, argv)
    if arguments.quick:
        arguments.supports, arguments.depth, arguments.clips = [1.28, 2.56], 2, 2
    model = model_of(arguments.size, arguments.depth)
    num_layers, clips = len(model.encoder.blocks), range(arguments.clips)
    whole = EncoderSource(model, "ours", "none").to(arguments.device)
    cut = [
        EncoderSource(ending_at(model, 1 + layer), "naive", "none").to(arguments.device) for layer in range(num_layers)
    ]
    found: dict[str, dict] = {"together": {}, "one by one": {}}

    def together() -> int:
        for support in arguments.supports:
            wanted = Wanted(support_seconds=support)
            found["together"][support] = pooled(whole, clips, support, wanted, arguments.batch)
        return len(clips)

    def one_by_one() -> int:
        for support in arguments.supports:
            wanted = Wanted(support_seconds=support, layers=1)
            layers = [pooled(source, clips, support, wanted, 1) for source in cut]
            found["one by one"][support] = np.concatenate(layers, axis=1)
        return len(clips)

    with progress(2 * (arguments.rounds + 1)) as bar:
        ways = {"one by one": one_by_one, "together": together}
        turns = take_turns(ways, rounds=arguments.rounds, device=arguments.device, bar=bar)
    pairs = [(found["together"][support], found["one by one"][support]) for support in arguments.supports]
    difference = max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)
    report = Report(
        arguments, {"way": 12, "passes": 7, "ms a clip": 28, "ratio": 22, "CPU ratio": 22, "difference": 10}
    )
    for name, passes in (("one by one", num_layers * len(pairs)), ("together", len(pairs))):
        add_row(report, name, passes, turns, difference)
    report.draw(lambda figure: picture_of(report.rows, figure))


def add_row(report: Report, name: str, passes: int, turns: dict[str, Turns], difference: float) -> None:
    milliseconds = [1e3 * taken for taken in turns[name].wall]
    ratios = {clock: turns[name].times_as_fast_as(turns["one by one"], clock) for clock in ("wall", "cpu")}
    shown = f"{Spread.of(milliseconds):.0f}"
    cells = [name, passes, shown, f"{ratios['wall']:.1f}", f"{ratios['cpu']:.1f}", f"{difference:.0e}"]
    report.row(cells, name=name, passes=passes, seconds=turns[name].seconds(), ratio=ratios["wall"],
               ratio_cpu=ratios["cpu"], difference=difference)  # fmt: skip


def picture_of(rows: list[dict], figure: Figure) -> None:
    """Draw milliseconds a clip of both ways."""
    axes = figure.subplots()
    axes.bar([f"{row['name']}\n{row['passes']} passes" for row in rows], [1e3 * row["seconds"].median for row in rows])
    axes.set_ylabel("ms a clip, all layers and supports")


if __name__ == "__main__":
    main()
