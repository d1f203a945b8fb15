"""Span corruption (T5) and mixtures of denoisers (UL2), pure functions of seed and document.

A window of a document's tokens becomes a source, in which each corrupted span is replaced by a
sentinel, and a target, in which each sentinel is followed by the span it stands for. Sentinels
are the vocabulary's extra ids, counted from its last id down: the first is <extra_id_0>. Both
sides end in EOS.

Mode tokens tell a mixture's denoisers apart. They are the first extra ids after the vocabulary's
own: base_size + 0 is [R], + 1 is [S], + 2 is [X], at the head of the source. A user of such a
model puts the mode before the input: [S] for text to be continued, as most prompts are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from encdec.data.objectives import Document, Encoded, Form, Objective, encode_texts, named
from encdec.data.vocabulary import Vocabulary
from encdec.errors import ConfigError

MODES = ("R", "S", "X")


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a window.

    ``mean_span`` tokens a corrupted span (None: one span at the window's end, a prefix LM);
    ``density`` the share of corrupted tokens, for a prefix LM the mean of a uniform draw; ``rate``
    its share of a mixture's windows, relative to the others'.
    """

    mode: str
    mean_span: float | None
    density: float
    rate: float = 1.0

    def __post_init__(self):
        if self.mode not in MODES:
            raise ConfigError(f"a denoiser's mode is {self.mode!r}; expected one of R, S, X")
        if self.mean_span is not None and self.mean_span < 1:
            raise ConfigError(f"mean_span is {self.mean_span}; expected 1 token or more, or None")
        if not 0 < self.density < 1:
            raise ConfigError(f"density is {self.density}; expected a share between 0 and 1")
        if self.rate <= 0:
            raise ConfigError(f"a denoiser's rate is {self.rate}; expected more than 0")


# Tay et al. 2022 (2205.05131), 3.1.2 and table 1: seven denoisers of about equal participation.
# The span settings were compared with a public seqio task that quotes the table
# (Finnish-NLP/ul2-small-nl24-finnish, tasks.py).
UL2_DENOISERS = (
    Denoiser("R", 3, 0.15),
    Denoiser("R", 8, 0.15),
    Denoiser("S", None, 0.25),
    Denoiser("X", 3, 0.5),
    Denoiser("X", 8, 0.5),
    Denoiser("X", 64, 0.15),
    Denoiser("X", 64, 0.5),
)
# T5Gemma 2 (2512.14856, 3.1): (mean span, corrupted share) (3, 15 %), (12, 50 %), (32, 15 %),
# (32, 50 %), and the last 75 % of the input as one span, mixed 1:1:1:1:4. The report names no
# modes; these follow UL2's rule, by which many corrupted tokens or long spans are extreme.
T5GEMMA2_DENOISERS = (
    Denoiser("R", 3, 0.15),
    Denoiser("X", 12, 0.5),
    Denoiser("X", 32, 0.15),
    Denoiser("X", 32, 0.5),
    Denoiser("S", None, 0.75, rate=4),
)
SETTINGS = {"ul2": UL2_DENOISERS, "t5gemma2": T5GEMMA2_DENOISERS}


def mode_id(vocabulary: Vocabulary, mode: str) -> int:
    """Id of a mode token: the vocabulary's extra ids from the lowest up, in the order R, S, X."""
    return vocabulary.base_size + MODES.index(mode)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Tokens of a window, how many of them are corrupted, in how many spans."""

    tokens: int
    noise: int
    spans: int


def _span_shape(denoiser: Denoiser, tokens: int) -> _Shape:
    assert denoiser.mean_span is not None
    noise = min(max(round(tokens * denoiser.density), 1), tokens - 1)
    spans = max(round(noise / denoiser.mean_span), 1)
    return _Shape(tokens, noise, min(spans, noise, tokens - noise))


@functools.cache
def _longest_shape(denoiser: Denoiser, source_capacity: int, target_capacity: int) -> _Shape | None:
    """The longest window whose kept tokens and spans fit both capacities."""
    low, high = 1, source_capacity + target_capacity + 1
    while high - low > 1:
        tokens = (low + high) // 2
        shape = _span_shape(denoiser, tokens)
        kept = tokens - shape.noise + shape.spans
        fits = kept <= source_capacity and shape.noise + shape.spans <= target_capacity
        low, high = (tokens, high) if fits else (low, tokens)
    return _span_shape(denoiser, low) if low > 1 else None


def _random_lengths(rng: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """``parts`` lengths of at least 1 that sum to ``total``, every such split equally likely."""
    cuts = np.zeros(0, np.int64)
    if parts > 1:
        cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]).astype(np.int64))


def _corrupt_spans(
    ids: np.ndarray, shape: _Shape, sentinels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Source and target without EOS; kept and corrupted spans take turns, a kept one first."""
    lengths = np.empty(2 * shape.spans, np.int64)
    lengths[0::2] = _random_lengths(rng, shape.tokens - shape.noise, shape.spans)
    lengths[1::2] = _random_lengths(rng, shape.noise, shape.spans)
    starts = np.cumsum(lengths) - lengths
    corrupted = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    begins = np.zeros(shape.tokens, bool)
    begins[starts] = True
    source, target = ids.copy(), ids.copy()
    source[starts[1::2]] = sentinels[: shape.spans]
    target[starts[0::2]] = sentinels[: shape.spans]
    return source[~corrupted | begins], target[corrupted | begins]


