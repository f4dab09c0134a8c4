"""The house style: palette, fonts, the look of each model, and the parts of figures."""

import functools
import io
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
import seaborn as sns
from fontTools.unicodedata import script as script_of
from fontTools.unicodedata import script_name
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

PALETTE = sns.color_palette("colorblind").as_hex()
GREY, PALE, INK = PALETTE[7], "#d9d9d9", "#333333"
MARKERS = ["o", "s", "D", "^", "v", "P", "X", "*", "<", ">"]
LINES = ["-", "--", "-.", ":"]
# Fonts for scripts that DejaVu lacks. Fonts that are not installed are skipped.
SCRIPT_FONTS = re.compile(
    r"Noto Sans|Noto Sans (?!.*(Mono|Math|Symbols)).*|Arial Unicode MS|Nirmala UI|Leelawadee UI|Ebrima|Microsoft YaHei"
    r"|Malgun Gothic|Yu Gothic|PingFang SC|Hiragino Sans|Apple SD Gothic Neo|WenQuanYi.*|Unifont"
)
STYLE = {
    **sns.axes_style("whitegrid"),
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "figure.titlesize": 15,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 7,
    "hatch.linewidth": 0.8,
    "grid.color": "#e5e5e5",
    "axes.edgecolor": "#999999",
    "text.parse_math": False,  # a task may be called "$x$"
    "pdf.fonttype": 42,
}
WIDTH = 10.0


class Look(NamedTuple):
    """How a model is drawn in every figure."""

    colour: str
    marker: str
    hatch: str


LOOKS = {
    "teacher": Look(PALETTE[0], "o", ""),
    "pruned teacher": Look(PALETTE[9], "s", "//"),
    "student": Look(PALETTE[3], "D", ""),
    "no distillation": Look(GREY, "^", "\\\\"),
    "random weights": Look(PALETTE[4], "v", ".."),
    "blank": Look(PALETTE[6], "<", "--"),
    "tf-idf": Look(INK, "X", "++"),
    "static": Look(PALETTE[5], "P", "xx"),
    "static SIF": Look(PALETTE[8], "p", "oo"),
    "pruned teacher int8": Look(PALETTE[9], "h", "||"),
    "student int8": Look(PALETTE[1], "d", "**"),
}
SPARE_LOOKS = [Look(PALETTE[2], ">", "xx"), Look("#7b4f12", "8", "++"), Look("#005f5f", "*", "--")]
BASELINES = ["majority", "word overlap", "chance", "constant", "machine"]  # rows that are no encoder
SCORES = {"accuracy": "accuracy", "macro_f1": "macro F1", "f1": "entity F1", "score": "mean score"}


@functools.cache
def font_families() -> list[str]:
    """DejaVu, which matplotlib ships on every machine, then the installed fonts of other scripts."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *sorted(filter(SCRIPT_FONTS.fullmatch, installed))]


def context() -> AbstractContextManager[None]:
    """Apply the house style; the notebook's own settings are restored afterwards."""
    return matplotlib.style.context(["default", STYLE | {"font.family": font_families()}])


class _Figure(Figure):
    """A figure that notebooks show as a picture, without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with context():
            self.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
        return buffer.getvalue()


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the house style (`context`)."""

    @functools.wraps(draw)
    def wrapper(*arguments, **named) -> Figure:
        with context():
            figure = draw(*arguments, **named)
            figure.draw_without_rendering()  # the first drawing makes the ticks, in the style set then
            figure.set_layout_engine("none")  # the layout is final: later drawings skip it
        return figure

    return wrapper


def looks(table: pd.DataFrame) -> dict[str, Look]:
    """The look of every model in the table, in the order of `LOOKS`, then of the table."""
    found = [model for model in table["model"].dropna().unique() if model not in BASELINES]
    others = [model for model in found if model not in LOOKS]
    spare = {model: SPARE_LOOKS[i % len(SPARE_LOOKS)] for i, model in enumerate(others)}
    return {model: look for model, look in (LOOKS | spare).items() if model in found}


def new_figure(title: str, height: float, width: float = WIDTH) -> Figure:
    """A figure of this size in inches, with its title; long lines of the title are broken."""
    figure = _Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    figure.suptitle("\n".join(wrap(line, round(9 * width)) for line in title.split("\n")))
    return figure


