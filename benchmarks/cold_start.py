"""Measure where the time of a cold start goes: from the command to the first trained step.

python benchmarks/cold_start.py [--recipe NAME] [--repeats N] [--json FILE]

Starts `pipelines/pretrain.py` with no Ray running, in an empty output folder, and stops it after its first step. Printed for
each start: when its first line came (everything is checked, Ray runs), when the first step was recorded, and the CPU seconds
that each process has used by then. `ray::IDLE` are processes that Ray starts in advance.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, wherever it is started from

from benchmarks.results_file import Results, describe_machine, open_results
from benchmarks.streams.cpu_time import read_cpu_times

POLL_SECONDS = 0.05
MOST_SECONDS = 600.0


def measure(recipe: str) -> Results:
    """Yield the figures of one cold start."""
    with tempfile.TemporaryDirectory(prefix="hvp_ray-cold-") as output:
        command = [sys.executable, "pipelines/pretrain.py", recipe, "--run.name", "cold", "--run.output", output]
        start = time.perf_counter()
        program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines: list[tuple[float, str]] = []

        def read() -> None:
            assert program.stdout is not None
            lines.extend((time.perf_counter() - start, line.rstrip()) for line in program.stdout)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while not any("metrics.jsonl" in files for _, _, files in os.walk(output)):
                if program.poll() is not None or time.perf_counter() - start > MOST_SECONDS:
                    raise RuntimeError("the run recorded no step:\n" + "\n".join(line for _, line in lines))
                time.sleep(POLL_SECONDS)
            first_step = time.perf_counter() - start
            spent = Counter[str]()
            for process_id, (_, seconds) in read_cpu_times().items():
                if process_id != os.getpid():
                    spent[_title(process_id)] += seconds
        finally:
            program.send_signal(signal.SIGTERM)
            program.wait()
            reader.join()
    yield {"name": "cold.first_line", "value": lines[0][0], "unit": "s"}
    yield {"name": "cold.first_step", "value": first_step, "unit": "s"}
    yield {"name": "cold.cpu", "value": sum(spent.values()), "unit": "CPU s"}
    for title, seconds in spent.most_common(10):
        yield {"name": "cold.cpu", "value": seconds, "unit": "CPU s", "process": title}


def _title(process_id: int) -> str:
    """Return the name of a process without its arguments."""
    try:
        words = psutil.Process(process_id).cmdline()
    except psutil.NoSuchProcess:
        return "ended"
    if not words:
        return "ended"
    if words[0].startswith("ray::"):
        return words[0].split("(")[0].split(".")[0]
    return next((Path(word).name for word in words if word.endswith(".py")), Path(words[0]).name)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--recipe", default="simsiam-digits", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    times = []
    with open_results(options.json, describe_machine("torch", "ray")) as keep:
        for repeat in range(options.repeats):
            for result in measure(options.recipe):
                keep([result | {"recipe": options.recipe, "repeat": repeat}])
                print(
                    f"{result['name']:18} {result['value']:8.2f} {result['unit']:6} {result.get('process', '')}",
                    flush=True,
                )
                if result["name"] == "cold.first_step":
                    times.append(result["value"])
    print(f"first step after {statistics.median(times):.1f} s (median of {len(times)})")


if __name__ == "__main__":
    main()
