"""Queued resources: command lines, what arrives on the hosts, and the babysitter's decisions."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time

import pytest

from launch import ssh, tpu_vm
from launch.babysit import UNAVAILABLE, Action, PollState, RestartLimits, Seen, decide, summary
from launch.commands import Runner
from launch.slices import Slices
from tests.launch.golden import AWKWARD, check_golden

BASE = ["--name=run1", "--project=my-project", "--zone=us-west4-a", "--slice=v5e:4x4"]
TRAIN = [
    "--config=configs/pretrain.py:330m",
    "--workdir=/mnt/my-bucket/runs/330m",
    "--config.steps=3",
    "--config.data.records=/mnt/my-bucket/a=3,/mnt/my-bucket/b=1",
]


@pytest.mark.parametrize(
    "name, arguments",
    [
        (
            "babysit",
            [
                "babysit",
                *BASE,
                "--spot",
                "--bucket=my-bucket",
                "--env=JAX_COMPILATION_CACHE_DIR=/mnt/my-bucket/cache",
            ],
        ),
        (
            "babysit-two-slices",
            [
                "babysit",
                "--name=run2",
                "--zone=us-east5-a",
                "--slice=v5p:4x4x16*2",
                "--reservation=mine",
                "--internal_ips",
                "--tunnel_through_iap",
                "--subnetwork=pods",
                "--labels=team=slm,run=2",
                "--ssh_key=/keys/tpu",
                "--gcloud=--tags=training",
                "--bucket=gs://data=/data",
                "--bucket=runs",
            ],
        ),
    ],
)
def test_dry_runs_are_golden(name, arguments, capsys):
    assert tpu_vm.main([*arguments, "--dry_run", "--", *TRAIN]) == 0
    check_golden(f"tpu_vm-{name}.txt", capsys.readouterr().out)


def test_single_steps_are_the_same_commands(capsys):
    tpu_vm.main(["babysit", *BASE, "--bucket=my-bucket", "--dry_run", "--", *TRAIN])
    together = capsys.readouterr().out
    for action in ("create", "setup", "run", "state", "delete"):
        train = ["--", *TRAIN] if action == "run" else []
        assert tpu_vm.main([action, *BASE, "--bucket=my-bucket", "--dry_run", *train]) == 0
        # The babysitter's question names the run, too.
        assert capsys.readouterr().out.removesuffix("'\n") in together, action


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["create", "--name=a", "--zone=z", "--slice=v5e:4"], "v5e slices are 1x1"),
        (["create", "--name=a", "--zone=z", "--slice=v9:4x4"], "is not a slice"),
        (["create", "--name=", "--zone=z", "--slice=v5e:4x4"], "--name is empty"),
        (["logs", "--name=a", "--zone=z", "--slice=v5e:4x4", "--lines=-3"], "--lines is -3"),
        (["create", "--name=a", "--zone=z", "--slice=v5e:4x4", "--delete"], "is for babysit"),
        (["create", "--name=a", "--zone=z", "--slice=tpu7x:2x2x1"], "GKE only"),
        (["create", *BASE, "--reserved", "--reservation=mine"], "not allowed with"),
        (["create", *BASE, "--gcloud=tags=x"], "expected --OPTION"),
        (["create", *BASE, "--bucket=MY-BUCKET"], "lower-case letters"),
        (["create", *BASE, "--bucket=b"], "3 or more"),
        (["create", *BASE, "--bucket=my-bucket=mnt"], "mounts the bucket at 'mnt'"),
        (["run", *BASE], "arguments of `encdec train`"),
        (["run", *BASE, "--", "--config=c.py"], "--workdir is missing"),
        (["run", *BASE, "--", "--workdir=runs/a"], "every machine shares"),
        (["run", *BASE, "--", "--workdir=s3://b/a"], "expected --workdir=/DIR"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        tpu_vm.main([*arguments, "--dry_run"] if "--" not in arguments else arguments)
    assert words in capsys.readouterr().err + str(error.value)


def test_slices_in_the_words_of_the_api():
    assert Slices.parse("v5e:16x16").accelerator_type == "v5litepod-256"
    assert Slices.parse("v5p:4x4x4").accelerator_type == "v5p-128"  # TensorCores, two a chip
    assert Slices.parse("v6e:4x4*2") == Slices("v6e", (4, 4), 2)
    shapes = ("v5e:2x2", "v5e:4x4", "v4:2x2x2", "v5p:2x2x2", "v5e:2x4", "v6e:2x4", "v6e:4x4")
    # With a shape, as xpk takes it; and whether the accelerator type alone would mean that shape.
    assert Slices.parse("v5p:4x4x12").xpk_type == "v5p-4x4x12"
    assert Slices.parse("tpu7x:2x4x4").xpk_type == "tpu7x-2x4x4"
    assert Slices.parse("tpu7x:2x4x4").accelerator_type == "tpu7x-64"  # 32 chips of two cores
    default = ("v5p:2x2x1", "v5p:2x4x4", "v5p:4x8x8", "v5p:4x8x12", "v5p:16x16x24", "v6e:8x16")
    other = ("v5p:4x4x16", "v5p:4x4x24", "v4:4x4x16", "tpu7x:16x24x24")
    assert [Slices.parse(s).default_shape for s in (*default, *other)] == [True] * 6 + [False] * 4
    assert [Slices.parse(s).nodes for s in shapes] == [1, 4, 2, 2, 2, 2, 4]
    # Eight chips of these two kinds are one machine outside GKE.
    assert [Slices.parse(s).vms for s in shapes] == [1, 4, 2, 2, 1, 1, 4]


@pytest.mark.parametrize(
    "shape, said",
    [
        *((f"v5e:{sides}", "v5e slices are 1x1, 2x2, 2x4") for sides in ("5x5", "2x8", "16x32")),
        *((f"v6e:{sides}", "v6e slices are 1x1, 2x2, 2x4") for sides in ("16x8", "4", "0x4")),
        *((f"v5p:{sides}", "up to 6,144 chips") for sides in ("2x4x8", "8x4x4", "4x4x6", "4x4")),
        ("v5p:16x16x28", "up to 6,144 chips"),
        ("v5p:1x1x1", "v5p slices are 2x2x1, 2x2x2, 2x2x4, 2x4x4, or ascending"),
        ("v4:12x16x24", "up to 4,096 chips"),
        ("tpu7x:16x24x28", "2x4x4, 1x1x1, or ascending multiples of 4 with up to 9,216 chips"),
        ("v5e:4x4*0", "has no slice"),
    ],
)
def test_slices_that_do_not_exist_are_refused(shape, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Slices.parse(shape)


@pytest.mark.parametrize(
    "shape, wanted, command",
    [
        ("v4:2x2x4", ["--type=v4", "--topology=2x2x4"], []),
        ("v5p:4x4x4", ["--accelerator-type=v5p-128"], []),
        ("v5p:4x4x12", ["--accelerator-type=v5p-384"], []),
        ("v5p:4x4x16", ["--type=v5p", "--topology=4x4x16"], ["alpha"]),
        ("v6e:16x16", ["--accelerator-type=v6e-256"], []),
    ],
)
def test_the_shape_that_is_asked_for_is_requested(shape, wanted, command):
    """By gcloud's released command where that can say it: its --type knows v4 only."""
    options = tpu_vm.parse(["create", "--name=a", "--zone=z", f"--slice={shape}", "--spot"])
    line = tpu_vm.Pod(options).create()
    assert line[: 1 + len(command)] == ["gcloud", *command]
    shaped = [a for a in line if a.startswith(("--type", "--topology", "--accelerator-type"))]
    assert shaped == wanted
    assert ("--provisioning-model=spot" in line) == (command == ["alpha"])


