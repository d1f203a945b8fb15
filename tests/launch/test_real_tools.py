"""The command lines handed to the tools themselves: gcloud against an API of ours, and xpk.

``make launcher-parsers`` installs xpk into an environment of its own; gcloud is used if present.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from launch import gke, ssh, tpu_vm
from launch.commands import FINAL_CODES, PREEMPTED
from launch.slices import CHIPS, Slices
from tests.launch.golden import AWKWARD
from tests.launch.tpu_api import TpuApi

TRAIN = ["--config=configs/pretrain.py:1b", "--workdir=/mnt/my-bucket/runs/1b"]

GCLOUD = all(shutil.which(name) for name in ("gcloud", "ssh-keygen", "ssh-agent"))
ALPHA = (
    GCLOUD
    and (pathlib.Path(shutil.which("gcloud")).resolve().parents[1] / "lib/surface/alpha").exists()
)
XPK = os.environ.get("ENCDEC_XPK") or shutil.which("xpk") or f"{sys.prefix}-xpk/bin/xpk"

# Each host is a folder; what scp is asked to copy is not copied.
REMOTE = """
import json, os, pathlib, subprocess, sys
root = pathlib.Path(os.environ["FAKE_ROOT"])
name = pathlib.Path(sys.argv[0]).name
with open(root / "calls.jsonl", "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "ssh":
    command = " ".join(sys.argv[sys.argv.index("--") + 1 :])
    sys.exit(subprocess.run(["bash", "-c", command], cwd=root).returncode)
"""


@pytest.fixture
def api(tmp_path, monkeypatch):
    """gcloud, logged in to an API with one slice of two hosts; no key, and an agent without it."""
    (tmp_path / "bin").mkdir()
    for name in ("ssh", "scp"):
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{REMOTE}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "token").write_text("token")
    agent = subprocess.Popen(
        ["ssh-agent", "-D", "-a", f"{tmp_path}/agent"], stdout=subprocess.DEVNULL
    )
    server = TpuApi(hosts=2)
    settings = server.environment | {
        "CLOUDSDK_CONFIG": f"{tmp_path}/config",
        "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": f"{tmp_path}/token",
        "HOME": str(tmp_path),
        "FAKE_ROOT": str(tmp_path),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SSH_AUTH_SOCK": f"{tmp_path}/agent",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    agent.terminate()
    agent.wait()


def at_once(*calls) -> list:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.mark.skipif(not GCLOUD, reason="gcloud or OpenSSH is not installed")
class TestGcloud:
    BASE = ("--name=run1", "--zone=z")

    @pytest.mark.skipif(not ALPHA, reason="gcloud components install alpha")
    def test_the_api_gets_what_was_asked_for(self, api):
        create = lambda *more: lambda: tpu_vm.main(["create", *self.BASE, *more])
        codes = at_once(
            create("--slice=v5p:4x4x4", "--spot", "--service_account=a@p", "--network=n"),
            create(
                "--slice=v5p:4x4x16*2",
                "--reservation=mine",
                "--internal_ips",
                "--subnetwork=s",
                "--labels=team=slm,run=2",
                "--gcloud=--description=a b",
            ),
        )
        assert codes == [0, 0]
        bodies = {path.split("/")[1]: body for path, _, body in api.requests}
        released, alpha = (bodies[version] for version in ("v2", "v2alpha1"))
        spec = released["tpu"]["nodeSpec"][0]
        assert spec["nodeId"] == "run1" and spec["node"]["acceleratorType"] == "v5p-128"
        assert "spot" in released and spec["node"]["networkConfig"]["network"] == "n"
        assert spec["node"]["serviceAccount"]["email"] == "a@p"
        spec = alpha["tpu"]["nodeSpec"][0]
        assert spec["node"]["acceleratorConfig"] == {"type": "V5P", "topology": "4x4x16"}
        assert alpha["reservationName"].endswith("/reservations/mine")
        assert spec["multiNodeParams"]["nodeCount"] == 2
        assert spec["node"]["networkConfig"]["enableExternalIps"] is False
        assert spec["node"]["networkConfig"]["subnetwork"] == "s"
        assert spec["node"]["labels"] == {"team": "slm", "run": "2"}
        assert spec["node"]["description"] == "a b"

    def test_a_first_login_makes_a_key_and_all_arrives(self, api, tmp_path):
        """Through gcloud, ssh and the host's shell; a copy is refused if no agent has the key."""
        (tmp_path / "worker.sh").write_text('printf \'%s\\0\' "$SETTING" "$@" >>got\n')
        options = tpu_vm.parse(
            ["run", *self.BASE, "--slice=v5e:4x4", "--tunnel_through_iap", "--env=SETTING=a 'b'"]
            + ["--", *TRAIN, *AWKWARD]
        )
        pod = tpu_vm.Pod(options)
        with tpu_vm.login(options) as run:
            codes = at_once(
                lambda: run(pod.copy("encdec.tar.gz")).returncode, lambda: run.all(pod.start())
            )
        assert codes == [0, 0]
        key = ssh.KEY.expanduser()
        assert key.is_relative_to(tmp_path) and key.exists()
        got = (tmp_path / "got").read_text().split("\0")[:-1]
        assert got == ["a 'b'", "start", *TRAIN, *AWKWARD, "--distributed"] * 2
        calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
        assert sorted(call[0] for call in calls) == ["scp", "scp", "ssh", "ssh"]
        for call in calls:
            assert str(key) in call and "-oBatchMode=yes" in call
            assert any("start-iap-tunnel" in argument for argument in call)


# Reads command lines with xpk's own parser, and says which machines it takes the types for.
PARSE = """
import argparse, json, sys
from xpk.core.system_characteristics import UserFacingNameToSystemCharacteristics as systems
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser(prog="xpk")
set_parser(parser)
read = [vars(parser.parse_args(line[1:])) for line in json.load(sys.stdin)]
kept = lambda value: isinstance(value, (str, int, list, type(None)))
json.dump({
    "lines": [{name: value for name, value in line.items() if kept(value)} for line in read],
    "types": {name: [s.topology, s.vms_per_slice, s.device_type, s.gke_accelerator]
              for name, s in systems.items() if s.accelerator_type.name == "TPU"},
}, sys.stdout)
"""


@pytest.mark.skipif(
    not os.access(XPK, os.X_OK), reason="xpk is not installed: make launcher-parsers"
)
class TestXpk:
    BASE = ("--name=run1", "--cluster=pods", "--project=p", "--zone=us-west4-a")

    def create(self, shape: str, *more: str, train=TRAIN) -> list[str]:
        arguments = ["xpk", *self.BASE, f"--slice={shape}", "--image=i", *more, "--", *train]
        return gke.xpk_create(gke.parse(arguments))

    def test_its_parser_reads_our_lines(self, tmp_path):
        lines = [
            self.create("tpu7x:2x4x4*2", "--spot", "--env=A=b"),
            *gke.xpk_attach(gke.parse(["xpk-attach", *self.BASE, "--bucket=my_bucket=/data"])),
            gke.xpk_delete(gke.parse(["xpk-delete", *self.BASE])),
        ]
        done = subprocess.run(
            [str(pathlib.Path(XPK).with_name("python")), "-c", PARSE],
            input=json.dumps(lines),
            capture_output=True,
            text=True,
            env=os.environ | {"HOME": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        read = json.loads(done.stdout)
        create, attach, delete = read["lines"]
        assert create["tpu_type"] == "tpu7x-2x4x4" and create["num_slices"] == 2
        assert attach["mount_point"] == "/data" and attach["bucket"] == "my_bucket"
        assert attach["readonly"] is False and attach["auto_mount"] is True
        assert delete["workload"] == "run1"
        compared = 0
        for chip, ours in CHIPS.items():
            for name, (topology, vms, device, label) in read["types"].items():
                if name != f"{ours.type_prefix}-{topology}":
                    continue
                sides = [int(side) for side in topology.split("x")]
                # It also takes what Google does not offer: v4's sides in any order, and slices
                # of v5p above the largest that can be scheduled.
                if sides[-1] % 4 == 0 and (
                    sides != sorted(sides) or math.prod(sides) > ours.largest
                ):
                    with pytest.raises(ValueError, match="does not exist"):
                        Slices.parse(f"{chip}:{topology}")
                    continue
                slices = Slices.parse(f"{chip}:{topology}")
                assert slices.xpk_type == name and slices.accelerator_type == device
                assert slices.nodes == vms and ours.node_label == label
                # Of the shapes of one size xpk marks the one that the type alone stands for.
                if chip != "v4" and 1 < slices.chips <= 6144:
                    assert slices.default_shape == (read["types"][device][0] == topology), name
                compared += 1
        assert compared > 900

    @pytest.fixture(scope="class")
    def pod(self, tmp_path_factory):
        """The manifest that xpk itself makes of our line: failure policy and job."""
        folder = tmp_path_factory.mktemp("xpk")
        line = self.create("tpu7x:2x2x2", "--env=A=x y", train=[*TRAIN, *AWKWARD])
        done = subprocess.run(
            [XPK, *line[1:], "--dry-run", f"--output-manifest-file={folder}/m.yaml"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(folder)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return yaml.safe_load((folder / "m.yaml").read_text())["spec"]

    def test_its_manifest_is_the_slice_of_ours(self, pod):
        options = ["jobset", "--name=run1", "--slice=tpu7x:2x2x2", "--image=i", "--", *TRAIN]
        ours = gke.manifest(gke.parse(options))["spec"]
        theirs, own = (spec["replicatedJobs"][0]["template"]["spec"] for spec in (pod, ours))
        for name in ("parallelism", "completions", "backoffLimit"):
            assert theirs[name] == own[name]
        theirs, own = theirs["template"]["spec"], own["template"]["spec"]
        for name in ("hostNetwork", "dnsPolicy", "restartPolicy"):
            assert theirs[name] == own[name]
        # xpk adds the name of a placement policy that it makes for such slices.
        assert own["nodeSelector"].items() <= theirs["nodeSelector"].items()
        assert own["tolerations"] == theirs["tolerations"]
        assert len(theirs["containers"]) == len(own["containers"]) == 1
        chips = [int(c["resources"]["limits"]["google.com/tpu"]) for c in theirs["containers"]]
        assert chips == [int(own["containers"][0]["resources"]["limits"]["google.com/tpu"])] == [4]
        assert pod["ttlSecondsAfterFinished"] == ours["ttlSecondsAfterFinished"]

    def test_all_codes_but_the_final_ones_restart_it(self, pod):
        assert pod["failurePolicy"]["maxRestarts"] == 10
        job = pod["replicatedJobs"][0]["template"]["spec"]
        (rule,) = (rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"])
        assert rule["operator"] == "NotIn"
        assert set(rule["values"]) == set(range(1, 256)) - set(FINAL_CODES)

    def test_its_script_passes_arguments_and_a_signal_on(self, pod, tmp_path):
        container = pod["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][
            0
        ]
        assert {"name": "A", "value": "x y"} in container["env"]
        assert container["command"][:2] == ["bash", "-c"]
        # As Kubernetes does; only $$( is left of what it would expand.
        script = re.sub(r"\$\$\(", "$(", container["command"][2]).replace("sleep 5", "sleep 0.1")
        (tmp_path / "encdec").write_text(
            f"#!{sys.executable}\n"
            "import json, pathlib, signal, sys, time\n"
            f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({PREEMPTED}))\n"
            f"pathlib.Path({str(tmp_path / 'got')!r}).write_text(json.dumps(sys.argv[1:]))\n"
            "time.sleep(30)\n"
        )
        (tmp_path / "encdec").chmod(0o755)
        process = subprocess.Popen(
            ["bash", "-c", script],
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 30
        while not (tmp_path / "got").exists() or not (tmp_path / "got").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        assert json.loads((tmp_path / "got").read_text()) == [
            "train",
            *TRAIN,
            *AWKWARD,
            "--distributed",
        ]
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == PREEMPTED, said


def test_codes_are_written_as_ranges():
    assert gke.ranges({1, 6, *range(8, 127)}) == "1,6,8-126"
    assert gke.ranges({2}) == "2"
