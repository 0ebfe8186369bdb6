"""The codecs of an opened bundle, by name and level."""

from __future__ import annotations

from ..errors import CodecError
from ..quant.codec import CODECS, Codec, Raw16, Raw32
from ..quant.klt import KLT, KLTTables
from ..quant.tabq import TOLERANCES, TabQ
from ..quant.tabq_rans import TabQRans, TabQTables
from ..quant.trellis import has_native
from .bundle import Bundle

DEFAULT_LEVEL = 2


def default_codec(bundle: Bundle) -> str:
    """The codec to use where none is asked for: the one that sends least for its errors."""
    return "klt" if "klt" in bundle.manifest.codecs and has_native() else "tabq"


def open_codec(bundle: Bundle, name: str, level: int | None = None) -> Codec:
    """Make a codec for the hidden states at a bundle's split.

    Args:
        bundle: either half; both give codecs that understand each other.
        name: one of those that the manifest lists.
        level: from 0, the finest; by default `DEFAULT_LEVEL`. ``raw32`` and ``raw16`` have none. What encodes
            needs it; a payload says itself how to decode it.

    Raises:
        CodecError: an unknown name, or a level that the codec does not have.
    """
    known = [codec for codec in bundle.manifest.codecs if codec in CODECS]
    if name not in known:
        raise CodecError(f"codec {name!r} is unknown; choose one of {', '.join(known)}")
    match name:
        case "raw32":
            return _without_level(Raw32(), level)
        case "raw16":
            return _without_level(Raw16(), level)
        case "klt":
            arch = bundle.manifest.architecture
            klt = KLTTables.load(bundle.folder, d_model=arch.d_model, vocab_size=arch.vocab_size)
            return KLT(klt, _checked(name, level, len(klt.levels)))
        case "tabq-rans":
            tables = TabQTables.load(bundle.folder, d_model=bundle.manifest.architecture.d_model)
            return TabQRans(tables, _tabq(name, level))
        case _:
            return _tabq(name, level)


def _tabq(name: str, level: int | None) -> TabQ:
    return TabQ(tolerance=TOLERANCES[_checked(name, level, len(TOLERANCES))])


def _without_level(codec: Codec, level: int | None) -> Codec:
    if level is not None:
        raise CodecError(f"level {level}: codec {codec.name} has no levels; leave it out or choose another codec")
    return codec


def _checked(name: str, level: int | None, levels: int) -> int:
    level = DEFAULT_LEVEL if level is None else level
    if not 0 <= level < levels:
        raise CodecError(f"level {level}: codec {name} of this bundle has levels 0 (finest) to {levels - 1}")
    return level
