"""Progress on the terminal: live bars where there is a terminal and ``rich``, plain lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class PlainProgress:
    """Prints the lines and no bars: for logs, pipes, and terminals without ``rich``."""

    live = False

    def add(self, name: str, total: int, done: int = 0) -> Any:
        return None

    def update(self, bar: Any, done: int, status: str | None = None) -> None:
        pass

    def line(self, text: str) -> None:
        print(text, flush=True)


class LiveProgress:
    """Bars that stay at the bottom while lines scroll by above them."""

    live = True

    def __init__(self, bars: Any) -> None:
        self._bars = bars

    def add(self, name: str, total: int, done: int = 0) -> Any:
        return self._bars.add_task(name, total=total, completed=done, status="")

    def update(self, bar: Any, done: int, status: str | None = None) -> None:
        fields = {} if status is None else {"status": status}
        self._bars.update(bar, completed=done, **fields)

    def line(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)


class SilentProgress(PlainProgress):
    """For the ranks that do not write."""

    def line(self, text: str) -> None:
        pass


@contextmanager
def progress(*, silent: bool = False) -> Iterator[PlainProgress | LiveProgress]:
    if silent:
        yield SilentProgress()
        return
    try:
        from rich import progress as rich_progress
    except ImportError:
        rich_progress = None
    if rich_progress is None or not sys.stdout.isatty():
        yield PlainProgress()
        return
    columns = (
        rich_progress.TextColumn("{task.description:<8}"),
        rich_progress.BarColumn(bar_width=28),
        rich_progress.TaskProgressColumn(),
        rich_progress.TextColumn("{task.fields[status]}", style="dim"),
        rich_progress.TimeRemainingColumn(compact=True),
    )
    # Four times a second: the bars share the CPU with the training they show.
    with rich_progress.Progress(*columns, refresh_per_second=4) as bars:
        yield LiveProgress(bars)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "   ".join((first, *rest)).rstrip()

    return "\n".join((line(header), "-" * (sum(widths) + 3 * (len(widths) - 1)), *map(line, rows)))
