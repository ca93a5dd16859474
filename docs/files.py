"""The list of the package's files, each with the first line of its docstring: `python docs/files.py` prints it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def file_list(package: Path = ROOT / "image_classifier") -> str:
    """Return the list as Markdown: a heading for each folder, a line for each file."""
    return "\n".join(_lines(package))


def _lines(package: Path) -> Iterator[str]:
    for folder in [package, *sorted(path.parent for path in package.rglob("__init__.py") if path.parent != package)]:
        name = folder.relative_to(package.parent).as_posix()
        yield f"\n### {name}/\n"
        if summary := _summary(folder / "__init__.py"):
            yield f"{summary}\n"
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                yield f"- `{path.name}`: {_summary(path)}"


def _summary(path: Path) -> str:
    """Return the first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


if __name__ == "__main__":
    print(file_list())
