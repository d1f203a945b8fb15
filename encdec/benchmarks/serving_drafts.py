"""``encdec benchmark serving --checkpoint=DIR``: a trained model's server, plain and with drafts.

Servers of one model, one for each kind of drafts, answer the same requests in alternation. The
first one drafts nothing: its answers are what those of the others have to be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from encdec.benchmarks.serving_client import Pass, about_machine, ask_all, latencies
from encdec.inference.generation_settings import OFF
from encdec.serving.app import Service

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
    """Bodies of requests for the file's texts, over and over until there are enough."""
    from encdec.inference.answer_files import read_inputs

    texts = read_inputs(options.jsonl)
    bodies = []
    for number in range(options.requests):
        body = {
            "prompt": texts[number % len(texts)],
            "temperature": 0,
            "seed": options.seed + number,
            "stream": True,
            "truncate": True,
            "logprobs": 0,
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
    with servers(options) as found:
        for number in range(options.repeats + (options.repeats > 1)):
            order = list(found) if number % 2 else list(found)[::-1]
            made = {name: _pass(*found[name], bodies) for name in order}
            if number or options.repeats == 1:
                rounds.append({name: made[name] for name in found})
    return rounds


def _pass(url: str, service: Service, bodies: Sequence[Mapping[str, Any]]) -> DraftedPass:
    before = _counts(service)
    made = asyncio.run(ask_all(url, bodies, len(bodies)))
    return DraftedPass(made, *(b - a for a, b in zip(before, _counts(service))))


def _counts(service: Service) -> tuple[int, int, int]:
    """Steps, drafted and accepted tokens so far, as the server reports them."""
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
        equal = [(a, b) for a, b in answers if (a.tokens, a.finish) == (b.tokens, b.finish)]
        differences = [
            abs(x - y) for a, b in equal for x, y in zip(a.log_probs, b.log_probs, strict=True)
        ]
        ratios = [made[OFF].made.seconds / made[name].made.seconds for made in rounds]
        by_work = [
            made[OFF].made.processor_seconds / made[name].made.processor_seconds for made in rounds
        ]
        drafted = sum(one.drafted for one in passes)
        report["arms"][name] = {
            "requests_per_second": statistics.median(
                options.requests / one.made.seconds for one in passes
            ),
            "tokens_per_second": statistics.median(one.made.rate for one in passes),
            "times_off": statistics.median(ratios),
            "ratios": ratios,
            "processor_seconds": statistics.median(one.made.processor_seconds for one in passes),
            "times_off_in_processor_time": statistics.median(by_work),
            "steps": statistics.median(one.steps for one in passes),
            "drafted_tokens": drafted,
            "accepted": sum(one.accepted for one in passes) / drafted if drafted else 0.0,
            "answers": len(answers),
            "equal_answers": len(equal),
            "unequal": [place for place, (a, b) in enumerate(answers) if a.tokens != b.tokens][:20],
            "largest_log_prob_difference": max(differences, default=0.0),
            **latencies([one.made for one in passes]),
        }
    return report


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
        lines += [
            f"--draft={name}: {arm['requests_per_second']:.1f} requests/s, "
            f"{arm['tokens_per_second']:,.0f} tokens/s, {arm['times_off']:.2f} times off "
            f"({spread}; in processor time {by_work:.2f})",
            f"    {arm['steps']:,.0f} steps, {arm['drafted_tokens']:,} tokens drafted in all, "
            f"{arm['accepted']:.0%} kept; answer {answer['median']:.3f} s, p95 {answer['p95']:.3f}",
            f"    equal to off: {arm['equal_answers']:,} of {arm['answers']:,} answers, their log-"
            f"probabilities within {arm['largest_log_prob_difference']:.1e}",
        ]
    return "\n".join(lines)
