"""``encdec serve`` as a process: from a work directory to SIGTERM."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import jax
import numpy as np
import pytest

from encdec import cli
from encdec.cost.flops import cache_bytes, weight_bytes
from encdec.data.vocabulary import ByteVocabulary
from encdec.interop.framing import Framing
from encdec.interop.importing import write_model
from encdec.model import unroll_params
from encdec.saved.saved_config import model_config_of, read_config
from encdec.serving import server
from tests.inference.test_generator import PROMPTS, printing_model
from tests.serving.examples import generator


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A random model as `encdec import` would leave it."""
    config, params = printing_model("encoder_decoder")
    params = jax.tree.map(np.asarray, unroll_params(params, config))
    out = tmp_path_factory.mktemp("serve") / "model"
    write_model(
        out,
        config.replace(scan_layers=False),
        params,
        source={"family": "test", "name": "random"},
        vocabulary=PROMPTS.vocabulary,
        framing=Framing(PROMPTS.decoder_start_id),
        max_length=80,
    )
    return out


@pytest.mark.slow
def test_a_process_serves_and_ends_in_order(workdir):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "encdec",
            "serve",
            f"--checkpoint={workdir}",
            "--port=0",
            "--slots=2",
            "--max_tokens=2000",
            "--name=mine",
            "--grace_seconds=300",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    try:
        url = process.stdout.readline().split()[-1]
        # The model is an import, whose inputs end without EOS.
        ids = PROMPTS.encode("short")[0][:-1]
        answer = httpx.post(
            f"{url}/v1/completions",
            timeout=60,
            json={"prompt": "short", "temperature": 0, "max_tokens": 8, "model": "mine"},
        )
        wanted = generator().generate_from_tokens([ids])[0][0]
        assert answer.json()["choices"][0]["text"] == wanted.text[:8]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            # Long enough to be caught running.
            running = pool.submit(
                httpx.post,
                f"{url}/v1/completions",
                timeout=120,
                json={
                    "prompt": "short",
                    "temperature": 3.0,
                    "seed": 1,
                    "max_tokens": 2000,
                    "n": 16,
                },
            )
            while httpx.get(f"{url}/healthz").json()["active"] == 0 and not running.done():
                pass
            process.send_signal(signal.SIGTERM)
            assert running.result().status_code == 200
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out == "" and "Traceback" not in err, err
        assert re.search(r"programs ready.*\n.*2 slots of 40 tokens in and 2,000 out", err), err
        assert err.endswith("ended\n")
    finally:
        process.kill()


def test_mistakes_are_named_at_once(workdir, capsys):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for argv, code, message in (
        (["--slots=0"], 2, "slots is 0; expected 1 or more"),
        (["--max_queue=-1"], 2, "max_queue is -1; expected 0 or more"),
        (["--timeout_seconds=0"], 2, "timeout_seconds is 0; expected more than 0"),
        (["--grace_seconds=nan"], 2, "grace_seconds is nan"),
        ([f"--port={port}"], 2, f"--port={port} cannot be used"),
        (["--port=99999"], 2, "--port is 99999; expected 0 to 65535"),
        (["--port=0", "--checkpoint=/nowhere"], 4, "/nowhere has no config.json"),
        (["--port=0", "--step=3"], 4, "3"),
    ):
        assert cli.main(["serve", f"--checkpoint={workdir}", *argv]) == code, argv
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    taken.close()


