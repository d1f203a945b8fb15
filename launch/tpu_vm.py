"""Cloud TPU VMs by queued resources: requested, set up, trained on, resumed after preemption.

    python -m launch.tpu_vm babysit --name=run1 --zone=us-west4-a --slice=v5e:16x16 --spot \\
        --bucket=my-bucket -- --config=configs/pretrain.py:1b --workdir=/mnt/my-bucket/runs/1b ...

``babysit`` does everything and continues after preemptions until the run is done; the other actions
are its single steps. Ctrl-C leaves everything as it is, and the same command resumes. The hosts run
launch/worker.sh.

Without external addresses (--internal_ips) hosts are reached through IAP (--tunnel_through_iap), or
directly from a machine in their network; they install encdec through Cloud NAT.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from launch import ssh
from launch.babysit import UNAVAILABLE, Action, Decision, PollState, RestartLimits, Seen, decide
from launch.commands import (
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
    tool_option,
    train_arguments,
)
from launch.slices import CHIPS

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKER = ROOT / "launch" / "worker.sh"
TARBALL = "encdec.tar.gz"
POLL_SECONDS = 60.0

COMMAND = ("compute", "tpus", "queued-resources")
GCLOUD = ("gcloud", *COMMAND)
# One SSH connection to each host of each slice.
EVERYWHERE = ("--node=all", "--worker=all")
# Nobody may be there to answer a question, and a host that is taken away does not close its
# connections: both would hold up the babysitter forever.
SSH_OPTIONS = (
    "-oBatchMode=yes",
    "-oConnectTimeout=30",
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=4",
)
_STATE = re.compile(r"^encdec-state: (absent|running|exited [0-9]+)\s*$", re.MULTILINE)


class Pod:
    """The command lines for one queued resource."""

    def __init__(self, options: argparse.Namespace):
        self._name = options.name
        self._place = (
            *([f"--project={options.project}"] if options.project else []),
            f"--zone={options.zone}",
        )
        self._options = options

    def create(self) -> list[str]:
        options, slices = self._options, self._options.slice
        chip = CHIPS[slices.chip]
        # gcloud's released command knows --type=v4 only; the accelerator type alone stands for the
        # default shape of its size.
        by_type = slices.chip == "v4" or not slices.default_shape
        alpha = bool(options.alpha or options.reservation or (by_type and slices.chip != "v4"))
        shape = (
            [f"--type={chip.type_prefix}", f"--topology={slices.topology}"]
            if by_type
            else [f"--accelerator-type={slices.accelerator_type}"]
        )
        nodes = (
            [f"--node-id={self._name}"]
            if slices.count == 1
            else [f"--node-count={slices.count}", f"--node-prefix={self._name}"]
        )
        given = {
            "--reservation": options.reservation,
            "--valid-until-duration": options.valid_for,
            "--service-account": options.service_account,
            "--network": options.network,
            "--subnetwork": options.subnetwork,
            "--labels": options.labels,
        }
        return [
            *(["gcloud", "alpha", *COMMAND] if alpha else GCLOUD),
            "create",
            self._name,
            *self._place,
            *shape,
            *nodes,
            f"--runtime-version={options.runtime or chip.runtime}",
            *(["--spot"] if options.spot else []),
            # The alpha command asks for standard capacity next to --spot unless it is told so.
            *(["--provisioning-model=spot"] if options.spot and alpha else []),
            *(["--reserved"] if options.reserved else []),
            *(f"{name}={value}" for name, value in given.items() if value),
            *(["--internal-ips"] if options.internal_ips else []),
            # The hosts' own account reads and writes the buckets.
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
            *options.gcloud,
        ]

    def describe(self) -> list[str]:
        return [*GCLOUD, "describe", self._name, *self._place, "--format=value(state.state)"]

    def status(self) -> list[str]:
        return [*GCLOUD, "describe", self._name, *self._place]

    def delete(self) -> list[str]:
        return [*GCLOUD, "delete", self._name, *self._place, "--force", "--quiet"]

    def copy(self, tarball: str) -> list[str]:
        return [
            *GCLOUD,
            "scp",
            tarball,
            str(WORKER),
            f"{self._name}:",
            *self._place,
            *EVERYWHERE,
            *self._route,
            *(f"--scp-flag={option}" for option in SSH_OPTIONS),
            *self._options.gcloud_ssh,
        ]

    def on_workers(self, *arguments: str, where: Sequence[str] = EVERYWHERE) -> list[str]:
        """``worker.sh ARGUMENTS`` on the hosts; quoted for the shell there."""
        environment = ["env", *self._options.env] if self._options.env else []
        command = shlex.join([*environment, "bash", "worker.sh", *arguments])
        return [
            *GCLOUD,
            "ssh",
            self._name,
            *self._place,
            *where,
            *self._route,
            *(f"--ssh-flag={option}" for option in SSH_OPTIONS),
            *self._options.gcloud_ssh,
            f"--command={command}",
        ]

    @property
    def _route(self) -> list[str]:
        """How hosts are reached, and with which key."""
        options = self._options
        key = [f"--ssh-key-file={options.ssh_key}"] if options.ssh_key else []
        if options.tunnel_through_iap:
            return ["--tunnel-through-iap", *key]
        return [*(["--internal-ip"] if options.internal_ips else []), *key]

    def set_up(self, tarball: str) -> list[list[str]]:
        return [
            archive(tarball),
            self.copy(tarball),
            self.on_workers("setup", pathlib.Path(tarball).name),
        ]

    def state(self) -> list[str]:
        return self.on_workers("state", *self._options.train)

    def start(self) -> list[list[str]]:
        """Mounts first: a rebooted host has lost its mounts."""
        return [
            *(
                self.on_workers("mount", bucket, directory)
                for bucket, directory in self._options.bucket
            ),
            self.on_workers("start", *self._options.train),
        ]


def archive(tarball: str) -> list[str]:
    """The last commit of this checkout as one file."""
    return ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={tarball}", "HEAD"]


def look(pod: Pod, run: Runner, hosts: int) -> Seen:
    """Queries the state of the resource and, if it has hosts, of these."""
    described = run(pod.describe(), quiet=True)
    if described.returncode:
        missing = re.search(r"NOT_FOUND|not found|was not found", described.stderr)
        return Seen(None if missing else "UNKNOWN")
    state = described.stdout.strip()
    if state != "ACTIVE":
        return Seen(state or "UNKNOWN")
    answer = run(pod.state(), quiet=True)
    workers = tuple(_STATE.findall(answer.stdout))
    if len(workers) == hosts:
        return Seen(state, workers)
    # Before the first set-up there is no worker.sh to answer.
    if not workers and "worker.sh" in answer.stdout + answer.stderr:
        return Seen(state, ("absent",) * hosts)
    return Seen(state, None)


def act(pod: Pod, run: Runner, decision: Decision) -> int:
    """Carries out a decision; returns a tool's exit code, 0 on success."""
    if decision.action is Action.CREATE:
        return run(pod.create()).returncode
    if decision.action is Action.DELETE:
        return run(pod.delete()).returncode
    if decision.action is Action.SET_UP:
        return set_up(pod, run) or run.all(pod.start())
    if decision.action is Action.START:
        return run.all(pod.start())
    if decision.action is Action.STOP:
        return run(pod.on_workers("stop")).returncode
    return 0


