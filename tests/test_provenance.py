"""The report shows the settings that differ from the defaults, and no others."""

import dataclasses

import pytest
from helpers import SCRIPTS, load_script
from test_settings import CLASSES

from modernbert_small.reporting.provenance import changed_settings
from modernbert_small.settings.parse import parse_settings
from modernbert_small.settings.sections import SECTIONS


@pytest.mark.parametrize(("section", "script"), list(zip(SECTIONS, SCRIPTS, strict=True)))
def test_only_settings_that_differ_from_the_default(section, script, tmp_path):
    arguments = getattr(load_script(script), CLASSES[section])

    def changed(*flags):
        settings = parse_settings(arguments, section, None, list(flags))
        return changed_settings(section, getattr(settings, "to_dict", lambda: dataclasses.asdict(settings))())

    default = changed()
    # What is found out about the machine, and set accordingly.
    assert default.keys() <= {"use_cpu", "bf16"} if section in ("pre_train", "distil_train") else not default
    flags = ["--output_dir", str(tmp_path), "--seed", "7"]
    assert changed(*flags) == default | {"output_dir": str(tmp_path), "seed": 7}
