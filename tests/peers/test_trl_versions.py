"""The tests of TRL's functions, of which `make test-cpu` has those of the newest, under the older ones that are known.

1.15's own fused head and divergence run on GPUs alone: ours are not compared with them there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = Path(sys.prefix) / "trl"
TESTS = sorted(str(path) for path in (ROOT / "tests" / "integrations").glob("test_trl*.py"))


@pytest.mark.thorough
@pytest.mark.parametrize("version", ["1.13.0", "1.14.1", "1.15.0"])
def test_functions_of_an_older_trl(version):
    if not VERSIONS.is_dir():
        pytest.skip("older versions of TRL are not installed: make test-all")
    assert TESTS
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(VERSIONS / version), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    code = "import importlib.metadata; print(importlib.metadata.version('trl'))"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == version
    assert " passed" in done.stdout
