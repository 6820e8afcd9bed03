"""`report.html`: one self-contained page about a run, or a comparison of several.

Made from `metrics.jsonl`, `samples.jsonl` and the provenance files of the run folders. Missing parts are left out.
matplotlib is imported where it draws, so that the command line starts fast; torch is not needed.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_aspo.errors import UserError
from megatron_aspo.tools.pages import PAGES
from megatron_aspo.tools.report.figure import make_plots
from megatron_aspo.tools.report.runs import load_runs
from megatron_aspo.tools.report.samples import PAGE_BYTES, load_samples
from megatron_aspo.tools.report.tables import config_differences, result_rows

__all__ = ["write_report"]


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write `report.html` into the folder `out` (default: the run's own; `report` for several) and return its path.

    Raises:
        UserError: a folder holds no run with a finished step, or `out` cannot be written.
    """
    runs = load_runs(run_dirs)
    if out is None:
        out = runs[0].folder if len(runs) == 1 else Path("report")
    samples = [load_samples(run, PAGE_BYTES // len(runs)) for run in runs]
    page = PAGES.get_template("report/page.html").render(
        runs=runs,
        results=result_rows(runs),
        plots=make_plots(runs),
        differences=config_differences(runs),
        samples=[part for part in samples if part["groups"]],
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot write the report into {out}: {error.strerror}; choose another folder: --out") from None
    return out / "report.html"
