"""Show what a listener on the link between two hosts can read: send known values over it, then look for them in a capture.

python clear_text.py send ADDRESS      on a host of the cluster: a task on a node with the resource `view` returns them
python clear_text.py find CAPTURE TOKEN_FILE [PASSWORD_FILE]

`find` prints how often each value occurs in a capture (tcpdump -w), `send` what it has sent. Headers are as long as they
need to be: the three bytes that every JPEG begins with occur by chance in 16 MB of encrypted traffic.
"""

import base64
import json
import mmap
import sys
from pathlib import Path

VALUES = {
    "JPEG header": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "PNG header": b"\x89PNG\r\n\x1a\n",
    "train/loss": b"train/loss",
    "hvp_ray": b"hvp_ray",
}
_REPEATS = 100_000
"""A packet's end may split a value. So many copies make an object of 3 MB, which goes through the object store."""


def send(address: str) -> int:
    """Send the values between the object stores of two nodes, and as a small argument; return the bytes of the object."""
    import ray

    ray.init(address, log_to_driver=False, logging_level="ERROR")
    text = b"".join(VALUES.values())

    @ray.remote(num_cpus=0, resources={"view": 0.01})
    def answer(argument: bytes) -> bytes:
        return argument * _REPEATS

    return len(ray.get(answer.remote(text), timeout=60))


def find(capture: Path, token: str, password: str | None) -> dict[str, int]:
    """Count the values, the token, and the password as an MLflow client sends it."""
    values = VALUES | {"token": token.encode()}
    if password is not None:
        values["password"] = base64.b64encode(f"admin:{password}".encode()).rstrip(b"=")[:-1]
    with capture.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        counts = {}
        for name, value in values.items():
            counts[name], place = 0, content.find(value)
            while place >= 0:
                counts[name], place = counts[name] + 1, content.find(value, place + 1)
        return counts


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["send", address]:
            print(send(address))
        case ["find", capture, *secrets] if secrets:
            token, *rest = (Path(path).read_text().strip() for path in secrets)
            print(json.dumps(find(Path(capture), token, *(rest or [None]))))
        case _:
            sys.exit(__doc__)