def test_ways_to_the_hosts():
    def route(*more):
        line = tpu_vm.Pod(tpu_vm.parse(["state", *BASE, *more])).on_workers("state")
        known = ("--internal-ip", "--tunnel-through-iap", "--ssh-key-file", "--plain")
        return [argument for argument in line if argument.startswith(known)]

    assert route() == []
    assert route("--internal_ips") == ["--internal-ip"]  # from a machine in their network
    assert route("--internal_ips", "--tunnel_through_iap") == ["--tunnel-through-iap"]
    assert route("--ssh_key=/k", "--gcloud_ssh=--plain") == ["--ssh-key-file=/k", "--plain"]


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "launch.tpu_vm", "babysit", *BASE, "--dry_run", "--", *TRAIN]
    # The pipe is closed before anything is written.
    line = f"set -o pipefail; {shlex.join(command)} | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode in (0, 141) and done.stderr == ""


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
class TestKey:
    """The key of a first connection."""

    def test_it_is_made_once_and_held_by_an_agent(self, tmp_path):
        key = tmp_path / ".ssh" / "key"
        ssh.make_key(key)
        made = key.read_bytes(), key.with_name("key.pub").read_text()
        assert made[1].startswith("ssh-rsa ") and key.stat().st_mode & 0o77 == 0
        key.with_name("key.pub").unlink()
        ssh.make_key(key)
        assert (key.read_bytes(), key.with_name("key.pub").read_text()) == made
        with ssh.agent(key) as environment:
            socket = pathlib.Path(environment["SSH_AUTH_SOCK"])
            held = subprocess.run(
                ["ssh-add", "-L"], capture_output=True, text=True, env=os.environ | environment
            )
            assert held.stdout.split()[:2] == made[1].split()[:2]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SSH_AUTH_SOCK", str(socket))
                with ssh.agent(key) as same:
                    assert same == {}  # the user's own agent holds it
        assert not socket.exists()

    def test_a_passphrase_that_nobody_can_type_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        key = tmp_path / "key"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(key)], check=True
        )
        with pytest.raises(SystemExit, match="passphrase"), ssh.agent(key):
            pass
        key.with_name("key.pub").unlink()
        with pytest.raises(SystemExit, match="has no key.pub"):
            ssh.make_key(key)


