"""Parts of HTML that widgets show."""

import html
from collections.abc import Sequence

from matplotlib.colors import to_hex, to_rgb

from kdlib.viz.style import PALETTE


def escape(text: object) -> str:
    """Escape text for HTML; each dollar gets its own element, else a pair is typeset as an equation."""
    return html.escape(str(text)).replace("$", "<span>$</span>")


def page(*parts: str) -> str:
    """Parts of HTML as one block, large enough for a projector."""
    return f'<div style="font-size:16px;line-height:1.5;max-width:980px">{"".join(parts)}</div>'


def paragraph(text: str) -> str:
    """A paragraph of HTML."""
    return f'<p style="margin:8px 0">{text}</p>'


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells."""
    cell = "text-align:left;vertical-align:top;padding:4px 14px 4px 0;border-bottom:1px solid #ccc;font-size:16px"

    def line(kind: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f'<{kind} style="{cell}">{text}</{kind}>' for text in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<table style="border-collapse:collapse;margin:8px 0">{line("th", head)}{body}</table>'


def bar(length: float, colour: str, label: str) -> str:
    """A bar of a length from 0 to 1 with its label, in a column of fixed width."""
    block = f"display:inline-block;height:14px;background:{colour};width:{max(1, round(180 * length))}px"
    return f'<span style="display:inline-block;width:260px"><span style="{block}"></span> {label}</span>'


def tint(colour: str, share: float = 0.25) -> str:
    """A colour, mostly transparent."""
    return to_hex([1 - share * (1 - part) for part in to_rgb(colour)])


def mark(text: str) -> str:
    """Marked text: bold, underlined and on a tint."""
    look = f"background:{tint(PALETTE[1], 0.4)};color:#222;text-decoration:underline"
    return f'<b style="{look}">{text}</b>'
