"""The house: arrows point down, and the deterministic core needs no torch, no Ray, no DALI, no MLflow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hvp_ray"

HEAVY = {"ray", "torch", "nvidia", "mlflow"}
MAY_IMPORT = {
    "ray": (
        "stream/",
        "launch/",
        "evaluation/feature_pool.py",
        "comparison/runner.py",
        "comparison/inline_runs.py",
    ),
    "nvidia": ("views/render_dali.py",),
    "mlflow": ("tracking/mlflow.py", "tracking/mlflow_report.py", "tracking/mlflow_store.py"),
    "jinja2": ("tracking/page.py",),
    "torch.distributed": ("distributed/", "launch/local.py"),
}
LEVELS = [
    ("errors.py", "host_to_device.py", "logs.py", "stored_archive.py"),
    ("row_reuse.py", "extras.py"),
    ("randomness.py", "credentials.py"),
    ("files.py",),
    ("config/",),
    ("local_cache.py",),
    ("records.py", "identity.py", "resolved_run.py", "methods/configs.py"),
    ("recipes/", "selection/candidates.py", "views/geometry.py"),
    ("views/plan.py", "views/masks.py", "views/blur_kernel.py", "data/"),
    ("views/color.py",),
    (
        "views/color_batch.py",
        "views/decoded.py",
        "views/downscale.py",
        "views/normalise.py",
        "views/renderer.py",
        "views/render_cpu.py",
        "views/render_dali.py",
    ),
    ("selection/", "distributed/world.py"),
    ("methods/",),
    ("distributed/", "evaluation/", "tracking/", "stream/"),
    ("training/",),
    ("costs/", "runs/", "export/"),
    ("launch/",),
    ("comparison/",),
    ("api.py", "cli/"),
]


def _level(path: str) -> int:
    matches = [(len(prefix), level) for level, row in enumerate(LEVELS) for prefix in row if path.startswith(prefix)]
    return max(matches)[1]


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            is_package = (ROOT / node.module.replace(".", "/")).is_dir()
            submodules = [f"{node.module}.{alias.name}" for alias in node.names] if is_package else []
            existing = [name for name in submodules if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()]
            names += existing or [node.module]
    return names


def _modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def test_arrows_point_down() -> None:
    wrong = []
    for path in _modules():
        here = path.relative_to(PACKAGE).as_posix()
        for name in _imports(path):
            if not name.startswith("hvp_ray."):
                continue
            target = name.removeprefix("hvp_ray.").replace(".", "/")
            target = f"{target}/" if (PACKAGE / target).is_dir() else f"{target}.py"
            if _level(target) > _level(here):
                wrong.append(f"{here} -> {target}")
    assert not wrong


@pytest.mark.parametrize("library", list(MAY_IMPORT))
def test_each_library_has_its_place(library: str) -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in _modules()
        if any(name == library or name.startswith(f"{library}.") for name in _imports(path))
    }
    assert users
    assert all(user.startswith(MAY_IMPORT[library]) for user in users), users


def test_core_imports_neither_torch_nor_ray_nor_dali_nor_mlflow() -> None:
    program = (
        "import sys\n"
        "import hvp_ray.views.plan, hvp_ray.views.geometry, hvp_ray.data.order, hvp_ray.identity, hvp_ray.recipes\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("hvp_ray.stream.view_worker", {"torch._dynamo", "timm", "torchvision", "matplotlib", "pandas", "mlflow"}),
        ("hvp_ray.launch.driver", {"matplotlib", "mlflow", "sklearn"}),
        ("hvp_ray.launch.trainer", {"matplotlib", "mlflow", "sklearn"}),
        ("hvp_ray.launch.trainer_setup", {"torch._dynamo", "timm", "torchvision", "matplotlib", "mlflow", "sklearn"}),
        ("hvp_ray.launch.board", {"torch", "cv2", "pandas"}),
    ],
)
def test_processes_import_what_they_need_at_the_start(module: str, absent: set[str]) -> None:
    """Each would delay the first batch by a second or more, and take memory in every view worker."""
    program = f"import sys, {module}; print(sorted({absent!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_only_programs_print() -> None:
    for path in _modules():
        if path.parent.name == "cli":
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


_OF_THE_CURRENT_DEVICE = {"current_stream", "synchronize", "Stream", "max_memory_allocated", "record"}
"""Calls that mean the thread's current device (or its stream) if they have no argument."""


def test_streams_and_events_name_their_device() -> None:
    """The current device of a thread is number 0 until it is set, whatever the rank, so nothing may depend on it."""
    wrong = []
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or node.args or node.keywords or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            is_event = node.func.attr == "record" and owner != "self"
            if node.func.attr in _OF_THE_CURRENT_DEVICE and (owner == "torch.cuda" or is_event):
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong


def test_no_unnamed_rooms() -> None:
    assert not [path for path in PACKAGE.rglob("*") if path.stem in ("utils", "common", "misc", "helpers")]
