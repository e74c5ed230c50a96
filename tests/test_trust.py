"""What is imported is declared, what is declared is pinned, and nothing pickled or remote is read."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

SOURCES = [*ROOT.glob("*.py"), *(ROOT / "mlm").glob("*.py"), *(ROOT / "modernbert_small").rglob("*.py")]
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {"modernbert_small", "benchmarks", "mlm"} | {path.stem for path in BENCHMARKS}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(lines):
    return {normal(one.name): one for one in map(Requirement, lines)}


NEEDED = requirements(PROJECT["dependencies"])
EXTRAS = requirements(line for lines in PROJECT["optional-dependencies"].values() for line in lines)
PINNED = requirements(
    line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] not in "#-"
)


def imported(paths):
    """Top-level names of third-party imports, wherever in the files they stand."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - OWN


@pytest.mark.parametrize(("paths", "declared"), [(SOURCES, NEEDED | EXTRAS), (BENCHMARKS, NEEDED | EXTRAS)])
def test_what_is_imported_is_declared(paths, declared):
    distributions = packages_distributions()
    for name in imported(paths):
        candidates = {normal(one) for one in distributions.get(name, [name])}
        assert candidates & declared.keys(), f"{name} is imported, but no dependency gives it"


def test_what_is_declared_is_imported_or_needed_by_name():
    distributions = packages_distributions()
    used = {normal(one) for name in imported(SOURCES) for one in distributions.get(name, [])}
    by_name = {"accelerate", "tensorboard", "torch-optimi"}  # transformers' Trainer imports them
    by_name |= {"lxml-html-clean"}  # trafilatura does
    assert NEEDED.keys() - used <= by_name


def test_pins_satisfy_the_lower_bounds():
    for name, pin in PINNED.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", name
        declared = (NEEDED | EXTRAS).get(name)
        assert declared is not None, f"{name} is pinned but not declared"
        assert declared.specifier.contains(Version(specifier.version), prereleases=True), name
    assert NEEDED.keys() <= PINNED.keys()


def test_the_lock_has_every_pin_with_hashes():
    text = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^(\S+)==(\S+) \\\n    --hash=sha256:", text, re.MULTILINE))
    assert len(locked) > 2 * len(PINNED)
    for name, pin in PINNED.items():
        assert locked[name] == next(iter(pin.specifier)).version, f"{name}: run `make lock`"


def calls(paths):
    """(file, line, dotted name of the called, keywords) of each call."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func), keywords


def test_nothing_pickled_is_read_and_no_remote_code_is_run():
    for where, name, keywords in calls(SOURCES):
        assert name not in ("torch.load", "pickle.load", "pickle.loads", "joblib.load", "eval", "exec"), where
        assert not (name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False"), where
        allowed = {"False", "trust_remote_code", "args.trust_remote_code"}  # which a flag turns on
        assert keywords.get("trust_remote_code", "False") in allowed, where
        # transformers asks on the terminal what it was not told.
        if name.endswith(".from_pretrained"):
            assert "trust_remote_code" in keywords, where
        if name == "Transformer":
            for argument in ("model_kwargs", "processor_kwargs", "config_kwargs"):
                assert "'trust_remote_code': False" in keywords.get(argument, ""), where
        if name.endswith(("Model.from_pretrained", "ForMaskedLM.from_pretrained")):
            assert keywords.get("use_safetensors") == "True", where