def test_slots_that_do_not_fit_into_memory_are_refused_with_what_does(workdir, capsys, monkeypatch):
    """Before the model is read: nothing of the slots is allocated."""
    from encdec.inference import cache_memory
    from encdec.serving import engine

    config = model_config_of(read_config(workdir))
    weights = weight_bytes(config, "float32")
    slot = cache_bytes(config, 40, 1 + 20, dtype="float32")
    memory = weights + 3 * slot  # two slots, and the input that is being read
    monkeypatch.setattr(cache_memory, "memory_bytes", lambda: memory)
    monkeypatch.setattr(engine.Engine, "__init__", lambda *a, **k: 1 / 0)
    argv = ["serve", f"--checkpoint={workdir}", "--port=0", "--max_tokens=20"]

    def refused(*more):
        try:
            return cli.main([*argv, *more])
        except ZeroDivisionError:
            return None  # the slots are allocated next

    assert refused("--slots=2") is None
    assert refused("--slots=3") == 2
    error = capsys.readouterr().err
    assert "the largest that fits is --max_input_tokens=24 or --max_tokens=4 or --slots=2" in error
    assert refused("--slots=3", "--max_input_tokens=24") is None
    assert refused("--slots=3", "--max_input_tokens=25") == 2
    assert refused("--slots=2", "--max_input_tokens=41") == 2
    assert refused("--slots=1000000", "--max_input_tokens=1000000000") == 2
    assert "lower all three" in capsys.readouterr().err
    # A draft model's weights, keys and values are in memory too.
    assert refused("--slots=2", f"--draft={workdir}") == 2


def test_no_request_may_ask_for_more_answers_than_slots_and_queue_hold(workdir, monkeypatch):
    """It would never be taken, however often the client tries again."""
    served = []
    monkeypatch.setattr(server, "run", lambda *started: served.append(started))
    argv = ["serve", f"--checkpoint={workdir}", "--port=0", "--no_warm_up", "--slots=2"]
    assert cli.main([*argv, "--max_queue=3"]) == 0
    [(service, bound, _)] = served
    bound.close()
    assert service.limits.max_answers == 5


def test_draft_models_that_cannot_draft_are_refused(workdir, tmp_path, capsys):
    """Before the model is read, whatever is wrong with them."""
    content = json.loads((workdir / "config.json").read_text())
    data = content["data"]

    def refused(message, code=2, serve=(), **changes):
        (tmp_path / "config.json").write_text(json.dumps(content | changes))
        argv = ["serve", f"--checkpoint={workdir}", "--port=0", f"--draft={tmp_path}", *serve]
        assert cli.main(argv) == code
        assert message in capsys.readouterr().err

    spec = data["vocabulary"] | {"size": 261, "extra_ids": 2}
    vocabulary = ByteVocabulary(extra_ids=2)
    spec["fingerprint"] = vocabulary.fingerprint
    refused(
        f"has another vocabulary than the model ({vocabulary.size} ids against 259)",
        data=data | {"vocabulary": spec | {"size": vocabulary.size}},
    )
    refused("is an export", export={"format": "onnx"})
    refused(
        "has a table of 100 tokens, but the vocabulary has 259",
        model=content["model"] | {"vocab_size": 100},
    )
    refused(
        "trained with inputs of up to 39 tokens, but the server accepts 40; give a draft model "
        "trained with as many, or lower --max_input_tokens to 39",
        data=data | {"inputs_length": 39},
    )
    refused(
        "trained with answers of up to 40 tokens, but the server accepts 41",
        serve=["--max_tokens=41"],
    )
    decoder_only = {"architecture": "decoder_only", "encoder_layers": 0, "share_embeddings": True}
    refused(
        "trained with inputs and answers together of up to 79 tokens, but the server accepts 80",
        data=data | {"inputs_length": 39},
        model=content["model"] | decoder_only,
    )
    (tmp_path / "config.json").unlink()
    refused_for = f"{tmp_path} has no config.json"
    assert cli.main(["serve", f"--checkpoint={workdir}", f"--draft={tmp_path}", "--port=0"]) == 4
    assert refused_for in capsys.readouterr().err


def test_a_model_without_vocabulary_is_refused_by_name(workdir, tmp_path, capsys):
    for name in ("config.json", "params"):
        (tmp_path / name).symlink_to(workdir / name)
    content = json.loads((workdir / "config.json").read_text())
    content["data"]["vocabulary"] = None
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(content))
    for command in (["serve", "--port=0"], ["generate", "text"]):
        assert cli.main([*command, f"--checkpoint={tmp_path}"]) == 3
        error = capsys.readouterr().err
        assert "it again with --vocabulary=FILE" in error and "None" not in error


def test_exported_graphs_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"format_version": 1, "export": {"format": "onnx"}}')
    assert cli.main(["serve", f"--checkpoint={tmp_path}", "--port=0"]) == 2
    assert "serve the work directory that it was made from" in capsys.readouterr().err
