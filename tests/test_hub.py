"""The Hub: a model is pushed to a server over HTTP, fetched by name into its cache, imported."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse

import pytest

from encdec import cli, hub
from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import ConfigError
from encdec.export.model_card import check_license
from encdec.interop.framing import Framing
from encdec.interop.importing import write_model
from encdec.model import unroll_params
from tests.export.examples import pair

pytest.importorskip("huggingface_hub")
ROOT = pathlib.Path(__file__).resolve().parents[1]
TOKEN = "hf_of_a_test"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's protocol as one repository of small files needs."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    created: list[dict] = []  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012
    data: dict[str, bytes] = {}  # noqa: RUF012  # of the data set org/rows

    def log_message(self, *_):
        pass

    @property
    def sha(self) -> str:
        return hashlib.sha1(
            b"".join(name.encode() + self.files[name] for name in self.files)
        ).hexdigest()

    def answer(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def entry(self, name):
        oid = hashlib.sha1(self.files[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": oid}

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.asked.append(path)
        if path.startswith(("/api/datasets/org/rows", "/datasets/org/rows/resolve/main/")):
            self.answer_data(path)
        elif not path.startswith(("/api/models/org/tiny", "/org/tiny/resolve/")):
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif path.startswith("/org/tiny/resolve/"):
            name = path.split("/", 5)[5]
            if name in self.files:
                oid = self.entry(name)["oid"]
                self.answer(self.files[name], ETag=f'"{oid}"', X_Repo_Commit=self.sha)
            else:
                self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        elif "/tree/" in path:
            self.answer([self.entry(name) for name in self.files])
        else:
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": "org/tiny", "sha": self.sha, "siblings": siblings, "tags": []})

    def answer_data(self, path):
        """The data set org/rows: what it is, its folders, its files."""
        sha = "5" * 40
        below = path.partition("/resolve/main/")[2] or path.partition("/tree/main")[2].strip("/")
        if "/resolve/" in path and below in self.data:
            content = self.data[below]
            tag = hashlib.sha1(content).hexdigest()
            self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=sha)
        elif "/tree/" in path:
            found = [name for name in self.data if not below or name.startswith(below + "/")]
            rests = {name: name[len(below) :].strip("/").split("/") for name in found}
            folders = {f"{below}/{rest[0]}".strip("/") for rest in rests.values() if rest[1:]}
            entries = [
                {"type": "file", "path": n, "size": len(self.data[n]), "oid": "0" * 40}
                for n in found
                if len(rests[n]) == 1 or "recursive=true" in self.path.lower()
            ]
            entries += [{"type": "directory", "path": n, "oid": "0" * 40} for n in folders]
            missing = {"status": 404, "X_Error_Code": "EntryNotFound"}
            if found:
                self.answer(entries)
            else:
                self.answer({"error": "Entry not found"}, **missing)
        elif path in ("/api/datasets/org/rows", "/api/datasets/org/rows/revision/main"):
            self.answer({"id": "org/rows", "sha": sha, "siblings": [], "tags": []})
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(self.path)
        if "/paths-info/" in self.path:
            asked = json.loads(body) if body[:1] == b"{" else urllib.parse.parse_qs(body.decode())
            paths = asked["paths"] if isinstance(asked["paths"], list) else [asked["paths"]]
            entries = []
            for name in paths:
                if name in self.data:
                    size = len(self.data[name])
                    entries.append({"type": "file", "path": name, "size": size, "oid": "0" * 40})
                elif any(file.startswith(name + "/") for file in self.data):
                    entries.append({"type": "directory", "path": name, "oid": "0" * 40})
            self.answer(entries)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer(
                {
                    "url": f"http://{self.headers['Host']}/org/tiny",
                    "id": "org/tiny",
                    "name": "org/tiny",
                }
            )
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer(
                {
                    "files": [
                        {"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names
                    ]
                }
            )
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
                if line["key"] == "file":
                    value = line["value"]
                    assert value["encoding"] == "base64"
                    self.files[value["path"]] = base64.b64decode(value["content"])
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/org/tiny/commit/{self.sha}",
                    "commitOid": self.sha,
                }
            )


@pytest.fixture
def server(monkeypatch):
    for name in ("files", "created", "asked", "data"):
        monkeypatch.setattr(Hub, name, type(getattr(Hub, name))())
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def run(tmp_path, server, script: str, **environment) -> str:
    """A process of its own: the client reads its environment when it is imported."""
    env = {
        **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
        **{"HF_ENDPOINT": server, "HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": TOKEN},
        **{"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"},
        **environment,
    }
    found = subprocess.run(
        [sys.executable, "-c", f"from encdec.cli import main\n{script}"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path, server):
    config, params = pair("paper")
    write_model(
        tmp_path / "run",
        config.replace(scan_layers=False),
        unroll_params(params, config),
        source={"format": "test", "family": "test", "name": "made here"},
        vocabulary=ByteVocabulary(4),
        framing=Framing(1),
        max_length=64,
    )
    Hub.files["model.safetensors"] = b"of an earlier push"
    out = run(
        tmp_path,
        server,
        "assert main(['export', '--checkpoint=run', '--format=hf', '--out=exported',"
        " '--push=org/tiny', '--private', '--license=apache-2.0']) == 0\n"
        "assert main(['import', 'org/tiny', '--out=back']) == 0\n"
        "assert main(['import', 'org/absent', '--out=no']) == 3\n",
    )
    assert f"pushed: {server}/org/tiny/commit/" in out
    assert Hub.created[0]["name"] == "tiny"
    assert Hub.created[0].get("visibility") == "private" or Hub.created[0]["private"]
    exported = tmp_path / "exported"
    sent = {
        str(p.relative_to(exported)): p.read_bytes() for p in exported.rglob("*") if p.is_file()
    }
    assert Hub.files == sent
    assert {"README.md", "generation_config.json", "modeling_encdec.py"} <= sent.keys()
    card = sent["README.md"].decode()
    assert card.startswith('---\nlicense: "apache-2.0"\nlibrary_name: "transformers"\n')
    assert "trust_remote_code=True" in card and "Imported from made here" in card
    # In the Hub's cache, as its own client lays it out, without what an import does not read.
    [snapshot] = (tmp_path / "hub" / "hub" / "models--org--tiny" / "snapshots").iterdir()
    assert (snapshot / "config.json").read_bytes() == sent["config.json"]
    assert not (snapshot / "modeling_encdec.py").exists()
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert content["imported"]["name"] == "org/tiny"
    assert content["model"]["d_model"] == config.d_model
    assert "org/absent on the Hub: " in out and "give an existing directory" in out
    # Once fetched, no connection is needed.
    asked = len(Hub.asked)
    script = "assert main(['import', 'org/tiny', '--out=again']) == 0\n"
    wrong = (
        "assert main(['export', '--checkpoint=run', '--format=hf', '--out=x', '--push=org/tiny'])"
        " == 3\n"
        "import pathlib; assert not pathlib.Path('x').exists()\n"
    )
    out = run(tmp_path, server, script + wrong, HF_HUB_OFFLINE="1")
    assert len(Hub.asked) == asked and "log in with" in out


def test_names_and_licences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.repository("org/tiny") == ("org/tiny", None)
    assert hub.repository("org/tiny@v1.0") == ("org/tiny", "v1.0")
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    for path in ("org/tiny", "a/b/c", "./a", "/a/b", "name"):
        assert hub.repository(path) is None, path
    with pytest.raises(ConfigError, match="--push=tiny; expected ORG/NAME"):
        hub.check_push("tiny")
    check_license("cc-by-4.0")
    with pytest.raises(ConfigError, match="expected an identifier such as"):
        check_license("a licence")
    command = ["export", "--checkpoint=none", "--format=hf", "--out=o"]
    assert cli.main([*command, "--private"]) in (2, 4)


ROWS = [b'{"source": "%d", "target": "%d"}\n' % (n, n + 1) for n in range(6)]


def test_data_of_the_hub_is_read_by_its_address(tmp_path, server):
    """A file, a folder and a pattern give the records of the same files on this machine."""
    Hub.data.update(
        {
            "README.md": b"# rows\n",
            "data/train-0.jsonl": b"".join(ROWS[:4]),
            "data/train-1.jsonl.gz": gzip.compress(b"".join(ROWS[4:])),
            "data/notes.bin": b"no rows",
        }
    )
    (tmp_path / "here").mkdir()
    for name in ("train-0.jsonl", "train-1.jsonl.gz"):
        (tmp_path / "here" / name).write_bytes(Hub.data[f"data/{name}"])
    prepare = (
        "prepare = lambda out, *files: main(['prepare', '--jsonl', *files, '--vocabulary=bytes',"
        " '--workers=1', '--inputs_length=8', '--targets_length=8', '--split=train',"
        " '--out=' + out])\n"
    )
    hub = "hf://datasets/org/rows"
    out = run(
        tmp_path,
        server,
        f"{prepare}"
        "assert prepare('local', 'here') == 0\n"
        f"assert prepare('folder', '{hub}/data') == 0\n"
        f"assert prepare('pattern', '{hub}/data/train-*') == 0\n"
        f"assert prepare('files', '{hub}@main/data/train-0.jsonl',"
        f" '{hub}/data/train-1.jsonl.gz') == 0\n"
        f"assert prepare('no', '{hub}/data/absent.jsonl') == 3\n"
        f"assert prepare('no', '{hub}/absent/*.jsonl') == 3\n"
        "assert prepare('no', 'hf://datasets/org/absent/a.jsonl') == 3\n",
    )
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "local").glob("*.arrayrecord")}
    assert wanted
    for name in ("folder", "pattern", "files"):
        found = {p.name: p.read_bytes() for p in (tmp_path / name).glob("*.arrayrecord")}
        assert found == wanted, name
    assert f"there is no file at {hub}/data/absent.jsonl" in out and not (tmp_path / "no").exists()
    assert "hf://datasets/org/absent/a.jsonl on the Hub: " in out
    asked = len(Hub.asked)
    run(
        tmp_path,
        server,
        f"{prepare}assert prepare('offline', '{hub}/data/train-0.jsonl') == 0\n",
        HF_HUB_OFFLINE="1",
    )
    assert len(Hub.asked) == asked


def test_addresses_of_data(monkeypatch, capsys):
    parts = hub._parts
    assert parts("hf://datasets/a/b/c/d.csv") == ("dataset", "a/b", None, "c/d.csv")
    assert parts("hf://a/b@v1/d.csv") == ("model", "a/b", "v1", "d.csv")
    found = parts("hf://datasets/a/b@refs/convert/parquet/x/0.parquet")
    assert found == ("dataset", "a/b", "refs/convert/parquet", "x/0.parquet")
    for wrong in ("hf://datasets/a/b", "hf://a", "hf://spaces/a/b/c", "hf://datasets/a/b/"):
        with pytest.raises(ConfigError, match="expected hf://datasets/ORG/NAME/PATH"):
            parts(wrong)
    # Where the client is not installed, and of flags that name no data: one line.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["prepare", "--jsonl=hf://datasets/a/b/c.jsonl", "--out=x", "--vocabulary=bytes"]
    with pytest.raises(SystemExit):
        cli.main(command)
    assert (
        "hf://datasets/a/b/c.jsonl needs huggingface_hub, which is not" in capsys.readouterr().err
    )
