"""A language model's opinions of answers, kept on disk: over HTTP, or a model on this machine."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import http.client
import json
import pathlib
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from encdec.errors import ConfigError
from encdec.evaluation.predictions import Example
from encdec.files import write_json
from encdec.pretrained import LOCAL, load_causal_model, why_unread
from encdec.storage import make_directory

PROMPT = (
    "Judge an answer by its reference. Give one number from 0 (wrong) to 10 (as good as the "
    "reference), and nothing else.\n###Input\n{source}\n###Reference\n{reference}\n###Answer\n"
    "{answer}\n###Number\n"
)
# A number alone, or after a word such as "Score:", with or without mark-up and "out of 10".
_MARKS = r"[\s*_`\"'()\[\]#>]*"
_OF_TEN = r"(?:/|out\s+of|of)" + _MARKS + r"10(?:\.0)?\b"
_OPINION = re.compile(
    _MARKS
    + r"(?:(?:(?:my|the|final|overall)\s+)*(?:score|rating|number|grade|mark|opinion|answer)"
    + _MARKS
    + r"(?:is|:|=)?"
    + _MARKS
    + r")?(\d+(?:\.\d+)?)"
    + _MARKS
    + rf"(?:{_OF_TEN}|points?)?[.!]?"
    + _MARKS,
    re.IGNORECASE,
)
# Within a sentence, only with its scale ("7 out of 10").
_WITHIN = re.compile(r"(?<![\d.,-])(\d+(?:\.\d+)?)" + _MARKS + _OF_TEN, re.IGNORECASE)
CACHE = "judge"  # folder of its replies, in the output directory
REPLY_TOKENS = 8  # of a local model; a number takes fewer

# Statuses after which the same request may succeed: time-outs, conflicts, limits; and all from 500.
_PASSING_STATUSES = (408, 409, 425, 429)

# Maps a prompt to the model's reply. Raises OSError, HTTPException or ValueError if a later try
# may succeed, and ConfigError if none can.
Ask = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge: the model to ask, and how to ask it.

    Attributes:
        endpoint: address of the model, or "local"; part of the report and of the cache's keys.
        model: its name or directory.
        cache: directory of replies; answered prompts are not asked again.
        ask: sends a prompt.
        attempts: requests for one reply; after these the opinion is missing.
        pause_seconds: before the second request; each further pause is twice as long.
        workers: requests at a time.
        template: of the prompt.
    """

    endpoint: str
    model: str
    cache: pathlib.Path
    ask: Ask
    attempts: int = 3
    pause_seconds: float = 1.0
    workers: int = 4
    template: str = PROMPT

    def describe(self) -> dict[str, str]:
        """The judge as the report describes it."""
        return {"endpoint": self.endpoint, "model": self.model, "prompt": self.template}

    def opinions(
        self, examples: Sequence[Example], predictions: Sequence[str]
    ) -> list[float | None]:
        """0 to 100 for each prediction; None if the judge timed out, was busy, or replied
        without an opinion.

        Raises:
            ConfigError: the judge refuses such requests; the others are not sent.
        """
        prompts = [
            self.template.format(
                source=example.source, reference=example.references[0], answer=text
            )
            for example, text in zip(examples, predictions, strict=True)
        ]
        refused = threading.Event()

        def opinion(prompt: str) -> float | None:
            if refused.is_set():
                return None
            try:
                return self._opinion(prompt)
            except ConfigError:
                refused.set()  # before this worker takes the next prompt
                raise

        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(opinion, prompts))

    def _opinion(self, prompt: str) -> float | None:
        key = hashlib.sha256(json.dumps([self.endpoint, self.model, prompt]).encode()).hexdigest()
        path = self.cache / f"{key}.json"
        if path.exists():
            return parse_opinion(json.loads(path.read_text())["reply"])
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause_seconds * 2 ** (attempt - 1))
            try:
                reply = self.ask(prompt)
            except (OSError, http.client.HTTPException, ValueError):
                continue
            # A reply without an opinion is kept too: at temperature 0 it would be the same again.
            # If no reply came, the next call asks again.
            score = parse_opinion(reply)
            make_directory(self.cache)
            opinion = {"score": score, "reply": reply, "model": self.model, "prompt": prompt}
            write_json(path, opinion)
            return score
        return None


