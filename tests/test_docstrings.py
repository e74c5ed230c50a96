import pytest

from modernbert_small.corpus import docstrings
from modernbert_small.corpus.docstrings import python_files, read_docstrings, split_docstring


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Do it.", ("Do it.", "")),
        ("Do it.\n\n    More.\n      Deeper.\n    ", ("Do it.", "More.\n  Deeper.")),
        ("\n    Do it, and\n    more.\n    Then rest.\n    ", ("Do it, and more.", "Then rest.")),
        ("No full stop\n\nBody.", ("No full stop", "Body.")),
        ("Do it\n>>> it()\n1", ("Do it", ">>> it()\n1")),
        ("Do it\nArgs:\n    x: number.", ("Do it", "Args:\n    x: number.")),
        ("Title\n=====\nBody", ("Title", "Body")),
        ("one\ntwo\nthree\nfour", ("", "one\ntwo\nthree\nfour")),
    ],
)
def test_summary_and_body(docstring, expected):
    assert split_docstring(docstring) == expected


def test_docstrings_of_modules_classes_and_functions_are_read_and_nothing_runs(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Module."""\nimport nowhere\nraise SystemExit\n"not a docstring"\n'
        'class A:\n    """Class."""\n    def f(self):\n        "Method."\n        return "text"\n'
        "if True:\n    async def g():\n        '''Async.\n\n        Body.\n        '''\n"
        'try:\n    pass\nexcept ValueError:\n    def h():\n        """In a handler."""\n'
    )
    expected = [("Module.", ""), ("Class.", ""), ("Method.", ""), ("Async.", "Body."), ("In a handler.", "")]
    assert read_docstrings(path) == expected


@pytest.mark.parametrize("source", [b"def f(:", b"\x00", b"# -*- coding: latin-9x -*-\n", b"'\xff'"])
def test_a_file_that_does_not_parse_is_none(tmp_path, source):
    (tmp_path / "bad.py").write_bytes(source)
    assert read_docstrings(tmp_path / "bad.py") is None


def test_files_come_in_a_fixed_order_without_tests_and_foreign_packages(tmp_path, monkeypatch):
    standard, installed = tmp_path / "python", tmp_path / "python/site-packages"
    names = ("b.py", "a/z.py", "a/tests/t.py", "tkinter/t.py", "test_me.py", "notes.txt")
    packages = ("mypackage/__init__.py", "mypackage/deep/n.py", "mypackage/tests/t.py", "other/o.py")
    for path in (*(standard / name for name in names), *(installed / name for name in packages)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folders = {"stdlib": standard, "purelib": installed, "platlib": installed}
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(folders[name]))
    monkeypatch.syspath_prepend(str(installed))

    def found(packages):
        return [path.relative_to(standard).as_posix() for path in python_files(packages)]

    own = ["a/z.py", "b.py", "test_me.py", "site-packages/mypackage/__init__.py", "site-packages/mypackage/deep/n.py"]
    assert found(("mypackage",)) == own
    assert found(None) == [*own, "site-packages/other/o.py"]
