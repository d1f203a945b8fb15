"""The judge over real HTTP: a stub server that answers, dawdles or talks nonsense."""

from __future__ import annotations

import http.server
import importlib.util
import json
import threading
import time

import pytest

from encdec.errors import ConfigError
from encdec.evaluation.evaluate_command import main
from encdec.evaluation.judge import (
    CACHE,
    Judge,
    endpoint,
    kept_opinions,
    local_model,
    parse_opinion,
)
from encdec.evaluation.predictions import Example

EXAMPLES = [Example(f"question {i}", ("right",)) for i in range(4)]
ANSWERS = ["good", "slow", "nonsense", "shaky"]


@pytest.fixture
def server():
    asked = []

    class Stub(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = body["messages"][0]["content"].split("###Answer\n")[1].split("\n")[0]
            asked.append((answer, body["model"], self.headers["Authorization"], self.path))
            if answer == "slow":
                time.sleep(0.6)
            if answer == "shaky" and [one[0] for one in asked].count("shaky") == 1:
                self.send_error(503)
                return
            text = "I cannot say" if answer == "nonsense" else "7.5/10"
            content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            try:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the other side gave up waiting
                pass

        def log_message(self, *arguments):
            pass

    stub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{stub.server_address[1]}/v1", asked
    stub.shutdown()


def test_opinions_are_given_kept_or_missing_but_never_zero(server, tmp_path):
    address, asked = server
    ask = endpoint(address, "wise", "k", timeout_seconds=0.2)
    judge = Judge(address, "wise", tmp_path / CACHE, ask, attempts=2, pause_seconds=0.01)
    assert judge.opinions(EXAMPLES, ANSWERS) == [75, None, None, 75]
    counts = {name: [one[0] for one in asked].count(name) for name in ANSWERS}
    assert counts == {"good": 1, "slow": 2, "nonsense": 1, "shaky": 2}
    assert {one[1:] for one in asked} == {("wise", "Bearer k", "/v1/chat/completions")}
    kept = [json.loads(path.read_text()) for path in (tmp_path / CACHE).glob("*.json")]
    assert len(kept) == 3 and all(one["model"] == "wise" for one in kept)
    assert {one["reply"]: one["score"] for one in kept} == {"7.5/10": 75, "I cannot say": None}
    # Only what timed out is asked again by the next call: a reply would be the same again.
    asked.clear()
    assert judge.opinions(EXAMPLES, ANSWERS) == [75, None, None, 75]
    assert [one[0] for one in asked] == ["slow", "slow"]
    asked.clear()
    assert kept_opinions(tmp_path, judge.describe(), EXAMPLES, ANSWERS) == [75, None, None, 75]
    assert asked == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500])
def test_a_judge_that_refuses_is_an_error_at_once(status, tmp_path):
    asked = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no model \'nope\' here"}}')

        def log_message(self, *arguments):
            pass

    stub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{stub.server_address[1]}"
    judge = Judge(
        address, "nope", tmp_path, endpoint(address, "nope"), pause_seconds=0.001, workers=1
    )
    if status in (429, 500):
        assert judge.opinions(EXAMPLES[:1], ["good"]) == [None] and len(asked) == 3
    else:
        with pytest.raises(ConfigError, match=rf"answers {status} .*: no model 'nope' here; check"):
            judge.opinions(EXAMPLES, ANSWERS)
        assert len(asked) == 1
    assert not list(tmp_path.glob("*.json"))
    stub.shutdown()


