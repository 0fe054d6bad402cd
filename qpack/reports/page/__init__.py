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
from qpack.reports.page.document import document, pairs, section, table, tiles
from qpack.reports.text import HEADINGS, NUMERIC, percent, row, summary, total
from qpack.sizes import format_size


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
    return document(
        title=f"{name}: what the checkpoint holds",
        eyebrow=f"{inspection.model_type} checkpoint",
        heading=name,
        skip=("kinds", "table"),
        sections=sections,
        by="qpack inspect",
    )


def _tiles(inspection: Inspection) -> str:
    values = [
        (format_size(inspection.bytes), f"in {len(inspection.files)} file{'s' if len(inspection.files) > 1 else ''}"),
        (_short(inspection.weights), "weights"),
        (f"{inspection.bits:.3f}", "bits a weight over all"),
    ]
    if inspection.packed:
        values.append((f"{inspection.packed_bits:.3f}", "bits a packed weight"))
    if inspection.error is not None:
        values.append((percent(inspection.error), "mean error of a packed weight"))
    return tiles(values)


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
    rows = (
        (str(layer), *("" if value is None else percent(value) for value in values)) for layer, values in drawing.table
    )
    numbers = table(("layer", *drawing.kinds), rows, label="Error by layer")
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
{numbers}
</details>
</section>"""


def _provenance(inspection: Inspection) -> str:
    lines = {"directory": str(inspection.directory.resolve()), "files": _files(inspection.files)}
    lines |= {key: value for key, value in summary(inspection).items() if key in ("source", "options", "fingerprint")}
    return section("origin", "Origin", pairs(lines))


def _files(files: tuple[str, ...]) -> str:
    return ", ".join(files) if len(files) <= 4 else f"{files[0]} to {files[-1]}"


def _short(count: int) -> str:
    for unit, size in ((" B", 10**9), (" M", 10**6), (" k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
