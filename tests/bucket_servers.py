"""Object storage on loopback for tests: Google's and Amazon's protocol, with faults on demand.

``python -m tests.bucket_servers FOLDER encdec ...`` runs a command while gs://bucket/FOLDER's name
holds a copy of a folder.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping

Fault = Callable[[str, str], int | None]


class Proxy:
    """Passes requests on to a server; ``fault(method, path)`` may answer with a status instead.

    With ``generations`` an object's content comes with its generation, and a write or deletion that
    names another is refused, as Google does and its emulator does not: tensorstore relies on both.
    """

    def __init__(self, target: int, generations: bool = False):
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        proxy = self

        def ask(
            method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}
        ) -> tuple[http.client.HTTPResponse, bytes]:
            server = http.client.HTTPConnection("127.0.0.1", target, timeout=30)
            with contextlib.closing(server):
                server.request(method, path, body, headers)
                reply = server.getresponse()
                return reply, reply.read()

        def generation(path: str) -> str | None:
            """Of the object that a request names; None where there is none."""
            if not (match := re.search(r"/b/([^/?]+)/o(?:/([^?]+))?", path)):
                return None
            name = match[2] or next(iter(re.findall(r"[?&]name=([^&]+)", path)), "")
            name = urllib.parse.quote(urllib.parse.unquote(name), safe="")
            reply, content = (
                ask("GET", f"/storage/v1/b/{match[1]}/o/{name}") if name else (None, b"")
            )
            return json.loads(content)["generation"] if reply and reply.status == 200 else None

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def pass_on(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if len(body) < length:  # the client is gone, or tries again: half an object is none
                    self.close_connection = True
                    return
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                # Some uploads name their object in the body.
                named = (
                    re.search(rb'"name": ?"([^"]+)"', body[:2000])
                    if "upload" in self.path
                    else None
                )
                path = f"{self.path}&name={named[1].decode()}" if named else self.path
                proxy.requests.append((self.command, path))
                status = proxy.fault(self.command, path) if proxy.fault else None
                if status:
                    self.answer(status, [], b"refused by the test")
                    return
                dropped = ("transfer-encoding", "content-length", "connection", "expect")
                headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
                with proxy.lock:  # the servers mix up requests at one time
                    seen = generation(path) if generations else None
                    wanted = re.search(r"[?&]ifGenerationMatch=(\d+)", path)
                    if generations and wanted and wanted[1] != (seen or "0"):
                        self.answer(412, [], b"another generation")
                        return
                    reply, content = ask(self.command, self.path, body, headers)
                known = [("x-goog-generation", seen)] if seen and self.command == "GET" else []
                self.answer(reply.status, [*reply.getheaders(), *known], content)

            def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response_only(status)
                length = str(len(body))
                for name, value in headers:
                    if name.lower() == "content-length":
                        length = value if self.command == "HEAD" else length
                    elif name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = pass_on

            def log_message(self, *arguments: object) -> None:
                """Nothing is printed."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _forget(protocol: str) -> None:
    """The file systems of a process know a server that has ended."""
    import fsspec
    from etils.epath import backend

    fsspec.get_filesystem_class(protocol).clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()


@contextlib.contextmanager
def google() -> Iterator[tuple[Proxy, dict[str, str]]]:
    """A server with the bucket "bucket", and the environment in which libraries find it."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    proxy = Proxy(port, generations=True)
    try:
        yield (
            proxy,
            {
                "STORAGE_EMULATOR_HOST": proxy.url,
                "TENSORSTORE_GCS_HTTP_URL": proxy.url,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks another service of Google's
                "GCE_METADATA_ROOT": "127.0.0.1:1",  # no machine of Google's: known at once
                "NO_GCE_CHECK": "true",
            },
        )
    finally:
        proxy.close()
        server.stop()
        _forget("gcs")


@contextlib.contextmanager
def amazon() -> Iterator[tuple[Proxy, dict[str, str]]]:
    """The same for S3."""
    from moto.server import ThreadedMotoServer

    port = free_port()
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    proxy = Proxy(port)
    request = http.client.HTTPConnection("127.0.0.1", port)
    request.request("PUT", "/bucket")
    request.getresponse().read()
    try:
        yield (
            proxy,
            {
                "AWS_ENDPOINT_URL": proxy.url,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        )
    finally:
        proxy.close()
        server.stop()
        _forget("s3")


def main(folder: str, *command: str) -> int:
    """Runs a command against a bucket with a copy of the folder; its exit code."""
    from encdec.buckets import send_file

    source = pathlib.Path(folder).resolve()
    with google() as (_, variables):
        os.environ.update(variables)
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            send_file(file, f"gs://bucket/{source.name}/{file.relative_to(source)}")
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
