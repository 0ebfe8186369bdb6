"""Which options of a generation go together, and with which bundle."""

from __future__ import annotations

from typing import Literal, get_args

from ...errors import RequestError
from ..bundle import Bundle, Manifest
from ..draft_bundle import Draft

OnServerLoss = Literal["wait", "replay", "local", "fail"]
DraftMode = Literal["auto", "off", "chain", "tree", "ngram"]


def checked_policy(policy: OnServerLoss | None, manifest: Manifest, *, exits: bool) -> OnServerLoss:
    """What is done when the server is lost, as far as a bundle can do it.

    Args:
        policy: asked for, or None.
        manifest: of the bundle.
        exits: whether the device can go on with exits.

    Raises:
        RequestError: another word, or what this bundle cannot do.
    """
    whole = manifest.whole_on_device and not manifest.device_only
    if policy is None:
        return "local" if whole else "replay"
    if policy not in get_args(OnServerLoss):
        raise RequestError(f"on_server_loss={policy!r}: must be one of {', '.join(get_args(OnServerLoss))}")
    if policy == "local" and not (whole or exits):
        raise RequestError(
            "on_server_loss='local': the device has no layers to go on with; export with --device-layers all, "
            "give an exit agreement and no deadline to go on with the draft, or choose replay"
        )
    if policy in ("replay", "wait") and whole:
        raise RequestError(
            f"on_server_loss={policy!r}: with its own copy of the layers the device goes on at once; choose local"
        )
    return policy


def checked_draft(draft: DraftMode, manifest: Manifest, *, server: bool) -> DraftMode:
    """How to draft; ``auto`` is off where nothing can be drafted.

    Raises:
        RequestError: another word, or drafts where there can be none.
    """
    if draft not in get_args(DraftMode):
        raise RequestError(f"draft={draft!r}: must be one of {', '.join(get_args(DraftMode))}")
    reason = _nothing_to_save(manifest, "drafts", server=server)
    if reason is None or draft == "off":
        return draft
    if draft != "auto":
        raise RequestError(f"draft={draft!r}: {reason}; leave drafting off")
    return "off"


def check_exits(agreement: float, manifest: Manifest, *, server: bool, draft: DraftMode, skips: bool) -> None:
    """Raise `RequestError` where exits do not go together with the bundle or with the other options.

    Args:
        agreement: that is to be promised.
        manifest: of the bundle.
        server: whether there is one.
        draft: how tokens are drafted.
        skips: whether layers or parts of them are left out.
    """
    reason = _nothing_to_save(manifest, "exited tokens", server=server)
    if reason is None and skips:
        reason = "exits are calibrated at full depth, and a skip schedule or ffn skip leaves a part of it out"
    if reason is None and draft not in ("auto", "off"):
        reason = f"with exits nothing is drafted, and draft={draft!r} was asked for"
    if reason is not None:
        raise RequestError(f"exit agreement {agreement:g}: {reason}; leave one of them out")


def exit_threshold(agreement: float, bundle: Bundle, draft: Draft | None, *, deadline: bool) -> float:
    """How sure a bundle's draft must be of a token to keep a promised agreement.

    Args:
        agreement: 0 promises nothing, and is for deadlines alone.
        bundle: the device half.
        draft: of it, if it has one.
        deadline: whether there is one.

    Raises:
        RequestError: there is no draft or no calibration of it, or it cannot promise that.
    """
    if agreement == 0 and not deadline:
        raise RequestError(
            "exit agreement 0: must lie between 0 and 1, as 0.95 does; only with a deadline it may promise nothing"
        )
    if draft is not None and agreement == 0:
        return 0.0
    if draft is None or draft.record.exits is None:
        missing = (
            "trained draft; run `isthmus distill`"
            if draft is None
            else "calibration of its draft; run `isthmus distill --exits-only`"
        )
        raise RequestError(f"exit agreement {agreement:g}: {bundle.folder} holds no {missing}")
    threshold = draft.record.exits.threshold(agreement)
    if threshold is None:
        raise RequestError(
            f"exit agreement {agreement:g}: this draft cannot promise that, measured on "
            f"{sum(draft.record.exits.tokens)} tokens; promise less, or measure on more text"
        )
    return threshold


def _nothing_to_save(manifest: Manifest, what: str, *, server: bool) -> str | None:
    """Why tokens cannot be decided ahead of a server, if they cannot."""
    if not server:
        return "the device runs all layers itself, there is no round trip to save"
    if manifest.whole_on_device:
        return f"this bundle's sessions move between device and server, and {what} do not move with them"
    return None
