"""Small pieces of HTML."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def figure(svg: str, caption: str, *, heading: str = "") -> str:
    """A chart with its caption."""
    head = f"<h4>{escape(heading)}</h4>" if heading else ""
    return f"<figure>{head}{svg}<figcaption>{caption}</figcaption></figure>"


def side_by_side(figures: Iterable[str]) -> str:
    """Figures in a row that wraps."""
    return f'<div class="row">{"".join(figures)}</div>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Headline figures: (value, what it is, class of the value)."""
    cells = "".join(
        f'<div class="tile"><b class="{kind}">{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label, kind in entries
    )
    return f'<div class="tiles">{cells}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "") -> str:
    """A table whose first column names its rows."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{escape(str(first))}</th>{"".join(_cell(v) for v in rest)}</tr>'
        for first, *rest in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    """True and False as a good and a bad sign, floats with three digits."""
    if isinstance(value, bool):
        return f'<td class="{"good" if value else "bad"}">{"yes" if value else "no"}</td>'
    return f"<td>{value:.3f}</td>" if isinstance(value, float) else f"<td>{escape(str(value))}</td>"