# Decisions.

ACTIVE = lambda *workers: Seen("ACTIVE", workers)
READY = PollState(ready=True)


def test_from_nothing_to_training():
    seen = [
        Seen(None),
        Seen("WAITING_FOR_RESOURCES"),
        Seen("PROVISIONING"),
        ACTIVE("absent", "absent"),
        ACTIVE("running", "running"),
        ACTIVE("exited 0", "exited 0"),
    ]
    memory, actions = PollState(), []
    for look in seen:
        decision = decide(look, memory)
        memory = decision.memory
        actions.append(decision.action)
    assert actions == [
        Action.CREATE,
        Action.WAIT,
        Action.WAIT,
        Action.SET_UP,
        Action.WAIT,
        Action.FINISH,
    ]
    assert decision.code == 0


def test_a_preempted_slice_is_deleted_requested_anew_and_set_up_again():
    decision = decide(Seen("SUSPENDED"), READY)
    assert decision.action is Action.DELETE
    decision = decide(Seen(None), decision.memory)
    assert decision.action is Action.CREATE
    assert decide(ACTIVE("absent"), decision.memory).action is Action.SET_UP


@pytest.mark.parametrize(
    "code, action",
    [
        (0, Action.FINISH),
        (2, Action.FINISH),
        (3, Action.FINISH),
        (4, Action.FINISH),
        (5, Action.FINISH),
        (7, Action.FINISH),
        (75, Action.START),
        (1, Action.START),
        (134, Action.START),
        (137, Action.START),
        (143, Action.START),
    ],
)
def test_exit_codes(code, action):
    decision = decide(ACTIVE(*[f"exited {code}"] * 4), READY)
    assert decision.action is action
    if action is Action.FINISH:
        assert decision.code == code
    assert decision.memory.crashes == (code not in (0, 2, 3, 4, 5, 7, 75))


def test_the_code_that_explains_the_others():
    assert summary([137, 3, 134, 75]) == 3
    assert summary([75, 137, 75]) == 75
    assert summary([0, 0]) == 0 and summary([0, 1]) == 1


def test_preemptions_are_resumed_for_ever_and_crashes_a_few_times():
    memory = READY
    for _ in range(100):
        decision = decide(ACTIVE("exited 75"), memory)
        assert decision.action is Action.START
        memory = decision.memory
    limits = RestartLimits(crashes=3, settled=2)
    for _ in range(3):
        decision = decide(ACTIVE("exited 134"), memory, limits)
        assert decision.action is Action.START
        memory = decision.memory
    assert decide(ACTIVE("exited 134"), memory, limits).action is Action.FINISH
    # Unless it ran for long in between.
    for _ in range(2):
        memory = decide(ACTIVE("running"), memory, limits).memory
    assert decide(ACTIVE("exited 134"), memory, limits).action is Action.START


