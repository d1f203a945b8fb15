"""GKE: the JobSet manifest as YAML and against Kubernetes' rules, and xpk's command line."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import yaml

from launch import gke
from launch.commands import FINAL_CODES, PREEMPTED
from tests.launch.golden import AWKWARD, check_golden

TRAIN = ["--config=configs/pretrain.py:1b", "--workdir=/mnt/my-bucket/runs/1b"]
BASE = ["--name=run1", "--slice=v5e:16x16*2", "--image=us-docker.pkg.dev/p/r/encdec:1"]


def manifest(*more: str, train=TRAIN) -> dict:
    return gke.manifest(gke.parse(["jobset", *BASE, *more, "--", *train]))


@pytest.mark.parametrize(
    "name, arguments",
    [
        (
            "jobset",
            [
                "jobset",
                *BASE,
                "--bucket=my-bucket",
                "--spot",
                "--service_account=trainer",
                "--queue=research",
                "--env=JAX_COMPILATION_CACHE_DIR=/mnt/my-bucket/cache",
            ],
        ),
        (
            "xpk",
            [
                "xpk",
                *BASE,
                "--cluster=pods",
                "--project=my-project",
                "--zone=us-west4-a",
                "--env=JAX_COMPILATION_CACHE_DIR=/mnt/my-bucket/cache",
            ],
        ),
    ],
)
def test_dry_runs_are_golden(name, arguments, capsys):
    assert gke.main([*arguments, "--dry_run", "--", *TRAIN]) == 0
    check_golden(f"gke-{name}.txt", capsys.readouterr().out)


def test_the_other_actions(capsys):
    assert gke.main(["xpk-attach", "--cluster=pods", "--bucket=my_bucket=/data", "--dry_run"]) == 0
    assert capsys.readouterr().out == (
        "xpk storage attach my-bucket --type=gcsfuse --cluster=pods --bucket=my_bucket "
        "--mount-point=/data --readonly=false --size=1 --auto-mount=true\n"
    )
    for action in ("status", "logs", "delete"):
        assert gke.main([action, "--name=run1", "--dry_run"]) == 0
        assert capsys.readouterr().out.startswith("kubectl ")


def test_yaml_reads_back_what_was_meant():
    content = manifest("--bucket=my-bucket", "--env=A= x: 'y' # $(id)", train=[*TRAIN, *AWKWARD])
    assert yaml.safe_load(gke.as_yaml(content)) == content
    odd = {"a b": [], "c": {}, "d": [[1, "2"], {"e": None}], "f": "yes", "g": "1e3", "h": True}
    assert yaml.safe_load(gke.as_yaml(odd)) == odd


def expanded(argument: str) -> str:
    """What Kubernetes makes of an argument, with no variable set but HOME."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda m: "$" if m[0] == "$$" else ("/root" if m[1] == "HOME" else m[0]),
        argument,
    )


