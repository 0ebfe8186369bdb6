"""Pictures: of `isthmus eval`, what is kept over what is sent; of `isthmus plan`, speed over accuracy.

Needs matplotlib (``pip install 'isthmus[eval]'``), which is imported when a picture is asked for.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError

if TYPE_CHECKING:
    from ..export.planner import PlanReport

SUFFIXES = (".png", ".svg")
BITS = (0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # marks of the axis, as far as they are reached
# Okabe and Ito's colours, which the colour-blind tell apart, each with a mark of its own.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
    ("#000000", "X"),
)

PLOTTED_DROPS = 4  # times the limit, as far as a plan's picture reaches

Row = dict[str, Any]  # one codec and level, as --json prints it


def check_plot(path: Path, *, device_only: bool = False) -> None:
    """Refuse a picture that could not be drawn, before anything is measured.

    Raises:
        RequestError: another suffix than `SUFFIXES`, no folder, no matplotlib, or nothing that crosses a link.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"--plot {path}: must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise RequestError(f"--plot {path}: there is no folder {path.parent}; make it first")
    if device_only:
        raise RequestError(f"--plot {path}: a device-only bundle sends nothing, there are no bits to draw over")
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib; install it with pip install 'isthmus[eval]'")


def plot_text(rows: Sequence[Row], path: Path) -> None:
    """Draw KL (logarithmic) and perplexity ratio over bits per element, with standard errors.

    A KL of 0 has no place on a logarithmic scale and is left out.
    """
    first = rows[0]
    title = f"{first['tokens']} tokens, split {first['split']}, against {first['reference']}"
    panels = [("kl", "KL divergence (nats)", True), ("perplexity_ratio", "perplexity ratio", False)]
    _draw(rows, path, title, panels, {"perplexity_ratio": (1.0, "reference")})


def plot_task(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy over bits per element, with standard errors, and the reference's if there is one."""
    first = rows[0]
    title = f"{first['task']}, {first['items']} items, split {first['split']}"
    reference = first["reference_accuracy"]
    lines = {} if reference is None else {"accuracy": (reference, "reference")}
    _draw(rows, path, title, [("accuracy", "accuracy", False)], lines)


def plot_plan(report: PlanReport, path: Path) -> None:
    """Draw a plan's Pareto front, time per token over the drop in accuracy, and where one token's time goes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(10, 4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    front, parts = figure.subplots(1, 2, width_ratios=(3, 2))
    most = PLOTTED_DROPS * max(report.slack.get("max_drop", (0.0, 5.0))[1], 1.0)
    most = 1.3 * max((candidate.drop for candidate in report.pareto if candidate.drop <= most), default=most) + 0.1
    modes = sorted({candidate.mode for candidate in report.pareto})
    for mode, (color, mark) in zip(modes, STYLES, strict=False):
        points = [candidate for candidate in report.pareto if candidate.mode == mode and candidate.drop <= most]
        drops, times = ([getattr(point, name) for point in points] for name in ("drop", "ms_per_token"))
        errors = [point.time_uncertainty * point.ms_per_token for point in points]
        front.errorbar(
            drops, times, errors, fmt=f"-{mark}", markersize=4, linewidth=0.8, color=color, elinewidth=0.6, label=mode
        )
    if report.chosen is not None:
        front.plot(
            report.chosen.drop, report.chosen.ms_per_token, "o", ms=14, mfc="none", color="black", label="chosen"
        )
    front.set(xlabel="expected increase in perplexity, %", ylabel="ms per token", yscale="log")
    front.set_xlim(-0.05 * most, 1.05 * most)
    front.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    front.yaxis.set_major_formatter("{x:g}")
    front.yaxis.set_minor_locator(NullLocator())
    front.grid(alpha=0.3)
    front.legend()
    left = 0.0
    for (name, time), (color, _) in zip(report.time_parts.items(), STYLES * 2, strict=False):
        parts.barh(["one token"], [time], left=left, color=color, label=f"{name} {time:.2f} ms")
        left += time
    parts.set(xlabel="ms")
    parts.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    _save(figure, path)


def _draw(
    rows: Sequence[Row],
    path: Path,
    title: str,
    panels: Sequence[tuple[str, str, bool]],
    lines: dict[str, tuple[float, str]],
) -> None:
    """A panel for each ``(key, label, logarithmic)``, with a curve for each codec and level lines ``(y, label)``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    figure = Figure(figsize=(8.5 if len(panels) > 1 else 6.5, 3.7), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    codecs = list(dict.fromkeys(row["codec"] for row in rows))
    for axis, (key, label, logarithmic) in zip(axes, panels, strict=True):
        if key in lines:
            height, name = lines[key]
            axis.axhline(height, color="#888888", linewidth=1, linestyle="--", label=name)
        for codec, (colour, mark) in zip(codecs, STYLES * len(codecs), strict=False):
            points = sorted(
                (row["bits_per_element"], row[key], row[f"{key}_se"] or 0.0)
                for row in rows
                if row["codec"] == codec and (row[key] > 0 or not logarithmic)
            )
            if points:
                bits, values, errors = zip(*points, strict=True)
                axis.errorbar(
                    bits, values, errors, label=codec, color=colour, marker=mark, markersize=5, linewidth=1.5, capsize=3
                )
        axis.set_xscale("log", base=2)
        reached = [row["bits_per_element"] for row in rows]
        axis.xaxis.set_major_locator(FixedLocator(BITS))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlim(min(reached) / 1.2, max(reached) * 1.2)
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylabel(label)
        axis.grid(which="major", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.supxlabel(
        "bits per element of a hidden state, side information included; bars: one standard error", fontsize=10
    )
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(temporary, dpi=160)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RequestError(f"--plot {path}: cannot be written ({error}); choose another place") from error