def test_hosts_that_lag_behind_are_waited_for_and_then_stopped():
    limits, memory = RestartLimits(strange=2), READY
    actions = []
    for _ in range(3):
        decision = decide(ACTIVE("exited 137", "running"), memory, limits)
        memory = decision.memory
        actions.append(decision.action)
    assert actions == [Action.WAIT, Action.WAIT, Action.STOP]
    assert decide(ACTIVE("exited 137", "exited 143"), memory, limits).action is Action.START


def test_a_slice_that_cannot_be_reached_is_replaced():
    memory = READY
    for _ in range(RestartLimits().strange):
        decision = decide(Seen("ACTIVE", None), memory)
        assert decision.action is Action.WAIT
        memory = decision.memory
    decision = decide(Seen("ACTIVE", None), memory)
    assert decision.action is Action.DELETE and not decision.memory.ready


def unreachable_until_acted(memory: PollState):
    while True:
        decision = decide(Seen("ACTIVE", None), memory)
        if decision.action is not Action.WAIT:
            return decision
        memory = decision.memory


def test_slices_are_not_replaced_for_ever_where_the_fault_is_in_the_login():
    memory = READY
    for _ in range(RestartLimits().replaced):
        decision = unreachable_until_acted(memory)
        assert decision.action is Action.DELETE
        memory = decide(Seen(None), decision.memory).memory
        memory = decide(Seen("PROVISIONING"), memory).memory
    decision = unreachable_until_acted(memory)
    assert decision.action is Action.FINISH and decision.code == UNAVAILABLE
    # Unless one answered in between.
    memory = decide(ACTIVE("absent"), memory).memory
    assert unreachable_until_acted(memory).action is Action.DELETE


def test_requests_that_keep_failing_are_given_up():
    memory = PollState()
    for _ in range(RestartLimits().refusals):
        decision = decide(Seen("FAILED"), memory)
        assert decision.action is Action.DELETE
        memory = decide(Seen(None), decision.memory).memory
    decision = decide(Seen("FAILED"), memory)
    assert decision.action is Action.FINISH and decision.code == UNAVAILABLE


def test_every_state_has_an_action_and_running_hosts_are_never_started_again():
    workers = ["absent", "running", "exited 0", "exited 2", "exited 75", "exited 137"]
    for pair in itertools.product(workers, repeat=2):
        for memory in (PollState(), READY, PollState(ready=True, crashes=5, strange=5)):
            decision = decide(ACTIVE(*pair), memory)
            if "running" in pair:
                assert decision.action in (Action.WAIT, Action.STOP)


# The whole, with a gcloud that keeps a slice in a folder and a bash that plays its hosts.

GCLOUD = """
import json, os, pathlib, subprocess, sys
root = pathlib.Path(os.environ["FAKE_ROOT"])
with open(root / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
state = root / "state"
states = lambda: state.read_text().split()
hosts = int(os.environ["FAKE_HOSTS"])
verb = sys.argv[4]
assert sys.argv[1:4] == ["compute", "tpus", "queued-resources"], sys.argv
if verb == "create":
    assert not state.exists()
    state.write_text("WAITING_FOR_RESOURCES PROVISIONING " + os.environ["FAKE_NEXT"])
    for host in range(hosts):
        (root / f"host{host}").mkdir(exist_ok=True)
elif verb == "describe":
    if not state.exists():
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource")
    now, *later = states()
    print(now)
    if later:
        state.write_text(" ".join(later))
elif verb == "delete":
    assert "--force" in sys.argv and "--quiet" in sys.argv
    state.unlink()
    for host in range(hosts):
        subprocess.run(["rm", "-rf", str(root / f"host{host}")])
elif states()[0] != "ACTIVE":
    sys.exit("ERROR: not reachable")
elif verb == "scp":
    for host in range(hosts):
        subprocess.run(["cp", *sys.argv[5:7], str(root / f"host{host}")], check=True)
else:
    assert verb == "ssh"
    command = next(a for a in sys.argv if a.startswith("--command="))[len("--command="):]
    codes = []
    for host in range(hosts):
        home = root / f"host{host}"
        run = subprocess.run(["bash", "-c", command], cwd=home, env=os.environ | {
            "HOME": str(home), "FAKE_HOST": str(host)})
        codes.append(run.returncode)
    sys.exit(max(codes))
"""

