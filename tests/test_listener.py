"""eagle_moe/serving/listener.py: a server tells where it is, and ends in order when told to."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection

import pytest

from eagle_moe.serving.listener import is_loopback, listen

SERVER = """
import asyncio, signal, sys
from asyncio.base_events import BaseEventLoop
from eagle_moe.serving.listener import answer, listen

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/slow":
        print("slow", flush=True)
        await asyncio.sleep(600)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"yes"})

def make(loop, made=BaseEventLoop.__init__):
    print("made", flush=True)
    if len(sys.argv) > 1:
        signal.raise_signal(int(sys.argv[1]))
    made(loop)

BaseEventLoop.__init__ = make
with listen("127.0.0.1", 0) as listener:
    answer(app, listener, "127.0.0.1", "At {url}.", patience=600)
print("ended")
"""


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that serves, with its port; killed when the block is left."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("At http://127.0.0.1:"), line + process.stdout.read()
        yield process, int(line.rstrip(".\n").rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


def rest(process: subprocess.Popen[str]) -> str:
    """What it still says until it has ended, which it does well."""
    assert process.wait(timeout=60) == 0, process.stdout.read()
    return process.stdout.read()  # and not `communicate`, which forgets what `readline` has read on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_loop_runs_ends_it_in_order(number):
    with serving(str(int(number))) as (process, _):
        assert rest(process) == "made\nended\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_serves_ends_it_in_order(number):
    with serving() as (process, port):
        client = HTTPConnection("127.0.0.1", port, timeout=60)
        client.request("GET", "/")
        assert client.getresponse().read() == b"yes"
        client.close()
        process.send_signal(number)
        assert rest(process) == "made\nended\n"


def test_a_second_ctrl_c_does_not_wait_for_what_is_under_way():
    with serving() as (process, port):
        client = HTTPConnection("127.0.0.1", port, timeout=60)
        client.request("GET", "/slow")
        assert [process.stdout.readline() for _ in range(2)] == ["made\n", "slow\n"]
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None, "the first one waits"
        process.send_signal(signal.SIGINT)
        assert rest(process).endswith("ended\n")  # after uvicorn has told what it broke off
        client.close()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("127.evil.example", False),
    ],
)
def test_what_is_loopback(host, loopback):
    assert is_loopback(host) is loopback


def test_an_address_that_cannot_be_had_is_told():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: in use. Give another, or 0 for any"):
            listen("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"--host no.such.host.invalid"):
        listen("no.such.host.invalid", 0)
