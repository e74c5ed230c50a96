"""Recipes: one YAML file with a section for each script."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from modernbert_small.run.errors import UserError
from modernbert_small.run.script import ROOT
from modernbert_small.settings.sections import SECTIONS

RECIPES = ROOT / "recipes"
RECIPE_HELP = "a recipe, or the name of one that comes along: v2, denseon, cpu, demo"


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe, by its path or, if there is no such file, by the name of one that comes along."""
    path, known = Path(name_or_path).expanduser(), RECIPES / f"{name_or_path}.yaml"
    return known if known.is_file() and not path.exists() else path


class _RecipeLoader(yaml.SafeLoader):
    """YAML whose mappings hold each key once; plain YAML takes the last value in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a repeated key, whose earlier value would be lost.

        Raises:
            UserError: with the key and its line.
        """
        found = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in found:
                raise UserError(
                    f"{self.name}: line {key.start_mark.line + 1}: {key.value} is here a second time; expected each "
                    "key once"
                )
            found.add(key.value)
        return super().construct_mapping(node, deep)


def read_recipe(recipe: Path) -> dict[str, dict[str, Any]]:
    """Read a recipe: one mapping per script, nothing else.

    Raises:
        UserError: no such file, no YAML, a repeated key, or a section that no script has.
    """
    try:
        with recipe.open(encoding="utf-8") as stream:
            sections = yaml.load(stream, _RecipeLoader) or {}
    except OSError as error:
        raise UserError(f"{recipe}: {error.strerror}; expected {RECIPE_HELP}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(sections, dict):
        raise UserError(f"{recipe}: expected sections {', '.join(SECTIONS)}, found {type(sections).__name__}")
    for name, values in sections.items():
        if name not in SECTIONS:
            raise UserError(f"{recipe}: unknown section {name!r}; sections are {', '.join(SECTIONS)}")
        if not isinstance(values, dict | None):
            raise UserError(f"{recipe}: {name}: expected `key: value` lines, found {values!r}")
    return sections
