from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClientMessage(_message.Message):
    __slots__ = ("hello", "open", "attach", "step", "cancel", "close")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    open: Open
    attach: Attach
    step: Step
    cancel: Cancel
    close: Close
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., attach: _Optional[_Union[Attach, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("welcome", "opened", "attached", "result", "fault", "closed")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    opened: Opened
    attached: Attached
    result: Result
    fault: Fault
    closed: Closed
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., attached: _Optional[_Union[Attached, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_major", "protocol_minor", "manifest_sha256", "split", "codec", "client")
    PROTOCOL_MAJOR_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MINOR_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    protocol_major: int
    protocol_minor: int
    manifest_sha256: str
    split: int
    codec: str
    client: str
    def __init__(self, protocol_major: _Optional[int] = ..., protocol_minor: _Optional[int] = ..., manifest_sha256: _Optional[str] = ..., split: _Optional[int] = ..., codec: _Optional[str] = ..., client: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_major", "protocol_minor", "server", "limits")
    PROTOCOL_MAJOR_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MINOR_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    protocol_major: int
    protocol_minor: int
    server: str
    limits: Limits
    def __init__(self, protocol_major: _Optional[int] = ..., protocol_minor: _Optional[int] = ..., server: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_frame_bytes", "max_frame_tokens", "max_session_tokens", "lease_ms")
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    max_frame_bytes: int
    max_frame_tokens: int
    max_session_tokens: int
    lease_ms: int
    def __init__(self, max_frame_bytes: _Optional[int] = ..., max_frame_tokens: _Optional[int] = ..., max_session_tokens: _Optional[int] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("max_tokens", "sampling", "context_ids", "bypass", "ffn_similarity", "ffn_from")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    BYPASS_FIELD_NUMBER: _ClassVar[int]
    FFN_SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    FFN_FROM_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    sampling: Sampling
    context_ids: _containers.RepeatedScalarFieldContainer[int]
    bypass: _containers.RepeatedCompositeFieldContainer[Bypass]
    ffn_similarity: float
    ffn_from: int
    def __init__(self, max_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., context_ids: _Optional[_Iterable[int]] = ..., bypass: _Optional[_Iterable[_Union[Bypass, _Mapping]]] = ..., ffn_similarity: _Optional[float] = ..., ffn_from: _Optional[int] = ...) -> None: ...

class Bypass(_message.Message):
    __slots__ = ("first_layer", "position")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    position: int
    def __init__(self, first_layer: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "accept_distance")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    accept_distance: float
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., accept_distance: _Optional[float] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    def __init__(self, session: _Optional[bytes] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("session", "last_acknowledged_step")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LAST_ACKNOWLEDGED_STEP_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    last_acknowledged_step: int
    def __init__(self, session: _Optional[bytes] = ..., last_acknowledged_step: _Optional[int] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("last_step",)
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    last_step: int
    def __init__(self, last_step: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "position", "sample", "frame", "kv")
    STEP_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    step: int
    position: int
    sample: bool
    frame: Frame
    kv: KVChunk
    def __init__(self, step: _Optional[int] = ..., position: _Optional[int] = ..., sample: _Optional[bool] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., kv: _Optional[_Union[KVChunk, _Mapping]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("tokens", "payload", "crc32c", "drafted")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    payload: bytes
    crc32c: int
    drafted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[int] = ..., payload: _Optional[bytes] = ..., crc32c: _Optional[int] = ..., drafted: _Optional[_Iterable[int]] = ...) -> None: ...

class KVChunk(_message.Message):
    __slots__ = ("tokens", "first_layer", "last_layer", "coding", "payload", "crc32c")
    class Coding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STORED: _ClassVar[KVChunk.Coding]
        ROWS8: _ClassVar[KVChunk.Coding]
    STORED: KVChunk.Coding
    ROWS8: KVChunk.Coding
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    CODING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    first_layer: int
    last_layer: int
    coding: KVChunk.Coding
    payload: bytes
    crc32c: int
    def __init__(self, tokens: _Optional[int] = ..., first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., coding: _Optional[_Union[KVChunk.Coding, str]] = ..., payload: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("step", "length", "token", "decode_us", "queue_us", "compute_us", "onnxruntime_us", "tokens")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    ONNXRUNTIME_US_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    step: int
    length: int
    token: int
    decode_us: int
    queue_us: int
    compute_us: int
    onnxruntime_us: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., length: _Optional[int] = ..., token: _Optional[int] = ..., decode_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., onnxruntime_us: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Close(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Closed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Fault(_message.Message):
    __slots__ = ("code", "message", "expected_step", "retry_after_ms")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[Fault.Code]
        VERSION_MISMATCH: _ClassVar[Fault.Code]
        MANIFEST_MISMATCH: _ClassVar[Fault.Code]
        UNSUPPORTED_CODEC: _ClassVar[Fault.Code]
        OUT_OF_ORDER: _ClassVar[Fault.Code]
        BAD_FRAME: _ClassVar[Fault.Code]
        BAD_CRC: _ClassVar[Fault.Code]
        NON_FINITE: _ClassVar[Fault.Code]
        FRAME_TOO_LARGE: _ClassVar[Fault.Code]
        SESSION_UNKNOWN: _ClassVar[Fault.Code]
        SESSION_FULL: _ClassVar[Fault.Code]
        SERVER_FULL: _ClassVar[Fault.Code]
        BAD_REQUEST: _ClassVar[Fault.Code]
        CANCELLED: _ClassVar[Fault.Code]
        INTERNAL: _ClassVar[Fault.Code]
        DRAINING: _ClassVar[Fault.Code]
    UNKNOWN: Fault.Code
    VERSION_MISMATCH: Fault.Code
    MANIFEST_MISMATCH: Fault.Code
    UNSUPPORTED_CODEC: Fault.Code
    OUT_OF_ORDER: Fault.Code
    BAD_FRAME: Fault.Code
    BAD_CRC: Fault.Code
    NON_FINITE: Fault.Code
    FRAME_TOO_LARGE: Fault.Code
    SESSION_UNKNOWN: Fault.Code
    SESSION_FULL: Fault.Code
    SERVER_FULL: Fault.Code
    BAD_REQUEST: Fault.Code
    CANCELLED: Fault.Code
    INTERNAL: Fault.Code
    DRAINING: Fault.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: Fault.Code
    message: str
    expected_step: int
    retry_after_ms: int
    def __init__(self, code: _Optional[_Union[Fault.Code, str]] = ..., message: _Optional[str] = ..., expected_step: _Optional[int] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...
