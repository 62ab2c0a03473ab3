"""The documents: their links lead somewhere, and no module goes unmentioned."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    targets = LINK.findall(page.read_text())
    missing = [
        target for target in targets if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing


def test_structure_has_a_line_for_every_module():
    text = (ROOT / "docs/structure.md").read_text()
    modules = [*ROOT.glob("placement/**/*.py"), *ROOT.glob("exflow/**/*.py")]
    missing = [
        str(path.relative_to(ROOT))
        for path in sorted(modules)
        if not path.name.startswith("__") and f"`{path.name}`" not in text
    ]
    assert not missing