def test_arguments_reach_the_container_unchanged():
    train = [*TRAIN, *AWKWARD, "--config.model=$(HOME)"]
    pod = manifest("--env=Y=$(HOME)", train=train)["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]["spec"]
    container = pod["containers"][0]
    assert [expanded(a) for a in container["command"]] == [
        "encdec",
        "train",
        *train,
        "--distributed",
    ]
    assert expanded(container["env"][0]["value"]) == "$(HOME)"


def test_xpks_script_reads_the_arguments_back():
    train = [*TRAIN, *AWKWARD, "--config.model=$(HOME)"]
    command = gke.xpk_create(gke.parse(["xpk", *BASE, "--cluster=c", "--", *train]))[-1]
    script = expanded(command.removeprefix("--command="))
    read = subprocess.run(
        ["bash", "-c", "encdec() { printf '%s\\0' \"$@\"; }; " + script.removeprefix("exec ")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")[:-1]
    assert read == ["train", *train, "--distributed"] == shlex.split(script)[2:]


def action_for(content: dict, message: str, reason: str = "PodFailurePolicy") -> str:
    """What the JobSet controller does: the first rule of which reason and pattern match."""
    for rule in content["spec"]["failurePolicy"]["rules"]:
        reasons, patterns = rule["onJobFailureReasons"], rule.get("onJobFailureMessagePatterns")
        if reason in reasons and (
            not patterns or any(re.search(pattern, message) for pattern in patterns)
        ):
            return rule["action"]
    return "RestartJobSet"


def test_each_end_of_a_pod_has_its_answer():
    content = manifest()
    job = content["spec"]["replicatedJobs"][0]["template"]["spec"]
    codes = next(
        rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    )
    assert codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    # The words of the Job controller (kubernetes/pkg/controller/job/pod_failure_policy.go).
    message = (
        "Container train for pod default/run1-slice-0-0-x failed with exit code {} "
        "matching FailJob rule at index 1"
    )
    for code in FINAL_CODES:
        assert code in codes["values"]
        assert action_for(content, message.format(code)) == "FailJobSet"
    assert PREEMPTED in codes["values"]
    for words in (
        message.format(PREEMPTED),
        "Pod default/x has condition DisruptionTarget matching FailJob rule at index 0",
    ):
        assert action_for(content, words) == "RestartJobSetAndIgnoreMaxRestarts"
    assert (
        action_for(content, "Job has reached the specified backoff limit", "BackoffLimitExceeded")
        == "RestartJobSet"
    )
    assert job["backoffLimit"] == 0  # or the pod alone would be replaced
    # Kubernetes' own conditions for a pod failure policy.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert len(job["podFailurePolicy"]["rules"]) <= 20 and 0 not in codes["values"]


def test_shapes():
    for text, hosts, chips, label in (
        ("v5e:2x2", 1, "4", "tpu-v5-lite-podslice"),
        ("v5p:4x4x4", 16, "4", "tpu-v5p-slice"),
        ("v6e:1x1", 1, "1", "tpu-v6e-slice"),
        ("tpu7x:2x2x2", 2, "4", "tpu7x"),
    ):
        options = gke.parse(["jobset", "--name=a", f"--slice={text}", "--image=i", "--", *TRAIN])
        job = gke.manifest(options)["spec"]["replicatedJobs"][0]["template"]["spec"]
        pod = job["template"]["spec"]
        assert job["parallelism"] == job["completions"] == hosts
        (container,) = pod["containers"]  # one for each host, with all of its chips
        assert container["resources"]["limits"] == {"google.com/tpu": chips}
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label


def template(*more: str) -> dict:
    return manifest(*more)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


def test_a_checkpoint_fits_through_the_mount():
    """A sidecar's own limits, 256 MiB and 5 GiB, end it under a checkpoint of 12 GB."""
    limits = lambda *more: {
        name.removeprefix("gke-gcsfuse/"): value
        for name, value in template("--bucket=my-bucket", *more)["metadata"]["annotations"].items()
    }
    assert limits() == {
        "volumes": "true",
        "cpu-limit": "4",
        "memory-limit": "8Gi",
        "ephemeral-storage-limit": "32Gi",
    }
    given = limits("--fuse_limits=500m,1.5Gi,0")
    assert given["cpu-limit"] == "500m" and given["ephemeral-storage-limit"] == "0"
    assert "metadata" not in template()


def test_time_to_live_and_queue():
    content = manifest("--queue=research", "--ttl_seconds=60")
    assert content["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    assert content["spec"]["ttlSecondsAfterFinished"] == 60
    assert "labels" not in manifest()["metadata"]


def test_it_is_given_to_kubectl(tmp_path, monkeypatch):
    fake = tmp_path / "kubectl"
    fake.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\n"
        f"pathlib.Path({str(tmp_path / 'got')!r}).write_text(sys.stdin.read())\n"
        "sys.exit(0 if sys.argv[1:] == ['apply', '--validate=strict', '--filename=-'] else 9)\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gke.main(["jobset", *BASE, "--", *TRAIN]) == 0
    assert yaml.safe_load((tmp_path / "got").read_text()) == manifest()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["jobset", "--name=Run_1", "--slice=v5e:4x4", "--image=i", "--", *TRAIN], "lower-case"),
        (["jobset", "--name=a", "--slice=v5e:4x4", "--", *TRAIN], "needs --image"),
        (["xpk", *BASE, "--", *TRAIN], "needs --cluster"),
        (["jobset", *BASE], "arguments of `encdec train`"),
        (["jobset", *BASE, "--max_restarts=-1", "--", *TRAIN], "--max_restarts is -1; expected 0"),
        (["jobset", *BASE, "--cluster=c", "--", *TRAIN], "--cluster is for xpk, xpk-attach"),
        (["jobset", *BASE, "--fuse_limits=4,8Gi", "--", *TRAIN], "expected CPU,MEMORY,STORAGE"),
        (["xpk", *BASE, "--cluster=c", "--bucket=my-bucket", "--", *TRAIN], "xpk-attach"),
        (["xpk", *BASE, "--cluster=c", "--queue=q", "--", *TRAIN], "--queue is for jobset"),
        (
            ["xpk", *BASE, "--cluster=c", '--env=A="b"', "--", *TRAIN],
            "xpk cannot pass on the quotes",
        ),
    ],
)
def test_mistakes_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        gke.main(arguments)
    assert words in capsys.readouterr().err
