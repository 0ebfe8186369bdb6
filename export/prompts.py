"""Prompts for a model to answer, where it writes what its draft is trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import ExportError

LEAST_PROMPTS = 16
_PLACE = re.compile(r"{(\w+)}")
_DEFAULT = Path(__file__).parent / "drafts" / "prompts.json"


def read_prompts(path: Path) -> list[str]:
    """One prompt a line of a UTF-8 file; blank lines are left out.

    Raises:
        ExportError: the file cannot be read, or has too few.
    """
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror or error}; give a readable file with a prompt a line") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path}: not UTF-8 at byte {error.start}; convert the prompts") from error
    if len(prompts) < LEAST_PROMPTS:
        raise ExportError(f"{path}: {len(prompts)} prompts where training needs at least {LEAST_PROMPTS}; give more")
    return prompts


def default_prompts(passages: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    """Prompts without end: templates that come with the package, their places filled at random.

    Args:
        passages: texts for what is to be summarised or rewritten.
        rng: chooses.
    """
    shipped = json.loads(_DEFAULT.read_text(encoding="utf-8"))
    fillers = {**shipped["fillers"], "passage": list(passages)}
    templates = [template for template in shipped["templates"] if passages or "{passage}" not in template]
    while True:
        template = templates[rng.integers(len(templates))]
        yield _PLACE.sub(lambda place: fillers[place[1]][rng.integers(len(fillers[place[1]]))], template)
