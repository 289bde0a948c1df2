"""Hooks of mkdocs: pages from the repository's root, links to files outside docs/, formulas.

Pages link to source files as a code host does (`../rome/losses/ipa.py`). The site has no
such files: with `repo_url` in mkdocs.yml these links lead to the repository; without it only their
text stays.
"""

from __future__ import annotations

import html
import pathlib
import re
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parent.parent
ROOT_PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
BRANCH = "main"
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the Markdown files of the repository's root as pages."""
    for name, page in ROOT_PAGES.items():
        path = ROOT / name
        if path.exists():
            content = path.read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Rewrite the links of a page that leave docs/."""
    source = page.file.src_uri
    is_root_page = source in ROOT_PAGES.values()
    folder = ROOT if is_root_page else (ROOT / "docs" / source).parent

    def rewrite(match: re.Match[str]) -> str:
        text = match.group(1)
        target = match.group(2)
        if "://" in target or target.startswith(("#", "mailto:")):
            return match.group(0)
        name, hash_sign, anchor = target.partition("#")
        path = (folder / name).resolve()
        if not path.is_relative_to(ROOT):
            return match.group(0)
        inside = path.relative_to(ROOT).as_posix()
        if inside in ROOT_PAGES:
            return f"[{text}]({ROOT_PAGES[inside]}{hash_sign}{anchor})"
        if is_root_page and inside.startswith("docs/") and inside.endswith(".md"):
            return f"[{text}]({inside.removeprefix('docs/')}{hash_sign}{anchor})"
        is_page = inside.startswith("docs/") and not inside.startswith(
            ("docs/results/", "docs/figures/")
        )
        if is_page and not is_root_page:
            return match.group(0)
        if config.repo_url:
            kind = "tree" if path.is_dir() else "blob"
            return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/{BRANCH}/{inside})"
        return text

    return LINK.sub(rewrite, markdown)


def on_page_content(html_text: str, page: Page, config: Any, files: Files) -> str:
    """Turn formulas into MathML, which browsers show without scripts."""

    def convert(match: re.Match[str]) -> str:
        is_block = match.group(1) == "div"
        latex = html.unescape(match.group(2)).strip()[2:-2]
        display = "block" if is_block else "inline"
        return latex2mathml.converter.convert(latex, display=display)

    return FORMULA.sub(convert, html_text)
