"""Running the application: sockets, signals, orderly shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn

from encdec.errors import ConfigError
from encdec.logs import logger
from encdec.serving.app import Service, make_app

_LOG = logger(__name__)

FLUSH_SECONDS = 5.0  # to send the last responses


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, not yet listening, so that no client waits while programs compile.

    Raises:
        ConfigError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ConfigError(
            f"--host={host} --port={port} cannot be used: {error}; give another "
            "(--port=0: any free one)"
        ) from None
    return bound


def address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn that finishes running requests before it stops.

    After the first SIGTERM or SIGINT new requests get 503, and accepted ones have
    ``grace_seconds`` to finish; a second signal stops at once.
    """

    def __init__(self, service: Service, grace_seconds: float, announce: bool = False):
        super().__init__(
            uvicorn.Config(
                make_app(service),
                # Not uvicorn's own: it would shut down the handlers of all other libraries.
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=round(FLUSH_SECONDS),
            )
        )
        self._service, self._grace_seconds = service, grace_seconds
        self._announce = announce
        self._ending: asyncio.Task | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in sockets if self._announce and sockets else ():
            # Said only now that it is true: clients are taken, and signals end it in order.
            print(f"listening on {address(bound)}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._ending is not None or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """Begins the shutdown, on the event loop."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        engine = self._service.engine
        engine.close()
        deadline = time.monotonic() + self._grace_seconds
        while not engine.idle and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        left = engine.active + engine.waiting
        if left:
            _LOG.warning(
                f"encdec: {left} answers were not finished within {self._grace_seconds:g} s"
            )
        await asyncio.get_running_loop().run_in_executor(None, engine.stop)
        self.should_exit = True


def run(service: Service, bound: socket.socket, grace_seconds: float) -> None:
    """Serves until a signal; the engine is started and stopped."""
    service.engine.start()
    Server(service, grace_seconds, announce=True).run(sockets=[bound])
    service.engine.stop()


@contextlib.contextmanager
def running(service: Service, grace_seconds: float = 5.0) -> Iterator[tuple[str, Server]]:
    """The server in a thread, for benchmarks and tests: its address, and the server."""
    bound = bind("127.0.0.1", 0)
    service.engine.start()
    server = Server(service, grace_seconds)
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]), daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server stopped before it was ready")
            time.sleep(0.005)
        yield address(bound), server
    finally:
        server.should_exit = True
        service.engine.stop()
        thread.join(30)
