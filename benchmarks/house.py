"""Measure the house: lines, functions, parameters, whole-config signatures, words; a column of docs/architecture.md.

    python benchmarks/house.py .                                     # print this checkout's column
    python benchmarks/house.py BEFORE . --write docs/architecture.md # write a column for each checkout
    python benchmarks/house.py . --time "make test"                  # run a command in the checkout and add its minutes

Everything else is read from the files of the checkout, so any commit can measure any other. `--write` keeps columns and
rows that are in the table already, and replaces the values that are measured again.
"""

import argparse
import ast
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

BEGIN, END = "<!-- begin house -->\n", "<!-- end house -->\n"
GENERATED = re.compile(r"\A<!-- generated.*|\A# [^\n]*\n\nWritten by .*|<!-- begin .*?<!-- end", re.DOTALL)
"""A page, or a part of one, that a program writes."""


def measure(checkout: Path) -> dict[str, str]:
    """Return the rows of a checkout: name -> value."""
    package = sorted((checkout / "hvp_ray").rglob("*.py"))
    tests = sorted((checkout / "tests").rglob("*.py"))
    functions = [function for path in package for function in _functions(path)]
    lengths = sorted(_num_lines(function) for function in functions)
    parameters = [_num_parameters(function) for function in functions]
    package_lines, test_lines = _lines(package), _lines(tests)
    return {
        "lines of the package": f"{package_lines:,}",
        "files of the package": str(len(package)),
        "test lines per package line": f"{test_lines / package_lines:.2f}",
        "function, median / 95th percentile / longest, lines": (
            f"{statistics.median(lengths):.0f} / {lengths[int(0.95 * len(lengths))]} / {lengths[-1]}"
        ),
        "functions of more than 60 lines": str(sum(length > 60 for length in lengths)),
        "parameter list, longest": str(max(parameters)),
        "functions with six or more parameters": str(sum(number >= 6 for number in parameters)),
        "signatures with a whole RunConfig": str(sum(_takes_run_config(function) for function in functions)),
        "words of README": f"{_words(checkout / 'README.md'):,}",
        "words of docs, written by hand": f"{_words(*_pages(checkout)):,}",
    }


def _minutes(command: str, checkout: Path) -> float:
    start = time.monotonic()
    subprocess.run(command, shell=True, cwd=checkout, check=True)
    return (time.monotonic() - start) / 60


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument for argument in every if argument.arg not in ("self", "cls")]


def _num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return len(_parameters(function))


def _takes_run_config(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    annotations = [argument.annotation for argument in _parameters(function) if argument.annotation is not None]
    names = [node.id for annotation in annotations for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    return "RunConfig" in names


def _pages(checkout: Path) -> list[Path]:
    return sorted((checkout / "docs").rglob("*.md"))


def _lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def _words(*paths: Path) -> int:
    tokens = [token for path in paths for token in GENERATED.sub("", path.read_text()).split()]
    return sum(any(character.isalnum() for character in token) for token in tokens)


def table(columns: dict[str, dict[str, str]]) -> str:
    """Return the Markdown table: a row for each measure, a column for each checkout."""
    rows = list(dict.fromkeys(row for values in columns.values() for row in values))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(values.get(row, "") for values in columns.values())] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Return the columns of a table that `table` wrote."""
    lines = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if line.strip()
    ]
    if not lines:
        return {}
    header, _, *rows = lines
    return {name: {row[0]: row[place] for row in rows} for place, name in enumerate(header[1:], start=1)}


def main() -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="+", help="folders of checkouts")
    parser.add_argument("--names", nargs="+", help="heads of the columns; default: after, or before and after")
    parser.add_argument("--time", metavar="COMMAND", help="run this in each checkout, and add a row of its minutes")
    parser.add_argument("--write", type=Path, help="page whose table between the markers is replaced")
    arguments = parser.parse_args()
    names = arguments.names or ["before", "after"][-len(arguments.checkouts) :]
    columns = dict(zip(names, map(measure, arguments.checkouts), strict=True))
    if arguments.time is not None:
        for name, checkout in zip(names, arguments.checkouts, strict=True):
            columns[name][f"`{arguments.time}`, minutes"] = f"{_minutes(arguments.time, checkout):.1f}"
    if arguments.write is None:
        print(table(columns), end="")
        return
    before, rest = arguments.write.read_text().split(BEGIN)
    old, after = rest.split(END)
    kept = read_table(old)
    merged = kept | {name: kept.get(name, {}) | values for name, values in columns.items()}
    arguments.write.write_text(f"{before}{BEGIN}\n{table(merged)}\n{END}{after}")


if __name__ == "__main__":
    main()
