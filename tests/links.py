"""Dead links of Markdown files, and of the built site: ``python -m tests.links build/docs``."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token


class Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.links += [value for key, value in attrs if key in ("href", "src")]
        self.anchors |= {value for key, value in attrs if key == "id"}


class MarkdownPage:
    """The same of Markdown, whose headings have the anchors that GitHub gives them."""

    def __init__(self, text: str) -> None:
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        flat = [inner for token in tokens for inner in (token, *(token.children or []))]
        self.links = [str(t.attrs[key]) for t in flat for key in ("href", "src") if key in t.attrs]
        self.anchors = {*_anchors(tokens)}


def _anchors(tokens: list[Token]) -> Iterator[str]:
    seen: Counter[str] = Counter()
    for before, token in pairwise(tokens):
        if before.type == "heading_open":
            title = "".join(t.content for t in token.children or [])
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            yield f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor
            seen[anchor] += 1


@cache
def read(path: Path) -> Page | MarkdownPage:
    return (Page if path.suffix == ".html" else MarkdownPage)(path.read_text(encoding="utf-8"))


def dead_links(paths: Iterable[Path]) -> list[str]:
    """Links of files to files or to anchors that are not there; the network is not asked."""
    dead = []
    for path in paths:
        for link in read(path).links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = path.parent / unquote(url.path) if url.path else path
            anchor = unquote(url.fragment)
            has_anchors = target.suffix in (".md", ".html")
            if not target.exists() or (
                anchor and has_anchors and anchor not in read(target.resolve()).anchors
            ):
                dead.append(f"{path}: {link}")
    return dead


if __name__ == "__main__":
    pages = [*Path(sys.argv[1]).rglob("*.html")]
    dead = dead_links(pages)
    sys.exit("\n".join(["dead links:", *dead]) if dead else 0)
