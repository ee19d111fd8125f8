import subprocess
import sys

from ray import cloudpickle

from hvp_ray.launch.board import Unread

PASS_ON = """
import sys
from ray import cloudpickle
passed = cloudpickle.loads(cloudpickle.loads(sys.stdin.buffer.read()))
again = cloudpickle.dumps(passed)
assert "wave" not in sys.modules
sys.stdout.buffer.write(again)
"""


def test_an_unread_value_passes_a_process_that_does_not_load_its_class() -> None:
    from wave import Error  # of a module that nothing else imports

    sent = cloudpickle.dumps(cloudpickle.dumps(Unread(Error("kept"))))

    passed = subprocess.run([sys.executable, "-c", PASS_ON], input=sent, capture_output=True, check=True).stdout

    value = cloudpickle.loads(passed).read()
    assert isinstance(value, Error) and value.args == ("kept",)
