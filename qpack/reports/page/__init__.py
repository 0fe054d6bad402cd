"""An inspection as one HTML page: no scripts, nothing from elsewhere, readable by screen readers, light and dark.

The page holds what `qpack.reports.text` prints, and the error of each kind of module over the layers as a drawing, with
the same numbers in a table below it.
"""

import os
import tempfile
from html import escape
from pathlib import Path

from qpack.errors import OutputExistsError
from qpack.inspection import Inspection
from qpack.reports.page.chart import Chart, chart
from qpack.reports.text import HEADINGS, NUMERIC, percent, row, summary, total
from qpack.sizes import format_size

_STYLE = Path(__file__).with_name("style.css")


def write(inspection: Inspection, path: Path, *, force: bool) -> None:
    """Write the page to ``path``, whole or not at all.

    Raises:
        OutputExistsError: if ``path`` exists and ``force`` is not set, or is a directory.
    """
    if path.is_dir():
        raise OutputExistsError(f"{path}: is a directory, expected the name of a file to write")
    if path.exists() and not force:
        raise OutputExistsError(f"{path}: already exists (--force replaces it)")
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(page(inspection))
            file.flush()
            os.fchmod(descriptor, 0o644)
            os.fsync(descriptor)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def page(inspection: Inspection) -> str:
    """The page."""
    name = inspection.directory.resolve().name
    drawing = chart(inspection)
    sections = [_tiles(inspection), _storage(inspection), _kinds(inspection)]
    sections.append(_errors(drawing) if drawing else _NO_ERRORS)
    sections.append(_provenance(inspection))
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)}: what the checkpoint holds</title>
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#kinds">Skip to the table</a>
<header>
<p class="eyebrow">{escape(inspection.model_type)} checkpoint</p>
<h1>{escape(name)}</h1>
</header>
<main>
{body}
</main>
<footer><p>Written by qpack inspect. This page needs no network.</p></footer>
</body>
</html>
"""


def _tiles(inspection: Inspection) -> str:
    tiles = [
        (format_size(inspection.bytes), f"in {len(inspection.files)} file{'s' if len(inspection.files) > 1 else ''}"),
        (_short(inspection.weights), "weights"),
        (f"{inspection.bits:.3f}", "bits a weight over all"),
    ]
    if inspection.packed:
        tiles.append((f"{inspection.packed_bits:.3f}", "bits a packed weight"))
    if inspection.error is not None:
        tiles.append((percent(inspection.error), "mean error of a packed weight"))
    cells = "\n".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for value, label in tiles)
    return f'<section aria-label="Summary">\n<dl class="tiles">\n{cells}\n</dl>\n</section>'


def _storage(inspection: Inspection) -> str:
    """A bar of the bytes by dtype, with its legend."""
    dtypes = inspection.by_dtype()
    whole = max(inspection.bytes, 1)
    parts, legend = [], []
    for index, (dtype, (count, _, size)) in enumerate(dtypes.items()):
        share = 100 * size / whole
        parts.append(f'<span class="s{index % 8}" style="flex-grow:{share:.4f}"></span>')
        text = f"<b>{escape(dtype)}</b> {format_size(size)}, {share:.1f} %, {count} tensors"
        legend.append(f'<li><i class="s{index % 8}"></i>{text}</li>')
    items = "\n".join(legend)
    return f"""<section aria-labelledby="storage">
<h2 id="storage">Where the bytes are</h2>
<div class="bar" aria-hidden="true">{"".join(parts)}</div>
<ul class="legend">
{items}
</ul>
</section>"""


def _kinds(inspection: Inspection) -> str:
    columns = len(HEADINGS) if inspection.error is not None else len(HEADINGS) - 2

    def cells(values: tuple[str, ...]) -> str:
        first, *rest = values[:columns]
        found = [f'<th scope="row">{escape(first)}</th>']
        for heading, value in zip(HEADINGS[1:], rest, strict=False):
            found.append(
                f'<td class="number">{escape(value)}</td>' if heading in NUMERIC else f"<td>{escape(value)}</td>"
            )
        return "".join(found)

    heads = "".join(
        f'<th scope="col"{" class=number" if heading in NUMERIC else ""}>{heading}</th>'
        for heading in HEADINGS[:columns]
    )
    rows = "\n".join(f"<tr>{cells(row(kind))}</tr>" for kind in inspection.by_kind())
    return f"""<section aria-labelledby="kinds">
<h2 id="kinds">By kind of module</h2>
<p>NF4/64 is four bits a weight and a scale for every 64 of them; nested: those scales are in 8 bits. Error: the norm of
what packing changed over that of the weight.</p>
<div class="scroll" role="region" aria-labelledby="kinds" tabindex="0">
<table>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
<tfoot><tr>{cells(total(inspection))}</tr></tfoot>
</table>
</div>
</section>"""


_NO_ERRORS = """<section aria-labelledby="errors">
<h2 id="errors">Error by layer</h2>
<p>Not known: there is no qpack.json with errors beside the weights.</p>
</section>"""


def _errors(drawing: Chart) -> str:
    heads = "".join(f'<th scope="col" class="number">{escape(kind)}</th>' for kind in drawing.kinds)
    rows = "\n".join(
        f'<tr><th scope="row">{layer}</th>'
        + "".join(f'<td class="number">{"" if value is None else percent(value)}</td>' for value in values)
        + "</tr>"
        for layer, values in drawing.table
    )
    return f"""<section aria-labelledby="errors">
<h2 id="errors">Error by layer</h2>
<p>The mean over the experts of a layer, where there are any.
The axis does not begin at zero. Point at a mark for its value.</p>
<figure>
<div class="scroll" role="region" aria-label="Drawing" tabindex="0">
{drawing.svg}
</div>
<figcaption>
<ul class="legend">
{drawing.legend}
</ul>
</figcaption>
</figure>
<details>
<summary>The same as a table</summary>
<div class="scroll" role="region" aria-label="Error by layer" tabindex="0">
<table>
<thead><tr><th scope="col">layer</th>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</details>
</section>"""


def _provenance(inspection: Inspection) -> str:
    lines = {"directory": str(inspection.directory.resolve()), "files": _files(inspection.files)}
    lines |= {key: value for key, value in summary(inspection).items() if key in ("source", "options", "fingerprint")}
    items = "\n".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in lines.items())
    return f"""<section aria-labelledby="origin">
<h2 id="origin">Origin</h2>
<dl class="pairs">
{items}
</dl>
</section>"""


def _files(files: tuple[str, ...]) -> str:
    return ", ".join(files) if len(files) <= 4 else f"{files[0]} to {files[-1]}"


def _short(count: int) -> str:
    for unit, size in ((" B", 10**9), (" M", 10**6), (" k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
