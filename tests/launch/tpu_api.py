"""A Cloud TPU API on the loopback address, as far as gcloud's queued-resources commands call it."""

from __future__ import annotations

import http.server
import json
import re
import threading
import urllib.parse


class TpuApi(http.server.ThreadingHTTPServer):
    """Holds one ACTIVE queued resource of one slice.

    Attributes:
        requests: path without its query, query and JSON body of each POST and PATCH.
    """

    daemon_threads = True

    def __init__(self, hosts: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hosts = hosts
        self.requests: list[tuple[str, dict, dict]] = []
        self.metadata: dict[str, str] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    @property
    def environment(self) -> dict[str, str]:
        """Sends gcloud here for all that it asks."""
        return {
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": self.address,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{self.address}compute/v1/",
            "CLOUDSDK_CORE_PROJECT": "p",
            "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
        }

    def answer(self, path: str) -> dict:
        node = "projects/p/locations/z/nodes/run1"
        if ":getGuestAttributes" in path:
            values = lambda name: {
                "queryPath": "",
                "queryValue": {"items": [{"namespace": "", "key": "hostname", "value": name}]},
            }
            return {"guestAttributes": [values(f"host-{i}") for i in range(self.hosts)]}
        if "/operations/" in path:
            return {"name": path.split("/", 2)[2], "done": True, "response": {"name": node}}
        if "/nodes/" in path:
            return {
                "name": node,
                "id": "1",
                "state": "READY",
                "health": "HEALTHY",
                "apiVersion": "V2",
                "metadata": self.metadata,
                "networkEndpoints": [
                    {"ipAddress": f"10.0.0.{i}", "accessConfig": {"externalIp": f"203.0.113.{i}"}}
                    for i in range(self.hosts)
                ],
            }
        if "/queuedResources/" in path:
            return {
                "name": path.split("/", 2)[2],
                "state": {"state": "ACTIVE"},
                "tpu": {"nodeSpec": [{"parent": "projects/p/locations/z", "nodeId": "run1"}]},
            }
        if path.startswith("/compute/"):
            return {"name": "p", "commonInstanceMetadata": {"items": []}}
        return {}


class _Handler(http.server.BaseHTTPRequestHandler):
    def _reply(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        if self.command in ("POST", "PATCH") and ":getGuestAttributes" not in url.path:
            self.server.requests.append((url.path, urllib.parse.parse_qs(url.query), body))
            self.server.metadata |= body.get("metadata", {})
        if self.command in ("POST", "PATCH", "DELETE") and ":" not in url.path:
            version = re.match(r"/v\w+/", url.path)[0]
            content = self.server.answer(f"{version}projects/p/locations/z/operations/o")
        else:
            content = self.server.answer(url.path)
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = do_DELETE = _reply

    def log_message(self, *arguments) -> None:
        pass
