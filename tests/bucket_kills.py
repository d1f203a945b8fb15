"""A whole life in a bucket, killed again and again: it ends in the bits of one that nobody killed.

    python -m tests.bucket_kills [gs | s3]

Text is prepared, a model trained, evaluated and exported, by the commands, in one process that is
killed (SIGKILL) at one request after the other, and started again. A server on this machine
answers in place of the bucket's. Nothing of pytest collects this: it takes minutes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

from encdec import buckets
from encdec.data.records import open_records
from encdec.files import whole_lines
from encdec.saved.fingerprint import fingerprints
from encdec.saved.saved_params import load_params_for_inference, saved_steps
from encdec.storage import as_path, entries, on_this_machine
from encdec.train.metrics import read_metrics
from tests.bucket_servers import Proxy, amazon, google

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
BUCKET = "bucket/life"

# The life: each command is left out once its result is there, and resumes what it had begun.
LIFE = """
import sys
from encdec import cli
from encdec.storage import as_path
place, text = sys.argv[1:]

def run(*arguments):
    code = cli.main(list(arguments))
    assert code == 0, (arguments, code)

if not as_path(f"{place}/records/dataset.json").exists():
    run("prepare", f"--jsonl={text}/train/dialogsum.jsonl", "--vocabulary=bytes", "--workers=1",
        "--inputs_length=24", "--targets_length=12", f"--out={place}/records",
        "--block_bytes=400")
run("train", "--config=configs/pretrain.py:test", f"--workdir={place}/run",
    f"--config.data.records={place}/records", f"--config.data.eval_records={place}/records",
    "--config.model_overrides.vocab_size=264", "--config.batch_size=8",
    "--config.steps=12", "--config.schedule.name=constant", "--config.schedule.warmup_steps=0",
    "--config.log_every=1", "--config.eval.every=3", "--config.checkpoint.every=2",
    "--config.checkpoint.keep=2")
run("evaluate", f"--checkpoint={place}/run", "--tasks=dialogsum", f"--data_dir={text}",
    "--split=test", f"--out={place}/evaluation", "--max_tokens=4", "--resamples=10",
    "--batch_rows=4")
if not as_path(f"{place}/model/config.json").exists():
    run("export", f"--checkpoint={place}/run", "--format=hf", f"--out={place}/model")
