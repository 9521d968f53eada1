"""The source distribution: it holds all that git knows, and what is built and installed from it serves every op."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

from test_architecture import ROOT, repository_files

GENERATED = {"PKG-INFO", "setup.cfg"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Made of a copy, in which things lie about that are no part of it."""
    copy = tmp_path_factory.mktemp("sources")
    for path in repository_files():
        (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy / path.relative_to(ROOT))
    for name in ("rlkernels/_C.so", "tests/__pycache__/conftest.cpython-311.pyc", "build/cpu/kl.cpp.o", "runs/log.txt"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (archive,) = folder.iterdir()
    return archive


def test_it_holds_what_git_knows(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    names = {name for name in names - GENERATED if not name.startswith("rlkernels.egg-info/")}
    assert names == {str(path.relative_to(ROOT)) for path in repository_files()}


@pytest.mark.parametrize(
    "objects", ["of this checkout", pytest.param("its own", marks=pytest.mark.thorough)], ids=lambda which: which
)
def test_it_builds_and_serves_every_op_in_an_environment_of_its_own(sdist, tmp_path, objects):
    """Which has of this one what the package needs, but not the package."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (sources,) = tmp_path.iterdir()
    if objects == "of this checkout" and (ROOT / "build" / "cpu").exists():
        # Whatever of the sources differs is compiled again, and what is absent is an error.
        shutil.copytree(ROOT / "build" / "cpu", sources / "build" / "cpu")
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    here, there = (
        subprocess.check_output([program, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
        for program in (sys.executable, python)
    )
    Path(there.strip(), "shared.pth").write_text(here)

    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RLKERNELS_", "PYTHON"))}
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(sources)],
        env=variables | {"RLKERNELS_CUDA": "0"},
        check=True,
    )
    program = [python, ROOT / "tests" / "every_op.py", there.strip()]
    done = subprocess.run(program, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "18 ops\n"
