"""A report as one HTML file: nothing is loaded from elsewhere, plots are in it as SVG."""

import re
from collections.abc import Sequence

import jinja2
from markupsafe import Markup

from flamingo_fast.bench.records import Environment
from flamingo_fast.bench.section import Section

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --text: #1d1d1f; --soft: #60646c; --line: #d9dbe0; --back: #fff; --band: #f5f6f8;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8ea; --soft: #a0a4ad; --line: #3a3d44; --back: #16171a; --band: #1f2126;
    --bad: #ff8a80; }
  /* Plots are drawn dark on nothing: turned around they keep their hues. */
  figure svg { filter: invert(1) hue-rotate(180deg); }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
nav a { margin-right: 1rem; } a { color: inherit; }
code, .soft { color: var(--soft); overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
th { vertical-align: bottom; background: var(--band); }
th.n, td.n { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; }
figcaption, li.note { color: var(--soft); font-size: .85rem; }
.failed { color: var(--bad); font-weight: 600; }
@media print { body { max-width: none; font-size: 11px; } .wide { overflow: visible; }
  table { font-size: 9px; } tr, figure { break-inside: avoid; } nav { display: none; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ environment }}</p>
<p><code>{{ command }}</code></p>
<nav>{% for section in sections %}
<a href="#{{ section.name }}{{ loop.index }}">{{ section.title }}</a>{% endfor %}
</nav>
{% for section in sections %}
<section id="{{ section.name }}{{ loop.index }}">
<h2>{{ section.title }}{% if section.seconds %}
<span class="soft">{{ "%.0f" | format(section.seconds) }} s</span>{% endif %}</h2>
{% for line in section.failures %}<p class="failed">Failed: {{ line }}</p>
{% endfor %}{% if section.name == "summary" %}{% for line in section.sentences %}<p>{{ line }}</p>
{% endfor %}{% endif %}{% for figure in section.figures %}
<figure>{{ svg(figure.svg, loop.index, section.name) }}
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}{% for table in section.tables %}<h3>{{ table.title }}</h3>
<div class="wide"><table>
<thead><tr>{% for header in table.headers %}
<th{% if loop.index0 >= table.first_number %} class="n"{% endif %}>{{ header }}</th>{% endfor %}
</tr></thead>
<tbody>{% for row in table.rows %}
<tr>{% for cell in row %}<td{% if loop.index0 >= table.first_number %} class="n"{% endif %}>
{{- cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% if table.notes %}<ul>{% for note in table.notes %}
<li class="note">{{ note }}</li>{% endfor %}</ul>
{% endif %}{% endfor %}{% if section.notes %}<ul>{% for note in section.notes %}
<li class="note">{{ note }}</li>{% endfor %}</ul>{% endif %}
</section>
{% endfor %}
</body>
</html>
"""


def html(
    environment: Environment | str,
    command: str,
    sections: Sequence[Section],
    title: str = "flamingo_fast benchmarks",
) -> str:
    """The page; what is in it as text is escaped.

    Arguments:
        environment: what the numbers depend on.
        command: that made it.
        sections: the first, "summary", has the sentences of all.
    """
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False
    ).from_string(_PAGE)
    return template.render(
        environment=str(environment),
        command=command,
        sections=sections,
        title=title,
        svg=_inline,
    )


def _inline(svg: str, index: int, section: str) -> Markup:
    """Without its size in points, so that it fits a phone; ids of two plots must differ."""
    prefix = f"{section}{index}-"
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r'(xlink:href="#|href="#|url\(#)', rf"\1{prefix}", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    width = re.search(r'viewBox="0 0 ([\d.]+)', head)
    style = f' style="width:{float(width[1]) * 4 / 3:.0f}px"' if width else ""
    return Markup(f"{head}{style}>{rest}")
