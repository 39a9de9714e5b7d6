"""Which tokens are hidden from ATST-Frame's student?

Spans of consecutive tokens, wav2vec 2.0's way (arXiv 2006.11477) as ATST-Frame uses it (arXiv 2306.04186). Every start
gets a random rank; the rank at which a position is first covered then decides: up to the n-th span as published, or
until the wanted share is hidden. Published spans overlap, so that a ratio of .65 hides half of the tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from audiossl.errors import UserError
from audiossl.noise import Noise
from audiossl.sound.frontend import beyond

MIN_SPANS = 2  # of every clip, however short: as published


def num_spans(draw: Tensor, available: Tensor, ratio: float, length: int) -> Tensor:
    """Count spans as published, int(ratio * N / length + draw), at least 2: draw and available (B,) -> (B,) int64."""
    exact = available.double() * ratio / length
    return (exact.floor() + (draw >= 1 - exact.frac())).long().clamp(min=MIN_SPANS)


def num_hidden(available: Tensor, ratio: float, share: Literal["published", "corrected"]) -> Tensor:
    """Count the tokens to hide when they are counted: available (B,) -> (B,) int64, rounded up or to the nearest.

    Published is the comparison of whole numbers with ratio * N as a float32: 100 at .55 gives 55, not 56.
    """
    exact = available.double() * ratio
    return (exact.float().ceil() if share == "published" else exact.round()).long()


def hide_smallest(key: Tensor, count: Tensor) -> Tensor:
    """Hide the `count` (B,) positions with the smallest keys (B, N), of equal ones the first: (B, N) bool."""
    chosen = torch.arange(key.shape[1], device=key.device) < count[:, None]
    return torch.zeros_like(chosen).scatter(1, key.argsort(dim=1, stable=True), chosen)


def cover_ranks(draw: Tensor, room: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Say which span is the first to cover each position: (B, N) int64, N where none does.

    Starts lie in 0 .. room - 1, room (B,), and are taken in the order of their draws (B, N); the span taken as number k
    has lengths[:, k] of (B, N), at most `longest`.
    """
    count = draw.shape[1]
    position = torch.arange(count, device=draw.device)
    cannot_start = position >= room[:, None]
    order = draw.masked_fill(cannot_start, math.inf).argsort(dim=1, stable=True)
    rank = torch.zeros_like(order).scatter(1, order, position.expand_as(order))
    reach = functional.pad(lengths.gather(1, rank), (longest - 1, 0)).unfold(1, longest, 1)  # (B, N, longest)
    rank = functional.pad(rank.masked_fill(cannot_start, count), (longest - 1, 0), value=count).unfold(1, longest, 1)
    distance = torch.arange(longest - 1, -1, -1, device=draw.device)
    return rank.masked_fill(reach <= distance, count).amin(2)