"""

# What a life is killed at, in order: a request's method and address.
KILLS = {
    "gs": (
        ("POST|PUT", r"records/.*unfinished"),
        ("POST|PUT", r"records/rows-000001"),
        ("POST|PUT", r"records/rows-000002"),
        ("POST|PUT", r"records/dataset\.json"),
        ("POST|PUT", r"run/config\.json"),
        ("POST|PUT", r"run/metrics\.jsonl"),
        ("POST|PUT", r"checkpoints/2/params"),
        ("POST|PUT", r"checkpoints/2/optimizer"),
        ("POST|PUT", r"checkpoints/2/commit_success"),
        ("POST|PUT", r"checkpoints/4/fingerprints"),
        ("POST|PUT", r"tensorboard"),
        ("POST|PUT", r"checkpoints/6/params/manifest"),
        ("DELETE", r"checkpoints/2/"),
        ("POST|PUT", r"checkpoints/8/params"),
        ("POST|PUT", r"checkpoints/10/commit_success"),
        ("DELETE", r"checkpoints/(6|8)/"),
        ("POST|PUT", r"evaluation/dialogsum/predictions"),
        ("POST|PUT", r"evaluation/report\.json"),
        ("POST|PUT", r"model/model-0"),
        ("POST|PUT", r"model/config\.json"),
    ),
    # Each step is uploaded from this machine; a process that begins fetches the last whole one.
    "s3": (
        ("PUT", r"records/rows-000001"),
        ("PUT", r"run/metrics\.jsonl"),
        ("PUT", r"checkpoints/2/params"),
        ("PUT", r"checkpoints/2/_CHECKPOINT_METADATA"),
        ("PUT", r"checkpoints/4/optimizer"),
        ("GET", r"checkpoints/2/optimizer"),
        ("DELETE", r"checkpoints/2/_CHECKPOINT_METADATA"),
        ("DELETE", r"checkpoints/4/params"),
        ("PUT", r"checkpoints/12/_CHECKPOINT_METADATA"),
        ("PUT", r"evaluation/dialogsum/predictions"),
        ("PUT", r"model/model-0"),
    ),
}


def main(scheme: str = "gs") -> int:
    """Runs both lives and compares them; the exit code says whether they are equal."""
    begin, bucket, kills = time.monotonic(), f"{scheme}://{BUCKET}", KILLS[scheme]
    serve = {"gs": google, "s3": amazon}[scheme]
    with tempfile.TemporaryDirectory() as name, serve() as (proxy, variables):
        folder = pathlib.Path(name)
        os.environ.update(variables)
        os.environ[buckets.CACHE] = str(folder / "cache")
        for server in ("gcp_storage_emulator", "werkzeug"):
            logging.getLogger(server).setLevel(logging.CRITICAL)
        _write_text(folder / "text")
        assert _live(str(folder / "local"), folder / "text") == 0
        for number, target in enumerate(kills, 1):
            code = _killed(proxy, bucket, target, folder / "text")
            shown = "killed" if code == -signal.SIGKILL else f"ended with {code}: NOT KILLED"
            seconds = time.monotonic() - begin
            print(f"{number:2} {shown} at {target[0]} {target[1]} ({seconds:,.0f} s)", flush=True)
            if code != -signal.SIGKILL:
                return 1
        assert _live(bucket, folder / "text") == 0
        local, remote = _result(str(folder / "local")), _result(bucket)
    for part in local:
        same = local[part] == remote[part]
        print(f"{part}: {'equal' if same else f'{remote[part]} instead of {local[part]}'}")
    print(f"{len(kills)} kills, {time.monotonic() - begin:,.0f} s")
    return 0 if local == remote else 1


def _write_text(folder: pathlib.Path) -> None:
    for split, rows in (("train", 100), ("test", 12)):
        path = folder / split / "dialogsum.jsonl"
        path.parent.mkdir(parents=True)
        pairs = ((f"{n:08d}", f"{n:04d}"[::-1]) for n in range(rows))
        path.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in pairs))


def _start(place: str, text: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LIFE, place, str(text)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _live(place: str, text: pathlib.Path) -> int:
    return _start(place, text).wait()


def _killed(proxy: Proxy, bucket: str, target: tuple[str, str], text: pathlib.Path) -> int:
    """Lets it continue until it makes such a request, which is not answered; its exit code."""
    process = None

    def fault(method: str, path: str) -> int | None:
        shown = path.replace("%2F", "/").replace("%3D", "=")
        if process and re.fullmatch(target[0], method) and re.search(target[1], shown):
            process.send_signal(signal.SIGKILL)
            return 503
        return None

    proxy.fault = fault
    try:
        process = _start(bucket, text)
        return process.wait()
    finally:
        proxy.fault = None


def _result(place: str) -> dict[str, object]:
    """All that a life leaves, without times."""
    run, kept = f"{place}/run", ("step", "train/loss", "train/gradient_norm", "eval/loss")
    answers = as_path(f"{place}/evaluation/dialogsum")
    report = json.loads(as_path(f"{place}/evaluation/report.json").read_text())
    model = on_this_machine(f"{place}/model")
    names = {name.removesuffix(".parts") for name in entries(answers)}
    return {
        "records": open_records(f"{place}/records").card.fingerprint,
        # Once each: a finished run that is called again is evaluated again.
        "metrics": list(
            dict.fromkeys(
                json.dumps({k: row[k] for k in kept if k in row}) for row in read_metrics(run)
            )
        ),
        "checkpoints": {
            step: fingerprints(load_params_for_inference(run, step)[1]) for step in saved_steps(run)
        },
        "answers": [
            json.loads(line)["prediction"]
            for name in sorted(names)
            if name.startswith("predictions")
            for _, line in whole_lines(answers / name)
        ],
        "scores": report["tasks"]["dialogsum"]["scores"],
        "exported": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(model.iterdir())
            if path.suffix == ".safetensors" or path.name == "config.json"
        },
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
