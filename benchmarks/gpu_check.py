"""Everything that only a GPU shows, in one run of at most eight minutes: a table in benchmarks/results.

python benchmarks/gpu_check.py [--data FILE] [--parts a,b,c,d,e,f,g] [--json FILE] [--markdown FILE] [--rehearse]

(a) parity of pixels; (b) rendering speed; (c) view workers and trainer on one GPU; (d) hard steps in random steps, eager and
compiled; (e) memory of a DALI worker; (f) nccl with two processes; (g) the tests that need a GPU.

Every part is a process of its own with a limit of time; what it measured before it failed or was stopped is kept. Parts that
are not named keep the results that the JSON file has of them, so a check can be done in pieces. Without a GPU it says so and
ends; what is missing among the packages it says by name.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, wherever it is started from

LIMIT_SECONDS = {"a": 90, "b": 80, "c": 170, "d": 240, "e": 60, "f": 60, "g": 120}
TOTAL_SECONDS = 480
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "pyarrow": "pyarrow",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "simplejpeg": "simplejpeg",
    "jaxtyping": "jaxtyping",
    "safetensors": "safetensors",
    "psutil": "psutil",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
}
OF_PART = {
    "a": {"nvidia.dali": "nvidia-dali-cuda130"},
    "b": {"nvidia.dali": "nvidia-dali-cuda130"},
    "c": {"nvidia.dali": "nvidia-dali-cuda130", "ray": "ray"},
    "e": {"nvidia.dali": "nvidia-dali-cuda130"},
    "f": {"pytest": "pytest", "beartype": "beartype"},
    "g": {"pytest": "pytest", "beartype": "beartype", "ray": "ray", "nvidia.dali": "nvidia-dali-cuda130"},
}
OPTIONAL = {"kornia": "kornia"}
STEP_RECIPES = ("simsiam-imagenet-r50-100ep", "dino-imagenet-vits16-100ep")
SCORING_PX = {False: ["224", "112", "96", "80"], True: ["224", "96"]}
"""Compiled or not -> resolutions; each is compiled anew, which takes a minute."""


def missing_packages(part: str) -> list[str]:
    """Return the names of packages that a part needs and that are not installed."""

    def is_there(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            return False

    return [name for module, name in (PACKAGES | OF_PART.get(part, {})).items() if not is_there(module)]


def describe_environment(data: Path | None, *, rehearse: bool) -> dict[str, Any]:
    """Return what the table's head says."""
    import torch

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    has_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if has_gpu else "rehearsal on a CPU; the numbers mean nothing"
    versions = ("torch", "torchvision", "nvidia-dali-cuda130", "ray", "kornia", "timm", "numpy", "simplejpeg")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": "rehearsal" if rehearse else device,
        "GPUs": torch.cuda.device_count(),
        "driver": _driver(),
        "CUDA of torch": torch.version.cuda or "none",
        "CPU": f"{os.cpu_count()} cores, {platform.machine()}",
        "Python": platform.python_version(),
        "data": f"{data.name}, first 128 photographs" if data else "made-up photographs",
    } | {name: version(name) for name in versions}


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def run_part(part: str, options: argparse.Namespace, limit: float) -> tuple[list[dict[str, Any]], str]:
    """Run a part in a process of its own; return its results and how it ended."""
    missing = missing_packages(part)
    if missing:
        return [], f"not run: not installed: {', '.join(missing)}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.jsonl"
        command = [sys.executable, __file__, "--run-part", part, "--into", str(out), "--picture", str(options.picture)]
        command += ["--data", str(options.data)] if options.data else []
        command += ["--rehearse"] if options.rehearse else []
        start = time.monotonic()
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT)
            try:
                code = process.wait(timeout=limit)
                outcome = f"done in {time.monotonic() - start:.0f} s"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code, outcome = 0, f"stopped at its limit of {limit:.0f} s; what is below was measured before"
            log.seek(0)
            text = log.read()
        if code != 0:
            outcome = "failed:\n\n```\n" + "\n".join(text.strip().splitlines()[-12:]) + "\n```"
        if code != 0 or options.verbose:
            print(text[-6000:], flush=True)
        lines = out.read_text().splitlines() if out.exists() else []
    return [json.loads(line) for line in lines], outcome


def do_part(options: argparse.Namespace) -> int:
    """The process of one part: write each result as soon as it is there."""
    from benchmarks.gpu.check import Check

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    with tempfile.TemporaryDirectory() as folder, options.into.open("w") as file:
        check = Check(
            data=options.data, folder=Path(folder), rehearse=options.rehearse, picture=options.picture.resolve()
        )
        runs = {
            "a": lambda check: importlib.import_module("benchmarks.gpu.parity").run(check),
            "b": lambda check: importlib.import_module("benchmarks.gpu.rendering").run(check),
            "c": lambda check: importlib.import_module("benchmarks.gpu.end_to_end").run(check),
            "d": lambda check: _step_benchmark(rehearse=check.rehearse),
            "e": lambda check: importlib.import_module("benchmarks.gpu.memory").run(check),
            "f": lambda _: _tests("tests/gpu/test_nccl.py"),
            "g": lambda _: _tests("tests/gpu", "--ignore=tests/gpu/test_nccl.py"),
        }
        try:
            for result in runs[options.run_part](check):
                file.write(json.dumps(result) + "\n")
                file.flush()
        except Exception:  # noqa: BLE001 (it goes into the table)
            traceback.print_exc()
            return 1
    return 0


