"""recipes/v2.yaml, run offline from a filled cache, must give the same corpus and labels as the bare commands."""

import json
import subprocess
import sys
from pathlib import Path

from helpers import ROOT, SCRIPTS
from standin_hub import StandInHub
from test_recipe_from_hub import BOUNDS, CONSTANTS, HUB_IDS, launch, recipe, repositories  # noqa: F401, fixtures


def test_offline_with_a_warm_cache_the_recipe_file_gives_the_same(recipe, repositories, tmp_path):  # noqa: F811
    before, cache, _, _ = recipe
    with StandInHub(repositories) as hub:
        for dataset in HUB_IDS["datasets"]:  # models and evaluation sets are in the cache already
            command = [Path(sys.executable).with_name("hf"), "download", "--repo-type", "dataset", dataset]
            subprocess.run(command, env=hub.environment(cache), check=True, capture_output=True)
        config = ["--config", str(ROOT / "recipes" / "v2.yaml")]
        jobs = [[script, CONSTANTS, [*config, *flags]] for script, flags in zip(SCRIPTS, BOUNDS, strict=True)]
        asked = len(hub.requests)
        result = launch(tmp_path, hub.environment(cache, HF_HUB_OFFLINE="1"), *jobs)
        assert result.returncode == 0, result.stdout + result.stderr
        assert len(hub.requests) == asked
    for folder in ("corpus", "distil"):
        files = sorted(path.name for path in (before / "data" / folder).glob("*.parquet"))
        assert files
        for name in files:
            assert (tmp_path / "data" / folder / name).read_bytes() == (before / "data" / folder / name).read_bytes()
    ceiling = json.loads((tmp_path / "data/distil/run.json").read_text())["ceiling"]
    assert list(ceiling["retrieval"][0]["scores"]) == ["NanoMSMARCO", "NanoHotpotQA"]
