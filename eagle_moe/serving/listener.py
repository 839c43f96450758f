"""A socket of this machine, and an ASGI app that answers on it until it is told to end."""

from __future__ import annotations

import errno
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp
    from uvicorn import Server

ENDING = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises `ValueError` if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror}.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port}: in use. Give another, or 0 for any.") from None
        raise ValueError(f"--host {host} --port {port}: {error.strerror}.") from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; of names only `localhost` is known to."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def answer(app: ASGIApp, listener: socket.socket, host: str, told: str, patience: int) -> None:
    """Serve `app` until Ctrl-C or SIGTERM; a second Ctrl-C does not wait for what is under way.

    `told` is what the person reads once the socket listens, with {url} for the address;
    `patience` is how many seconds open connections have after the first signal.
    """
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=patience)
    server = uvicorn.Server(config)
    listener.listen()  # from here on visitors may come; they are answered in a moment
    address, port = listener.getsockname()[:2]
    place = f"[{address}]" if ":" in address else address
    with _ended_by_signals(server):
        print(told.format(url=f"http://{place}:{port}"), flush=True)
        if not is_loopback(host):
            print(
                "warning: every machine that reaches this one can ask; nothing here asks who they "
                "are. Put a proxy with a password before it.",
                file=sys.stderr,
            )
        server.run(sockets=[listener])


@contextmanager
def _ended_by_signals(server: Server) -> Iterator[None]:
    """From the first line that tells of it on, a signal is the server's, which ends in order.
    (uvicorn listens to signals once its event loop runs; Ctrl-C before that would tear the loop
    apart in the making.)"""
    before = {number: signal.signal(number, server.handle_exit) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
