"""Of ``encdec benchmark speculate``: a file's answers with and without drafts, compared."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from encdec.benchmarks.speculate_expected import tokens_per_step
from encdec.benchmarks.transformers_runtime import TransformersModel
from encdec.inference.answer_files import read_inputs
from encdec.inference.drafting import Paces
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.generator import Generation, Generator, TextGenerator
from encdec.inference.pace import LONGEST_DRAFT, SIZES, Insistent
from encdec.machine import available_cores

PEER = "transformers"
STEP_SIZES = (1, 2, 4, 5, 8, 10, 16)  # whose costs are measured
TIE = 1e-4  # of two log-probabilities: ten times what rounding does to one in float32


@dataclasses.dataclass(frozen=True)
class TaskRate:
    """One runtime on one file, with and without drafts.

    Attributes:
        runtime: its name.
        task: the file's name.
        rows: inputs answered together.
        tokens: of all answers.
        plain_rate: tokens per second without drafts, first tokens included.
        drafted_rate: with.
        same_answers: share of the answers that are equal in every token.
        different: the others' places in the file, counted from 0.
        ties: those of them where the two tokens that differ first are as likely as each other but
            for rounding (``near_tie``); the rest are faults.
        log_prob_difference: the largest, of tokens up to the first that differs.
        regrouped_difference: the same between plain answers in batches of these rows and of
            another number: what rounding does without drafts. None where it was not asked for.
        tokens_a_step: of verifying steps, each row; 0 where there were none.
        acceptance: share of the drafted tokens that were kept.
        allowed: tokens per step of each size that these answers would allow one row alone.
    """

    runtime: str
    task: str
    rows: int
    tokens: int
    plain_rate: float
    drafted_rate: float
    same_answers: float
    tokens_a_step: float
    acceptance: float
    different: tuple[int, ...] = ()
    ties: tuple[int, ...] = ()
    log_prob_difference: float = 0.0
    regrouped_difference: float | None = None
    allowed: dict[int, float] = dataclasses.field(default_factory=dict)


def measure_task(
    runtime: str,
    generators: tuple[TextGenerator, TextGenerator],
    path: str,
    limit: int,
    max_tokens: int | None,
    regrouped: TextGenerator | None = None,
) -> TaskRate:
    """Answers a file's texts twice, alternating by windows, after all programs were compiled.

    ``regrouped``: decodes plainly, too, in batches of another size, to be compared.
    """
    texts = read_inputs(path)[:limit]
    settings = GenerationSettings(max_tokens=max_tokens)
    rows = generators[0].batch_rows
    seconds, tokens = [0.0, 0.0], [0, 0]
    made: tuple[list[Generation], list[Generation]] = ([], [])
    _prepare(generators, texts, settings)
    before = _counts(generators[1].paces)
    for part in _windows(texts, rows):
        for which, one in enumerate(generators):
            clock = time.perf_counter()
            answers = one.generate(part, settings, truncate=True)
            seconds[which] += time.perf_counter() - clock
            made[which].extend(answer for (answer,) in answers)
            tokens[which] += sum(len(answer.tokens) for (answer,) in answers)
    steps, drafted, accepted = _counts(generators[1].paces) - before
    pairs = list(zip(*made))
    different = tuple(i for i, (a, b) in enumerate(pairs) if a.tokens != b.tokens)
    ties = tuple(i for i in different if near_tie(generators[0], texts[i], *pairs[i], max_tokens))
    between = None
    if regrouped:
        again = [one for (one,) in regrouped.generate(texts, settings, truncate=True)]
        between = max(map(log_prob_difference, made[0], again))
    vocabulary = generators[0].prompts.vocabulary
    sources = [vocabulary.encode(text) for text in texts]
    allowed = tokens_per_step(
        sources, [one.tokens for one in made[0]], vocabulary.eos_id, STEP_SIZES[1:]
    )
    return TaskRate(
        runtime,
        pathlib.Path(path).name.split(".")[0],
        rows,
        tokens[0],
        tokens[0] / seconds[0],
        tokens[1] / seconds[1],
        1 - len(different) / len(texts),
        1 + accepted / steps if steps else 0.0,
        accepted / drafted if drafted else 0.0,
        different,
        ties,
        max(log_prob_difference(*pair) for pair in pairs),
        between,
        allowed,
    )


def _windows(texts: Sequence[str], rows: int) -> Iterator[Sequence[str]]:
    """What is answered in one turn. Batches are made of the texts of one window, sorted by length:
    other windows would make batches of other shapes, and compile other programs."""
    for begin in range(0, len(texts), 4 * rows):
        yield texts[begin : begin + 4 * rows]


def _prepare(
    generators: tuple[TextGenerator, TextGenerator],
    texts: Sequence[str],
    settings: GenerationSettings,
) -> None:
    """Has compiled what answers need, whatever sizes of steps are chosen for which of them.

    Exports compile next to nothing and answer only the first texts.
    """
    plain, drafted = generators
    if not isinstance(drafted, Generator):
        for one in generators:
            one.generate(texts[: one.batch_rows], settings, truncate=True)
        return
    windows, kind = list(_windows(texts, plain.batch_rows)), drafted.paces.kind
    for part in windows:
        plain.generate(part, settings, truncate=True)
    for size in SIZES:
        drafted.paces.begin(functools.partial(Insistent, sizes=(size,)))
        for part in windows:
            drafted.generate(part, settings, truncate=True)
    drafted.paces.begin(kind, compiled=True)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place where they differ; the shorter's length if it is the longer's beginning."""
    pairs = enumerate(zip(one, other))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def log_prob_difference(one: Generation, other: Generation) -> float:
    """The largest between the log-probabilities of the tokens with which both begin."""
    same = first_difference(one.tokens, other.tokens)
    pairs = zip(one.log_probs[:same], other.log_probs[:same])
    return max((abs(a - b) for a, b in pairs), default=0.0)


