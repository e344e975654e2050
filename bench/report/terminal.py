"""Results on the terminal: a table for each suite, dtype and direction."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.report.columns import BROKEN, SPEEDUP, legend, reasons, tables
from bench.report.groups import Group


def make_console() -> Console:
    """As wide as the terminal; without one, wide enough for the tables."""
    made = Console()
    return made if made.is_terminal else Console(width=140)


def print_report(found: list[Group], console: Console) -> None:
    for shown in tables(found):
        title = f"{shown.suite.name}, {shown.dtype}, {shown.direction}"
        printed = Table(title=title, title_justify="left")
        for i, header in enumerate(shown.headers):
            justify = "left" if i == 0 else "right"
            printed.add_column(header.replace("vs ", "vs\n"), justify=justify, no_wrap=i == 0)
        for row in shown.rows:
            printed.add_row(*map(coloured, row))
        console.print(printed)
    for suite in dict.fromkeys(g.suite for g in found):
        console.print(f"[dim]{suite.name}: {legend(suite)}[/dim]")
    for reason in reasons(found):
        console.print(f"[dim]not measured: {reason}[/dim]", highlight=False)


def coloured(cell: str) -> str:
    """Green where ours is faster, red where it is slower or a provider is broken."""
    if speedup := SPEEDUP.fullmatch(cell):
        return f"[green]{cell}[/]" if float(speedup[1]) >= 1 else f"[red]{cell}[/]"
    return f"[bold red]{cell}[/]" if cell in BROKEN else cell
