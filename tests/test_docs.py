"""The README's map against the tree, and files that documents name."""

import re
from pathlib import Path

import pytest

from modernbert_small.settings.whole import full_recipe

ROOT = Path(__file__).resolve().parent.parent


def test_the_map_names_every_module_and_no_other():
    section = (ROOT / "README.md").read_text().split("## Where things are")[1]
    named, folder = [], ""
    for line in section.split("modernbert_small/\n")[1].split("benchmarks/")[0].splitlines():
        names = re.split("  +", line.strip())[0].split()
        if names[0].endswith("/"):
            folder = names[0]
        else:
            named += [folder * line.startswith("    ") + name for name in names]
    assert len(named) == len(set(named))
    package = ROOT / "modernbert_small"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert set(named) == {module for module in modules if not module.endswith("__init__.py")}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs"])
def test_links_lead_somewhere(document):
    files = sorted((ROOT / document).glob("*.md")) if (ROOT / document).is_dir() else [ROOT / document]
    for file in files:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text()):
            assert target.startswith("https://") or (file.parent / target).exists(), f"{file.name}: {target}"


def test_own_datas_recipe_is_one(tmp_path):
    (block,) = (ROOT / "docs/own-data.md").read_text(encoding="utf-8").split("```yaml\n")[1:]
    (tmp_path / "my.yaml").write_text(block.split("```")[0])
    assert full_recipe(tmp_path / "my.yaml")["distil_train"]["eval_datasets"] == ["heldout", "/data/my-searches"]
