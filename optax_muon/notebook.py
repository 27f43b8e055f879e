"""Tables as HTML, for `_repr_html_`: in light and dark themes, without scripts or style sheets.

Colors and fonts are those of the notebook; lines are a half-transparent grey.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["html_table"]

_LINE = "1px solid rgba(128,128,128,0.5)"
_CELL = f"text-align:left;padding:0.2em 0.8em;border-bottom:{_LINE};background:none;color:inherit"


def html_table(rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose first row is the heading; all texts are escaped.

    Args:
        rows: Rows of cells.
        caption: What the table shows.

    >>> "<td" in html_table([["path"], ["<script>"]]), "<script>" in html_table([["<script>"]])
    (True, False)
    """
    heading, *body = rows
    titled = f'<caption style="text-align:left">{html.escape(caption)}</caption>' if caption else ""
    head = "".join(f'<th scope="col" style="{_CELL}">{html.escape(cell)}</th>' for cell in heading)
    lines = (
        "<tr>" + "".join(f'<td style="{_CELL}">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in body
    )
    return (
        f'<table style="border-collapse:collapse">{titled}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )
