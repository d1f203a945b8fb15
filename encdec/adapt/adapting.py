"""Builds an adapted model from its sources, and writes its work directory."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from encdec.adapt.parameters import (
    Choice,
    ParameterOrigin,
    adapted_config,
    origins,
    summary_text,
    table_text,
    values,
)
from encdec.adapt.sources import (
    VOCABULARY_AXIS,
    AdaptationSource,
    check_same_vocabulary,
    grown,
    with_rows,
)
from encdec.data.chat_template import TEMPLATE_FILE
from encdec.data.vocabulary import Vocabulary
from encdec.interop.framing import Framing
from encdec.interop.importing import write_model
from encdec.interop.layout import unflatten
from encdec.model import ModelConfig, Params
from encdec.saved.lineage import Lineage

TABLE_FILE = "adaptation.txt"  # next to the parameters: where each of them comes from


@dataclasses.dataclass(frozen=True)
class AdaptationPlan:
    """What will be made, decided from configurations alone.

    Attributes:
        config: of the adapted model.
        choice: what is taken of the sources.
        decoder, encoder: the sources; the same twice unless each side has its own.
        table: the origin of every parameter.
        vocabulary: of the adapted model; None if its source was imported without one.
        rows: the source's row of each row of the vocabulary's tables, -1 of new ones; None where
            they are taken as they are.
    """

    config: ModelConfig
    choice: Choice
    decoder: AdaptationSource
    encoder: AdaptationSource
    table: tuple[ParameterOrigin, ...]
    vocabulary: Vocabulary | None
    rows: np.ndarray | None

    @property
    def framing(self) -> Framing:
        """The encoder's inputs begin as its source's texts did: start token, then prefix."""
        own, before = self.decoder.framing, self.encoder.framing
        prefix = (before.start_id, *before.inputs_prefix)
        return dataclasses.replace(
            own,
            start_id=self._place(own.start_id),
            inputs_eos=before.inputs_eos,
            inputs_prefix=tuple(map(self._place, prefix)),
        )

    @property
    def is_random(self) -> bool:
        """Whether anything is drawn."""
        drawn = any(one.how == "drawn" for one in self.table)
        return drawn or self.rows is not None and bool((self.rows < 0).any())

    def _place(self, token: int) -> int:
        """The id that a source's id has here: new sentinels are in front of those of the source."""
        return token if self.rows is None else int(np.flatnonzero(self.rows == token)[0])

    def text(self) -> str:
        """The table of origins, for people."""
        return self._written(table_text)

    def summary(self) -> str:
        """The same by module."""
        return self._written(summary_text)

    def _written(self, text: Callable[..., str]) -> str:
        sides = {"encoder": self.encoder, "decoder": self.decoder}
        names = {side: str(source.directory) for side, source in sides.items()}
        if self.encoder.place == self.decoder.place and self.encoder.step != self.decoder.step:
            names = {side: f"{names[side]}, step {source.step:,}" for side, source in sides.items()}
        new = "" if self.rows is None else f"{int((self.rows < 0).sum())} rows of ids drawn\n"
        return text(self.table, names) + new


def make_plan(
    decoder: AdaptationSource, encoder: AdaptationSource, choice: Choice, extra_ids: int = 0
) -> AdaptationPlan:
    """The plan for adapting these sources.

    Raises:
        ConfigError: the sources do not go together.
        DataError: they have different vocabularies.
    """
    if encoder.place != decoder.place:
        check_same_vocabulary(decoder, encoder)
    vocabulary, size, rows = grown(decoder, extra_ids)
    config = adapted_config(decoder.config, encoder.config, choice).replace(vocab_size=size)
    table = origins(config, choice)
    return AdaptationPlan(config, choice, decoder, encoder, tuple(table), vocabulary, rows)


def carry_out(plan: AdaptationPlan) -> Params:
    """The adapted model's parameters, unrolled."""
    decoder = plan.decoder.parameters()
    same = plan.encoder.checkpoint == plan.decoder.checkpoint
    sources = {"decoder": decoder, "encoder": decoder if same else plan.encoder.parameters()}
    flat = values(plan.table, sources, plan.config, plan.choice.seed)
    if plan.rows is not None:
        for name in flat.keys() & VOCABULARY_AXIS.keys():
            flat[name] = with_rows(name, flat[name], plan.rows, plan.choice.seed)
    return unflatten(flat)


def write(
    plan: AdaptationPlan, out: pathlib.Path | epath.Path, *, name: str, overwrite: bool = False
) -> ModelConfig:
    """Carries the plan out and writes a work directory that every command reads.

    Returns:
        The configuration as stored.

    Raises:
        ConfigError: ``out`` is in use.
        CheckpointError: a source's checkpoint is damaged.
    """
    texts = {TABLE_FILE: plan.text()}
    template = plan.decoder.directory / TEMPLATE_FILE
    if template.is_file():
        texts[TEMPLATE_FILE] = template.read_text(encoding="utf-8")
    sides = {"decoder": plan.decoder, "encoder": plan.encoder}
    return write_model(
        out,
        plan.config,
        carry_out(plan),
        source={
            "format": "adapt",
            "family": "adapted",
            "name": name,
            "choice": dataclasses.asdict(plan.choice),
            "sources": {
                side: {"directory": str(source.directory), "name": source.name, "step": source.step}
                for side, source in sides.items()
            },
            "lineage": dataclasses.asdict(joined([plan.decoder, plan.encoder])),
        },
        vocabulary=plan.vocabulary,
        framing=plan.framing,
        max_length=min(source.max_length for source in sides.values()),
        overwrite=overwrite,
        texts=texts,
    )


def joined(sources: Sequence[AdaptationSource]) -> Lineage:
    """The cost and the seeds of all sources together, each counted once.

    Of two checkpoints of one run the later one's, which includes the earlier one's. Seeds are in
    the order of the sources.
    """
    last: dict[str, AdaptationSource] = {}
    for source in sources:
        last[source.place] = max(last.get(source.place, source), source, key=lambda one: one.step)
    lines = [source.lineage() for source in last.values()]
    flops = [line.training_flops for line in lines]
    seeds = [line.seeds for line in lines]
    return Lineage(
        None if None in flops else sum(x for x in flops if x is not None),
        None if None in seeds else tuple(seed for x in seeds if x is not None for seed in x),
    )
