"""What gin binds: objectives and mixtures by name. Only preparation imports this.

Settings of `encdec prepare` itself are bound by `prepare_command`, out of `PrepareSettings`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import gin
from encdec.data.denoising import SETTINGS, Denoiser, MixtureOfDenoisers, SpanCorruption
from encdec.data.objectives import CausalLM, Objective, PrefixLM, SequenceToSequence
from encdec.data.text_tasks import TextTask
from encdec.errors import ConfigError
from encdec.fields import did_you_mean

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def parse_gin(files: Sequence[str], bindings: Sequence[str]) -> None:
    """Bind what gin files and bindings say and nothing else; ConfigError where they are wrong."""
    gin.clear_config()
    # `include` lines name paths from the repository's root, wherever the command is run.
    gin.add_config_file_search_path(str(REPOSITORY))
    try:
        gin.parse_config_files_and_bindings(list(files), list(bindings))
    except (ValueError, OSError, SyntaxError) as error:
        raise ConfigError(f"gin: {error}") from error


def refuse_unused(bindings: Sequence[str]) -> None:
    """ConfigError for a binding of something that this preparation does not use.

    Bindings in files are for several commands; one that is typed is meant for this one.
    """
    used = set(re.findall(r"^([\w./]+)\.\w+ =", gin.operative_config_str(), re.MULTILINE))
    used |= {name.rpartition(".")[2] for name in used}
    for binding in bindings:
        bound = re.match(r"\s*([\w./]+)\.(\w+)\s*=", binding)
        if bound and bound[1] not in used:
            raise ConfigError(
                f"--gin_bindings={binding!r} binds {bound[1]}, which is not used here; used are "
                f"{', '.join(sorted(name for name in used if '.' not in name))}"
            )


@gin.configurable
def mixture(
    rates: Sequence[float] | None = None, temperature: float = 1.0, maximum: int | None = None
) -> dict[str, Any]:
    """How a mixture's tasks are mixed, as gin binds it: `mixing.mixing_rates`."""
    return {"rates": rates, "temperature": temperature, "maximum": maximum}


@gin.configurable(module="objectives")
def sequence_to_sequence(inputs_eos: bool = True) -> SequenceToSequence:
    """Supervised pairs, as gin binds them."""
    return SequenceToSequence(inputs_eos=inputs_eos)


@gin.configurable(module="objectives")
def prefix_lm(split: float = 0.5) -> PrefixLM:
    """Prefix LM over raw text, as gin binds it."""
    return PrefixLM(split=split)


@gin.configurable(module="objectives")
def span_corruption(density: float = 0.15, mean_span: float = 3.0) -> SpanCorruption:
    """T5's span corruption, as gin binds it."""
    return SpanCorruption(density=density, mean_span=mean_span)


@gin.configurable(module="objectives")
def ul2(
    denoisers: str | Sequence[Sequence[Any]] = "ul2", mode_tokens: bool = True
) -> MixtureOfDenoisers:
    """A mixture of denoisers, as gin binds it: "ul2", "t5gemma2", or a list of denoisers.

    A denoiser is (mode, mean_span, density, rate); mean_span None is a prefix LM.
    """
    if isinstance(denoisers, str):
        if denoisers not in SETTINGS:
            raise ConfigError(
                f"ul2.denoisers is {denoisers!r}; wanted one of {', '.join(SETTINGS)} or a list"
            )
        return MixtureOfDenoisers(SETTINGS[denoisers], mode_tokens)
    try:
        own = tuple(Denoiser(*denoiser) for denoiser in denoisers)
    except TypeError as error:
        raise ConfigError(
            f"ul2.denoisers is {denoisers!r}; wanted a list of (mode, mean_span, density, rate)"
        ) from error
    return MixtureOfDenoisers(own, mode_tokens)


@gin.configurable(module="objectives")
def causal_lm() -> CausalLM:
    """Causal LM over raw text, for decoder-only models."""
    return CausalLM()


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "sequence_to_sequence": sequence_to_sequence,
    "prefix_lm": prefix_lm,
    "span_corruption": span_corruption,
    "ul2": ul2,
    "causal_lm": causal_lm,
}
# By which name gin binds the settings of a task's own objective; of others they stay the task's.
_NAMES = {SequenceToSequence: "sequence_to_sequence", PrefixLM: "prefix_lm"}
_NAMES |= {SpanCorruption: "span_corruption"}


def choose_objective(given: str | Objective | None, task: TextTask) -> Objective:
    """The objective named, else the task's own, with what gin binds of it."""
    if isinstance(given, Objective):
        return given
    if given is None:
        return _with_bindings(task.objective)
    if given not in OBJECTIVES:
        hint = did_you_mean(given, OBJECTIVES)
        raise ConfigError(f"no objective {given!r}; there are {', '.join(OBJECTIVES)}{hint}")
    return OBJECTIVES[given]()


def _with_bindings(own: Objective) -> Objective:
    name = _NAMES.get(type(own))
    if name is None:
        return own
    kept = {
        field.name: getattr(own, field.name)
        for field in dataclasses.fields(own)
        if not _is_bound(f"{name}.{field.name}")
    }
    return OBJECTIVES[name](**kept)


def _is_bound(parameter: str) -> bool:
    try:
        gin.query_parameter(parameter)
    except ValueError:
        return False
    return True
