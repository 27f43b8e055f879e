r"""What pages and docstrings of this project write beyond Markdown, as a Python-Markdown extension.

    $x$, $$x$$                      equations: MathML, so that pages need no script to show them
    >>> 1 + 1                       an example without a fence, up to an empty line
    <!-- tables of FILE.md -->      all tables of another file, so that no number is copied

`build.py` builds the site with it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"\s*(`{3,}|~{3,})")
PROMPT = re.compile(r"(\s*)>>> ")
TABLES = re.compile(r"<!-- tables of (\S+) -->")


class Equation(InlineProcessor):
    """An equation as MathML; code in backticks was taken out before."""

    def __init__(self, pattern: str, md: Markdown, display: str) -> None:
        super().__init__(pattern, md)
        self.display = display

    def handleMatch(self, match: re.Match[str], data: str) -> tuple[str, int, int]:
        """Convert one match; the stash keeps it from being read as Markdown again."""
        del data
        mathml = convert(match[1].strip(), display=self.display)
        return self.md.htmlStash.store(mathml), match.start(0), match.end(0)


class Examples(Preprocessor):
    """Puts a fence around every example that has none, and shows `<BLANKLINE>` as an empty line."""

    def run(self, lines: list[str]) -> list[str]:
        """Go through the lines; `fence` is what closes the block they are in, if any."""
        found: list[str] = []
        fence = ""
        indent: str | None = None
        for line in lines:
            if indent is not None:
                if not line.strip():
                    found.append(f"{indent}```")
                    indent = None
            elif mark := FENCE.match(line):
                if not fence:
                    fence = mark[1]
                elif mark[1].startswith(fence):
                    fence = ""
            elif not fence and (prompt := PROMPT.match(line)):
                indent = prompt[1]
                found += ["", f"{indent}```pycon"]
            found.append("" if line.strip() == "<BLANKLINE>" else line)
        return found if indent is None else [*found, f"{indent}```"]


class Tables(Preprocessor):
    """Puts the tables of a file of this repository in the place of a comment that names it."""

    def run(self, lines: list[str]) -> list[str]:
        """Replace the comments; a file that does not exist, or has no table, is an error."""
        found: list[str] = []
        for line in lines:
            match = TABLES.fullmatch(line)
            found += self.tables(match[1]) if match else [line]
        return found

    def tables(self, path: str) -> list[str]:
        """The lines of all tables, with an empty line between two of them."""
        text = (ROOT / path).read_text().splitlines()
        rows = [line if line.startswith("|") else "" for line in text]
        kept = [row for i, row in enumerate(rows) if row or (i and rows[i - 1])]
        if not any(kept):
            raise ValueError(f"{path} has no table.")
        return kept


class Notation(Extension):
    """Registers the three; the numbers are priorities, larger ones come first."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Examples come before fences are taken out (25), equations after code in a line (190)."""
        md.preprocessors.register(Tables(md), "tables-of-files", 34)
        md.preprocessors.register(Examples(md), "examples", 33)
        block = Equation(r"\$\$(.+?)\$\$", md, "block")
        inline = Equation(r"\$([^$\s](?:[^$]*?[^$\s])?)\$", md, "inline")
        md.inlinePatterns.register(block, "equation-block", 186)
        md.inlinePatterns.register(inline, "equation", 185)


def makeExtension(**settings: Any) -> Notation:
    """Make the extension; this is the name that Markdown looks for."""
    return Notation(**settings)
