"""Recipes: one YAML file with a section for each script."""

import argparse
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from modernbert_small.run.errors import UserError

DEFAULT_RECIPE = Path(__file__).parents[2] / "recipes" / "v2.yaml"  # the scripts' own values


SECTIONS = ("create_dataset", "init_model_mlm", "pre_train", "create_distil_dataset", "distil_train")


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
        raise UserError(f"{recipe}: {error.strerror}; expected a recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(sections, dict):
        raise UserError(f"{recipe}: expected sections {', '.join(SECTIONS)}, found {type(sections).__name__}")
    for name, values in sections.items():
        if name not in SECTIONS:
            raise UserError(f"{recipe}: unknown section {name!r}; sections are {', '.join(SECTIONS)}")
        if not isinstance(values, dict | None):
            raise UserError(f"{recipe}: {name}: expected `key: value` lines, found {values!r}")
    require_equal_widths(recipe, sections)
    return sections


def require_equal_widths(recipe: Path, sections: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuse a student as wide as no label, which phase 5 would only find after phases 3 and 4.

    Raises:
        UserError: both widths are given, and differ.
    """
    width = (sections.get("init_model_mlm") or {}).get("hidden_size")
    labels = (sections.get("create_distil_dataset") or {}).get("embedding_dim")
    if width != labels and None not in (width, labels):
        raise UserError(
            f"{recipe}: init_model_mlm has hidden_size {width}, create_distil_dataset embedding_dim {labels}; expected "
            "the same, since the student's vectors are compared with the labels"
        )


def full_recipe(recipe: Path) -> dict[str, dict[str, Any]]:
    """A recipe over the scripts' defaults."""
    given, defaults = read_recipe(recipe), read_recipe(DEFAULT_RECIPE)
    return {section: values | (given.get(section) or {}) for section, values in defaults.items()}


def recipe_path(command_line: list[str]) -> str | None:
    """The value of --config, read before anything else is parsed."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config")
    try:
        recipe = early.parse_known_args(command_line)[0].config
    except argparse.ArgumentError as error:
        raise UserError(f"--config: {error}") from error
    return recipe and os.path.expanduser(recipe)
