"""Docstrings of the standard library and of installed packages: English that is on every machine.

Files are read with `ast` and never imported.
"""

import ast
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from inspect import cleandoc
from pathlib import Path

# Beside the standard library in the source python_docs: pinned in requirements.txt, and enough text for the demo.
PACKAGES = ("numpy",)

# Docstrings in these folders describe test cases, or belong to another Python's packages.
_SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "dist-packages", "__pycache__"}
# Some distributions install these parts of the standard library only on request.
_SKIPPED_FOLDERS |= {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# A summary is one sentence. Text that goes on for more lines than this is a paragraph.
_SUMMARY_LINES = 3
_SENTENCE_END = re.compile(r"[.!?][)`'\"]*$")
# Lines that start a list, a field, an example or a section; and underlines.
_NEW_BLOCK = re.compile(r"(?:>>>|\.\. |[-*+:@=~#]|\d+[.)] )|.*:$")
_UNDERLINE = re.compile(r"[=\-~^#*]{3,}\s*\n")


def python_files(packages: Sequence[str] | None = None) -> list[Path]:
    """Source files of the standard library and of packages, in a fixed order, without tests.

    Args:
        packages: names of installed packages; None takes all that are installed.
    """
    installed = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    if packages is not None:
        specs = map(importlib.util.find_spec, packages)
        installed = [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin is not None]
    return [
        path
        for root in dict.fromkeys([Path(sysconfig.get_path("stdlib")), *installed])
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    ]


def read_docstrings(path: Path) -> list[tuple[str, str]] | None:
    """(summary, body) of each docstring of a file, in the order of the source; None if it does not parse."""
    try:
        with warnings.catch_warnings():
            # Invalid escapes in other people's strings.
            warnings.simplefilter("ignore")
            docstrings = list(_docstrings(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return None
    return [split_docstring(text) for text in docstrings]


def split_docstring(docstring: str) -> tuple[str, str]:
    """Split a docstring into summary and body; either may be empty.

    The summary is the first sentence, which may be wrapped onto several lines. It ends at the end of a sentence, at an
    empty line, or before a line that starts a list, a field or an example. A docstring without such an end within three
    lines has no summary and is all body, since half a sentence would make a bad query.
    """
    lines = cleandoc(docstring).strip().split("\n")
    for count in range(1, min(len(lines), _SUMMARY_LINES) + 1):
        following = lines[count].strip() if count < len(lines) else ""
        if _SENTENCE_END.search(lines[count - 1].rstrip()) or not following or _NEW_BLOCK.match(following):
            summary = " ".join(line.strip() for line in lines[:count])
            body = "\n".join(lines[count:]).strip("\n")
            return summary, _UNDERLINE.sub("", body, count=1) if _UNDERLINE.match(body) else body
    return "", "\n".join(lines)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings below a node, depth first. Expressions, most of a tree, hold none and are not visited."""
    if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node, clean=False)):
        yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings(child)
