"""Draw what a terminal shows as an SVG.

tmux capture-pane -e -p | python docs/images/terminal.py "what it shows" > docs/images/status.svg
"""

from __future__ import annotations

import re
import sys
from html import escape

_WIDTH, _HEIGHT, _MARGIN = 8.4, 19, 16  # of a character, of a line, around all
_COLOURS = {"31": "#ff7b72", "32": "#7ee787", "33": "#e3b341"}


def draw(text: str, title: str) -> str:
    """An SVG of lines of text with the usual escape sequences for colours."""
    lines = text.rstrip().splitlines()
    columns = max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in lines)
    width, height = columns * _WIDTH + 2 * _MARGIN, len(lines) * _HEIGHT + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>',
        '<g font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" '
        'font-size="14" fill="#c9d1d9" xml:space="preserve">',
    ]
    style: dict[str, str] = {}
    for number, line in enumerate(lines):
        column = 0
        for piece in re.split(r"(\x1b\[[\d;]*m)", line):
            if piece.startswith("\x1b"):
                for code in piece[2:-1].split(";"):
                    _set(style, code)
                continue
            if shown := piece.strip():
                x = _MARGIN + (column + piece.index(shown)) * _WIDTH
                y = _MARGIN + number * _HEIGHT + 14
                # Whatever font there is, the columns stay in their places.
                attributes = {
                    "x": f"{x:.1f}",
                    "y": str(y),
                    "textLength": f"{len(shown) * _WIDTH:.1f}",
                    "lengthAdjust": "spacingAndGlyphs",
                    **style,
                }
                told = " ".join(f'{name}="{value}"' for name, value in attributes.items())
                parts.append(f"<text {told}>{escape(shown)}</text>")
            column += len(piece)
    return "\n".join([*parts, "</g>", "</svg>\n"])


def _set(style: dict[str, str], code: str) -> None:
    if code in ("", "0"):
        style.clear()
    elif code == "39":
        style.pop("fill", None)
    elif code == "1":
        style["font-weight"] = "bold"
    elif code == "2":
        style["opacity"] = "0.7"
    elif code in _COLOURS:
        style["fill"] = _COLOURS[code]


if __name__ == "__main__":
    sys.stdout.write(draw(sys.stdin.read(), sys.argv[1]))
