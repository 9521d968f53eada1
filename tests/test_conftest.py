"""What tests rely on."""

import signal
import subprocess
import sys


def test_tests_hear_ctrl_c():
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_tests_hear_ctrl_c_in_the_background():
    """Where a shell has it ignored."""
    test = f"{__file__}::{test_tests_hear_ctrl_c.__name__}"
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-m", "pytest", "-q", test]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
