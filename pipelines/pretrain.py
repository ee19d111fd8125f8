"""`hvp-ray pretrain` from a checkout; see hvp_ray/cli/pretrain.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

from hvp_ray.cli.program import run_command

if __name__ == "__main__":
    run_command("pretrain", sys.argv[1:])
