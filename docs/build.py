"""Build the documentation site into `site/`, strictly: `python docs/build.py`, or `make docs`.

The results of the benchmarks are pages too; they are copied beside the others first. Zensical fails
on what it warns of: a link, an anchor or a name of the reference that does not exist. Then every
link, image and anchor of the built pages is followed once more, those of the theme included.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "pages"
SITE = ROOT / "site"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Links(HTMLParser):
    """The targets that a page links to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag links to, shows, or is named."""
        found = dict(attrs)
        self.anchors |= {name for name in (found.get("id"), found.get("name")) if name}
        names = {"a": "href", "link": "href", "img": "src", "script": "src"}
        if (target := found.get(names.get(tag, ""))) and found.get("rel") != "canonical":
            self.targets.append(target)


def copy_results() -> None:
    """Put the results where the pages link to them."""
    shutil.rmtree(PAGES / "results", ignore_errors=True)
    shutil.copytree(RESULTS, PAGES / "results")


def build() -> list[str]:
    """Run Zensical; returns its complaints, those it does not count as warnings included."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    path = os.pathsep.join([str(ROOT / "docs"), os.environ.get("PYTHONPATH", "")])
    shutil.rmtree(SITE, ignore_errors=True)
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    said = ANSI.sub("", done.stdout + done.stderr)
    if done.returncode:
        return [said]
    return [line for line in said.splitlines() if line.startswith(("griffe:", "mkdocstrings:"))]


def broken_links() -> list[str]:
    """What the built pages link to within the site and does not exist."""
    pages = {path: Links(path.read_text()) for path in SITE.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            where = urlsplit(target)
            if where.scheme or where.netloc or path.name == "404.html":
                continue
            place = path.parent / unquote(where.path) if where.path else path
            file = (place / "index.html" if place.is_dir() else place).resolve()
            anchor = unquote(where.fragment)
            lost = file.suffix == ".html" and anchor and anchor not in pages[file].anchors
            if not file.exists() or lost:
                broken.append(f"{path.relative_to(SITE)}: {target} does not exist")
    return broken


def main() -> None:
    """Build, check, and end with what is wrong."""
    copy_results()
    if wrong := build() or broken_links():
        sys.exit("\n".join(wrong))
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