def _end_with_parent(parent: int) -> None:
    """A part has a process group of its own, which must not outlive a check that is killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def _step_benchmark(*, rehearse: bool) -> Any:
    """(d): benchmarks/step.py, eager, then compiled; both recipes compile side by side and take turns on the device."""
    images, repeats = ("2", "1") if rehearse else ("256", "12")
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for recipe in STEP_RECIPES[: 1 if rehearse else None]:
            runs = []
            for compiled in (False,) if rehearse else (False, True):
                out = Path(folder) / f"{recipe}-{compiled}.jsonl"
                run = [
                    sys.executable,
                    "benchmarks/step.py",
                    "--recipes",
                    recipe,
                    "--images",
                    images,
                    "--repeats",
                    repeats,
                ]
                run += ["--scoring-px", *SCORING_PX[compiled], "--json", str(out), "--lock", f"{folder}/lock"]
                runs.append((run + ["--compile"] * compiled, out))
            processes.append(runs)
        done: dict[Path, int] = {}
        under_way = [(subprocess.Popen(runs[0][0]), runs) for runs in processes]
        failed = []
        while under_way:
            time.sleep(0.5)
            yield from _new_lines([out for runs in processes for _, out in runs], done)
            for process, runs in list(under_way):
                if process.poll() is None:
                    continue
                under_way.remove((process, runs))
                if process.returncode != 0:
                    failed.append(" ".join(runs[0][0][1:]))
                runs.pop(0)
                if runs:
                    under_way.append((subprocess.Popen(runs[0][0]), runs))
        if failed:
            raise RuntimeError(f"failed: {failed}")


def _new_lines(paths: list[Path], done: dict[Path, int]) -> Any:
    for path in paths:
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        yield from (json.loads(line) for line in lines[done.get(path, 0) :])
        done[path] = len(lines)


def _tests(*arguments: str) -> Any:
    """Run pytest; yield passed, failed and skipped, and the names of what failed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "-p", "no:cacheprovider", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    process.wait()
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1])}
    for kind in ("passed", "failed", "skipped"):
        yield {"name": f"tests.{kind}", "value": counts.get(kind, 0), "unit": "tests"}
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            yield {"name": line[:200].replace("|", "/"), "value": None, "unit": ""}
    if process.returncode not in (0, 5):  # 5: none was collected
        raise RuntimeError(f"pytest ended with {process.returncode}")


def read_earlier(path: Path | None) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Return results and outcomes that a JSON file has of parts done before."""
    parts: dict[str, list[dict[str, Any]]] = {}
    outcomes: dict[str, str] = {}
    if path is not None and path.exists():
        for line in path.read_text().splitlines():
            result = json.loads(line)
            if "outcome" in result:
                outcomes[result["part"]] = result["outcome"]
            else:
                parts.setdefault(result["part"], []).append(result)
    return parts, outcomes


def main() -> int:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Parquet file with photographs (default: made-up ones)")
    parser.add_argument(
        "--parts", default="a,b,c,e,f,g,d", help="which parts, e.g. a,b (default: all; d, the longest, last)"
    )
    parser.add_argument("--json", type=Path, help="one JSON object a line (default: beside the Markdown file)")
    parser.add_argument("--markdown", type=Path, help="default: benchmarks/results/gpu-<device>-<date>.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/device_timeline.png", help="of part c")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU and tiny: does the program run?")
    parser.add_argument("--verbose", action="store_true", help="show what the parts print")
    parser.add_argument("--run-part", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data is not None:
        options.data = options.data.resolve()
    if options.run_part:
        return do_part(options)
    if missing := [name for name in missing_packages("") if name != "simplejpeg"]:
        print(f"gpu-check: not installed: {', '.join(missing)}")
        return 1
    import torch

    if not torch.cuda.is_available() and not options.rehearse:
        print("gpu-check: nothing was run: torch sees no GPU on this machine (make gpu-check needs one)")
        return 0
    for name in OPTIONAL:
        if importlib.util.find_spec(name) is None:
            print(f"gpu-check: {OPTIONAL[name]} is not installed; part b goes without it")
    environment = describe_environment(options.data, rehearse=options.rehearse)
    slug = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    options.markdown = options.markdown or ROOT / f"benchmarks/results/gpu-{slug}-{environment['date']}.md"
    options.json = options.json or options.markdown.with_suffix(".jsonl")
    parts, outcomes = read_earlier(options.json)
    deadline = time.monotonic() + TOTAL_SECONDS
    for part in options.parts.split(","):
        left = deadline - time.monotonic()
        if part == "f" and torch.cuda.device_count() < 2:
            parts[part], outcomes[part] = [], f"not run: it needs two GPUs, and there is {torch.cuda.device_count()}"
        elif left < 10:
            parts[part], outcomes[part] = [], f"not run: the check's {TOTAL_SECONDS} s are over"
        else:
            parts[part], outcomes[part] = run_part(part, options, min(LIMIT_SECONDS[part], left))
        print(f"({part}) {outcomes[part].splitlines()[0]}", flush=True)
        write(options, environment, parts, outcomes)
    print(f"table {options.markdown}\njson  {options.json}")
    return 1 if any(outcome.startswith("failed") for outcome in outcomes.values()) else 0


def write(
    options: argparse.Namespace,
    environment: dict[str, Any],
    parts: dict[str, list[dict[str, Any]]],
    outcomes: dict[str, str],
) -> None:
    """Write what there is so far."""
    from benchmarks.gpu.report import markdown

    context = {"date": environment["date"], "device": environment["device"], "torch": environment["torch"]}
    lines = []
    for part in sorted(outcomes):
        lines += [{"part": part, "outcome": outcomes[part]} | context]
        lines += [{**result, "part": part} | context for result in parts.get(part, [])]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options.markdown.write_text(markdown(environment, parts, outcomes))


if __name__ == "__main__":
    sys.exit(main())
