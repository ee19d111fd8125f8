"""Measure seconds and CPU seconds per gigabyte of objects between two nodes, without and with TLS in turns.

python benchmarks/tls.py [--json FILE] [--mib 64] [--objects 8] [--repeats 3]

Two raylets in network namespaces of their own, joined by a bridge, so that objects cross a network device. Needs root, `ip`
and openssl. CPU seconds are those of both raylets: in Ray 2.60 they send and receive the objects. On a machine with other
work only the ratio of one run means something.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.results_file import Result, describe_machine, open_results

ROOT = Path(__file__).parents[1]
_ADDRESSES = {"a": "10.88.0.1", "b": "10.88.0.2"}
_DRIVER = """
import json, sys, time, numpy as np, ray
num_bytes, num_objects = int(sys.argv[1]), int(sys.argv[2])
ray.init("10.88.0.1:6379", log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0, resources={"b": 1})
class Source:
    def make(self, i):
        return np.full(num_bytes, i, np.uint8)

source = Source.remote()
def fetch():
    references = [source.make.remote(i) for i in range(num_objects)]
    ray.wait(references, num_returns=num_objects, fetch_local=False)
    print("ready", flush=True); sys.stdin.readline()
    start = time.perf_counter()
    ray.wait(references, num_returns=num_objects, fetch_local=True)
    print(time.perf_counter() - start, flush=True)
fetch()
fetch()  # the first one touches the pages of both stores
"""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def two_namespaces() -> Iterator[dict[str, str]]:
    """Join two namespaces by a bridge; yield the namespace of each node."""
    names = {node: f"tls{os.getpid()}-{node}" for node in (*_ADDRESSES, "switch")}
    try:
        for name in names.values():
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        switch = names["switch"]
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for node, address in _ADDRESSES.items():
            end = ["peer", "name", f"to_{node}", "netns", switch]
            _run("ip", "link", "add", "eth0", "netns", names[node], "type", "veth", *end)
            _run("ip", "-n", switch, "link", "set", f"to_{node}", "master", "br0", "up")
            _run("ip", "-n", names[node], "address", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", names[node], "link", "set", "eth0", "up")
        yield names
    finally:
        for name in names.values():
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for pid in map(int, pids.split()):
                psutil.Process(pid).kill()
            subprocess.run(["ip", "netns", "del", name], check=False)


def measure(names: dict[str, str], folder: Path, *, tls: bool, num_bytes: int, num_objects: int) -> tuple[float, float]:
    """Return seconds and CPU seconds of both raylets per gigabyte that goes from node b to node a."""
    folder.mkdir()
    store = str(2 * num_bytes * num_objects + 2**28)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
        "RAY_USE_TLS": "1" if tls else "0",
        "RAY_TLS_CA_CERT": str(folder.parent / "ca.crt"),
        "RAY_TLS_SERVER_CERT": str(folder.parent / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(folder.parent / "node.key"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def inside(node: str, *command: str, **options: object) -> subprocess.Popen[str]:
        path = environment | {"RAY_TMPDIR": str(folder / node)}
        return subprocess.Popen(
            ["ip", "netns", "exec", names[node], *command],
            env=path,
            text=True,
            **options,  # type: ignore[call-overload]
        )

    for node, address in _ADDRESSES.items():
        role = ["--head", "--port=6379", "--include-dashboard=false"] if node == "a" else ["--address=10.88.0.1:6379"]
        start = ["ray", "start", *role, f"--node-ip-address={address}", "--num-cpus=1", f'--resources={{"{node}": 1}}']
        start += [f"--object-store-memory={store}", "--disable-usage-stats"]
        with (folder / f"{node}.log").open("w") as log:
            if inside(node, *start, stdout=log, stderr=log).wait() != 0:
                raise RuntimeError(f"the node did not start: {(folder / f'{node}.log').read_text()[-2000:]}")
    pids = [pid for node in _ADDRESSES for pid in _pids(names[node])]
    raylets = [process for process in map(psutil.Process, pids) if process.name() == "raylet"]
    driver = inside(
        "a",
        sys.executable,
        "-c",
        _DRIVER,
        str(num_bytes),
        str(num_objects),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    seconds = cpu = 0.0
    for _ in range(2):
        if driver.stdout.readline().strip() != "ready":
            raise RuntimeError("the driver ended before it fetched")
        before = _cpu_seconds(raylets)
        driver.stdin.write("\n")
        driver.stdin.flush()
        seconds, cpu = float(driver.stdout.readline()), _cpu_seconds(raylets) - before
    driver.wait()
    for node in _ADDRESSES:
        for pid in _pids(names[node]):
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()
    gigabytes = num_bytes * num_objects / 1e9
    return seconds / gigabytes, cpu / gigabytes


def _pids(namespace: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid in found.split()]


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    """Measure, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--mib", type=int, default=64, help="MiB of an object")
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parsed = parser.parse_args()
    rows: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    size = {"num_bytes": parsed.mib * 2**20, "num_objects": parsed.objects}
    with (
        tempfile.TemporaryDirectory(prefix="tls", dir="/tmp", ignore_cleanup_errors=True) as name,
        two_namespaces() as names,
    ):
        folder = Path(name)
        _run(
            str(ROOT / "cluster" / "make_certificate.sh"), name, "node", *_ADDRESSES.values(), "127.0.0.1", "localhost"
        )
        for repeat in range(parsed.repeats):
            for tls in (False, True):
                rows[tls].append(measure(names, folder / f"{repeat}{tls:d}", tls=tls, **size))
                seconds, cpu = rows[tls][-1]
                print(f"{'TLS' if tls else 'no TLS':>7}  {1 / seconds:5.2f} GB/s  {cpu:5.2f} CPU s of raylets per GB")
    results: list[Result] = []
    for quantity, unit, index in (("seconds_per_gigabyte", "s/GB", 0), ("raylet_cpu_seconds_per_gigabyte", "s/GB", 1)):
        middle = {tls: statistics.median(row[index] for row in rows[tls]) for tls in rows}
        for tls, subject in ((False, "clear"), (True, "tls")):
            values = [row[index] for row in rows[tls]]
            results.append({"name": f"tls.{subject}.{quantity}", "value": middle[tls], "unit": unit, "values": values})
        results.append({"name": f"tls.{quantity}.ratio", "value": middle[True] / middle[False], "unit": "1"})
        print(f"{quantity}: {middle[False]:.2f} without TLS, {middle[True]:.2f} with it")
    with open_results(parsed.json, describe_machine("ray") | {"mib": parsed.mib, "objects": parsed.objects}) as keep:
        keep(results)


if __name__ == "__main__":
    main()
