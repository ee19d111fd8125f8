"""Documentation matches the code: generated pages, paths and links; the dashboard shows published metrics only."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

from hvp_ray.config import RunConfig
from hvp_ray.tracking.metrics_table import RECORDED, SUMMARY, TRAINER_METRICS, WORKER_METRICS

ROOT = Path(__file__).parents[2]
PUBLISHED = {f"ray_{name}" for name in (*TRAINER_METRICS, *WORKER_METRICS)}


def first_column(page: str) -> list[str]:
    return list(re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE))


def test_pages_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_metrics_page_explains_every_metric_once() -> None:
    assert sorted(first_column("metrics.md")) == sorted({*RECORDED, *SUMMARY, *PUBLISHED})


def test_configuration_page_explains_every_option() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    sections = re.split(r"^## ", page, flags=re.MULTILINE)
    assert not [row for row in page.splitlines() if row.startswith("| `") and row.endswith("|  |")]
    for section in dataclasses.fields(RunConfig):
        if section.name == "recipe":
            continue
        assert any(part.startswith(f"`{section.name}`") for part in sections), section.name


def test_dashboard_shows_published_metrics_only() -> None:
    dashboard = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(dashboard["panels"]) >= 8
    suffixes = r"(_bucket|_count|_sum)$"
    names = {re.sub(suffixes, "", name) for query in queries for name in re.findall(r"ray_hvp_ray_\w+", query)}
    assert all("ray_hvp_ray_" in query for query in queries)
    assert names <= PUBLISHED


PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("hvp_ray", "pipelines", "tests", "benchmarks", "cluster")


def test_paths_in_the_documentation_exist() -> None:
    """A path is a code span with a folder and a suffix; it starts at the repository or at the package."""
    paths = {
        (page.relative_to(ROOT).as_posix(), path)
        for page in PROSE
        for path in re.findall(r"`([a-z_]+/[\w./-]+\.(?:py|sh|md|toml|yaml|json|jsonl))[`:]", page.read_text())
        if (ROOT / path.split("/")[0]).is_dir() or (ROOT / "hvp_ray" / path.split("/")[0]).is_dir()
    }
    assert not sorted(p for p in paths if not (ROOT / p[1]).exists() and not (ROOT / "hvp_ray" / p[1]).exists())


def test_pages_named_in_the_code_exist() -> None:
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")]
    pages = {(path, page) for path in sources for page in re.findall(r"docs/[\w/-]+\.md", path.read_text())}
    assert not [(path, page) for path, page in pages if not (ROOT / page).exists()]


def test_links_of_readme_exist() -> None:
    """mkdocs checks the links between pages."""
    for page in PROSE[:2]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"
