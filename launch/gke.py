"""TPUs on Google Kubernetes Engine: a JobSet manifest of our own, or a workload of xpk.

    python -m launch.gke jobset --name=run1 --slice=v5e:16x16 --image=IMAGE --bucket=my-bucket \\
        -- --config=configs/pretrain.py:1b --workdir=/mnt/my-bucket/runs/1b ...
    python -m launch.gke xpk --name=run1 --cluster=pods --slice=v5e:16x16 --image=IMAGE \\
        -- --config=configs/pretrain.py:1b --workdir=/mnt/my-bucket/runs/1b ...

``jobset`` prints the manifest with --dry_run and applies it with kubectl without; the cluster needs
JobSet 0.10 or newer. Preemptions and node maintenance restart it without limit, crashes
``--max_restarts`` times, and an error that would recur (configuration, data, checkpoint, NaN,
storage) ends it. The image contains encdec and its configs: launch/Dockerfile.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from typing import Any

from launch.commands import (
    FINAL_CODES,
    PREEMPTED,
    Runner,
    actions_parser,
    bucket_option,
    dry_run_option,
    environment_option,
    number_option,
    parsed,
    refuse_elsewhere,
    repeated_option,
    run_main,
    slices_option,
    split_arguments,
    train_arguments,
)
from launch.slices import CHIPS, CHIPS_PER_NODE

CONTAINER = "train"
LEAST_JOBSET = "0.10"  # the first with onJobFailureMessagePatterns


def literally(argument: str) -> str:
    """An argument escaped for Kubernetes, which would expand ``$(NAME)``.

    https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables/
    """
    return argument.replace("$(", "$$(")


def manifest(options: argparse.Namespace) -> dict[str, Any]:
    """The JobSet: one job per slice, one pod per host.

    Fields: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/ and
    https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice.
    """
    slices = options.slice
    job = {
        "parallelism": slices.nodes,
        "completions": slices.nodes,
        "backoffLimit": 0,  # a failed pod fails the job: the others cannot continue without it
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": CONTAINER,
                        "operator": "In",
                        "values": sorted([*FINAL_CODES, PREEMPTED]),
                    },
                },
            ]
        },
        "template": _pod_template(options),
    }
    final = "|".join(map(str, FINAL_CODES))
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            **({"labels": {"kueue.x-k8s.io/queue-name": options.queue}} if options.queue else {}),
            # Each slice's pods in their own node pool.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "ttlSecondsAfterFinished": options.ttl_seconds,
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [
                    {
                        "name": "final",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [f"exit code ({final}) "],
                    },
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": slices.count, "template": {"spec": job}}
            ],
        },
    }


def _pod_template(options: argparse.Namespace) -> dict[str, Any]:
    """One pod for each host: one container with all of its chips."""
    slices = options.slice
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": options.image,
        "command": [literally(argument) for argument in ["encdec", "train", *options.train]],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        # The TPU's device files, and a mounted bucket, are root's.
        "securityContext": {"privileged": True, "runAsUser": 0},
        "resources": {"limits": {"google.com/tpu": str(min(CHIPS_PER_NODE, slices.chips))}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    if options.env:
        container["env"] = [
            {"name": name, "value": literally(value)}
            for name, value in (setting.split("=", 1) for setting in options.env)
        ]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_seconds,
        # The hosts' own network: no overlay between a step and its collectives over slices.
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": CHIPS[slices.chip].node_label,
            "cloud.google.com/gke-tpu-topology": slices.topology,
            **({"cloud.google.com/gke-spot": "true"} if options.spot else {}),
        },
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists"}],
        "containers": [container],
        # Processes that read data hand over rows in it; Kubernetes gives 64 MB.
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    for number, (bucket, directory) in enumerate(options.bucket):
        name = f"bucket-{number}"
        container["volumeMounts"].append({"name": name, "mountPath": directory})
        pod["volumes"].append(
            {
                "name": name,
                "csi": {
                    "driver": "gcsfuse.csi.storage.gke.io",
                    "volumeAttributes": {"bucketName": bucket, "mountOptions": "implicit-dirs"},
                },
            }
        )
    if not options.bucket:
        return {"spec": pod}
    processors, memory, storage = options.fuse_limits
    return {
        "metadata": {
            "annotations": {
                "gke-gcsfuse/volumes": "true",
                "gke-gcsfuse/cpu-limit": processors,
                "gke-gcsfuse/memory-limit": memory,
                "gke-gcsfuse/ephemeral-storage-limit": storage,
            }
        },
        "spec": pod,
    }


def as_yaml(content: dict[str, Any]) -> str:
    """Block YAML with JSON strings, which are valid YAML."""
    return "\n".join(_lines(content)) + "\n"


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        lines = []
        for key, item in value.items():
            key = key if re.fullmatch(r"[A-Za-z][\w./-]*", key) else json.dumps(key)
            inner = _lines(item)
            if isinstance(item, (dict, list)) and item:
                lines += [f"{key}:", *("  " + line for line in inner)]
            else:
                lines.append(f"{key}: {inner[0]}")
        return lines
    if isinstance(value, list) and value:
        lines = []
        for item in value:
            first, *rest = _lines(item)
            lines += [f"- {first}", *("  " + line for line in rest)]
        return lines
    return [json.dumps(value, ensure_ascii=False)]


def xpk_create(options: argparse.Namespace) -> list[str]:
    """``xpk workload create``; buckets are attached to the cluster (``xpk storage attach``)."""
    # xpk puts the command into a script of bash in a manifest of its own, in a subshell behind `&`
    # that gets the SIGTERM: `exec` makes that the training in every version of bash.
    command = literally("exec " + shlex.join(["encdec", "train", *options.train]))
    return [
        "xpk",
        "workload",
        "create",
        f"--workload={options.name}",
        f"--cluster={options.cluster}",
        *_place(options),
        f"--tpu-type={options.slice.xpk_type}",
        f"--num-slices={options.slice.count}",
        f"--docker-image={options.image}",
        f"--max-restarts={options.max_restarts}",
        # In addition to its own codes, 42 and 127 to 255. Any other ends the workload at once.
        f"--restart-on-exit-codes={ranges(set(range(1, 127)) - set(FINAL_CODES))}",
        f"--ttl-seconds-after-finished={options.ttl_seconds}",
        f"--termination-grace-period-seconds={options.grace_seconds}",
        *(f"--env={literally(setting)}" for setting in options.env),
        *(["--spot"] if options.spot else []),
        f"--command={command}",
    ]


def ranges(codes: Collection[int]) -> str:
    """Numbers as ``1,6,8-126``."""
    parts: list[list[int]] = []
    for code in sorted(codes):
        if parts and parts[-1][-1] == code - 1:
            parts[-1].append(code)
        else:
            parts.append([code])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def xpk_attach(options: argparse.Namespace) -> list[list[str]]:
    """Commands that mount each bucket in all later workloads of the cluster."""
    return [
        [
            "xpk",
            "storage",
            "attach",
            bucket.replace("_", "-").replace(".", "-"),
            "--type=gcsfuse",
            f"--cluster={options.cluster}",
            *_place(options),
            f"--bucket={bucket}",
            f"--mount-point={directory}",
            "--readonly=false",
            "--size=1",
            "--auto-mount=true",
        ]
        for bucket, directory in options.bucket
    ]


def xpk_delete(options: argparse.Namespace) -> list[str]:
    return [
        "xpk",
        "workload",
        "delete",
        f"--workload={options.name}",
        f"--cluster={options.cluster}",
        *_place(options),
    ]


def _place(options: argparse.Namespace) -> list[str]:
    return [
        *([f"--project={options.project}"] if options.project else []),
        *([f"--zone={options.zone}"] if options.zone else []),
    ]


ACTIONS = {
    "jobset": f"apply the manifest (with --dry_run: print it); JobSet {LEAST_JOBSET} or newer",
    "xpk": "create the workload with xpk",
    "xpk-attach": "mount the buckets in all later workloads of the cluster",
    "status": "state of the JobSet",
    "logs": "output of the first slice's first host",
    "delete": "delete the JobSet",
    "xpk-delete": "delete the workload with xpk",
}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    run = Runner(options.dry_run)
    if options.action == "jobset":
        text = as_yaml(manifest(options))
        if options.dry_run:
            print(text, end="")
            return 0
        # Strictly: a JobSet that does not know a field would otherwise drop it.
        return run(["kubectl", "apply", "--validate=strict", "--filename=-"], stdin=text).returncode
    actions = {
        "xpk": lambda: [xpk_create(options)],
        "xpk-attach": lambda: xpk_attach(options),
        "status": lambda: [["kubectl", "describe", "jobset", options.name]],
        "logs": lambda: [
            [
                "kubectl",
                "logs",
                f"--selector=jobset.sigs.k8s.io/jobset-name={options.name},"
                "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0",
                f"--container={CONTAINER}",
                f"--tail={options.lines}",
            ]
        ],
        "delete": lambda: [["kubectl", "delete", "jobset", options.name]],
        "xpk-delete": lambda: [xpk_delete(options)],
    }
    return run.all(actions[options.action]())


# Options that some actions use.
PLACES = {
    ("xpk", "xpk-attach", "xpk-delete"): ("cluster", "project", "zone"),
    ("logs",): ("lines",),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; ``train`` holds the arguments after ``--``."""
    own, train = split_arguments(argv)
    parser = actions_parser("python -m launch.gke", __doc__, ACTIONS)
    parser.add_argument("--name", type=_name, help="name of the JobSet or workload")
    parser.add_argument(
        "--slice",
        type=slices_option,
        metavar="CHIP:SIDES",
        help="v4, v5e, v5p, v6e or tpu7x, e.g. v5e:16x16, or v5e:16x16*2",
    )
    parser.add_argument("--image", help="container image with encdec")
    repeated_option(
        parser, "--bucket", "mounted in every pod (at /mnt/BUCKET)", bucket_option, "BUCKET[=DIR]"
    )
    environment_option(parser)
    _workload_options(parser)
    parser.add_argument("--cluster", help="xpk: the cluster")
    parser.add_argument("--project", help="xpk: default is gcloud's own")
    parser.add_argument("--zone", help="xpk: default is gcloud's own")
    number_option(parser, "--lines", "logs: number of lines", 100)
    dry_run_option(parser, "print what would run")
    options = parsed(parser, own)
    refuse_elsewhere(parser, options, PLACES)
    wanted = {
        "jobset": ("name", "slice", "image"),
        "xpk": ("name", "slice", "image", "cluster"),
        "xpk-attach": ("cluster", "bucket"),
        "xpk-delete": ("name", "cluster"),
    }
    for name in wanted.get(options.action, ("name",)):
        if not getattr(options, name):
            parser.error(f"{options.action} needs --{name}")
    if options.action == "xpk" and options.bucket:
        parser.error("--bucket: xpk mounts what is attached to the cluster; see xpk-attach")
    if options.action == "xpk":
        for name in ("queue", "service_account", "fuse_limits"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name} is for jobset; xpk sets its own")
        for setting in options.env:
            if set('"\\\n') & set(setting):  # it writes them into YAML as they are
                parser.error(f"--env: xpk cannot pass on the quotes or backslashes of {setting!r}")
    needs_run = options.action in ("jobset", "xpk")
    if needs_run and not train:
        parser.error(f"{options.action} needs the arguments of `encdec train` after `--`")
    options.train = train_arguments(train) if needs_run else []
    return options