def endpoint(address: str, model: str, api_key: str = "", timeout_seconds: float = 60.0) -> Ask:
    """Returns an ``Ask`` for a model at an OpenAI-compatible address, at temperature 0.

    Args:
        address: ``/chat/completions`` follows it.
        model: name that the address knows.
        api_key: sent as a bearer token where it is not empty.
        timeout_seconds: of one request.

    The returned function raises ConfigError for a status that refuses the request
    (404 for another model or path, 401 for a wrong key, 400): asked again it would be the same.
    """

    def ask(prompt: str) -> str:
        headers = {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        request = urllib.request.Request(
            address.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
                content = json.load(response)
        except urllib.error.HTTPError as error:
            if error.code in _PASSING_STATUSES or error.code >= 500:
                raise
            raise ConfigError(_refusal(request.full_url, model, error)) from None
        try:
            reply = content["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{address} sent no chat completion") from error
        if not isinstance(reply, str):
            raise ValueError(f"{address} sent a completion without text")
        return reply

    return ask


def _refusal(url: str, model: str, error: urllib.error.HTTPError) -> str:
    """The error for a judge's refusal, with the server's own reason."""
    text = error.read(2000).decode("utf-8", "replace")
    try:
        text = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        pass
    reason = " ".join(str(text).split())[:300]
    return (
        f"the judge {model!r} at {url} answers {error.code} {error.reason}"
        f"{f': {reason}' if reason else ''}; check --judge_endpoint, --judge_model and the key"
    )


def local_model(directory: str) -> Ask:
    """Asks a Hugging Face causal model on this machine, greedily; nothing is downloaded.

    A model with a chat template is asked by it. A prompt longer than the model's context has no
    reply.

    Raises:
        ConfigError: there is no such model.
    """
    import torch
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **LOCAL)
        model = load_causal_model(directory)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--judge_model={directory} is not a Hugging Face causal model: {why_unread(error)}"
        ) from None
    model.eval()
    longest = getattr(model.config, "max_position_embeddings", None)

    def ask(prompt: str) -> str:
        if tokenizer.chat_template:
            inputs: Any = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        count = inputs["input_ids"].shape[1]
        if longest and count + REPLY_TOKENS > longest:
            raise ValueError(f"a prompt of {count} tokens; the judge reads at most {longest}")
        with torch.no_grad():
            found = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=REPLY_TOKENS,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        # Models without a chat format continue after their number.
        text = cast(str, tokenizer.decode(found[0, count:], skip_special_tokens=True))
        lines = text.strip().splitlines()
        return lines[0] if lines else ""

    return ask


def parse_opinion(reply: str) -> float | None:
    """ "7", "7.5", "7/10", "Score: 8", "**7**" or "7 out of 10" as 0 to 100.

    None if it is ambiguous which number is the opinion, or if it is above 10.
    """
    found = _OPINION.fullmatch(reply) or _WITHIN.search(reply)
    # In a sentence another number may be what was meant.
    if not found or re.search(r"\d", reply[: found.start()] + reply[found.end() :]):
        return None
    return 10 * float(found[1]) if float(found[1]) <= 10 else None


def kept_opinions(
    directory: pathlib.Path,
    judge: Mapping[str, str],
    examples: Sequence[Example],
    predictions: Sequence[str],
) -> list[float | None]:
    """The opinions that an evaluation stored in its output directory; no judge is asked.

    Args:
        directory: of ``encdec evaluate --out``.
        judge: as its report describes it.
        examples: of a task.
        predictions: the answers to them.
    """
    asked = Judge(
        judge["endpoint"],
        judge["model"],
        directory / CACHE,
        _no_one,
        attempts=1,
        template=judge["prompt"],
    )
    return asked.opinions(examples, predictions)


def _no_one(prompt: str) -> str:
    raise ValueError("stored opinions only; no judge is asked here")