def _prefix_shape(
    density: float, left: int, source_capacity: int, target_capacity: int, rng: np.random.Generator
) -> _Shape:
    """A window cut once: the corrupted share is uniform around its mean, both capacities kept."""
    share = rng.uniform(max(0.0, 2 * density - 1), min(1.0, 2 * density))
    fill = min(source_capacity / max(1 - share, 1e-6), target_capacity / max(share, 1e-6))
    tokens = _without_orphan(min(left, max(int(fill), 2)), left)
    noise = min(max(round(tokens * share), 1), tokens - 1, target_capacity)
    return _Shape(_without_orphan(min(tokens, noise + source_capacity), left), noise, 1)


def _without_orphan(tokens: int, left: int) -> int:
    """One token less where it would leave a single one, which no window can hold."""
    return tokens - 1 if left - tokens == 1 and tokens > 2 else tokens


def _windows(
    ids: np.ndarray,
    denoisers: Sequence[Denoiser],
    capacities: tuple[int, int],
    sentinels: np.ndarray,
    rng: np.random.Generator,
) -> Iterator[tuple[Denoiser, int, np.ndarray, np.ndarray]]:
    """(denoiser, tokens, source, target) in order, without EOS and mode tokens."""
    rates = np.array([denoiser.rate for denoiser in denoisers])
    limits = np.cumsum(rates) / rates.sum()
    begin = 0
    # A single token cannot be both kept and corrupted.
    while len(ids) - begin > 1:
        place = int(np.searchsorted(limits, rng.random(), side="right"))
        denoiser = denoisers[min(place, len(denoisers) - 1)]
        left = len(ids) - begin
        if denoiser.mean_span is None:
            shape = _prefix_shape(denoiser.density, left, *capacities, rng)
            middle, end = begin + shape.tokens - shape.noise, begin + shape.tokens
            yield denoiser, shape.tokens, ids[begin:middle], ids[middle:end]
        else:
            longest = _longest_shape(denoiser, *capacities)
            assert longest is not None  # MixtureOfDenoisers refuses capacities without one
            shape = longest
            tokens = _without_orphan(min(left, shape.tokens), left)
            if tokens < shape.tokens:
                shape = _span_shape(denoiser, tokens)
            window = ids[begin : begin + tokens]
            yield denoiser, tokens, *_corrupt_spans(window, shape, sentinels, rng)
        begin += shape.tokens


