"""The results of a check as Markdown: one table for each part, and what was not run, with the reason."""

from collections.abc import Sequence
from typing import Any

from benchmarks.results_file import Result

TITLES = {
    "a": "Parity of pixels, uint8 levels",
    "b": "Rendering",
    "c": "View workers, object store and trainer on one GPU",
    "d": "A hard step in random steps",
    "e": "Memory of a DALI worker",
    "f": "NCCL, two processes",
    "g": "Tests that need a GPU (`pytest -m gpu tests/gpu`)",
}


def markdown(environment: dict[str, Any], parts: dict[str, list[Result]], outcomes: dict[str, str]) -> str:
    """Return the page.

    Args:
        environment: date, device, versions.
        parts: letter of a part -> its results.
        outcomes: letter -> how it ended: `done in 12 s`, or why not.
    """
    lines = [f"# GPU check: {environment['device']}, {environment['date']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in environment.items()]
    for letter, title in TITLES.items():
        results = parts.get(letter, [])
        lines += ["", f"## ({letter}) {title}", "", outcomes.get(letter, "not run"), ""]
        if not results:
            continue
        tables = {"a": _parity, "d": _steps}
        lines += tables.get(letter, _plain)(results)
    return "\n".join(lines) + "\n"


def _plain(results: Sequence[Result]) -> list[str]:
    rows = [row for row in results if not isinstance(row["value"], list)]
    return ["| what | value | unit |", "|---|---|---|"] + [
        f"| {row['name']} | {_number(row['value'])} | {row['unit']} |" for row in rows
    ]


def _parity(results: Sequence[Result]) -> list[str]:
    """Mean, worst and share above 8 of each operation, a column for each renderer it is compared with."""
    cells: dict[str, dict[str, dict[str, float]]] = {}
    for row in results:
        operation, against, quantity = row["name"].removeprefix("parity.").rsplit(".", 2)
        cells.setdefault(operation, {}).setdefault(against, {})[quantity] = row["value"]
    columns = ["dali-cpu", "cpu", "torchvision"]
    lines = [
        "Mean, worst value, and percentage of values that differ by more than 8.",
        "",
        "| operation | " + " | ".join(f"against {column}" for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for operation, by_renderer in cells.items():
        texts = [
            f"{cell['mean']:.3f}, {cell['worst']:.0f}, {cell['above_8']:.3f} %"
            if (cell := by_renderer.get(column))
            else ""
            for column in columns
        ]
        lines.append(f"| {operation} | " + " | ".join(texts) + " |")
    return lines


def _steps(results: Sequence[Result]) -> list[str]:
    rows: dict[tuple[str, bool], dict[str, Result]] = {}
    for row in (row for row in results if row["name"].startswith("step.")):
        setting, quantity = row["name"].rsplit(".", 1)
        rows.setdefault((setting.removeprefix("step."), bool(row.get("compiled"))), {})[quantity] = row
    lines = [
        "| step | compiled | images | ms | random steps | by operation count | images/s | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (setting, compiled), of in rows.items():
        values = {name: row["value"] for name, row in of.items()}
        images, is_compiled = of["seconds"].get("images", ""), "yes" if compiled else "no"
        lines.append(
            f"| {setting} | {is_compiled} | {images} | {1000 * values['seconds']:.1f} "
            f"| {values['ratio']:.2f} | {values['model_ratio']:.2f} | {_number(values.get('images_per_second'))} "
            f"| {_number(values.get('peak_memory_gib'))} |"
        )
    return lines + _ledger(results)


def _ledger(results: Sequence[Result]) -> list[str]:
    """The parts of a step, in random steps: a row for each part, a column for each setting; a table for each network."""
    subjects: dict[tuple[str, bool], dict[str, dict[str, float]]] = {}
    for row in (row for row in results if row["name"].startswith("ledger.")):
        subject, setting, part = row["name"].removeprefix("ledger.").rsplit(".", 2)
        cells = subjects.setdefault((subject, bool(row.get("compiled"))), {})
        cells.setdefault(part, {})[setting] = row["value"]
    lines: list[str] = []
    for (subject, compiled), cells in subjects.items():
        settings = list(dict.fromkeys(setting for of_part in cells.values() for setting in of_part))
        title = f"{subject}, {'compiled' if compiled else 'eager'}, random steps"
        lines += ["", f"| {title} | " + " | ".join(settings) + " |", "|---" * (len(settings) + 1) + "|"]
        for part, of_part in cells.items():
            texts = [f"{of_part[setting]:.3f}" if setting in of_part else "" for setting in settings]
            lines.append(f"| {part} | " + " | ".join(texts) + " |")
    return lines


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
