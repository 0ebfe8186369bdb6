"""Messages of the wire: building them, checking them, and the refusals that answer a bad one."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import google_crc32c
from google.protobuf.message import DecodeError

from ..._version import __version__
from ...errors import ProtocolError, RequestError
from ..bundle import Manifest
from ..sampling import Sampling
from ..skipping import NO_BYPASS, Bypass, checked_similarity
from . import isthmus_pb2 as pb

PROTOCOL_MAJOR = 1  # must be equal on both ends
PROTOCOL_MINOR = 4  # the lower of both is spoken; 1 added keys and values, 2 drafts, 3 skip decoding, 4 FFN skipping
KV_MINOR = 1
DRAFT_MINOR = 2
SKIP_MINOR = 3
FFN_SKIP_MINOR = 4

_STEP_HEADER = struct.Struct("<QII?")
_KV_HEADER = struct.Struct("<IIi")
_MAX_FAULT_CHARS = 500
_SEAL = struct.Struct("<BI")
_SEAL_TAG = 0x7D  # of field 15, four bytes: a peer that knows no seals skips it


class Refusal(Exception):  # noqa: N818  (a verdict on a message, not a failure of ours)
    """A message that the server does not accept; becomes the `Fault` that answers it.

    Args:
        code: name of a `Fault.Code`.
        message: value, rule and remedy; nothing of the server's insides.
        expected_step: the step to go on with, for ``OUT_OF_ORDER`` and ``BAD_CRC``.
        retry_after_ms: when to try again, for ``SERVER_FULL`` and ``DRAINING``.
    """

    def __init__(self, code: str, message: str, *, expected_step: int = 0, retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.fault = pb.ServerMessage(
            fault=pb.Fault(
                code=code,
                message=message[:_MAX_FAULT_CHARS],
                expected_step=expected_step,
                retry_after_ms=retry_after_ms,
            )
        )

    @property
    def passes(self) -> bool:
        """Whether the stream may go on after it."""
        return self.fault.fault.code == pb.Fault.BAD_CRC


def seal(message: bytes) -> bytes:
    """A message with its CRC32C behind it, as a field that is not part of the schema."""
    return message + _SEAL.pack(_SEAL_TAG, google_crc32c.value(message))


class Seals:
    """Opens the sealed messages that come in on one stream. After the first one all must be sealed.

    Attributes:
        used: whether there was one.
    """

    def __init__(self) -> None:
        self.used = False

    def open(self, data: bytes) -> bytes | None:
        """The message, or `None` if it was damaged on its way."""
        message = data[: -_SEAL.size]
        if len(data) >= _SEAL.size and data[len(message) :] == _SEAL.pack(_SEAL_TAG, google_crc32c.value(message)):
            self.used = True
            return message
        return None if self.used else data


def fault_error(fault: pb.Fault) -> ProtocolError:
    """The error that a user sees for a fault of the server."""
    known = pb.Fault.Code.values()
    code = pb.Fault.Code.Name(fault.code) if fault.code in known else f"FAULT_{fault.code}"
    message = fault.message
    if fault.retry_after_ms:
        message += f" (try again in {fault.retry_after_ms / 1000:g} s)"
    return ProtocolError(code, message)


def parse_client_message(data: bytes) -> pb.ClientMessage:
    """Parse what a client sent; raises `Refusal` unless it is a `ClientMessage` with a body."""
    try:
        message = pb.ClientMessage.FromString(data)
    except DecodeError as error:
        raise Refusal(
            "BAD_REQUEST", f"{len(data)} bytes that are no isthmus.v1 message; use a client of this protocol"
        ) from error
    if message.WhichOneof("body") is None:
        raise Refusal("BAD_REQUEST", "a message without a body that this server knows; update the server")
    return message


def parse_server_message(data: bytes) -> pb.ServerMessage:
    """Parse what a server sent; raises `ProtocolError` unless it is a `ServerMessage` with a body."""
    try:
        message = pb.ServerMessage.FromString(data)
    except DecodeError as error:
        raise ProtocolError("BAD_REQUEST", f"the server sent {len(data)} bytes that are no message") from error
    if message.WhichOneof("body") is None:
        raise ProtocolError("BAD_REQUEST", "the server sent a message that this client does not know; update it")
    return message


def hello_message(manifest_sha256: str, split: int, codec: str) -> bytes:
    """The first message of every stream."""
    hello = pb.Hello(
        protocol_major=PROTOCOL_MAJOR,
        protocol_minor=PROTOCOL_MINOR,
        manifest_sha256=manifest_sha256,
        split=split,
        codec=codec,
        client=f"isthmus {__version__}",
    )
    return pb.ClientMessage(hello=hello).SerializeToString()


def welcome_message(hello: pb.Hello, limits: pb.Limits) -> bytes:
    """The answer to a `Hello` that `check_hello` has let pass."""
    welcome = pb.Welcome(
        protocol_major=PROTOCOL_MAJOR,
        protocol_minor=min(PROTOCOL_MINOR, hello.protocol_minor),
        server=f"isthmus {__version__}",
        limits=limits,
    )
    return pb.ServerMessage(welcome=welcome).SerializeToString()


def message_field(data: bytes) -> int:
    """Which body a `ClientMessage` or `ServerMessage` has, without parsing it.

    Args:
        data: without its seal, see `Seals.open`.

    Returns:
        The number of its field, or 0 unless the message is that field alone, as every peer of this protocol writes it.
    """
    if not data or data[0] & 0x87 != 2:  # one byte: field number, and "length-delimited"
        return 0
    length = 0
    for at, byte in enumerate(data[1:6]):
        length |= (byte & 0x7F) << (7 * at)
        if byte < 0x80:
            return data[0] >> 3 if len(data) == at + 2 + length else 0
    return 0


def check_hello(hello: pb.Hello, *, manifest_sha256: str, split: int, codecs: Sequence[str]) -> None:
    """Raise `Refusal`, which names both sides' values, unless the peers fit each other."""
    if hello.protocol_major != PROTOCOL_MAJOR:
        raise Refusal(
            "VERSION_MISMATCH",
            f"client speaks protocol {hello.protocol_major}.{hello.protocol_minor}, server "
            f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}: the major versions must be equal; update the older side",
        )
    if hello.manifest_sha256 != manifest_sha256:
        raise Refusal(
            "MANIFEST_MISMATCH",
            f"device half has manifest {hello.manifest_sha256[:64]}, server half {manifest_sha256}: both "
            "must come from one export; copy the missing half of it",
        )
    if hello.split != split:
        raise Refusal(
            "MANIFEST_MISMATCH",
            f"client splits at layer {hello.split}, server at {split}: both must come from one export",
        )
    if hello.codec not in codecs:
        raise Refusal(
            "UNSUPPORTED_CODEC",
            f"codec {hello.codec[:40]!r}: this server decodes {', '.join(codecs)}; choose one",
        )


