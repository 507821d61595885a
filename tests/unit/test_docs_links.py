"""Every link of the documentation that stays in the repository leads to something that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TOUR = REPOSITORY / "docs/architecture.md"
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob(".github/**/*.md")])


def links(page: Path) -> list[str]:
    """The targets of a page's links and images; blocks of code have none."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """What a link can name of a page: its headings, as GitHub spells them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path):
    for target in links(page):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert linked.resolve().is_relative_to(REPOSITORY), f"{target} leaves the repository"
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_reachable_from_a_readme():
    reached, found = set(), [REPOSITORY / "README.md"]
    while found:
        page = found.pop().resolve()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        found += [page.parent / target.partition("#")[0] for target in links(page) if "://" not in target]
    assert set(REPOSITORY.glob("docs/*.md")) <= reached


def test_the_tour_walks_through_every_room():
    text = TOUR.read_text(encoding="utf-8")
    packages = [REPOSITORY / "xbai", REPOSITORY / "verl/verl"]
    rooms = [folder for package in packages for folder in package.iterdir() if (folder / "__init__.py").is_file()]
    assert len(rooms) > 15
    for room in rooms:
        assert re.search(rf"\b{room.name}/", text), f"the tour does not name {room}"
