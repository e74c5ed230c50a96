"""The README's map against the tree, and files that documents name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_map_names_every_module_and_no_other():
    section = (ROOT / "README.md").read_text().split("## Where things are")[1]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = re.findall(r"`(\w+)`", " ".join(first_cells))
    modules = {path.stem for path in (ROOT / "modernbert_small").glob("*.py")} - {"__init__"}
    assert len(named) == len(set(named))
    assert set(named) == modules


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs"])
def test_links_lead_somewhere(document):
    files = sorted((ROOT / document).glob("*.md")) if (ROOT / document).is_dir() else [ROOT / document]
    for file in files:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text()):
            assert target.startswith("https://") or (file.parent / target).exists(), f"{file.name}: {target}"
