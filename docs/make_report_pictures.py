"""Write the report of runs and take pictures of it in Chromium.

    python docs/make_report_pictures.py RUN [RUN ...] [--curves FILE.png] [--folder FOLDER] [--browser PATH]

Writes docs/report_curves.png and docs/report_samples.png; with --curves only FILE.png, with all curves (docs/demo.png).
Requires `uv pip install playwright==1.65.2` and Chromium (`apt-get install chromium`). FOLDER receives the report and
pictures at every width and theme. Exits with an error if the page sends a request, logs an error, or is wider than its
window.
"""

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright  # pyright: ignore[reportMissingImports]

from megatron_aspo.tools.report import write_report

DOCS = Path(__file__).parent
WIDTHS = {"wide": 1280, "narrow": 400}
THEMES = ("light", "dark")
SHOWN = {
    "curves_light_wide": "report_curves.png",
    "samples_dark_wide": "report_samples.png",
}
"""Pictures that the documentation shows."""


def main() -> None:
    parser = argparse.ArgumentParser(description="pictures of a report")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--curves", type=Path, metavar="FILE.png", help="write this picture of all curves only")
    parser.add_argument("--folder", type=Path, default=Path("report"))
    parser.add_argument("--browser", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    html = write_report(arguments.runs, arguments.folder)
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
                        complaints.append(f"request for {request.url}")
                        if request.url != html.resolve().as_uri()
                        else None
                    ),
                )
                page.goto(html.resolve().as_uri())
                wider = page.evaluate("document.documentElement.scrollWidth") - width
                if wider > 0:
                    complaints.append(f"the page is {wider} pixels wider than a window of {width}")
                take_pictures(page, arguments.folder, f"{theme}_{name}")
                if arguments.curves and (theme, name) == ("light", "wide"):
                    page.locator(".curves").screenshot(path=arguments.curves)
                page.close()
        browser.close()
    for name, shown in ({} if arguments.curves else SHOWN).items():
        shutil.copy(arguments.folder / f"{name}.png", DOCS / shown)
    if complaints:
        sys.exit("\n".join(complaints))


def take_pictures(page: Page, folder: Path, name: str) -> None:
    page.screenshot(path=folder / f"page_{name}.png", full_page=True)
    page.screenshot(path=folder / f"curves_{name}.png")
    if page.locator("#samples").count() == 0:
        return
    show_busiest_group(page)
    # By keyboard: the first response's first token, then the next.
    page.locator("#responses .token[tabindex='0']").first.focus()
    page.keyboard.press("ArrowRight")
    page.locator("#samples").evaluate("element => element.scrollIntoView()")
    page.screenshot(path=folder / f"samples_{name}.png")


def show_busiest_group(page: Page) -> None:
    """Select the first run's group with the most soft-clipped tokens, which are rare."""
    groups = page.evaluate("JSON.parse(document.getElementById('samples-data').textContent)[0].groups")
    best = max(groups, key=lambda group: sum(len(response["soft"]) for response in group["responses"]))
    page.select_option("#step", str(best["step"]))
    page.select_option("#group", index=[g for g in groups if g["step"] == best["step"]].index(best))


if __name__ == "__main__":
    main()