def open_message(max_tokens: int, sampling: Sampling, context_ids: Sequence[int], bypass: Bypass = NO_BYPASS) -> bytes:
    """Ask for a new session."""
    wire = pb.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        accept_distance=sampling.accept_distance,
    )
    opening = pb.Open(
        max_tokens=max_tokens,
        sampling=wire,
        context_ids=context_ids,
        bypass=[pb.Bypass(first_layer=layer, position=position) for layer, position in bypass.blocks.items()],
        ffn_similarity=bypass.ffn_similarity or 0.0,
        ffn_from=bypass.ffn_from,
    )
    return pb.ClientMessage(open=opening).SerializeToString()


def read_sampling(wire: pb.Sampling) -> Sampling:
    """The sampling of an `Open`; raises `Refusal` if a value is out of range."""
    try:
        return Sampling(
            temperature=wire.temperature,
            top_k=wire.top_k,
            top_p=wire.top_p,
            min_p=wire.min_p,
            repetition_penalty=wire.repetition_penalty,
            seed=wire.seed,
            accept_distance=wire.accept_distance,
        )
    except RequestError as error:
        raise Refusal("BAD_REQUEST", str(error)) from error


def read_bypass(opening: pb.Open, manifest: Manifest) -> Bypass:
    """What an `Open` leaves out; raises `Refusal` unless blocks are the server's, each named once, and graphs can."""
    starts = {segment.first_layer for segment in manifest.segments if segment.kind == "block"}
    wire = opening.bypass
    blocks = {each.first_layer: each.position for each in wire if each.first_layer >= manifest.split}
    if len(blocks) != len(wire) or not starts.issuperset(blocks):
        raise Refusal(
            "BAD_REQUEST",
            f"blocks to leave out, of {len(wire)}: each must begin a block of this server's half, and come once",
        )
    if not opening.ffn_similarity:
        return Bypass(blocks)
    try:
        return Bypass(blocks, checked_similarity(opening.ffn_similarity, manifest), opening.ffn_from)
    except RequestError as error:
        raise Refusal("BAD_REQUEST", str(error)) from error


