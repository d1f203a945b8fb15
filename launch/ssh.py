"""The key with which ``gcloud`` logs in to hosts, ready before its first connection.

``gcloud`` makes a missing key itself, but once for each slice at the same time, and a copy to
several hosts is refused while an agent runs that does not hold the key. So it is made here, and
held by an agent of this process if no other holds it.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

KEY = pathlib.Path("~/.ssh/google_compute_engine")  # gcloud's own
_START_SECONDS = 10.0


def make_key(key: pathlib.Path) -> None:
    """Makes a key without a passphrase, or its public half, where they are missing.

    Raises:
        SystemExit: the key cannot be made or read.
    """
    public = key.with_name(key.name + ".pub")
    if key.exists() and public.exists():
        return
    if key.exists():
        made = _run(["ssh-keygen", "-y", "-P", "", "-f", str(key)])
        if made.returncode:
            raise SystemExit(
                f"{key} has no {public.name} next to it; make it: ssh-keygen -y -f {key} > {public}"
            )
        public.write_text(made.stdout)
        return
    key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    public.unlink(missing_ok=True)
    made = _run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", str(key)])
    if made.returncode:
        raise SystemExit(f"{key} could not be made: {made.stderr.strip()}")


@contextlib.contextmanager
def agent(key: pathlib.Path) -> Iterator[dict[str, str]]:
    """Environment variables of an agent that holds the key; empty if the user's own agent does.

    Raises:
        SystemExit: the key has a passphrase, which nobody may be there to type.
    """
    listed = _run(["ssh-keygen", "-lf", str(key)])
    fingerprint = listed.stdout.split()[1] if listed.returncode == 0 else None
    if fingerprint and fingerprint in _run(["ssh-add", "-l"]).stdout:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        socket = pathlib.Path(folder) / "agent"
        process = subprocess.Popen(
            ["ssh-agent", "-D", "-a", str(socket)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's interrupt is not for it
        )
        try:
            environment = {"SSH_AUTH_SOCK": str(socket)}
            deadline = time.monotonic() + _START_SECONDS
            while not socket.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            added = _run(["ssh-add", "-q", str(key)], environment)
            if added.returncode:
                raise SystemExit(
                    f"{key} could not be added to an ssh-agent ({added.stderr.strip()}). If it has "
                    f'a passphrase, run first: eval "$(ssh-agent)"; ssh-add {key}'
                )
            yield environment
        finally:
            process.terminate()
            process.wait()


def _run(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program of OpenSSH that has no terminal to ask anything on."""
    try:
        return subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"SSH_ASKPASS_REQUIRE": "never"} | dict(environment or {}),
        )
    except FileNotFoundError:
        raise SystemExit(
            f"{arguments[0]} is not installed; gcloud logs in with OpenSSH's client"
        ) from None
