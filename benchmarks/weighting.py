"""What it is worth to weight klt's transform by the back's sensitivity: two exports, with and without, measured alike.

    python benchmarks/weighting.py --text wiki.test.raw [--split 10] [--tokens 4096] [--json]

Without, the transform is that of the plain covariance, whose coefficients of equal error do equal harm to the hidden
state, not to the predictions. Everything else of the export is the same. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from isthmus.cli.progress import progress_bar
from isthmus.export.export import export_bundle
from isthmus.runtime.chain import Chain
from isthmus.runtime.evaluate import BundleReference, evaluate_text, open_whole, read_text, text_windows

WINDOW = 512
LEVELS = (1, 2, 3, 4)


def unweighted(gradients: NDArray[np.float32]) -> NDArray[np.float64]:
    """All directions alike."""
    return np.eye(gradients.shape[1])


def measure(model: str, text: Path, split: int, tokens: int) -> list[dict[str, Any]]:
    """A row for each transform and level."""
    rows = []
    for name in ("weighted", "plain"):
        plain = patch("isthmus.export.klt_fit._sensitivity", unweighted)
        with tempfile.TemporaryDirectory() as scratch, progress_bar() as progress:
            out = Path(scratch, "bundle")
            with plain if name == "plain" else nullcontext():
                export_bundle(model, out, split=split, progress=progress)
            chain = Chain.open(out / "device", out / "server")
            windows = text_windows(chain.tokenizer, read_text(text)[0], window=WINDOW, tokens=tokens)
            reference = BundleReference(open_whole(out, chain.manifest), windows)
            codecs = chain.codecs(["klt"], LEVELS)
            results = evaluate_text(chain, windows, codecs, reference, progress=progress)
            rows += [{"transform": name} | result.to_dict() for result in results]
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--split", type=int, default=10, metavar="N")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(args.model, args.text, args.split, args.tokens)
    if args.json:
        print(json.dumps(rows))
        return
    columns = (
        "transform",
        "level",
        "bits_per_element",
        "kl",
        "kl_se",
        "top1",
        "perplexity_ratio",
        "perplexity_ratio_se",
    )
    cells = [[row[column] for column in columns] for row in rows]
    print(tabulate(cells, columns, floatfmt=("", "", ".2f", ".4f", ".4f", ".3f", ".3f", ".3f")))


if __name__ == "__main__":
    main()
