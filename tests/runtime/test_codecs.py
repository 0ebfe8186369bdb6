from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isthmus.errors import CodecError
from isthmus.export.tabq_fit import fit_tabq
from isthmus.runtime.bundle import Bundle, open_bundle
from isthmus.runtime.codecs import open_codec


@pytest.fixture
def bundle(tiny) -> Bundle:
    return open_bundle(Path(tiny.bundle("llama", split=1)) / "device")


@pytest.mark.parametrize("name", ["raw32", "raw16", "tabq"])
def test_a_bundle_opens_the_codecs_that_its_manifest_lists(bundle: Bundle, name: str) -> None:
    assert open_codec(bundle, name).name == name


def test_a_finer_level_takes_more_bytes(bundle: Bundle) -> None:
    hidden = np.random.default_rng(0).standard_normal((5, 576)).astype("f4")
    sizes = [len(open_codec(bundle, "tabq", level).encode(hidden)) for level in range(4)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2


def test_every_level_of_tabq_rans_reconstructs_what_tabq_does(bundle: Bundle) -> None:
    d_model = bundle.manifest.architecture.d_model
    hidden = np.random.default_rng(0).standard_t(6, (40, d_model)).astype("f4")
    fit_tabq([hidden]).save(bundle.folder)
    listed = replace(bundle, manifest=replace(bundle.manifest, codecs=("tabq", "tabq-rans")))
    for level in range(5):
        packed, coded = open_codec(listed, "tabq", level), open_codec(listed, "tabq-rans", level)
        assert coded.name == "tabq-rans"
        payload = coded.encode(hidden)
        assert (
            coded.decode(payload, 40, d_model).tobytes() == packed.decode(packed.encode(hidden), 40, d_model).tobytes()
        )
    with pytest.raises(CodecError, match="levels 0"):
        open_codec(listed, "tabq-rans", 5)


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("zip", None, "codec 'zip' is unknown; choose one of raw32, raw16, tabq"),
        ("raw16", 1, "raw16 has no levels"),
        ("tabq", 9, r"levels 0 \(finest\) to 4"),
        ("tabq", -1, "level -1"),
    ],
)
def test_what_a_bundle_does_not_hold_is_refused(bundle: Bundle, name: str, level: int | None, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        open_codec(bundle, name, level)
