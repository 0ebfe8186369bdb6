"""A stream leaves nothing of itself behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from isthmus.errors import LinkError
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.framing import hello_message
from isthmus.runtime.wire.security import ChannelSecurity
from isthmus.runtime.wire.stream import ClientStream


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def call_of(stream: ClientStream) -> weakref.ref[object]:
    return weakref.ref(stream._call)


# Else the process's exit is what deletes gRPC's call, and may wait for ever for a lock that a stopped thread has.
@pytest.mark.usefixtures("no_collection")
def test_closing_deletes_the_call(server: BackServer):
    stream = ClientStream(server.address, ChannelSecurity())
    call = call_of(stream)
    stream.send(hello_message("a" * 64, 2, "raw32"))
    assert stream.receive(10.0).HasField("welcome")
    stream.close()
    assert call() is None
    stream.close()


@pytest.mark.usefixtures("no_collection")
def test_closing_deletes_the_call_though_its_error_is_kept():
    stream = ClientStream("127.0.0.1:1", ChannelSecurity(insecure=True))
    call = call_of(stream)
    with pytest.raises(LinkError, match="cannot be reached") as raised:
        stream.receive(10.0)
    stream.close()
    assert call() is None
    assert raised.value.__cause__ is None


@pytest.mark.usefixtures("no_collection")
def test_closing_deletes_the_call_of_a_server_that_went(server: BackServer):
    stream = ClientStream(server.address, ChannelSecurity())
    call = call_of(stream)
    stream.send(hello_message("a" * 64, 2, "raw32"))
    assert stream.receive(10.0).HasField("welcome")
    server.stop(grace=0.0)
    with pytest.raises(LinkError, match=r"ended|broke"):
        stream.receive(10.0)
    stream.close()
    assert call() is None