def hide_spans(draw: Tensor, count: Tensor, available: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Hide `count` (B,) spans as published: draws (B, N) order their starts, lengths (B, N) are the spans' -> (B, N).

    Spans may overlap and are cut at N. Starts lie in range(N - the shortest of the spans), so the last position is
    never hidden by spans of one length.
    """
    is_used = torch.arange(draw.shape[1], device=draw.device) < count[:, None]
    room = available - lengths.masked_fill(~is_used, longest).amin(1)
    room = torch.where(room <= count, count + 1, room)
    return cover_ranks(draw, room, lengths, longest) < count[:, None]


def hide_share(draw: Tensor, count: Tensor, available: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Hide exactly `count` (B,) positions of the first `available` (B,) by spans, the last one cut short: (B, N) bool.

    Differs: spans are added until the share is reached, and may end at the very last position.
    """
    room = (available - lengths.amin(1) + 1).clamp(min=1)
    ranks = cover_ranks(draw, room, lengths, longest)
    return hide_smallest(ranks.masked_fill(beyond(available[:, None], draw.shape[1]), draw.shape[1] + 1), count)


def hide_apart(draw: Tensor, count: Tensor, available: Tensor, num_positions: int, length: int) -> Tensor:
    """Hide up to `count` (B,) spans that do not overlap, one after another as published: draw (B, n) -> (B, N) bool.

    A gap is chosen in proportion to its length, then a start in it evenly, of all but the last that would fit. Where no
    gap is longer than a span, the rest are left out.
    """
    position = torch.arange(num_positions, device=draw.device)
    first = torch.zeros(len(draw), num_positions, dtype=torch.int64, device=draw.device)  # of the gap at each position
    end = available[:, None].expand_as(first)
    mask = torch.zeros_like(first, dtype=torch.bool)
    for turn, where in enumerate(draw.split(1, dim=1)):
        weight = (position + length < end) * (end - first) / (end - first - length).clamp(min=1)
        total = weight.cumsum(1)
        start = (total <= where * total[:, -1:]).sum(1, keepdim=True).clamp(max=num_positions - 1)
        is_placed = (total[:, -1:] > 0) & (count[:, None] > turn)
        gap_first, gap_end = first.gather(1, start), end.gather(1, start)
        mask |= is_placed & (position >= start) & (position < start + length)
        in_gap = is_placed & (position >= gap_first) & (position < gap_end)
        end = torch.where(in_gap & (position < start + length), torch.where(position <= start, start + 1, 0), end)
        first = torch.where(in_gap & (position >= start + length), start + length, first)
    return mask


def hide_share_apart(draw: Tensor, count: Tensor, available: Tensor, num_positions: int, length: int) -> Tensor:
    """Hide exactly `count` (B,) positions by spans that do not overlap, one cut short: draw (B, N + 1) -> (B, N) bool.

    Differs: spans and single visible tokens are laid out in random order, so that every arrangement is as likely.
    """
    tile = torch.arange(num_positions + 1, device=draw.device)
    whole = (count // length)[:, None]
    num_tiles = whole + 1 + (available - count)[:, None]
    size = torch.where(tile < whole, length, torch.where(tile == whole, count[:, None] % length, 1))
    order = draw.masked_fill(tile >= num_tiles, math.inf).argsort(dim=1, stable=True)
    ends = size.gather(1, order).cumsum(1)
    position = torch.arange(num_positions, device=draw.device).expand(len(draw), -1).contiguous()
    owner = torch.searchsorted(ends, position, right=True)
    return (order <= whole).gather(1, owner)


class SpanMasking:
    """Draw masks by name for a batch of token sequences.

    `block`: spans of `length` that may overlap; `uniform`: of `shortest` to 2 * `length`, evenly; `disjoint`: of
    `length`, none overlapping; `random`: single tokens. `ratio` in (0, 1) is nominal where `share` is published (block:
    .65 hides .50 of 250, .75 hides .56 of 150) and true where it is corrected, round(ratio * N) tokens.

    Raises `UserError` for an unknown name, a ratio outside (0, 1), or lengths that are none.
    """

    def __init__(
        self,
        mask: Literal["block", "uniform", "disjoint", "random"],
        ratio: float,
        length: int,
        shortest: int,
        share: Literal["published", "corrected"],
    ):
        if mask not in ("block", "uniform", "disjoint", "random"):
            raise UserError(f"model.mask={mask!r}: choose block, uniform, disjoint or random")
        if share not in ("published", "corrected"):
            raise UserError(f"model.mask_share={share!r}: choose published or corrected")
        if not 0 < ratio < 1:
            raise UserError(f"model.mask_ratio={ratio}: the share of hidden tokens lies in (0, 1), 0.65 for example")
        if length < 1 or not 1 <= shortest <= 2 * length:
            raise UserError(
                f"model.mask_length={length} and model.mask_shortest={shortest}: spans have a token or more, and the "
                "shortest at most twice mask_length"
            )
        self.mask, self.ratio, self.length, self.shortest, self.share = mask, ratio, length, shortest, share

    def draw(self, generator: Noise, num_tokens: int, available: Tensor | None = None) -> Tensor:
        """Draw masks (B, N) bool, True = hidden.

        `available` (B,) says how many tokens of each clip are real: it is masked as a clip of that length would be, and
        what lies behind is True.
        """
        if available is None:
            available = torch.full((len(generator.rows),), num_tokens, device=generator.device)
        mask = self._draw(generator, num_tokens, available)
        return mask | beyond(available[:, None], num_tokens)

    def _draw(self, generator: Noise, num_tokens: int, available: Tensor) -> Tensor:
        is_published = self.share == "published"
        if self.mask == "random" or not is_published:
            count = num_hidden(available, self.ratio, self.share)
        else:
            count = num_spans(generator.uniform(), available, self.ratio, self.length)
        if self.mask == "random":
            key = generator.uniform(num_tokens).masked_fill(beyond(available[:, None], num_tokens), math.inf)
            return hide_smallest(key, count)
        if self.mask == "disjoint":
            most = max(int(self.ratio * num_tokens / self.length) + 1, MIN_SPANS)
            hide, num_draws = (hide_apart, most) if is_published else (hide_share_apart, num_tokens + 1)
            return hide(generator.uniform(num_draws), count, available, num_tokens, self.length)
        starts, longest = generator.uniform(num_tokens), self.length
        lengths = torch.full(starts.shape, self.length, device=starts.device)
        if self.mask == "uniform":
            longest = 2 * self.length
            lengths = self.shortest + (generator.uniform(num_tokens) * (longest - self.shortest + 1)).long()
            lengths = lengths.clamp(max=longest)
        return (hide_spans if is_published else hide_share)(starts, count, available, lengths, longest)
