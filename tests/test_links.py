"""Links of the documentation."""

from pathlib import Path

import pytest

from tests.links import dead_links

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_their_targets(page: Path) -> None:
    assert not dead_links([page])


def test_dead_links_are_found(tmp_path: Path) -> None:
    there, here = tmp_path / "there.md", tmp_path / "here.md"
    there.write_text("# A `b`: c?\n\n## Twice\n\n## Twice\n")
    alive = ["there.md", "there.md#a-b-c", "there.md#twice-1", "#here", "https://x.org/y.md#z"]
    dead = ["their.md", "there.md#a-b", "there.md#twice-2", "#there", "no.png"]
    code = "`[code](none.md)`\n\n```\n[code](none.md)\n```\n"
    here.write_text("# Here\n\n" + code + "\n".join(f"![x]({link})" for link in [*alive, *dead]))
    assert dead_links([here]) == [f"{here}: {link}" for link in dead]


def test_dead_links_of_html_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<a id="x" href="#x"></a><a href="#y"></a><img src="z.png"><a href=".">')
    assert dead_links([page]) == [f"{page}: #y", f"{page}: z.png"]
