"""What a server grants at most. Every bound is checked before memory is spent on what it bounds."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import RequestError
from ..wire import isthmus_pb2 as pb
from ..wire.transport import MAX_MESSAGE_BYTES


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of one server.

    Raises:
        RequestError: a bound that is not positive, or frames that gRPC would not carry.
    """

    # Open sessions, those without a stream included. A turn of all must stay within a step's deadline.
    max_sessions: int = 64
    # Of one device, where clients show certificates or tokens: nobody takes all places.
    max_sessions_per_device: int = 16
    # KV caches of all sessions together, in bytes. Reserved at Open, so that no step meets a full memory.
    kv_bytes: int = 4 << 30
    # Of one device. By default its sessions alone bound it.
    kv_bytes_per_device: int = 4 << 30
    # Prompt and new tokens of a session. The bundle's max_length lowers it.
    max_session_tokens: int = 1 << 17
    # Tokens of a frame.
    max_frame_tokens: int = 512
    # Sessions that advance in one run. More give more tokens/s together, and each waits longer for its own: at 32 rows
    # the matrix products have reached the speed of long prompts. 1 serves one step at a time.
    max_batch: int = 32
    # One Step, everything included. Below gRPC's limit, so that a fault can name the size.
    max_frame_bytes: int = 4_000_000
    # Seconds that a session outlives its stream. A phone that changes networks is back in a few; a longer
    # lease holds KV for those that are gone.
    lease_s: float = 30.0
    # Seconds that a stream may last without a session: enough for Hello and Open on a slow link.
    idle_s: float = 10.0
    # Seconds after which SERVER_FULL asks the client to come again: about a short generation.
    retry_after_s: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise RequestError(f"{name}={value}: a server's limit must be positive")
        if self.max_frame_bytes > MAX_MESSAGE_BYTES - 1024:
            raise RequestError(
                f"max_frame_bytes={self.max_frame_bytes}: must stay 1024 below {MAX_MESSAGE_BYTES}, "
                "the largest message that gRPC carries here"
            )

    def granted(self, max_length: int) -> pb.Limits:
        """What a client is told of them, on a bundle of this ``max_length``."""
        return pb.Limits(
            max_frame_bytes=self.max_frame_bytes,
            max_frame_tokens=self.max_frame_tokens,
            max_session_tokens=min(self.max_session_tokens, max_length),
            lease_ms=round(1000 * self.lease_s),
        )
