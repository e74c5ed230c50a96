"""recipes/v2.yaml, run offline from a filled cache, must give the same corpus and labels as the bare commands."""

import json
import shutil

from helpers import ROOT, SCRIPTS
from test_recipe_from_hub import BOUNDS, NO_WAITS, launch, recipe, repositories  # noqa: F401, fixtures


def test_offline_with_a_warm_cache_the_recipe_file_gives_the_same(recipe, tmp_path):  # noqa: F811
    before, cache, hub, _ = recipe
    shutil.copytree(before / "data" / "corpus", tmp_path / "data" / "corpus")
    config = ["--config", str(ROOT / "recipes" / "v2.yaml")]
    jobs = [[script, NO_WAITS, [*config, *flags]] for script, flags in zip(SCRIPTS, BOUNDS, strict=True)]
    asked = len(hub.requests)
    result = launch(tmp_path, hub.environment(cache, HF_HUB_OFFLINE="1"), *jobs)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(hub.requests) == asked
    assert "data/corpus is finished" in result.stderr
    files = sorted(path.name for path in (before / "data" / "distil").glob("*.parquet"))
    assert files
    for name in files:
        assert (tmp_path / "data/distil" / name).read_bytes() == (before / "data/distil" / name).read_bytes()
    ceiling = json.loads((tmp_path / "data/distil/run.json").read_text())["ceiling"]
    assert list(ceiling["retrieval"][0]["scores"]) == ["NanoMSMARCO", "NanoHotpotQA"]
