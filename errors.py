"""Errors that a user can meet. Each message states the value, the rule and the remedy."""

from __future__ import annotations


class IsthmusError(Exception):
    """Base of every error that comes from outside: input, files, peers, limits."""


class ModelError(IsthmusError):
    """A checkpoint cannot be found, read or is of a kind that has no builder."""


class ExportError(IsthmusError):
    """An export cannot start or finish: options out of range, no space, output exists."""


class AccuracyError(IsthmusError):
    """An accuracy table is damaged, cannot be written, or lacks what is asked of it."""


class BundleError(IsthmusError):
    """A bundle is incomplete, altered, of another schema or of another export."""


class RequestError(IsthmusError):
    """A generation request breaks a rule: empty or too long prompt, ids or sampling out of range."""


class MemoryLimitError(IsthmusError):
    """Something would not fit into the memory that it may take; nothing was loaded."""


class ProfileError(IsthmusError):
    """A device profile is missing, incomplete, contradicts itself or has keys that nobody reads."""


class PlanError(IsthmusError):
    """A plan cannot be made, read or followed: constraints out of range, another model, another bundle."""


class LimitError(IsthmusError):
    """A limit on memory or processors cannot be set, or leaves no room for a process at all."""


class CodecError(IsthmusError):
    """Hidden states cannot be encoded, or a payload cannot be decoded."""


class NonFiniteError(CodecError):
    """Hidden states hold NaN or infinity."""


class LinkError(IsthmusError):
    """The server cannot be reached, the link failed for good, or a link's description breaks a rule."""


class SecurityError(LinkError):
    """The peers could not agree on a secure channel: certificate, plaintext, trust."""


class ProtocolError(LinkError):
    """The peer broke the protocol or refused a message.

    Args:
        code: name of the wire's `Fault.Code`, for example ``"BAD_CRC"``.
        message: value, rule and remedy.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