UV = """
import os, pathlib, sys
if sys.argv[1] == "venv":
    pathlib.Path(sys.argv[-1], "bin").mkdir(parents=True)
else:
    encdec = pathlib.Path(sys.argv[sys.argv.index("--python") + 1]).with_name("encdec")
    encdec.write_text("#!" + sys.executable + "\\n" + os.environ["FAKE_ENCDEC"])
    encdec.chmod(0o755)
"""

# Says what it got and ends as the number of times it was started by all says.
ENCDEC = """
import json, os, pathlib, sys
root = pathlib.Path(os.environ["FAKE_ROOT"])
mine = root / f"started{os.environ['FAKE_HOST']}.jsonl"
with open(mine, "a") as file:
    file.write(json.dumps([os.getcwd(), os.environ.get("SETTING"), *sys.argv[1:]]) + "\\n")
codes = json.loads(os.environ["FAKE_CODES"])
sys.exit(codes[len(mine.read_text().splitlines()) - 1])
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A machine with a fake gcloud, uv and gcsfuse first on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    mounts = "import os, sys; print('mounted', *sys.argv[1:], file=sys.stderr)"
    for name, text in {
        "gcloud": GCLOUD,
        "uv": UV,
        "gcsfuse": mounts,
        "sudo": "import subprocess, sys; sys.exit(0)",
        "mountpoint": "import sys; sys.exit(1)",
    }.items():
        path = programs / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_ROOT", str(tmp_path))
    monkeypatch.setenv("FAKE_ENCDEC", ENCDEC)
    monkeypatch.setenv("FAKE_NEXT", "ACTIVE")
    monkeypatch.setenv("FAKE_HOSTS", "4")
    monkeypatch.setattr(ssh, "make_key", lambda key: None)
    monkeypatch.setattr(ssh, "agent", lambda key: contextlib.nullcontext({}))
    # The sources are whatever was committed last; a small file stands for them.
    (tmp_path / "constraints.txt").write_text("")
    monkeypatch.setattr(
        tpu_vm,
        "archive",
        lambda tarball: ["tar", "-czf", tarball, "-C", str(tmp_path), "constraints.txt"],
    )
    return tmp_path


def run_babysitter(*more: str, train=TRAIN) -> int:
    return tpu_vm.main(["babysit", *BASE, *more, "--poll_seconds=0.05", "--", *train])


def starts(root: pathlib.Path, host: int) -> list[list[str]]:
    return [json.loads(line) for line in (root / f"started{host}.jsonl").read_text().splitlines()]


def test_a_run_is_seen_through_crash_and_preemption(cloud, monkeypatch, capfd):
    """The slice is created, training crashes, is preempted with its slice, and finishes."""
    monkeypatch.setenv("FAKE_CODES", "[134, 75, 0]")
    # After the crash and the preemption of training, the slice itself goes.
    once = cloud / "once"

    def act(pod, run, decision, real=tpu_vm.act):
        code = real(pod, run, decision)
        if decision.action is Action.START and not once.exists():
            once.touch()
            _until(lambda: all(len(starts(cloud, host)) == 2 for host in range(4)))
            time.sleep(0.3)
            (cloud / "state").write_text("SUSPENDING SUSPENDED")
        return code

    monkeypatch.setattr(tpu_vm, "act", act)
    assert (
        run_babysitter(
            "--bucket=my-bucket", "--env=SETTING=a b", "--delete", train=[*TRAIN, *AWKWARD]
        )
        == 0
    )
    said = capfd.readouterr()
    for words in (
        "the slice does not exist: request",
        "training crashed with exit code 134: start",
        "the slice is SUSPENDING: wait",
        "it was preempted: delete",
        "training is done: finish",
    ):
        assert words in said.out, said.out
    assert "mounted --implicit-dirs my-bucket /mnt/my-bucket" in said.err
    calls = verbs(cloud)
    assert calls.count("create") == calls.count("delete") == calls.count("scp") == 2
    for host in range(4):
        for where, setting, *arguments in starts(cloud, host):
            assert where == str(cloud / f"host{host}" / "encdec-run" / "source")
            assert setting == "a b"
            # Through argparse, gcloud, ssh's shell, worker.sh and its background process.
            assert arguments == ["train", *TRAIN, *AWKWARD, "--distributed"]


def test_a_nan_stops_it_at_once(cloud, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_CODES", "[5]")
    assert run_babysitter() == 5
    assert "NaN or infinity" in capfd.readouterr().out
    assert len(starts(cloud, 0)) == 1
    calls = verbs(cloud)
    assert "delete" not in calls  # the slice stays for a look at it


def test_a_second_babysitter_takes_over_what_runs(cloud, monkeypatch):
    monkeypatch.setenv("FAKE_CODES", "[0, 1]")
    pod = tpu_vm.Pod(tpu_vm.parse(["run", *BASE, "--", *TRAIN]))
    run = Runner()
    run(pod.create())
    (cloud / "state").write_text("ACTIVE")
    assert tpu_vm.set_up(pod, run) == 0
    assert run.all(pod.start()) == 0
    _until(lambda: all((cloud / f"host{h}" / "encdec-run" / "exit").exists() for h in range(4)))
    assert run_babysitter() == 0
    assert len(starts(cloud, 0)) == 1


def test_another_run_is_started_where_one_has_ended(cloud, monkeypatch):
    monkeypatch.setenv("FAKE_CODES", "[0, 0]")
    monkeypatch.setenv("FAKE_HOSTS", "1")
    another = [*TRAIN, "--config.steps=9 9"]
    for train in (TRAIN, TRAIN, another, another):
        assert run_babysitter("--slice=v5e:2x4", train=train) == 0
    assert [line[3:] for line in starts(cloud, 0)] == [
        [*train, "--distributed"] for train in (TRAIN, another)
    ]


@pytest.mark.parametrize("shape, hosts", [("v6e:2x4", 1), ("v5e:2x4", 1), ("v4:2x2x2", 2)])
def test_a_healthy_slice_is_left_alone(cloud, monkeypatch, capfd, shape, hosts):
    monkeypatch.setenv("FAKE_HOSTS", str(hosts))
    monkeypatch.setenv("FAKE_CODES", "[0]")
    assert (
        tpu_vm.main(
            [
                "babysit",
                "--name=a",
                "--zone=z",
                f"--slice={shape}",
                "--poll_seconds=0.01",
                "--",
                *TRAIN,
            ]
        )
        == 0
    )
    assert verbs(cloud).count("create") == 1 and "delete" not in verbs(cloud)
    assert "cannot be reached" not in capfd.readouterr().out


# Runs where its bucket is mounted and ends with the machine, whose mounts do not come back.
REBOOTED = """
import os, pathlib, sys
root, host = pathlib.Path(os.environ["FAKE_ROOT"]), os.environ["FAKE_HOST"]
mounted, before = root / f"mounted{host}", root / f"rebooted{host}"
if not mounted.exists():
    sys.exit(3)
