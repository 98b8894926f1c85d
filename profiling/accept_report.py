"""Results of `accept` for people: a table for the terminal, and a page. Plain text and HTML alone,
as nothing may have to be installed."""

from collections.abc import Sequence
from html import escape

from flamingo_fast.profiling.accept_results import Results, StageResult

_MOST_FAILED = 10

_STYLE = """
:root { --text: #1d1d1f; --soft: #60646c; --line: #d9dbe0; --back: #fff; --good: #1a7f37;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8ea; --soft: #a0a4ad; --line: #3a3d44;
  --back: #16171a; --good: #4ac26b; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 76rem; margin: 0 auto; padding: 1rem; }
a { color: inherit; } h2 { margin-top: 2rem; } .soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
.passed { color: var(--good); } .failed, .running { color: var(--bad); font-weight: 600; }
.skipped { color: var(--soft); } td { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def text_table(results: Results) -> str:
    """A line for each stage, and below what failed and what was not exercised."""
    rows = [
        (each.name, each.status, f"{each.seconds:.1f}", f"{each.limit_s:g}", _counts(each))
        for each in results.stages
    ]
    header = ("stage", "status", "seconds", "at most", "checks")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    reasons = ["why", *(each.reason for each in results.stages)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), reason])
        for row, reason in zip((header, *rows), reasons, strict=True)
    ]
    lines.insert(1, "-" * max(map(len, lines[:1])))
    for stage in results.stages:
        failed = stage.with_status("failed")
        lines += [
            f"FAILED {stage.name}: {each.name}: {each.detail}" for each in failed[:_MOST_FAILED]
        ]
        if len(failed) > _MOST_FAILED:
            lines.append(f"FAILED {stage.name}: and {len(failed) - _MOST_FAILED} more")
    for stage in results.stages:
        lines += [f"not exercised, {stage.name}: {each}" for each in stage.not_exercised]
    total = sum(each.seconds for each in results.stages)
    lines.append(f"{len(results.stages)} stages in {total:.0f} s, {len(results.failed)} failed")
    return "\n".join(line.rstrip() for line in lines)


def _counts(stage: StageResult) -> str:
    counts = (len(stage.with_status(status)) for status in ("passed", "failed", "skipped"))
    return "/".join(map(str, counts))


def page(results: Results, *, tables: bool = True) -> str:
    """report.html.

    Arguments:
        tables: False leaves out all but the stages' statuses and what failed.
    """
    stages = [
        [
            f'<a href="#{escape(each.name)}">{escape(each.name)}</a>',
            _status(each.status),
            f"{each.seconds:.1f}",
            f"{each.limit_s:g}",
            _counts(each),
            escape(each.reason),
        ]
        for each in results.stages
    ]
    headers = ("stage", "status", "seconds", "at most", "passed/failed/skipped", "why")
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>flamingo_fast accept</title><style>{_STYLE}</style></head><body>",
        f"<h1>flamingo_fast accept, {escape(results.device)}{', quick' * results.quick}</h1>",
        f'<p class="soft"><code>{escape(results.command)}</code></p>',
        _table(headers, stages),
        *(_section(each, tables) for each in results.stages),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _status(status: str) -> str:
    return f'<span class="{escape(status)}">{escape(status)}</span>'


def _section(stage: StageResult, tables: bool) -> str:
    environment = ", ".join(f"{name} {each}" for name, each in stage.environment.items())
    parts = [
        f'<h2 id="{escape(stage.name)}">{escape(stage.name)}: {escape(stage.about)}</h2>',
        f"<p>{_status(stage.status)} {escape(stage.reason)}</p>",
        f'<p class="soft">{escape(stage.started)}; {escape(environment)}</p>',
    ]
    parts += [f"<p>Not exercised: {escape(each)}</p>" for each in stage.not_exercised]
    if stage.files:
        links = ", ".join(f'<a href="{escape(name)}">{escape(name)}</a>' for name in stage.files)
        parts.append(f"<p>Files: {links}</p>")
    if stage.left_out:
        parts.append(f"<p>{stage.left_out} checks and rows are left out.</p>")
    for each in stage.tables if tables else ():
        rows = [[escape(cell) for cell in row] for row in each.rows]
        parts += [f"<h3>{escape(each.title)}</h3>", _table(each.headers, rows)]
    shown = stage.checks if tables else stage.with_status("failed")
    if shown:
        # What failed comes first.
        ordered = sorted(shown, key=lambda each: each.status != "failed")
        rows = [[escape(each.name), _status(each.status), escape(each.detail)] for each in ordered]
        parts += ["<h3>Checks</h3>", _table(("check", "status", "detail"), rows)]
    return "\n".join(parts)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of cells that are HTML."""
    head = "".join(f"<th>{escape(each)}</th>" for each in headers)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'
