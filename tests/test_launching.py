"""The commands for several GPUs and machines that the docs give, read by the parsers that would read them."""

import re
import shlex
import subprocess

import pytest
import yaml
from helpers import ROOT
from torch.distributed.run import get_args_parser

from modernbert_small.settings.parser import SettingsParser
from modernbert_small.settings.sections import SECTIONS

DOCS = ROOT / "docs"
BY_SCRIPT = {entry.script: section for section, entry in SECTIONS.items()}


def check(words):
    """Parse a command as torchrun or python and the script do; returns torchrun's options and the script's settings."""
    words = list(words)
    options = get_args_parser().parse_args(words[1:])
    script = options.training_script.removeprefix("/modernbert-small/")
    section = BY_SCRIPT[script]
    settings = SettingsParser(SECTIONS[section].settings).parse(
        [word for word in options.training_script_args if word not in ("--config", "my.yaml", "/work/my.yaml")]
    )
    return section, options, settings


def commands(document):
    """The commands of a document's shell blocks that start a phase under torchrun."""
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / document).read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("torchrun")]


def test_commands_of_the_page():
    for words in commands("scaling.md"):
        section, options, settings = check(words)
        assert section != "init_model_mlm"
        assert int(options.nproc_per_node) * int(options.nnodes.split(":")[0]) in (4, 16)
        assert getattr(settings, "tokens_per_batch", None) == getattr(
            SECTIONS[section].settings, "tokens_per_batch", None
        )


@pytest.fixture
def stand_ins(tmp_path):
    """Programs that print how they were called, instead of Slurm's and torchrun."""
    for name in ("srun", "scontrol", "python"):
        says = 'echo "$@"' if name == "python" else ('echo "${@:2}"' if name == "srun" else "printf 'node1\\nnode2\\n'")
        (tmp_path / name).write_text(f"#!/bin/bash\n{says}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def test_the_slurm_script(stand_ins):
    env = {"PATH": f"{stand_ins}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    env |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
    ran = subprocess.run(["bash", DOCS / "slurm.sh"], env=env, capture_output=True, text=True, check=True)
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert lines.pop(1) == ["mlm/init_model_mlm.py", "--config", "my.yaml"]
    found = {}
    for words in lines:
        section, options, settings = check(words)
        assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2", "8", "node1:29500")
        found[section] = settings
    assert list(found) == [section for section in SECTIONS if section != "init_model_mlm"]


def test_the_manifest():
    spec = yaml.safe_load((DOCS / "pytorchjob.yaml").read_text())["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    section, _, settings = check([*container["command"], *container["args"]])
    assert settings.tokens_per_batch == SECTIONS[section].settings.tokens_per_batch
    assert spec["elasticPolicy"]["minReplicas"] == spec["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == spec["nprocPerNode"]