def near_tie(
    plain: TextGenerator,
    text: str,
    wanted: Generation,
    other: Generation,
    max_tokens: int | None = None,
) -> bool:
    """Whether rounding explains the first token in which two greedy answers differ: plain decoding
    chooses the other one itself if its logit is raised by TIE."""
    place = first_difference(wanted.tokens, other.tokens)
    if place >= min(len(wanted.tokens), len(other.tokens)):
        return False  # one ended early
    raised = GenerationSettings(max_tokens=max_tokens, logit_bias=[(other.tokens[place], TIE)])
    ((answer,),) = plain.generate([text], raised, truncate=True)
    return answer.tokens[: place + 1] == other.tokens[: place + 1]


def measure_transformers(
    generator: TextGenerator, directory: pathlib.Path, path: str, limit: int, max_tokens: int | None
) -> TaskRate:
    """The same of transformers with and without its own prompt lookup, one row at a time.

    Args:
        generator: of the model that was exported.
        directory: ``encdec export --format=hf`` of it.
        path, limit, max_tokens: as for ``measure_task``.
    """
    import torch

    torch.set_num_threads(available_cores())
    model, prompts = TransformersModel(directory, "float32"), generator.prompts
    sources = [prompts.encode(text, truncate=True)[0] for text in read_inputs(path)[:limit]]
    count, eos = max_tokens or generator.max_tokens, prompts.vocabulary.eos_id
    seconds, tokens = [0.0, 0.0], [0, 0]
    different: list[int] = []
    for number, ids in enumerate([sources[0], *sources]):
        if number == 1:  # the first time is preparation
            seconds, tokens, different = [0.0, 0.0], [0, 0], []
        made = []
        for which, more in enumerate(({}, {"prompt_lookup_num_tokens": LONGEST_DRAFT})):
            clock = time.perf_counter()
            made.append(model.answer(ids, count, eos, prompts.decoder_start_id, **more))
            seconds[which] += time.perf_counter() - clock
            tokens[which] += len(made[-1])
        different += [number - 1] * (made[0] != made[1])
    task = pathlib.Path(path).name.split(".")[0]
    plain, drafted = (n / taken for n, taken in zip(tokens, seconds))
    share = 1 - len(different) / len(sources)
    return TaskRate(PEER, task, 1, tokens[0], plain, drafted, share, 0.0, 0.0, tuple(different))


def _counts(paces: Paces) -> np.ndarray:
    return np.sum([(0, 0, 0), *((p.steps, p.drafted, p.accepted) for p in paces.all)], axis=0)
