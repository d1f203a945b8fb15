"""The same weights in transformers' ``generate``, with which our own paths are compared.

``python -m encdec.benchmarks.transformers_runtime`` is a process of its own that measures
memory; see
``encdec.benchmarks.generation_memory``.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import queue
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from encdec.benchmarks.device_rates import peak_memory
from encdec.benchmarks.generation import START_ID
from encdec.benchmarks.generation_memory import Workload, forget_peak
from encdec.data.vocabulary import ByteVocabulary
from encdec.export import formats
from encdec.inference.ready import cpu_has_bfloat16
from encdec.inference.text_io import PromptFormat
from encdec.machine import available_cores
from encdec.model import ModelConfig
from encdec.packages import install_hint

PRECISIONS = ("float32", "bfloat16", "int8")


def missing(precision: str, device: str = "cpu") -> str:
    """Why transformers cannot run here in one of PRECISIONS; empty where it can.

    Args:
        precision: see ``TransformersModel``.
        device: torch's name: cpu or cuda.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: {install_hint('hf')}"
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "JAX runs on a GPU that torch cannot use; install a torch with CUDA"
    elif precision == "bfloat16" and not cpu_has_bfloat16():
        return "this CPU has no bfloat16 products (avx512_bf16 or amx_bf16)"
    return ""


def artefact(config: ModelConfig, params: Any, folder: pathlib.Path) -> pathlib.Path:
    """``encdec export --format=hf`` in float32, written now unless it is there."""
    out = folder / "hf"
    if not (out / "config.json").is_file():
        prompts = PromptFormat(ByteVocabulary(), decoder_start_id=START_ID)
        formats.write("hf", out, formats.Export(config, params, prompts, targets_length=64))
    return out


class StreamedAnswer:
    """One call of ``generate``, of which this is the streamer: it waits after the first new token.

    Attributes:
        begun: the first new token is there, or the call has failed.
        go_on: the process that waits for the others has asked for them.
        done: all tokens are there, or the call has failed.
        tokens: all that ``generate`` returns, then.
        error: what ended the call.
    """

    def __init__(self) -> None:
        self.begun, self.go_on, self.done = (threading.Event() for _ in range(3))
        self.tokens: Any = None
        self.error: Exception | None = None
        self._puts = 0

    def put(self, tokens: Any) -> None:
        """Called with the prompt and then with every new token of all rows."""
        self._puts += 1
        if self._puts == 2:
            self.begun.set()
            self.go_on.wait()

    def end(self) -> None:
        """Called after the last token."""

    def run(self, generate: Callable[[StreamedAnswer], Any]) -> None:
        """The whole call; an error is kept for those who wait."""
        try:
            self.tokens = generate(self)
        except Exception as error:
            self.error = error
        self.begun.set()
        self.done.set()

    def wait(self, event: threading.Event) -> None:
        """Until then; raises what ended the call."""
        event.wait()
        if self.error:
            raise self.error


class TransformersModel:
    """An export for Hugging Face as transformers loads it: greedy, with its cache, no EOS.

    ``generate`` runs in a thread of its own, always the same, so that it can be halted after its
    first token: two calls would be timed with the preparations of both, and torch keeps threads
    and compiled products for each thread that calls it.

    Args:
        directory: of ``artefact``.
        precision: float32, bfloat16 (weights, cache and products) or int8 (torch's dynamic
            quantization of every linear layer; on a CPU alone).
        device: cpu or cuda.
    """

    def __init__(self, directory: pathlib.Path, precision: str, device: str = "cpu") -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        content = json.loads((directory / "config.json").read_text())
        self._two_stacks = content.get("is_encoder_decoder", False)
        auto = (
            transformers.AutoModelForSeq2SeqLM
            if self._two_stacks
            else transformers.AutoModelForCausalLM
        )
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        model = auto.from_pretrained(
            directory, trust_remote_code="auto_map" in content, local_files_only=True, dtype=dtype
        )
        model = model.eval().to(device)
        if precision == "int8":
            with warnings.catch_warnings():  # torch 2.13 says that this will move
                warnings.simplefilter("ignore")
                model = torch.ao.quantization.quantize_dynamic(
                    model, {torch.nn.Linear}, torch.qint8, inplace=True
                )
        model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            use_cache=True,
            pad_token_id=START_ID,
            decoder_start_token_id=START_ID if self._two_stacks else None,
        )
        self._model, self._device = model, device
        self._calls: queue.SimpleQueue[tuple[StreamedAnswer, Callable[[StreamedAnswer], Any]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        import torch

        torch.set_num_threads(available_cores())  # OpenMP keeps it for each thread
        while True:
            answer, generate = self._calls.get()
            answer.run(generate)

    def start(self, tokens_BxS: np.ndarray, count: int) -> StreamedAnswer:
        """Runs up to the first of ``count`` (2 or more) new tokens of every row."""
        import torch

        tokens = torch.as_tensor(np.asarray(tokens_BxS, np.int64))
        if not self._two_stacks:  # ours read a start token first
            tokens = torch.nn.functional.pad(tokens, (1, 0), value=START_ID)
        tokens = tokens.to(self._device)
        answer = StreamedAnswer()
        self._calls.put(
            (
                answer,
                lambda streamer: (
                    self._model.generate(
                        input_ids=tokens,
                        attention_mask=torch.ones_like(tokens),
                        max_new_tokens=count,
                        streamer=streamer,
                    )[:, -count:]
                    .cpu()
                    .numpy()
                ),
            )
        )
        answer.wait(answer.begun)
        return answer

    def answer(
        self, ids: Sequence[int], count: int, eos_id: int, start_id: int, **more: Any
    ) -> Any:
        """The answer's tokens to one input, by ``generate`` as its users call it.

        Args:
            ids: the input's tokens.
            count: new tokens at most.
            eos_id: ends the answer.
            start_id: what a decoder reads first.
            more: further arguments of ``generate``, such as ``prompt_lookup_num_tokens``.
        """
        import torch

        before = [] if self._two_stacks else [start_id]
        tokens = torch.as_tensor([[*before, *ids]], device=self._device)
        made = self._model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            eos_token_id=eos_id,
            decoder_start_token_id=start_id if self._two_stacks else None,
            **more,
        )[0]
        return made[1 if self._two_stacks else tokens.shape[1] :].tolist()

    def finish(self, answer: StreamedAnswer) -> np.ndarray:
        """All new tokens [B, count]."""
        answer.go_on.set()
        answer.wait(answer.done)
        return answer.tokens


def peaks(
    directory: pathlib.Path, precision: str, device: str, settings: Sequence[Workload]
) -> list[int]:
    """Of each setting in turn: as ``measure_peaks`` measures our own models, in bytes."""
    import torch

    model, found = TransformersModel(directory, precision, device), []
    for batch, inputs, outputs in settings:
        tokens = np.full((batch, inputs), 5)
        model.finish(model.start(tokens, outputs))
        forget_peak()
        model.finish(model.start(tokens, outputs))
        found.append(torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory())
    return found


if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    print(
        json.dumps(
            peaks(
                pathlib.Path(asked["directory"]),
                asked["precision"],
                asked["device"],
                asked["settings"],
            )
        )
    )
