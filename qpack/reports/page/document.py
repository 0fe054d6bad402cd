"""What every page has: one file without scripts, nothing from elsewhere, light and dark, readable by screen readers."""

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("style.css")
"""The look of the house; the page of `serve.page` has it too."""


def document(*, title: str, eyebrow: str, heading: str, skip: tuple[str, str], sections: Iterable[str], by: str) -> str:
    """A whole page. ``skip``: id and name of what a keyboard can skip to. ``by``: the command that wrote the page."""
    target, name = skip
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#{target}">Skip to the {escape(name)}</a>
<header>
<p class="eyebrow">{escape(eyebrow)}</p>
<h1>{escape(heading)}</h1>
</header>
<main>
{body}
</main>
<footer><p>Written by {escape(by)}. This page needs no network.</p></footer>
</body>
</html>
"""


def section(identity: str, title: str, content: str, text: str = "") -> str:
    """A part with its heading, and a line of ``text`` under that."""
    said = f"\n<p>{escape(text)}</p>" if text else ""
    return f"""<section aria-labelledby="{identity}">
<h2 id="{identity}">{escape(title)}</h2>{said}
{content}
</section>"""


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """The few numbers that matter most, each with its label."""
    cells = "\n".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for value, label in values)
    return f'<section aria-label="Summary">\n<dl class="tiles">\n{cells}\n</dl>\n</section>'


def pairs(lines: Mapping[str, str]) -> str:
    """Labels and values."""
    items = "\n".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in lines.items())
    return f'<dl class="pairs">\n{items}\n</dl>'


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], *, label: str) -> str:
    """A table of numbers, the first column its rows' names; wider than the page, it scrolls."""
    first, *rest = headings
    heads = f'<th scope="col">{escape(first)}</th>' + "".join(
        f'<th scope="col" class="number">{escape(heading)}</th>' for heading in rest
    )
    lines = []
    for name, *values in rows:
        cells = "".join(f'<td class="number">{escape(value)}</td>' for value in values)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    body = "\n".join(lines)
    return f"""<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">
<table>
<thead><tr>{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>"""
