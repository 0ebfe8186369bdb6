"""What a server grants at most. Every bound is checked before memory is spent on what it bounds."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from ...errors import RequestError
from ..wire import isthmus_pb2 as pb
from ..wire.transport import MAX_MESSAGE_BYTES

logger = logging.getLogger(__name__)

_MAY_BE_ZERO = ("prefix_cache_bytes", "prefixes_shared")


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of one server.

    Raises:
        RequestError: a bound that is not positive (but a cache may have no bytes), or frames that gRPC would not carry.
    """

    # Open sessions, those without a stream included. A turn of all must stay within a step's deadline.
    max_sessions: int = 64
    # Of one device, where clients show certificates or tokens: nobody takes all places.
    max_sessions_per_device: int = 16
    # KV caches of all sessions together, in bytes. Reserved at Open, so that no step meets a full memory.
    kv_bytes: int = 4 << 30
    # Of one device. By default its sessions alone bound it.
    kv_bytes_per_device: int = 4 << 30
    # Frames a second of one device, see `isthmus.runtime.server.frame_rate`: more than all its sessions together send
    # of any model that is worth splitting. Infinite is no limit.
    frames_per_s_per_device: float = 1000.0
    # Keys and values that are kept for later sessions with the same beginning, beside the KV caches; 0 keeps none. At
    # SmolLM2's size 2000 positions: some system prompts, or the last documents that were asked about.
    prefix_cache_bytes: int = 64_000_000
    # Whether devices that certificates or tokens tell apart use each other's: one can then find out by the time of an
    # answer what another has asked.
    prefixes_shared: bool = False
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
            if not (value > 0 or (value == 0 and name in _MAY_BE_ZERO)):
                raise RequestError(f"{name}={value}: a server's limit must be positive")
        if self.max_frame_bytes > MAX_MESSAGE_BYTES - 1024:
            raise RequestError(
                f"max_frame_bytes={self.max_frame_bytes}: must stay 1024 below {MAX_MESSAGE_BYTES}, "
                "the largest message that gRPC carries here"
            )

    @property
    def streams(self) -> int:
        """At once; gRPC refuses further ones unheard.

        More than sessions: some attach again while the old stream still looks alive, and of four times as many devices
        as there is room for, those without shall hear that the server is full, and when to come again.
        """
        return 4 * self.max_sessions + 16

    def within(self, kv_budget: float, longest: float) -> ServerLimits:
        """These, lowered to what memory there is. Of what one session of full length leaves, prefixes get a quarter.

        Args:
            kv_budget: bytes for keys and values in all, see `isthmus.runtime.memory.kv_budget`.
            longest: of these, those of one session of full length.
        """
        prefixes = int(min(self.prefix_cache_bytes, max(0.0, kv_budget - longest) / 4))
        if prefixes < self.prefix_cache_bytes:
            logger.warning("memory is short: %.1f MB of keys and values are kept for later prompts", prefixes / 1e6)
        return replace(self, prefix_cache_bytes=prefixes, kv_bytes=int(min(self.kv_bytes, kv_budget - prefixes)))

    def granted(self, max_length: int) -> pb.Limits:
        """What a client is told of them, on a bundle of this ``max_length``."""
        return pb.Limits(
            max_frame_bytes=self.max_frame_bytes,
            max_frame_tokens=self.max_frame_tokens,
            max_session_tokens=min(self.max_session_tokens, max_length),
            lease_ms=round(1000 * self.lease_s),
        )