def _workload_options(parser: argparse.ArgumentParser) -> None:
    """Where and how long the pods run."""
    parser.add_argument("--spot", action="store_true", help="use Spot nodes")
    parser.add_argument(
        "--service_account", help="jobset: Kubernetes service account with access to the buckets"
    )
    parser.add_argument("--queue", help="jobset: Kueue's local queue")
    parser.add_argument(
        "--fuse_limits",
        type=_fuse_limits,
        default=("4", "8Gi", "32Gi"),
        metavar="CPU,MEMORY,STORAGE",
        help="jobset: of each pod's mounts of buckets; a host's files of a checkpoint pass through "
        "the storage (4,8Gi,32Gi; 0: unlimited, on Standard clusters)",
    )
    parser.add_argument(
        "--max_restarts",
        type=int,
        default=10,
        metavar="N",
        help="restarts after crashes (%(default)s); xpk counts preemptions too",
    )
    number_option(parser, "--grace_seconds", "time from SIGTERM to SIGKILL", 120, "S")
    parser.add_argument(
        "--ttl_seconds",
        type=int,
        default=7 * 24 * 3600,
        metavar="S",
        help="what has ended is deleted, with its logs, after this time (%(default)s: a week)",
    )


def _fuse_limits(text: str) -> tuple[str, str, str]:
    parts = text.split(",")
    quantity = r"[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?"
    if len(parts) != 3 or not all(re.fullmatch(quantity, part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; expected CPU,MEMORY,STORAGE, e.g. 4,8Gi,32Gi")
    return parts[0], parts[1], parts[2]


def _name(text: str) -> str:
    # JobSet appends "-slice-0-0" and Kubernetes requires DNS labels of at most 63 characters.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected up to 40 lower-case letters, digits and hyphens, a letter first"
        )
    return text


if __name__ == "__main__":
    sys.exit(run_main(main))
