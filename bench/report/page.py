"""The README of a results folder as one HTML file that holds its tables and plots."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

from bench.report.columns import BROKEN, SPEEDUP

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { border-bottom: 1px solid #ddd; padding-bottom: .3rem }
img { max-width: 100% }
.table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th { text-align: left }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e5e5e5 }
tbody tr:hover { background: #f6f6f6 }
.faster { color: #00704f } .slower { color: #b3261e } .wrong { color: #b3261e; font-weight: bold }
"""
FASTER = re.compile(rf"(<td[^>]*>)({SPEEDUP.pattern})(</td>)")
WRONG = re.compile(rf"(<td[^>]*)>({'|'.join(BROKEN)})<")


def page(text: str, folder: Path) -> str:
    """``text`` is the Markdown of the README, ``folder`` holds its images."""
    from markdown_it import MarkdownIt

    body = MarkdownIt().enable("table").render(text)
    body = body.replace("<table>", '<div class="table"><table>')
    body = body.replace("</table>", "</table></div>")
    body = FASTER.sub(_coloured, body)
    body = WRONG.sub(r'\1 class="wrong">\2<', body)
    body = re.sub(r'<img src="([^"]+)"', lambda m: f'<img src="{_inline(folder / m[1])}"', body)
    title = escape(text.splitlines()[0].removeprefix("# "))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'


def _coloured(cell: re.Match) -> str:
    start, shown, ratio, end = cell.groups()
    return f'{start}<span class="{"faster" if float(ratio) >= 1 else "slower"}">{shown}</span>{end}'


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