def set_up(pod: Pod, run: Runner) -> int:
    if not run.dry_run:
        changed = run(["git", "-C", str(ROOT), "status", "--porcelain"], quiet=True).stdout
        if changed:
            print(f"not committed, so not copied to the hosts:\n{changed}", end="", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        return run.all(pod.set_up(TARBALL if run.dry_run else f"{folder}/{TARBALL}"))


def babysit(
    pod: Pod, run: Runner, hosts: int, *, poll_seconds: float = POLL_SECONDS, delete: bool = False
) -> int:
    """Polls, decides and acts until the run is done or given up; returns its exit code."""
    limits, memory, said = RestartLimits(), PollState(), ""
    while True:
        before, decision = memory, decide(look(pod, run, hosts), memory, limits)
        memory = decision.memory
        line = f"{decision.reason}: {decision.action.value}"
        if line != said:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", flush=True)
            said = line
        if decision.action is Action.FINISH:
            if delete:
                run(pod.delete())
            return decision.code
        failed = act(pod, run, decision)
        if failed and decision.action is Action.CREATE:
            memory = dataclasses.replace(memory, refusals=memory.refusals + 1)
            if memory.refusals > limits.refusals:
                print(f"{memory.refusals} requests in a row were refused", flush=True)
                return UNAVAILABLE
        elif failed and decision.action in (Action.SET_UP, Action.START):
            # Set up again: gcloud reports success where it could not reach a single host.
            memory = PollState(crashes=before.crashes + 1)
            if memory.crashes > limits.crashes:
                print(
                    f"could not {decision.action.value} {memory.crashes} times in a row", flush=True
                )
                return 1
        time.sleep(poll_seconds)


@contextlib.contextmanager
def login(options: argparse.Namespace) -> Iterator[Runner]:
    """Runs commands with a key that exists and that an agent holds, where they need one."""
    if options.dry_run or options.action not in WITH_SSH:
        yield Runner(options.dry_run)
        return
    key = (options.ssh_key or ssh.KEY).expanduser()
    ssh.make_key(key)
    with ssh.agent(key) as environment:
        yield Runner(environment=environment)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    pod = Pod(options)
    with login(options) as run:
        if options.action != "babysit":
            return step(pod, run, options)
        if options.dry_run:
            return show(pod, run)
        hosts = options.slice.vms * options.slice.count
        try:
            return babysit(
                pod, run, hosts, poll_seconds=options.poll_seconds, delete=options.delete
            )
        except KeyboardInterrupt:
            print("left as it is; the same command resumes", file=sys.stderr)
            return 130


def show(pod: Pod, run: Runner) -> int:
    """Prints all commands of the babysitter."""
    print("# If the slice does not exist:")
    run(pod.create())
    print("# Until it is ACTIVE, at every poll:")
    run(pod.describe())
    print("# Once on each new slice:")
    set_up(pod, run)
    print("# First, and again after a preemption or a crash:")
    run.all(pod.start())
    print("# At every poll while it is ACTIVE:")
    run(pod.state())
    print("# When it is SUSPENDED or FAILED, before it is requested again:")
    return run(pod.delete()).returncode


def step(pod: Pod, run: Runner, options: argparse.Namespace) -> int:
    """One of the single steps."""
    if options.action == "wait":
        return _wait(pod, run, options.poll_seconds)
    if options.action == "setup":
        return set_up(pod, run)
    actions = {
        "create": lambda: [pod.create()],
        "status": lambda: [pod.status()],
        "run": pod.start,
        "stop": lambda: [pod.on_workers("stop")],
        "state": lambda: [pod.state()],
        "logs": lambda: [
            pod.on_workers(
                "log",
                str(options.lines),
                where=(f"--node={options.node}", f"--worker={options.worker}"),
            )
        ],
        "delete": lambda: [pod.delete()],
    }
    return run.all(actions[options.action]())


def _wait(pod: Pod, run: Runner, poll_seconds: float) -> int:
    """Waits until the slice is active; 0, or 1 if it will not become active."""
    while True:
        described: subprocess.CompletedProcess[str] = run(pod.describe(), quiet=True)
        state = described.stdout.strip()
        if run.dry_run or state == "ACTIVE":
            return 0
        print(state or described.stderr.strip(), flush=True)
        if state in ("FAILED", "SUSPENDED"):
            return 1
        time.sleep(poll_seconds)


ACTIONS = {
    "babysit": "all steps, until the run is done",
    "create": "request the slice",
    "wait": "wait until it is active",
    "setup": "install encdec on every host",
    "run": "mount the buckets and start `encdec train` on every host, in the background",
    "state": "whether training runs on each host, or its exit code",
    "stop": "let training save and exit",
    "logs": "the end of one host's output",
    "status": "Google Cloud's description of the slice",
    "delete": "delete the slice",
}

# Actions that log in to hosts.
WITH_SSH = ("babysit", "setup", "run", "state", "stop", "logs")


# Options that some actions use.
PLACES = {("logs",): ("lines", "node", "worker"), ("babysit",): ("delete",)}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; ``train`` holds the arguments after ``--``."""
    own, train = split_arguments(argv)
    parser = actions_parser("python -m launch.tpu_vm", __doc__, ACTIONS)
    parser.add_argument("--name", required=True, help="name of the queued resource and its nodes")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="default: gcloud's own")
    parser.add_argument(
        "--slice",
        required=True,
        type=slices_option,
        metavar="CHIP:SIDES",
        help="v4, v5e, v5p or v6e, e.g. v5e:16x16, or v5e:16x16*2 for two slices",
    )
    _request_options(parser)
    _login_options(parser)
    repeated_option(
        parser, "--bucket", "mounted on every host (at /mnt/BUCKET)", bucket_option, "BUCKET[=DIR]"
    )
    environment_option(parser)
    parser.add_argument(
        "--poll_seconds",
        type=float,
        default=POLL_SECONDS,
        metavar="S",
        help="seconds between polls (%(default)s)",
    )
    parser.add_argument(
        "--delete",
        action="store_true",
        help="babysit: delete the slice when the run is done or given up",
    )
    parser.add_argument("--node", default="0", help="logs: of which slice (%(default)s)")
    parser.add_argument("--worker", default="0", help="logs: of which host (%(default)s)")
    number_option(parser, "--lines", "logs: number of lines", 100)
    dry_run_option(parser, "print what would run")
    options = parsed(parser, own)
    refuse_elsewhere(parser, options, PLACES)
    if CHIPS[options.slice.chip].runtime is None:
        parser.error(f"--slice: {options.slice.chip} is available on GKE only; see launch.gke")
    needs_run = options.action in ("babysit", "run")
    if needs_run and not train:
        parser.error(f"{options.action} needs the arguments of `encdec train` after `--`")
    options.train = train_arguments(train) if needs_run else []
    return options


def _request_options(parser: argparse.ArgumentParser) -> None:
    """What is requested of Google Cloud."""
    group = parser.add_argument_group("the request")
    capacity = group.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="cheaper, may be preempted")
    capacity.add_argument("--reserved", action="store_true", help="use any reservation")
    capacity.add_argument(
        "--reservation", metavar="NAME", help="use this reservation (by gcloud's alpha command)"
    )
    group.add_argument(
        "--valid_for",
        metavar="DURATION",
        help="how long the request is valid, e.g. 6h (default: unlimited)",
    )
    group.add_argument("--runtime", help="image of the hosts (default: the chip's)")
    group.add_argument("--network", help="default: the project's")
    group.add_argument("--subnetwork", help="default: the network's of the same name")
    group.add_argument(
        "--internal_ips", action="store_true", help="hosts without external addresses"
    )
    group.add_argument("--labels", metavar="KEY=VALUE,...", help="labels of the nodes")
    group.add_argument(
        "--service_account", help="service account of the hosts (default: Compute Engine's)"
    )
    group.add_argument("--alpha", action="store_true", help="request by gcloud's alpha command")
    tool_option(group, "--gcloud", "`queued-resources create`")


def _private_key(text: str) -> pathlib.Path:
    """The file of a key. An address would become a folder called gs:."""
    if not text or "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a file on this machine")
    return pathlib.Path(text)


def _login_options(parser: argparse.ArgumentParser) -> None:
    """How hosts are logged in to."""
    group = parser.add_argument_group("login to the hosts")
    group.add_argument(
        "--tunnel_through_iap", action="store_true", help="through Identity-Aware Proxy"
    )
    group.add_argument(
        "--ssh_key",
        type=_private_key,
        metavar="FILE",
        help=f"private key, made if it is missing (default: {ssh.KEY})",
    )
    tool_option(group, "--gcloud_ssh", "`queued-resources ssh` and `scp`")


if __name__ == "__main__":
    sys.exit(run_main(main))