@dataclasses.dataclass(frozen=True)
class MixtureOfDenoisers(Objective):
    """Windows of raw text, each corrupted by a denoiser drawn by rate (UL2, 2205.05131).

    Windows are as long as the two lengths allow, so that rows fill. ``mode_tokens`` puts the
    denoiser's mode token before the source. Rates count windows. UL2's own lengths were 512 and
    512; with far fewer target tokens than source tokens, half-corrupted windows leave much of
    the source side empty.
    """

    denoisers: tuple[Denoiser, ...] = UL2_DENOISERS
    mode_tokens: bool = True
    inputs_eos = True
    document_fields = ("text",)

    def __post_init__(self):
        if not self.denoisers:
            raise ConfigError("a mixture of denoisers needs at least one denoiser")

    def _capacities(self, form: Form) -> tuple[int, int]:
        """Tokens of a window's source and target, without EOS and mode token."""
        return form.inputs_length - 1 - self.mode_tokens, form.targets_length - 1

    def check(self, form: Form) -> None:
        """ConfigError where windows do not fit the lengths or sentinels run out."""
        capacities = self._capacities(form)
        shapes = []
        for denoiser in self.denoisers:
            shape = _Shape(2, 1, 0) if min(capacities) >= 1 else None
            if denoiser.mean_span is not None:
                shape = _longest_shape(denoiser, *capacities)
            if shape is None:
                raise ConfigError(
                    f"{form.inputs_length} source and {form.targets_length} target tokens are too "
                    "few for span corruption; give larger --inputs_length and --targets_length"
                )
            shapes.append(shape)
        needed = max(shape.spans for shape in shapes) + len(MODES) * self.mode_tokens
        if form.vocabulary.extra_ids < needed:
            what = "sentinels and mode tokens" if self.mode_tokens else "sentinels"
            raise ConfigError(
                f"{type(self).__name__} at {form.inputs_length} + {form.targets_length} tokens "
                f"needs {needed} {what}, the vocabulary has {form.vocabulary.extra_ids} extra ids; "
                f"give --extra_ids={needed} or more"
            )

    def encode(self, documents: Sequence[Document], first_document: int, form: Form) -> Encoded:
        encoded, vocabulary = Encoded(), form.vocabulary
        byte_lengths = vocabulary.byte_lengths
        sentinels = np.arange(vocabulary.size - 1, vocabulary.base_size - 1, -1, dtype=np.int32)
        eos = np.array([vocabulary.eos_id], np.int32)
        heads = {
            mode: np.array([mode_id(vocabulary, mode)][: self.mode_tokens], np.int32)
            for mode in MODES
        }
        capacities = self._capacities(form)
        texts = encode_texts(documents, first_document, vocabulary, encoded, add_eos=False)
        for number, ids in texts:
            rng = np.random.default_rng([form.seed, number])
            used = 0
            windows = _windows(ids, self.denoisers, capacities, sentinels, rng)
            for denoiser, tokens, source, target in windows:
                source = np.concatenate([heads[denoiser.mode], source, eos])
                target = np.concatenate([target, eos])
                encoded.add(source, target, int(byte_lengths[target].sum()))
                used += tokens
            if used < len(ids):
                encoded.dropped["tail_of_one_token"] += 1
        return encoded


@named("span_corruption")
@dataclasses.dataclass(frozen=True)
class SpanCorruption(Objective):
    """T5's objective (Raffel et al. 2020, 3.1.4): 15 % of the tokens, spans of 3 on average."""

    density: float = 0.15
    mean_span: float = 3.0
    inputs_eos = True
    document_fields = ("text",)

    def __post_init__(self):
        _ = self._mixture

    @functools.cached_property
    def _mixture(self) -> MixtureOfDenoisers:
        denoiser = Denoiser("R", self.mean_span, self.density)
        return MixtureOfDenoisers((denoiser,), mode_tokens=False)

    def check(self, form: Form) -> None:
        """ConfigError where windows do not fit the lengths or sentinels run out."""
        self._mixture.check(form)

    def encode(self, documents: Sequence[Document], first_document: int, form: Form) -> Encoded:
        return self._mixture.encode(documents, first_document, form)


@named("ul2")
def ul2(
    denoisers: str | Sequence[Sequence[Any]] = "ul2", mode_tokens: bool = True
) -> MixtureOfDenoisers:
    """A mixture of denoisers: "ul2", "t5gemma2", or a list of denoisers.

    A denoiser is (mode, mean_span, density, rate); mean_span None is a prefix LM.
    """
    if isinstance(denoisers, str):
        if denoisers not in SETTINGS:
            raise ConfigError(
                f"ul2.denoisers is {denoisers!r}; expected one of {', '.join(SETTINGS)} or a list"
            )
        return MixtureOfDenoisers(SETTINGS[denoisers], mode_tokens)
    try:
        own = tuple(Denoiser(*denoiser) for denoiser in denoisers)
    except TypeError as error:
        raise ConfigError(
            f"ul2.denoisers is {denoisers!r}; expected a list of (mode, mean_span, density, rate)"
        ) from error
    return MixtureOfDenoisers(own, mode_tokens)
