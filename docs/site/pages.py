# SPDX-License-Identifier: Apache-2.0
"""A hook of MkDocs: pages of the site that live elsewhere in the repository, with their links.

A link to one of those pages or to a file of results leads to its place in the site. A link to
anything else outside docs/ stays as it is, and `mkdocs build --strict` then fails.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "softgpu/README.md": "softgpu.md",
}
RESULTS = "bench/results"
_LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for path in sorted((ROOT / RESULTS).rglob("*.json")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    source = next((name for name, uri in PAGES.items() if uri == here), f"docs/{here}")

    def moved(link: re.Match) -> str:
        before, target, after = link.groups()
        repository_path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = PAGES.get(repository_path, repository_path.removeprefix("docs/"))
        if files.get_file_from_path(place) is None:
            return link.group()
        return before + posixpath.relpath(place, posixpath.dirname(here) or ".") + after

    return _LINK.sub(moved, markdown)
