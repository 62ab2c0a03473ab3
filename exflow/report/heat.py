"""Heat maps of affinity as small PNG images inside SVG: one pixel for a pair of experts.

The image is one colour whose opacity is the value, so it suits a light and a dark page alike.
"""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from exflow.report.svg import chart, text

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLOUR = (37, 118, 200)
SIDE = 250.0


def heat_map(
    title: str,
    values: NDArray[np.float64],
    rank_of_row: NDArray[np.int64],
    rank_of_column: NDArray[np.int64],
    *,
    most: float,
) -> str:
    """(experts, experts) affinities as shades, with lines between the ranks.

    Args:
        title: What is shown.
        values: 0 to `most`, in the order to show.
        rank_of_row: (experts,) rising.
        rank_of_column: (experts,) rising.
        most: The value of full colour.
    """
    left, top = 30.0, 20.0
    picture = base64.b64encode(png(np.clip(values / most, 0, 1))).decode()
    cell = SIDE / len(values)
    marks = [
        f'<image x="{left}" y="{top}" width="{SIDE}" height="{SIDE}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{picture}">'
        f"<title>{escape(title)}</title></image>",
        f'<rect x="{left}" y="{top}" width="{SIDE}" height="{SIDE}" class="frame"/>',
    ]
    for ranks, is_row in ((rank_of_row, True), (rank_of_column, False)):
        marks += _borders(ranks, cell, left, top, is_row=is_row)
    return chart(title, left + SIDE + 4, top + SIDE + 4, marks)


def _borders(
    ranks: NDArray[np.int64], cell: float, left: float, top: float, *, is_row: bool
) -> list[str]:
    """Lines between the ranks of one side, and the ranks' numbers."""
    marks = []
    for rank in np.unique(ranks):
        places = np.flatnonzero(ranks == rank) * cell
        start, middle = places[0], places.mean() + cell / 2
        if is_row:
            line = f"M{left} {top + start:.2f}h{SIDE}"
            marks.append(text(left - 6, top + middle + 4, str(rank), "muted", "end"))
        else:
            line = f"M{left + start:.2f} {top}v{SIDE}"
            marks.append(text(left + middle, top - 6, str(rank), "muted", "middle"))
        marks.append(f'<path d="{line}" class="border"/>')
    return marks


def png(opacity: NDArray[np.float64]) -> bytes:
    """A PNG of one colour with (rows, columns) opacities from 0 to 1."""
    height, width = opacity.shape
    pixels = np.empty((height, width, 4), dtype=np.uint8)
    pixels[:, :, :3] = COLOUR
    pixels[:, :, 3] = np.round(opacity * 255)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
