"""An installed wheel, without a clone: it brings the scripts and the recipes, and runs them from any folder.

This is not part of the test suite; `make soak` runs it. The wheel is built without isolation and installed into an
environment of its own, which finds the libraries in this one.
"""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPTS


def run(*words, cwd, status=0):
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, env={"PATH": "/bin"})
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, and the interpreter of an environment that it is installed in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files behind
    listed = run("git", "ls-files", cwd=ROOT).split("\n")
    for name in filter(None, listed):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", *flags, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:  # which is all that pip does with a wheel of plain files
        archive.extractall(packages)
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return wheel, folder / "venv" / "bin" / "python", packages


def test_the_wheel_holds_scripts_and_recipes_and_no_tests(installed):
    names = set(zipfile.ZipFile(installed[0]).namelist())
    recipes = {f"recipes/{path.name}" for path in ROOT.glob("recipes/*.yaml")}
    assert names >= {*SCRIPTS, *recipes, "modernbert_small/run/__main__.py"}
    assert any(name.startswith("modernbert_small/reporting/templates/") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "demo/"))]


def test_scripts_and_commands_run_from_any_folder(installed, tmp_path):
    _, python, packages = installed
    for script in SCRIPTS:
        module = script.removesuffix(".py").replace("/", ".")
        assert "--config RECIPE.yaml" in run(python, "-m", module, "--help", cwd=tmp_path)
    Path(tmp_path, "my_texts").mkdir()
    Path(tmp_path, "my_texts", "a.txt").write_text("One text of a few words.")
    said = run(python, "-m", "modernbert_small.run", "cpu", "--dry_run", cwd=tmp_path)
    assert f"{SCRIPTS[0]}: to do" in said
    said = run(python, "-m", "mlm.pre_train", cwd=tmp_path, status=2)
    assert f"phase 1 makes it: python {packages}/mlm/create_dataset.py" in said
