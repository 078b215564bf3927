"""What pages hold, and ask for."""

from html.parser import HTMLParser
from typing import Any


class Scripts(HTMLParser):
    """The scripts of a page, and what its tags would ask the network for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.asked: list[str] = []
        self.policy = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if tag == "script":
            self.scripts.append("")
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        self.asked += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]

    def handle_data(self, data: str) -> None:
        if self.scripts:
            self.scripts[-1] += data