def step_crc(step: int, position: int, tokens: int, sample: bool, payload: bytes, drafted: Sequence[int] = ()) -> int:
    """CRC32C of a step's header, payload and drafts, so that no field is believed that a flipped bit has changed."""
    header = google_crc32c.value(_STEP_HEADER.pack(step, position, tokens, sample))
    crc = int(google_crc32c.extend(header, payload))
    return int(google_crc32c.extend(crc, struct.pack(f"<{len(drafted)}I", *drafted))) if drafted else crc


def step_message(
    step: int, position: int, tokens: int, sample: bool, payload: bytes, drafted: Sequence[int] = ()
) -> bytes:
    """One frame of hidden states with its place in the session, and the ids of its last rows if they are drafts."""
    crc = step_crc(step, position, tokens, sample, payload, drafted)
    frame = pb.Frame(tokens=tokens, payload=payload, crc32c=crc, drafted=drafted)
    return pb.ClientMessage(step=pb.Step(step=step, position=position, sample=sample, frame=frame)).SerializeToString()


def renumbered_step(message: bytes, step: int, *, asks: bool = True) -> bytes:
    """A step's message with another number; it asks for no token unless ``asks``."""
    parsed = pb.ClientMessage.FromString(message).step
    if parsed.HasField("kv"):
        return kv_message(step, parsed.position, parsed.kv)
    frame = parsed.frame
    drafted = frame.drafted if asks else ()
    return step_message(step, parsed.position, frame.tokens, parsed.sample and asks, frame.payload, drafted)


def kv_crc(step: int, position: int, sample: bool, chunk: pb.KVChunk) -> int:
    """CRC32C of a step that carries keys and values, like `step_crc`."""
    header = step_crc(step, position, chunk.tokens, sample, b"")
    header = google_crc32c.extend(header, _KV_HEADER.pack(chunk.first_layer, chunk.last_layer, chunk.coding))
    return int(google_crc32c.extend(header, chunk.payload))


def kv_message(step: int, position: int, chunk: pb.KVChunk) -> bytes:
    """Keys and values with their place in the session; the chunk gets its checksum."""
    chunk.crc32c = kv_crc(step, position, False, chunk)
    return pb.ClientMessage(step=pb.Step(step=step, position=position, kv=chunk)).SerializeToString()


def crc_matches(step: pb.Step) -> bool:
    """Whether a step arrived as it was sent."""
    if step.HasField("kv"):
        return kv_crc(step.step, step.position, step.sample, step.kv) == step.kv.crc32c
    frame = step.frame
    crc = step_crc(step.step, step.position, frame.tokens, step.sample, frame.payload, frame.drafted)
    return crc == frame.crc32c
