"""Log lines of trainers and view workers say when, who and at which step; in processes of their own, as on a cluster."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _lines(program: str) -> list[str]:
    """Run a program; return what it wrote on standard error."""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return result.stderr.splitlines()


def test_line_has_time_level_run_process_step_and_logger() -> None:
    lines = _lines(
        "import logging\n"
        "from hvp_ray.logs import note_step, set_up_logging\n"
        "logger = logging.getLogger('hvp_ray.stream.view_stream')\n"
        "set_up_logging(run='before', origin='rank=7')\n"
        "set_up_logging(run='NAME', origin='rank=0')\n"
        "logger.info('begins')\n"
        "note_step(123)\n"
        "logger.warning('view worker %d is gone', 1)\n"
        "logger.debug('unheard')\n"
        "logging.getLogger('others').info('unheard')\n"
    )
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert len(lines) == 2
    assert re.fullmatch(f"{time} INFO run=NAME rank=0 step=- hvp_ray.stream.view_stream: begins", lines[0])
    warning = "WARNING run=NAME rank=0 step=123 hvp_ray.stream.view_stream: view worker 1 is gone"
    assert re.fullmatch(f"{time} {warning}", lines[1])


def test_console_of_the_root_does_not_repeat_a_line_and_a_file_of_the_root_has_its_origin(tmp_path: Path) -> None:
    """Ray Train puts both on the root logger of a trainer."""
    lines = _lines(
        "import logging\n"
        "from hvp_ray.logs import note_step, set_up_logging\n"
        "logging.basicConfig(format='console %(message)s')\n"
        f"file = logging.FileHandler({str(tmp_path / 'train.log')!r})\n"
        "file.setFormatter(logging.Formatter('%(run)s %(origin)s %(step)s %(message)s'))\n"
        "logging.getLogger().addHandler(file)\n"
        "set_up_logging(run='NAME', origin='worker=view-worker-1')\n"
        "note_step(4)\n"
        "logging.getLogger('hvp_ray.stream').warning('ours')\n"
        "logging.getLogger().removeHandler(file)\n"
        "logging.getLogger('hvp_ray_other').warning('theirs')\n"
    )
    assert len(lines) == 2
    assert lines[0].endswith("WARNING run=NAME worker=view-worker-1 step=4 hvp_ray.stream: ours")
    assert lines[1] == "console theirs"
    assert (tmp_path / "train.log").read_text() == "NAME worker=view-worker-1 4 ours\n"
