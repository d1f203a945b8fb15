"""The batch scripts under Slurm's own daemons, on one node that this machine plays."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from launch import slurm

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
MISSING = [name for name in DAEMONS if not shutil.which(name, path=SBIN)]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)}: not installed (apt-get install slurm-wlm munge)"
)

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
PlugStackConfig={root}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/builtin
ReturnToService=2
KillWait=1
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=32 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
"""

# Ends as its --config says; after SIGTERM rank by rank, as processes that save do.
PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["SLURM_PROCID"])
def save(*_):
    time.sleep(0.1 * rank)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("has", os.environ.get("SLURM_CPUS_PER_TASK"), "processors", flush=True)
if "--config=nan" in sys.argv and rank == 1:
    sys.exit(5)
if "--config=crash" in sys.argv:
    sys.exit(1)
time.sleep(60)
"""


@contextlib.contextmanager
def daemon(root: pathlib.Path, environment: dict[str, str], *command: str):
    with open(root / f"{command[0]}.out", "w") as output:
        process = subprocess.Popen(
            [shutil.which(command[0], path=SBIN), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(true, what, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A cluster of one node; its folder. The environment names it while the tests run."""
    root = tmp_path_factory.mktemp("slurm")
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(2)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        ports = [listener.getsockname()[1] for listener in listeners]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    (root / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0], ports=ports, root=root, user=user
        )
    )
    for name in ("cgroup.conf", "plugstack.conf"):
        (root / name).touch()
    (root / "state").mkdir()
    (root / "spool").mkdir()
    (root / "key").write_bytes(os.urandom(1024))
    (root / "key").chmod(0o400)
    settings = {"SLURM_CONF": str(root / "slurm.conf")}
    environment = os.environ | settings
    munge = [f"--{name}={root}/munge.{name}" for name in ("log-file", "pid-file", "seed-file")]
    munge += [f"--socket={root}/munge.sock", f"--key-file={root}/key", "--force", "--foreground"]
    state = lambda: subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, env=environment
    ).stdout.strip()
    with contextlib.ExitStack() as stack:
        stack.enter_context(daemon(root, environment, "munged", *munge))
        wait_for((root / "munge.sock").exists, (root / "munged.out").read_text)
        stack.enter_context(daemon(root, environment, "slurmctld", "-D"))
        stack.enter_context(daemon(root, environment, "slurmd", "-D"))
        try:
            wait_for(lambda: state() == "idle", state)
        except AssertionError:
            logs = "\n".join(file.read_text()[-500:] for file in sorted(root.glob("*.log")))
            pytest.skip(f"Slurm's daemons do not come up here: {logs}")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            yield root


def fields(job: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def test_ends_of_jobs(node, capfd):
    """A signal, a NaN in one of the processes, and crashes, in three jobs at the same time."""
    (node / "program.py").write_text(PROGRAM)

    def submit(name: str, *more: str) -> str:
        base = ["train", f"--name={name}", "--gpus_per_node=0", "--tasks_per_node=4", "--time=5"]
        base += ["--memory=100M", "--grace_seconds=1", "--max_restarts=1", f"--logs={node}"]
        program = f"--encdec={sys.executable} {node}/program.py"
        train = ["--", f"--config={name}", "--workdir=/shared/a"]
        assert slurm.main([*base, program, *more, *train]) == 0
        return capfd.readouterr().out.split()[-1]

    def log(name: str) -> str:
        return "".join(file.read_text() for file in node.glob(f"{name}-*.log"))

    planned, nan, crash = submit("planned", "--cpus_per_task=2"), submit("nan"), submit("crash")
    wait_for(lambda: log("planned").count("has 2 processors") == 4, lambda: log("planned"))
    # As Slurm does before the time limit.
    subprocess.run(["scancel", "--signal=TERM", planned], check=True)
    restarts = lambda job: fields(job)["Restarts"]

    wait_for(lambda: restarts(planned) == "1", lambda: log("planned"))
    said = log("planned")
    assert said.count("saved\n") == 4, said  # and none was killed before it had
    assert "everything is saved; requeued" in said and "exit code" not in said

    wait_for(lambda: fields(nan)["JobState"] == "FAILED", lambda: log("nan"))
    assert fields(nan)["ExitCode"] == "5:0" and restarts(nan) == "0"
    assert "exit code 5: it would fail again" in log("nan")

    wait_for(lambda: restarts(crash) == "1", lambda: log("crash"))
    # It is requeued for two minutes later.
    wait_for(lambda: fields(crash)["JobState"] == "PENDING", lambda: log("crash"))
    subprocess.run(["scontrol", "update", f"JobId={crash}", "StartTime=now"], check=True)
    wait_for(lambda: fields(crash)["JobState"] == "FAILED", lambda: log("crash"))
    assert fields(crash)["ExitCode"] == "1:0" and restarts(crash) == "1"
