"""Writes the report of some runs and takes docs/report_*.png of it, in a real browser.

python docs/make_report_pictures.py RUN [RUN ...] [--folder FOLDER] [--browser PATH]

It needs what the package does not: `uv pip install playwright==1.65.2`, and a Chromium (`apt-get install chromium`).
Pictures of more places and widths, to look at, go to FOLDER beside the report. Ends with an error if the page asks for
anything from a network, or logs an error.
"""

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright  # pyright: ignore[reportMissingImports]

from megatron_aspo.report import write_report

DOCS = Path(__file__).parent
WIDTHS = {"wide": 1280, "narrow": 400}
THEMES = ("light", "dark")
SHOWN = {
    "curves_light_wide": "report_curves.png",
    "samples_dark_wide": "report_samples.png",
    "samples_light_narrow": "report_narrow.png",
}
"""Which of all pictures the documentation has."""


def main() -> None:
    parser = argparse.ArgumentParser(description="pictures of a report")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--folder", type=Path, default=Path("report"))
    parser.add_argument("--browser", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    _, html = write_report(arguments.runs, arguments.folder)
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.browser, args=["--no-sandbox"])
        for theme in THEMES:
            for name, width in WIDTHS.items():
                page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=theme)
                page.on("pageerror", lambda error: complaints.append(str(error)))
                page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
                page.on(
                    "request",
                    lambda request: (
                        complaints.append(f"asks for {request.url}") if request.url != html.resolve().as_uri() else None
                    ),
                )
                page.goto(html.resolve().as_uri())
                wider = page.evaluate("document.documentElement.scrollWidth") - width
                if wider > 0:
                    complaints.append(f"the page is {wider} pixels wider than a window of {width}")
                take_pictures(page, arguments.folder, f"{theme}_{name}")
                page.close()
        browser.close()
    for name, shown in SHOWN.items():
        shutil.copy(arguments.folder / f"{name}.png", DOCS / shown)
    if complaints:
        sys.exit("\n".join(complaints))


def take_pictures(page: Page, folder: Path, name: str) -> None:
    page.screenshot(path=folder / f"page_{name}.png", full_page=True)
    page.screenshot(path=folder / f"curves_{name}.png")
    show_busiest_group(page)
    # As a reader gets there with the keyboard: the first response's first token, and one on.
    page.locator("#responses .token[tabindex='0']").first.focus()
    page.keyboard.press("ArrowRight")
    page.locator("#samples").evaluate("element => element.scrollIntoView()")
    page.screenshot(path=folder / f"samples_{name}.png")


def show_busiest_group(page: Page) -> None:
    """Of the first run: the one with the most soft-clipped tokens, which are rare."""
    groups = page.evaluate("JSON.parse(document.getElementById('samples-data').textContent)[0].groups")
    best = max(groups, key=lambda group: sum(len(response["soft"]) for response in group["responses"]))
    page.select_option("#step", str(best["step"]))
    page.select_option("#group", index=[g for g in groups if g["step"] == best["step"]].index(best))


if __name__ == "__main__":
    main()
