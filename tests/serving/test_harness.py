"""What EleutherAI's lm-evaluation-harness asks of a server, and what it makes of the answers.

Its package brings a hundred others (datasets, evaluate, pandas), too many for the test extra and
none of them in constraints.txt, so the real one runs where it is installed, or from an environment
of its own that ENCDEC_LM_EVAL names (``make lm-eval``). What it sends is checked always.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import httpx
import pytest

from encdec.evaluation.likelihood import LikelihoodModel
from encdec.evaluation.predictions import Example
from encdec.serving.server import running
from tests.inference.test_generator import PROMPTS, printing_model
from tests.serving.examples import NAME, generator, make_engine, make_service

EOS = PROMPTS.vocabulary.eos_id
PAIRS = [("short", "ab c"), ("short", "€d"), ("a longer one", "x"), ("two", " y")]


@pytest.fixture(scope="module", params=["encoder_decoder", "decoder_only"])
def server(request):
    service = make_service(make_engine(request.param))
    with running(service) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        yield request.param, url, client


@pytest.fixture(scope="module")
def true_nats(server):
    """Of each pair's answer with its EOS, by a pass of the whole model."""
    model = LikelihoodModel(*printing_model(server[0]), PROMPTS)
    return [one.nats for one in model.of([Example(source, (text,)) for source, text in PAIRS])]


def test_loglikelihoods_are_those_of_a_whole_pass(server, true_nats):
    """The body is the harness's, whose sums leave out the context and the last token."""
    _, _, client = server
    encode = PROMPTS.vocabulary.encode
    contexts = [[*encode(source), EOS] for source, _ in PAIRS]
    asked = {"model": NAME, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    body = asked | {
        "prompt": [[*context, *encode(text)] for context, (_, text) in zip(contexts, PAIRS)],
        "seed": 1234,
    }
    choices = client.post("/v1/completions", json=body).json()["choices"]
    ends = client.post("/v1/completions", json=body | {"logit_bias": {str(EOS): 100}}).json()
    for pair, context, choice, end, nats in zip(
        PAIRS, contexts, choices, ends["choices"], true_nats, strict=True
    ):
        kept = choice["logprobs"]
        count = len(context) + len(encode(pair[1]))
        assert len(kept["tokens"]) == len(kept["top_logprobs"]) == count + 1
        found = sum(kept["token_logprobs"][len(context) : -1])
        ended = end["logprobs"]["token_logprobs"]
        assert ended[:-1] == kept["token_logprobs"][:-1]  # a bias moves no probability
        assert found + ended[-1] == pytest.approx(-nats, abs=1e-3)
        assert "".join(kept["tokens"]) == choice["text"]
        assert choice["text"].startswith(f"{pair[0]}</s>{pair[1]}")
        for value, top in zip(kept["token_logprobs"], kept["top_logprobs"]):
            # Whether a token is the likeliest is asked of the same numbers.
            assert value is None or max(top.values()) >= value
    # Texts say the same by the name of EOS, and one prompt what many say.
    for pair, choice in zip(PAIRS, choices):
        text = client.post("/v1/completions", json=asked | {"prompt": "</s>".join(pair)}).json()
        assert text["choices"][0]["logprobs"] == choice["logprobs"]


def test_the_likeliest_continuation_is_said_to_be_greedy(server):
    name, _, client = server
    [[answer]] = generator(name).generate(["short"])
    context = [*PROMPTS.vocabulary.encode("short"), EOS]
    body = {"prompt": [*context, *answer.tokens[:5]], "max_tokens": 0, "logprobs": 1, "echo": True}
    kept = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    log_probs = kept["token_logprobs"][len(context) :]
    assert log_probs == [max(top.values()) for top in kept["top_logprobs"][len(context) :]]
    assert log_probs == pytest.approx(answer.log_probs[:5], abs=1e-4)


def test_generation_is_the_generators(server):
    name, _, client = server
    sources = [source for source, _ in PAIRS]
    body = {
        "model": NAME,
        "prompt": [PROMPTS.vocabulary.encode(source) for source in sources],
        "max_tokens": 12,
        "temperature": 0,
        "stop": ["\n\n", "</s>"],
        "seed": 1234,
    }
    choices = client.post("/v1/completions", json=body).json()["choices"]
    wanted = [made[0].text for made in generator(name).generate(sources)]
    assert [choice["text"] for choice in choices] == wanted


TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
target_delimiter: ""
"""
CHOICES = """task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{source}}</s>"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
ANSWERS = """task: tiny_answer
output_type: generate_until
doc_to_text: "{{source}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def harness() -> list[str] | None:
    if named := os.environ.get("ENCDEC_LM_EVAL"):
        return [named, "-m", "lm_eval"]
    return [sys.executable, "-m", "lm_eval"] if importlib.util.find_spec("lm_eval") else None


@pytest.mark.skipif(harness() is None, reason="no lm_eval here, and ENCDEC_LM_EVAL names none")
def test_the_real_harness(server, true_nats, tmp_path):
    """Both kinds of task, with nothing but the server's address: its tokenizer is the server's."""
    name, url, client = server
    texts = [made[0].text for made in generator(name).generate([source for source, _ in PAIRS])]
    data = tmp_path / "test.jsonl"
    rows = [
        {"source": source, "choices": [text, "other"], "target": answer}
        for (source, text), answer in zip(PAIRS, texts)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in (CHOICES, ANSWERS):
        (tmp_path / f"{task.split()[1]}.yaml").write_text(task + TASK.format(data=data))
    command = [
        *harness(),
        "--model=local-completions",
        f"--model_args=base_url={url}/v1/completions,model={NAME},max_length=60",
        "--tasks=tiny_choice,tiny_answer",
        f"--include_path={tmp_path}",
        f"--output_path={tmp_path / 'out'}",
        "--log_samples",
        "--batch_size=3",
    ]
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for path in pathlib.Path(tmp_path / "out").rglob("samples_*.jsonl"):
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
        samples[path.name.split("_2")[0]] = rows
    assert [row["exact_match"] for row in samples["samples_tiny_answer"]] == [1.0] * len(PAIRS)
    for row, (source, text), nats in zip(samples["samples_tiny_choice"], PAIRS, true_nats):
        found = float(row["filtered_resps"][0][0])
        # The harness does not count the end of the answer.
        body = {"prompt": f"{source}</s>{text}", "echo": True, "logprobs": 0, "max_tokens": 1}
        end = client.post("/v1/completions", json=body | {"logit_bias": {str(EOS): 100}}).json()
        last = end["choices"][0]["logprobs"]["token_logprobs"][-1]
        assert found + last == pytest.approx(-nats, abs=1e-3)
