"""The codecs of an opened bundle, by name and level."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CodecError
from ..quant.codec import CODECS, Codec, Raw16, Raw32
from ..quant.ids import Ids
from ..quant.klt import KLT, KLTTables
from ..quant.tabq import TOLERANCES, TabQ
from ..quant.tabq_rans import TabQRans, TabQTables
from ..quant.trellis import has_native
from .bundle import Bundle
from .segments import Embedding

DEFAULT_LEVEL = 2


def default_codec(bundle: Bundle) -> str:
    """The codec to use where none is asked for: the one that sends least for its errors."""
    if bundle.manifest.server_only:
        return "ids"
    return "klt" if "klt" in bundle.manifest.codecs and has_native() else "tabq"


def open_codec(bundle: Bundle, name: str, level: int | None = None) -> Codec:
    """Make a codec for the hidden states at a bundle's split.

    Args:
        bundle: either half; both give codecs that understand each other. ``ids`` decodes on the server's alone.
        name: one of those that the manifest lists.
        level: from 0, the finest; by default `DEFAULT_LEVEL`. ``raw32``, ``raw16`` and ``ids`` have none. What encodes
            needs it; a payload says itself how to decode it.

    Raises:
        CodecError: an unknown name, or a level that the codec does not have.
    """
    levels = open_levels(bundle, name)
    return levels[checked_level(levels, level)]


def open_levels(bundle: Bundle, name: str) -> tuple[Codec, ...]:
    """Make a codec at each of its levels, from the finest, over the same tables; one without levels alone.

    Raises:
        CodecError: an unknown name.
    """
    known = [codec for codec in bundle.manifest.codecs if codec in CODECS]
    if name not in known:
        if name in ("klt", "tabq-rans"):
            reason = "needs calibration, which this bundle was exported without"
        else:
            reason = "is not for this bundle" if name in CODECS else "is unknown"
        raise CodecError(f"codec {name!r} {reason}; choose one of {', '.join(known)}")
    arch = bundle.manifest.architecture
    tabq = tuple(TabQ(tolerance=tolerance) for tolerance in TOLERANCES)
    match name:
        case "raw32":
            return (Raw32(),)
        case "raw16":
            return (Raw16(),)
        case "ids":
            return (Ids(arch.vocab_size, Embedding(bundle).rows if bundle.segments("embed") else None),)
        case "klt":
            klt = KLTTables.load(bundle.folder, d_model=arch.d_model, vocab_size=arch.vocab_size)
            return tuple(KLT(klt, level) for level in range(len(klt.levels)))
        case "tabq-rans":
            tables = TabQTables.load(bundle.folder, d_model=arch.d_model)
            return tuple(TabQRans(tables, each) for each in tabq)
        case _:
            return tabq


def checked_level(levels: Sequence[Codec], level: int | None) -> int:
    """The level to use of what `open_levels` made, where ``level`` is asked for.

    Raises:
        CodecError: the codec does not have it.
    """
    name = levels[0].name
    if len(levels) == 1:
        if level is not None:
            raise CodecError(f"level {level}: codec {name} has no levels; leave it out or choose another codec")
        return 0
    level = DEFAULT_LEVEL if level is None else level
    if not 0 <= level < len(levels):
        raise CodecError(f"level {level}: codec {name} of this bundle has levels 0 (finest) to {len(levels) - 1}")
    return level
