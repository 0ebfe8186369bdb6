"""The gRPC settings that both ends must agree on, and the address form."""

from __future__ import annotations

from ...errors import LinkError

SESSION_METHOD = "Session"
SERVICE = "isthmus.v1.Isthmus"
SESSION_PATH = f"/{SERVICE}/{SESSION_METHOD}"

# gRPC's own default. A frame's limit lies below it, so that a large frame meets a named fault, not a dead stream.
MAX_MESSAGE_BYTES = 4 << 20

# Steps that may be on their way at once: enough to keep the link, the codec and the back busy during prefill,
# few enough that a session's buffers stay small (this times MAX_MESSAGE_BYTES).
PIPELINE_DEPTH = 4

# Steps with drafts are small, and many may be on their way at once. The server keeps the results of so many steps, so
# that none is lost with its stream; a device has at most so many without an answer.
RESULTS_KEPT = 64
MAX_PATH = 64  # guesses before a frame that it names

_PING_INTERVAL_MS = 20_000  # a dead peer or a silent network shows within this and the timeout
_PING_TIMEOUT_MS = 10_000
_LEAST_PING_INTERVAL_MS = 10_000  # what the server tolerates; must stay below the interval, or it drops the client

Option = tuple[str, int]

_BOTH_ENDS: tuple[Option, ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", _PING_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),  # no bound: a session may wait for its user
)

CLIENT_OPTIONS: tuple[Option, ...] = (
    *_BOTH_ENDS,
    ("grpc.enable_retries", 0),  # a step is repeated by us, by its number
    # Otherwise the channels of a process share a connection and its back-off: a cut would delay the next attempt.
    ("grpc.use_local_subchannel_pool", 1),
)

SERVER_OPTIONS: tuple[Option, ...] = (
    *_BOTH_ENDS,
    ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_INTERVAL_MS),
    ("grpc.server_handshake_timeout_ms", 10_000),  # gRPC's own two minutes are long for one that says nothing
    # Otherwise a second server on the same port starts, and takes half of the clients.
    ("grpc.so_reuseport", 0),
)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPv6]:PORT``.

    Raises:
        LinkError: the address has another form, or the port lies outside 0 to 65535.
    """
    if "://" in address:
        raise LinkError(f"address {address!r}: must be HOST:PORT alone; leave {address.partition('://')[0]}:// out")
    host, separator, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not (separator and bare and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise LinkError(f"address {address!r}: must be HOST:PORT with a port from 0 to 65535, as in 127.0.0.1:7070")
    if ":" in bare and not host.startswith("["):
        raise LinkError(f"address {address!r}: an IPv6 host goes in brackets, as in [::1]:7070")
    return bare, int(port)
