"""Runs the blocks that pages say a test runs, as a reader would: one after the other, in a folder.

    python -m tests.run_pages tests/test_walk.py

One process for all of them, with one device, so that programs are compiled once: ``encdec`` is
called in it. A command with ``&`` runs until ``kill %1``; the lines between them are run when it
has printed its first report, or that it listens. Python that begins with a file's name is
that file, other Python is executed, in one namespace for all blocks.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import urllib.request
from typing import Any

from encdec import cli
from tests.pages import SHELL, Block, commands, run_by

READY = re.compile(r"^(step |listening on )", re.MULTILINE)
PORT = "8000"  # of the pages; another one is used, which is free
STOPPED = {"train": 75, "serve": 0}  # exit codes after SIGTERM


class _Watched(io.TextIOBase):
    """A stream that sets an event when a command has begun its work."""

    def __init__(self, stream: Any, ready: threading.Event) -> None:
        self.stream, self.ready, self.seen = stream, ready, ""

    def write(self, text: str) -> int:
        self.seen = (self.seen + text)[-80:]
        if READY.search(self.seen):
            self.ready.set()
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


def run_blocks(blocks: list[Block]) -> dict[str, Any]:
    """Runs them in the current folder; returns the names that Python left.

    Raises:
        AssertionError: a command ended with another exit code than it should.
    """
    names: dict[str, Any] = {}
    for block in blocks:
        if block.language in SHELL:
            _run_shell(block)
        elif file := re.match(r"# (\w+\.py)\n", block.text):
            pathlib.Path(file[1]).write_text(block.text, "utf-8")
        else:
            exec(compile(block.text, block.place, "exec"), names)
    return names


def _run_shell(block: Block) -> None:
    lines = [words for _, words in commands(block.text.replace(PORT, str(_free_port())))]
    while lines:
        words = lines.pop(0)
        print("$", *words, flush=True)
        assert words[0] == "encdec", f"{block.place}: {words} cannot be run"
        if words[-1] != "&":
            code = cli.main(words[1:])
            assert code == 0, f"{block.place}: {words} gave {code}"
            continue
        words.pop()
        meanwhile = [lines.pop(0) for _ in range(lines.index(["kill", "%1"]))]
        lines.pop(0)
        ready = threading.Event()
        out, err = _Watched(sys.stdout, ready), _Watched(sys.stderr, ready)
        other = threading.Thread(target=_then_stop, args=(ready, meanwhile), daemon=True)
        other.start()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(words[1:])
        assert code == STOPPED[words[1]], f"{block.place}: {words} gave {code} after SIGTERM"
        other.join()


def _then_stop(ready: threading.Event, meanwhile: list[list[str]]) -> None:
    assert ready.wait(timeout=300)
    try:
        for words in meanwhile:
            assert words[0] == "curl", words
            print("$", *words, flush=True)
            with urllib.request.urlopen(words[1], words[3].encode(), timeout=60) as answer:
                print(json.dumps(json.load(answer)), flush=True)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


if __name__ == "__main__":
    run_blocks(run_by(sys.argv[1]))