def panels(title: str, count: int, most: int, height: float, **share: bool) -> tuple[Figure, list[Axes], int]:
    """Make a figure of several panels. Panels that share an axis with the first still show its numbers.

    Args:
        title: Title of the figure.
        count: Number of panels.
        most: Largest number of panels side by side.
        height: Height of a row of panels, in inches.
        share: `sharex` or `sharey`.

    Returns:
        The figure, its axes, and the number of columns.
    """
    rows = -(-count // most)
    columns = -(-count // rows)
    figure = new_figure(title, 1.4 + height * rows)
    grid = figure.add_gridspec(rows, columns)
    axes: list[Axes] = []
    for i in range(count):
        shared = {name: axes[0] for name, wanted in share.items() if wanted and axes}
        axes.append(figure.add_subplot(grid[i], **shared))
    return figure, axes, columns


def wrap(label: str, width: int = 18) -> str:
    """A label on several lines of at most `width` characters."""
    return textwrap.fill(legible(str(label)), width)


def legible(label: str) -> str:
    """Replace every letter that no installed font has by a dot; warn once per script which font to install."""
    found = letters()
    lacking = {c for c in label if ord(c) not in found and not c.isspace() and unicodedata.category(c)[0] != "C"}
    for script in sorted({script_name(script_of(c), "its") for c in lacking}):
        warn_missing_font(script)
    return "".join("·" if c in lacking else c for c in label)


@functools.cache
def letters() -> frozenset[int]:
    """The code points that the installed fonts of figures have."""
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in font_families()]
    return frozenset(code for font in fonts for code in font.get_charmap())


@functools.cache
def warn_missing_font(script: str) -> None:
    """Warn, once per script, that its letters are drawn as dots."""
    warnings.warn(
        f"Glyph of {script} script missing: figures show dots instead until a font such as Noto Sans {script} "
        "is installed",
        stacklevel=2,
    )


def count(values: Iterable[float]) -> str:
    """`n = 204`, or `n = 200 to 204` where the counts differ; nothing where there are none."""
    counts = sorted({int(value) for value in values if pd.notna(value)})
    if not counts:
        return ""
    return f"n = {counts[0]:,}" if len(counts) == 1 else f"n = {counts[0]:,} to {counts[-1]:,}"


def whiskers(rows: pd.DataFrame) -> np.ndarray:
    """Distances from value to low and to high, [2, rows]; 0 where there is no interval."""
    value, low, high = (rows[column].to_numpy(float) for column in ("value", "low", "high"))
    return np.nan_to_num(np.maximum([value - low, high - value], 0))


def percent(axis: Axis, label: str) -> None:
    """Shares from 0 to 1 as percent."""
    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, place: f"{100 * value:.4g}")
    axis.set_label_text(label)


def score_label(rows: pd.DataFrame) -> str:
    """Name of the metric of `rows`, with its unit."""
    metric = rows["metric"].iloc[0]
    return f"{SCORES.get(metric, metric)} (%)"


def panel_title(task: str, rows: pd.DataFrame) -> str:
    """Task, with the number of test items."""
    if task == "average":
        return "average of tasks"
    return f"{wrap(task)}\n{count(rows['n'])}".strip()


def layer_axis(axes: Axes) -> None:
    """Number the layers on the x axis."""
    axes.set_xlabel("layer (0 = embeddings)")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))


def band(axes: Axes, rows: pd.DataFrame, x: str, colour: str, **line) -> None:
    """A line with its interval."""
    rows = rows.sort_values(x).astype({x: float, "value": float, "low": float, "high": float})
    axes.plot(rows[x], rows["value"], color=colour, **line)
    axes.fill_between(rows[x], rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0)


def legend(figure: Figure, handles: list) -> None:
    """Draw the legend below all panels, so that it never covers data."""
    # Widths in letters; the line and the gaps take 8.
    widths = np.array([max(map(len, handle.get_label().split("\n"))) + 8 for handle in handles])
    for columns in range(len(handles), 0, -1):
        if sum(part.max() for part in np.array_split(widths, columns)) <= 95:
            break
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def dots(axes: Axes, rows: pd.DataFrame, column: str, labels: dict[str, str], looks: dict[str, Look]) -> None:
    """Draw values with intervals, one line of dots per entry of `labels` (value of `column` -> label), downwards."""
    models = [model for model in looks if model in set(rows["model"])]
    step = min(0.8 / len(models), 0.2)
    for i, model in enumerate(models):
        mine = rows[rows["model"] == model]
        place = mine[column].map({name: place for place, name in enumerate(labels)})
        offset = (i - (len(models) - 1) / 2) * step
        axes.errorbar(
            mine["value"], place + offset, xerr=whiskers(mine), fmt=looks[model].marker, color=looks[model].colour,
            markeredgecolor="white", capsize=3, elinewidth=1.8,
        )  # fmt: skip
    for place in range(1, len(labels), 2) if len(models) > 1 else ():
        axes.axhspan(place - 0.5, place + 0.5, color="#f5f5f5", zorder=0)
    axes.set_yticks(range(len(labels)), labels.values())
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.yaxis.grid(False)
    axes.margins(x=0.06)


def model_handles(models: Iterable[str], looks: dict[str, Look]) -> list[Line2D]:
    """Legend entries of models."""
    return [
        Line2D([], [], color=looks[m].colour, marker=looks[m].marker, markeredgecolor="white", label=wrap(m, 40))
        for m in looks
        if m in set(models)
    ]
