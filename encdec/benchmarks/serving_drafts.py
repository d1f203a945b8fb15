"""``encdec benchmark serving --checkpoint=DIR``: a trained model's server, plain and with drafts.

Servers of one model, one for each kind of drafts, answer the same requests in alternation. The
first one drafts nothing: its answers are what those of the others have to be. With ``--against``
another running server takes its turns: an earlier version of ours, or somebody else's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from encdec.benchmarks.serving_client import (
    Pass,
    TimedAnswer,
    about_machine,
    ask_all,
    latencies,
    served_model,
)
from encdec.errors import DataError
from encdec.inference.generation_settings import OFF
from encdec.serving.app import Service

AGAINST = "against"  # the server that was running already

# Settings of every second request with --mixed, in turn: what a request may ask for.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 0.9, "stop": ["(", ";"]},
    {"max_tokens": 13},
    {"temperature": 1.2, "top_k": 20, "max_tokens": 40},
    {"repetition_penalty": 1.3, "no_repeat_ngram": 3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.2, "logprobs": 2},
)


@dataclasses.dataclass(frozen=True)
class DraftedPass:
    """A pass, and what its server's drafts gave meanwhile.

    Attributes:
        made: the requests' answers.
        steps: of the running batch.
        drafted: tokens that steps verified.
        accepted: those of them that were kept.
    """

    made: Pass
    steps: int
    drafted: int
    accepted: int


def texts_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Bodies of requests for the file's texts, over and over until there are enough.

    For another server, of which nothing is known but the protocol, texts that would have to be cut
    are left out, and the longest answer is named.

    Raises:
        DataError: it would leave out all of them.
    """
    from encdec.inference.answer_files import read_inputs
    from encdec.inference.generator import read_prompt_format

    texts = read_inputs(options.jsonl)
    common: dict[str, Any] = {"truncate": True}
    if options.against:
        prompts, answer_length = read_prompt_format(options.checkpoint)
        common = {"max_tokens": answer_length}
        texts = [text for text in texts if not prompts.encode(text, truncate=True)[1]]
        if not texts:
            raise DataError(
                f"{options.jsonl}: every text is longer than the {prompts.max_input_tokens:,} "
                "tokens of the model's longest input; give shorter ones"
            )
    bodies = []
    for number in range(options.requests):
        body = {
            "prompt": texts[number % len(texts)],
            "temperature": 0,
            "seed": options.seed + number,
            "stream": True,
            "logprobs": 0,
            **common,
        }
        if options.mixed and number % 2:
            body |= KINDS[number // 2 % len(KINDS)] | {"stream": number % 3 > 0}
        bodies.append(body)
    return bodies


@contextlib.contextmanager
def servers(options: argparse.Namespace) -> Iterator[dict[str, tuple[str, Service]]]:
    """A server with each kind of drafts, by its name: address and service."""
    from encdec.inference.draft_model import check_draft_lengths, check_draft_model, load_draft
    from encdec.inference.generator import read_prompt_format
    from encdec.saved.saved_params import load_params_for_inference
    from encdec.serving.engine import Engine
    from encdec.serving.protocol import Limits
    from encdec.serving.server import running

    prompts, answer_length = read_prompt_format(options.checkpoint)
    for draft in options.draft:
        check_draft_model(draft, prompts.vocabulary)
        check_draft_lengths(draft, prompts.max_input_tokens, answer_length)
    config, params, _ = load_params_for_inference(options.checkpoint)
    with contextlib.ExitStack() as stack:
        found = {}
        for draft in [OFF, *(draft for draft in options.draft if draft != OFF)]:
            engine = Engine(
                config,
                params,
                prompts,
                max_tokens=answer_length,
                slots=options.slots,
                max_queue=options.requests,
                draft=load_draft(draft, prompts.vocabulary),
            )
            engine.warm_up()
            service = Service(engine, "model", Limits(answer_length, answer_length, 1), 3600.0)
            found[draft] = stack.enter_context(running(service))[0], service
        yield found


def measure(options: argparse.Namespace) -> list[dict[str, DraftedPass]]:
    """The passes of every round; more than one round begins with one of warming up."""
    bodies = texts_of(options)
    rounds = []
    other = served_model(options.against) if options.against else ""
    with servers(options) as ours:
        found: dict[str, tuple[str, Service | None]] = dict(ours)
        if options.against:
            found[AGAINST] = options.against, None
        for number in range(options.repeats + (options.repeats > 1)):
            order = list(found) if number % 2 else list(found)[::-1]
            made = {}
            for name in order:
                more = {"model": other} if name == AGAINST else {}
                made[name] = _pass(*found[name], [body | more for body in bodies])
            if number or options.repeats == 1:
                rounds.append({name: made[name] for name in found})
    return rounds


def _pass(url: str, service: Service | None, bodies: Sequence[Mapping[str, Any]]) -> DraftedPass:
    before = _counts(service)
    made = asyncio.run(ask_all(url, bodies, len(bodies)))
    return DraftedPass(made, *(b - a for a, b in zip(before, _counts(service))))


def _counts(service: Service | None) -> tuple[int, int, int]:
    """Steps, drafted and accepted tokens so far, as the server reports them; zeros without one."""
    if service is None:
        return 0, 0, 0
    names = ("decode_steps", "drafted_tokens", "accepted_tokens")
    values = dict(
        line.rsplit(" ", 1)
        for line in service.engine.metrics.text().decode().splitlines()
        if not line.startswith("#")
    )
    steps, drafted, accepted = (int(float(values[f"encdec_{name}_total"])) for name in names)
    return steps, drafted, accepted


def summary(
    options: argparse.Namespace, rounds: Sequence[Mapping[str, DraftedPass]]
) -> dict[str, Any]:
    """Medians over the rounds, ratios within each round, and equal answers."""
    report: dict[str, Any] = {"settings": vars(options), **about_machine(), "arms": {}}
    wanted = rounds[0][OFF].made
    for name in rounds[0]:
        passes = [made[name] for made in rounds]
        answers = [pair for one in passes for pair in zip(one.made.answers, wanted.answers)]
        # Of another server the text counts: pieces of tokens may be told otherwise.
        same = _same_text if name == AGAINST else _same_tokens
        equal = [(a, b) for a, b in answers if same(a, b)]
        differences = [abs(x - y) for a, b in equal for x, y in zip(a.log_probs, b.log_probs)]
        ratios = [made[OFF].made.seconds / made[name].made.seconds for made in rounds]
        by_work = [
            made[OFF].made.processor_seconds / made[name].made.processor_seconds for made in rounds
        ]
        drafted = sum(one.drafted for one in passes)
        against = [
            made[AGAINST].made.seconds / made[name].made.seconds
            for made in rounds
            if AGAINST in made
        ]
        report["arms"][name] = {
            "requests_per_second": statistics.median(
                options.requests / one.made.seconds for one in passes
            ),
            "tokens_per_second": statistics.median(one.made.rate for one in passes),
            "times_off": statistics.median(ratios),
            "ratios": ratios,
            "times_against": statistics.median(against) if against else None,
            "ratios_against": against,
            "processor_seconds": statistics.median(one.made.processor_seconds for one in passes),
            "times_off_in_processor_time": statistics.median(by_work),
            "steps": statistics.median(one.steps for one in passes),
            "drafted_tokens": drafted,
            "accepted": sum(one.accepted for one in passes) / drafted if drafted else 0.0,
            "answers": len(answers),
            "equal_answers": len(equal),
            "unequal": [place for place, pair in enumerate(answers) if not same(*pair)][:20],
            "largest_log_prob_difference": max(differences, default=0.0),
            **latencies([one.made for one in passes]),
        }
    return report


def _same_tokens(one: TimedAnswer, other: TimedAnswer) -> bool:
    return (one.tokens, one.finish) == (other.tokens, other.finish)


def _same_text(one: TimedAnswer, other: TimedAnswer) -> bool:
    return (one.text, one.finish) == (other.text, other.finish)


def _equal_text(arm: Mapping[str, Any]) -> str:
    return (
        f"    equal to off: {arm['equal_answers']:,} of {arm['answers']:,} answers, their log-"
        f"probabilities within {arm['largest_log_prob_difference']:.1e}"
    )


def text_of(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    lines = [
        f"{settings['checkpoint']}, {report['device']}, {report['cores']} cores: "
        f"{settings['requests']:,} requests at once, {settings['slots']} slots, "
        f"{settings['repeats']} rounds"
    ]
    for name, arm in report["arms"].items():
        spread = f"{min(arm['ratios']):.2f} to {max(arm['ratios']):.2f}"
        by_work, answer = arm["times_off_in_processor_time"], arm["answer_seconds"]
        rates = (
            f"{arm['requests_per_second']:.1f} requests/s, {arm['tokens_per_second']:,.0f} tokens/s"
        )
        waited = f"answer {answer['median']:.3f} s, p95 {answer['p95']:.3f}"
        if name == AGAINST:
            lines += [f"{settings['against']}: {rates}; {waited}", _equal_text(arm)]
            continue
        lines += [
            f"--draft={name}: {rates}, {arm['times_off']:.2f} times off "
            f"({spread}; in processor time {by_work:.2f})",
            f"    {arm['steps']:,.0f} steps, {arm['drafted_tokens']:,} tokens drafted in all, "
            f"{arm['accepted']:.0%} kept; {waited}",
            _equal_text(arm),
        ]
        if against := arm["ratios_against"]:
            lines.append(
                f"    {arm['times_against']:.2f} times {settings['against']} "
                f"({min(against):.2f} to {max(against):.2f})"
            )
    return "\n".join(lines)