if before.exists():
    sys.exit(0)
before.touch()
mounted.unlink()
sys.exit(137)
"""


def test_a_host_that_rebooted_in_place_gets_its_mounts_back(cloud, monkeypatch):
    mounted = "pathlib.Path(os.environ['FAKE_ROOT'], 'mounted' + os.environ['FAKE_HOST'])"
    for name, text in {
        "gcsfuse": f"{mounted}.touch()",
        "mountpoint": f"sys.exit(not {mounted}.exists())",
    }.items():
        (cloud / "bin" / name).write_text(f"#!{sys.executable}\nimport os, pathlib, sys\n{text}\n")
    monkeypatch.setenv("FAKE_ENCDEC", REBOOTED)
    monkeypatch.setenv("FAKE_HOSTS", "1")
    assert run_babysitter("--bucket=my-bucket", "--slice=v5e:2x4") == 0
    assert verbs(cloud).count("scp") == 1


def test_requests_that_are_refused_are_given_up(cloud, capfd):
    """A quota, a permission or an option that gcloud does not take."""
    gcloud = cloud / "bin" / "gcloud"
    refused = gcloud.read_text().replace("assert not state.exists()", "sys.exit('no quota')")
    gcloud.write_text(refused)
    assert run_babysitter() == UNAVAILABLE
    assert verbs(cloud).count("create") == 6
    assert "6 requests in a row were refused" in capfd.readouterr().out


def test_what_is_not_committed_is_named(cloud, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tpu_vm, "ROOT", tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    pod = tpu_vm.Pod(tpu_vm.parse(["run", *BASE, "--", *TRAIN]))
    Runner()(pod.create())
    (cloud / "state").write_text("ACTIVE")
    assert tpu_vm.set_up(pod, Runner()) == 0
    assert "not copied to the hosts:\n?? " in capfd.readouterr().out


def test_starts_that_fail_are_given_up(cloud, monkeypatch, capfd):
    """A bucket that cannot be mounted: training was preempted and never gets under way again.

    Each time hosts are set up again: gcloud says that it copied where it could reach none.
    """
    (cloud / "bin" / "gcsfuse").write_text("#!/bin/sh\ntest ! -e $FAKE_ROOT/started0.jsonl\n")
    monkeypatch.setenv("FAKE_CODES", "[75]")
    monkeypatch.setenv("FAKE_HOSTS", "1")
    assert run_babysitter("--bucket=my-bucket", "--slice=v5e:2x4") == 1
    assert "could not set up 6 times in a row" in capfd.readouterr().out
    assert len(starts(cloud, 0)) == 1


def verbs(root: pathlib.Path) -> list[str]:
    """What gcloud was asked to do, in order."""
    return [json.loads(line)[3] for line in (root / "calls.jsonl").read_text().splitlines()]


def _until(true) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if true():
                return
        except FileNotFoundError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)


# One host.


def worker(home: pathlib.Path, *arguments: str, **environment: str):
    return subprocess.run(
        ["bash", str(tpu_vm.WORKER), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"ENCDEC_HOME": str(home)} | environment,
    )


def test_a_host_saves_on_stop_and_gives_the_code(tmp_path):
    program = tmp_path / "venv" / "bin" / "encdec"
    program.parent.mkdir(parents=True)
    (tmp_path / "source").mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.3); print('saved', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    assert worker(tmp_path, "state").stdout == "encdec-state: absent\n"
    assert worker(tmp_path, "start").returncode == 0
    _until(lambda: "ready" in (tmp_path / "log").read_text())
    assert worker(tmp_path, "state").stdout == "encdec-state: running\n"
    first = (tmp_path / "pid").read_text()
    again = worker(tmp_path, "start")  # a second start changes nothing ...
    assert (again.returncode, again.stderr) == (0, "")
    other = worker(tmp_path, "start", "--config=other")  # ... and says so where it would
    assert other.returncode == 0 and "`stop` it to start another" in other.stderr
    assert (tmp_path / "pid").read_text() == first
    # As at the machine's end: the signal comes to the wrapper as well.
    wrapper = subprocess.run(
        ["ps", "-o", "ppid=", "-p", first.strip()], capture_output=True, text=True
    ).stdout.strip()
    subprocess.run(["kill", "-TERM", wrapper], check=True)
    assert worker(tmp_path, "stop").returncode == 0
    _until(lambda: (tmp_path / "exit").exists())
    assert worker(tmp_path, "state").stdout == "encdec-state: exited 75\n"
    assert worker(tmp_path, "log", "1").stdout == "saved\n"


def test_a_host_that_was_killed_says_so(tmp_path):
    (tmp_path / "pid").write_text("99999999\n")
    assert worker(tmp_path, "state").stdout == "encdec-state: exited 137\n"


def test_another_process_of_the_same_number_after_a_reboot_is_not_ours(tmp_path):
    (tmp_path / "pid").write_text(f"{os.getpid()}\n")
    (tmp_path / "boot").write_text(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text())
    assert worker(tmp_path, "state").stdout == "encdec-state: running\n"
    (tmp_path / "boot").write_text("another\n")
    assert worker(tmp_path, "state").stdout == "encdec-state: exited 137\n"
    assert worker(tmp_path, "stop").returncode == 0  # and this test lives


def test_what_is_typed_for_the_hosts_is_what_they_read():
    options = tpu_vm.parse(["run", *BASE, "--env=X=$(id) 'y'", "--", *TRAIN, *AWKWARD])
    command = tpu_vm.Pod(options).start()[-1][-1].removeprefix("--command=")
    read = subprocess.run(
        ["bash", "-c", "env() { printf '%s\\0' \"$@\"; }; " + command],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")[:-1]
    assert read == ["X=$(id) 'y'", "bash", "worker.sh", "start", *TRAIN, *AWKWARD, "--distributed"]
    assert shlex.split(command)[1:] == read
