"""What the training room depends on."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_training_needs_neither_ray_nor_mlflow_nor_a_run_folder() -> None:
    program = (
        "import sys\n"
        "import hvp_ray.training.loop, hvp_ray.training.trainee\n"
        "rooms = {name for name in sys.modules if name.startswith(('hvp_ray.runs', 'hvp_ray.launch'))}\n"
        "print(sorted(rooms | ({'ray', 'mlflow', 'nvidia'} & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
    sources = [path.read_text() for path in (ROOT / "hvp_ray" / "training").glob("*.py")]
    assert not [text for text in sources if "import os" in text or "pathlib" in text or "pyarrow" in text]
