"""Hosts on one machine: network namespaces on a bridge, each with one Ray node that a supervisor starts again.

Needs root and `ip` (iproute2). Changes nothing outside its own namespaces and its folder.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
_FALSE_CLOCK = Path(__file__).parent / "false_clock"
_RESTART_SECONDS = 1.0


def is_possible() -> bool:
    """Return whether this process may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    return subprocess.run(["ip", "netns", "list"], capture_output=True).returncode == 0


class Host:
    """One host. Its processes are those of its namespace."""

    def __init__(self, name: str, address: str, space: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name, self.address, self.space, self.folder = name, address, space, folder
        self._environment = dict(environment)
        self._stopping = threading.Event()
        self._supervisor: threading.Thread | None = None
        folder.mkdir()
        self.set_clock(0)

    def set_clock(self, seconds: int) -> None:
        """Shift the time of day that Python code of the node sees."""
        unfinished = self.folder / "clock.part"
        unfinished.write_text(f"{seconds:+d}\n")
        unfinished.replace(self.folder / "clock")

    def start(
        self, command: list[str], log: Path, *, false_clock: bool = False, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a process on this host, with its output at the end of a file."""
        values = {**os.environ, **self._environment, **environment}
        if false_clock:
            values["CHAOS_CLOCK"] = str(self.folder / "clock")
            values["PYTHONPATH"] = f"{_FALSE_CLOCK}{os.pathsep}{values['PYTHONPATH']}"
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.space, *command],
                env=values,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def keep_node(self, role: str, slots: int) -> None:
        """Start the Ray node, and start it again whenever it ends, as compose and systemd do."""
        self._stopping.clear()

        def supervise() -> None:
            while not self._stopping.is_set():
                command = [str(ROOT / "cluster" / "start_node.sh"), role]
                self.start(command, self.folder / "node.log", false_clock=role != "head", HVP_SLOTS=str(slots)).wait()
                self._stopping.wait(_RESTART_SECONDS)

        self._supervisor = threading.Thread(target=supervise, name=f"supervisor of {self.name}", daemon=True)
        self._supervisor.start()

    def stop(self) -> None:
        """End the supervisor and everything on this host."""
        self._stopping.set()
        self.kill()
        if self._supervisor is not None:
            while self._supervisor.is_alive():
                self.kill()
                self._supervisor.join(timeout=0.5)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Return this host's processes whose command line has these words, in the order of their ids."""
        listed = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True).stdout
        found = []
        for pid in sorted(int(line) for line in listed.split()):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self, title: str = "") -> None:
        """Kill at once: all processes, as if the plug were pulled, or those with a title."""
        for process in self.processes(title):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)

    def set_link(self, state: str) -> None:
        """Set the link up or down."""
        run("ip", "-n", self.space, "link", "set", "eth0", state)

    def slow_link(self) -> bool:
        """Make the link slow: 100 ms and 1 % loss, or 2 Mbit/s if the kernel lacks netem. False: it lacks both."""
        shape = ["tc", "-n", self.space, "qdisc", "replace", "dev", "eth0", "root"]
        kinds = ["netem delay 100ms 50ms loss 1%", "tbf rate 2mbit burst 32kbit latency 400ms"]
        return any(subprocess.run([*shape, *kind.split()], capture_output=True).returncode == 0 for kind in kinds)

    def normal_link(self) -> None:
        """Undo `slow_link`; safe to repeat."""
        subprocess.run(["tc", "-n", self.space, "qdisc", "del", "dev", "eth0", "root"], capture_output=True)


def run(*command: str) -> None:
    """Run a command.

    Raises:
        RuntimeError: it failed; with its output.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def hosts(names: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator[dict[str, Host]]:
    """Make hosts that reach each other and nothing else; end everything on them afterwards."""
    prefix = f"c{os.getpid()}"
    switch = f"{prefix}-sw"
    network = f"10.78.{os.getpid() % 256}"  # of its own: a starting head takes a GCS with its address for its own
    made: dict[str, Host] = {}
    spaces: list[str] = []
    try:
        run("ip", "netns", "add", switch)
        spaces.append(switch)
        run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "br0", "up")
        for number, name in enumerate(names, start=1):
            space, address = f"{prefix}-{name}", f"{network}.{number}"
            run("ip", "netns", "add", space)
            spaces.append(space)
            run("ip", "-n", space, "link", "set", "lo", "up")
            run(
                "ip",
                "link",
                "add",
                "eth0",
                "netns",
                space,
                "type",
                "veth",
                "peer",
                "name",
                f"to_{name}",
                "netns",
                switch,
            )
            run("ip", "-n", switch, "link", "set", f"to_{name}", "master", "br0", "up")
            run("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", space, "link", "set", "eth0", "up")
            settings = Path("/etc/netns") / space
            settings.mkdir(parents=True)
            (settings / "resolv.conf").write_text("")
            (settings / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
            own = {
                "HVP_HEAD": f"{network}.1",  # the first host
                "RAY_NODE_IP": address,
                "RAY_TMPDIR": str(folder / name),
                "RAY_TLS_SERVER_CERT": str(folder / "tls" / f"{name}.crt"),
                "RAY_TLS_SERVER_KEY": str(folder / "tls" / f"{name}.key"),
                "XDG_CACHE_HOME": str(folder / name / "cache"),
            }
            made[name] = Host(name, address, space, folder / name, {**environment, **own})
        yield made
    finally:
        for host in made.values():
            host.stop()
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