@pytest.mark.parametrize(
    "reply, opinion",
    [
        ("0", 0),
        (" 10 ", 100),
        ("7/10.", 70),
        ("7.5 / 10", 75),
        ("Score: 8", 80),
        ("**7**", 70),
        ("7 out of 10", 70),
        ("**Score:** 6.5/10", 65),
        ("The final score is 9.", 90),
        ("number: 3", 30),
        ("`4`", 40),
        ("8 points", 80),
        ("(5)", 50),
        ("I would give it 7 out of 10, since a detail is missing.", 70),
        ("It earns **9**/10!", 90),
        ("11", None),
        ("7 or 8", None),
        ("", None),
        ("-3", None),
        ("Score: -3", None),
        ("7-8", None),
        ("8/100", None),
        ("7,5", None),
        ("I cannot judge answer 3", None),
        ("1e1", None),
        ("7/10 or 8/10", None),
        ("12 out of 10", None),
        ("2 mistakes: 7 out of 10", None),
    ],
)
def test_replies(reply, opinion):
    assert parse_opinion(reply) == opinion


def test_other_json_is_no_opinion(server, tmp_path):
    class Odd(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message": {"content": null}}]}')

        def log_message(self, *arguments):
            pass

    stub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{stub.server_address[1]}"
    judge = Judge(address, "odd", tmp_path, endpoint(address, "odd"), attempts=1)
    assert judge.opinions(EXAMPLES[:1], ["good"]) == [None]
    stub.shutdown()


@pytest.fixture(scope="module")
def model_that_writes(tmp_path_factory):
    """Makes Hugging Face models that always write one word, whatever they are asked."""
    torch = pytest.importorskip("torch", reason="needs the extra hf")
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
    words = {word: number for number, word in enumerate(("<unk>", "<eos>", "7", "well"))}

    def make(word):
        folder = tmp_path_factory.mktemp(word)
        raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>"
        ).save_pretrained(folder)
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=4,
                n_positions=128,
                n_embd=4,
                n_layer=1,
                n_head=1,
                eos_token_id=1,
                bos_token_id=1,
            )
        )
        with torch.no_grad():
            # The last norm gives one direction for the word, and the next for the end after it.
            model.transformer.wte.weight.copy_(torch.eye(4))
            model.transformer.wpe.weight.zero_()
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.copy_(torch.eye(4)[words[word]])
        model.generation_config.max_length = None
        model.save_pretrained(folder)
        return folder

    return make


def test_a_model_on_this_machine(model_that_writes, tmp_path):
    folder = str(model_that_writes("well"))
    judge = Judge("local", folder, tmp_path, local_model(folder), attempts=1, workers=1)
    assert judge.opinions(EXAMPLES[:1], ["good"]) == [None]
    folder = str(model_that_writes("7"))
    ask = local_model(folder)
    assert set(ask("any words at all").split()) == {"7"}
    # It writes on after its number, until its limit; a number and an end is an opinion.
    judge = Judge("local", folder, tmp_path, lambda prompt: ask(prompt).split()[0], attempts=1)
    assert judge.opinions(EXAMPLES[:1], ["good"]) == [70]
    with pytest.raises(ValueError, match="the judge reads at most 128"):
        ask("word " * 200)
    assert judge.describe()["endpoint"] == "local" and judge.describe()["model"] == folder


def test_what_is_no_judge(tmp_path):
    with pytest.raises(ConfigError, match="holds no config.json"):
        main(["--checkpoint=x", "--tasks=xsum", "--out=y", f"--judge_model={tmp_path}"])
    with pytest.raises(ConfigError, match="expected the name of a model"):
        main(["--checkpoint=x", "--tasks=xsum", "--out=y", "--judge_endpoint=http://x"])
    # Nothing could be asked there, and every opinion would be missing.
    judge = ["--judge_endpoint=localhost:8000/v1", "--judge_model=m"]
    with pytest.raises(ConfigError, match="expected an address such as https://HOST/v1"):
        main(["--checkpoint=x", "--tasks=xsum", "--out=y", *judge])


def test_a_judge_without_its_packages_is_refused_before_the_answers(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    with pytest.raises(ConfigError, match="a judge on this machine needs transformers, which is"):
        main(["--checkpoint=x", "--tasks=xsum", "--out=y", f"--judge_model={tmp_path}"])
