"""The HTML report. Everything is inline: it can be mailed, and opened years later, without a network."""

import html
from collections.abc import Sequence
from importlib.resources import files

from megatron_aspo.report.runs import Run
from megatron_aspo.report.samples import PAGE_BYTES, load_samples, samples_json, without_script
from megatron_aspo.report.tables import comparison_rows, config_differences, facts, summary_rows
from megatron_aspo.run_folder import CONFIG_FILE


def make_page(runs: Sequence[Run], plots: Sequence[tuple[str, str]]) -> str:
    """plots: (title, <svg> element)."""
    title = runs[0].label if len(runs) == 1 else " · ".join(run.label for run in runs)
    body = _one(runs[0], plots) if len(runs) == 1 else _several(runs, plots)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
{body}
{_samples(runs)}
{_configurations(runs)}
</body>
</html>
"""


def _one(run: Run, plots: Sequence[tuple[str, str]]) -> str:
    rows = "\n".join(_row(name, [text]) for name, text in [*facts(run), *summary_rows(run)])
    return f"<h1>{html.escape(run.label)}</h1>\n<table>\n{rows}\n</table>\n{_curves(plots)}"


def _several(runs: Sequence[Run], plots: Sequence[tuple[str, str]]) -> str:
    legend = "\n".join(f"<li>{_name(run)}</li>" for run in runs)
    differences = config_differences(runs)
    settings = (
        _table(runs, differences, "settings")
        if differences
        else "<p>None that is recorded: the configurations are the same, or were not kept.</p>"
    )
    return f"""<h1>{len(runs)} runs compared</h1>
<ul class="legend">
{legend}
</ul>
{_table(runs, comparison_rows(runs), "results")}
<p class="note">Brackets are 95 % intervals; that of a difference takes the runs' held-out problems for independent
draws. Metrics of training are means over the last tenth of a run's steps.</p>
{_curves(plots)}
<h2>Settings that differ</h2>
{settings}"""


def _table(runs: Sequence[Run], rows: Sequence[tuple[str, Sequence[str]]], kind: str) -> str:
    heads = "".join(f'<th scope="col">{_name(run)}</th>' for run in runs)
    lines = "\n".join(_row(name, cells) for name, cells in rows)
    return (
        f'<div class="wide"><table class="{kind}">\n<thead><tr><td></td>{heads}</tr></thead>\n{lines}\n</table></div>'
    )


def _row(name: str, cells: Sequence[str]) -> str:
    return f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"


def _name(run: Run) -> str:
    """Letter and label beside the run's line, as it is in the plots."""
    dashes = {"-": "", "--": "5 3", ":": "1.5 2.5", "-.": "6 2 1.5 2"}[run.dashes]
    line = f'<line x1="0" x2="22" y1="5" y2="5" stroke="{run.colour}" stroke-width="3" stroke-dasharray="{dashes}"/>'
    swatch = f'<svg class="swatch" viewBox="0 0 22 10" aria-hidden="true">{line}</svg>'
    return f'<span class="run">{swatch}<b>{run.letter}</b> {html.escape(run.label)}</span>'


def _curves(plots: Sequence[tuple[str, str]]) -> str:
    figures = "\n".join(
        f"<figure>{svg.replace('<svg ', f'<svg role="img" aria-label="{html.escape(title)}" ', 1)}</figure>"
        for title, svg in plots
    )
    return f'<div class="curves">\n{figures}\n</div>'


def _samples(runs: Sequence[Run]) -> str:
    shown = [load_samples(run, PAGE_BYTES // len(runs)) for run in runs]
    if not any(samples.groups or samples.note for samples in shown):
        return ""
    notes = "\n".join(
        f'<p class="note">{html.escape(run.letter if len(runs) > 1 else "Here")}: {html.escape(samples.note)}. '
        "The rest is in samples.jsonl; the page has room for some.</p>"
        for run, samples in zip(runs, shown, strict=True)
        if samples.note
    )
    return (
        _asset("samples.html")
        .replace("<!-- notes -->", notes)
        .replace("<!-- text -->", "\n".join(without_script(runs, shown)))
        .replace("<!-- data -->", samples_json(runs, shown))
        .replace("<!-- script -->", _asset("samples.js"))
    )


def _configurations(runs: Sequence[Run]) -> str:
    parts: list[str] = []
    for run in runs:
        name = "Configuration" if len(runs) == 1 else f"Configuration of {run.letter} {run.label}"
        text = html.escape(run.text(CONFIG_FILE)) or "not recorded"
        parts.append(f"<details><summary>{html.escape(name)}</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
