"""Draw the picture of `report --folded FILE`: python flame_graph.py FILE > who-hangs.svg."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

WIDTH, ROW, CHARACTER = 1000, 17, 5.9
TIP, CHILD, FRAMES = "#9db7d6", "#d9d9d9", ("#f6c26b", "#f2b45a", "#efa75a", "#f4cd85")


class Node:
    """A frame, with all that was called from it."""

    def __init__(self) -> None:
        self.count = 0
        self.called: dict[str, Node] = {}

    def height(self) -> int:
        """How many rows it needs."""
        return 1 + max((node.height() for node in self.called.values()), default=0)


def read(text: str) -> Node:
    """The stacks, those with the same beginnings together."""
    root = Node()
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        node = root
        node.count += int(count)
        for frame in stack.split(";"):
            node = node.called.setdefault(frame, Node())
            node.count += int(count)
    return root


def boxes(node: Node, scale: float, left: float, bottom: float) -> Iterator[str]:
    """What is above a frame."""
    for name, called in sorted(node.called.items(), key=lambda item: -item[1].count):
        width = called.count * scale
        color = FRAMES[sum(name.encode()) % len(FRAMES)]
        if not called.called:
            color = TIP
        elif name == "its child process":
            color = CHILD
        room = int((width - 6) / CHARACTER)
        label = name if len(name) <= room else f"{name[: room - 1]}…"
        yield (
            f"<g><title>{escape(name)}: {called.count}</title>"
            f'<rect x="{left:.1f}" y="{bottom - ROW:.1f}" width="{width - 1:.1f}" '
            f'height="{ROW - 1}" rx="2" fill="{color}"/>'
            f'<text x="{left + 3:.1f}" y="{bottom - 5:.1f}">{escape(label)}</text></g>'
        )
        yield from boxes(called, scale, left, bottom - ROW)
        left += width


def draw(text: str) -> str:
    """The picture of what `report --folded` has written."""
    root = read(text)
    height = ROW * (root.height() - 1) + 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="9.8">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        *boxes(root, WIDTH / root.count, 0, height - 1),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(draw(Path(sys.argv[1]).read_text()))
