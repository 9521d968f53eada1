"""The wheel: it holds every module of every subpackage, and each imports from there."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from test_architecture import ROOT, repository_files

# Prints each module that does not import, but for want of another project, or that comes from somewhere else.
IMPORT_ALL = """
import importlib, pathlib, sys

folder = pathlib.Path.cwd()
for path in sorted(folder.rglob("*.py")):
    parts = [part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__"]
    if parts[-1] == "__main__":
        continue
    try:
        module = importlib.import_module(".".join(parts))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("rlkernels"):
            print(path, error)
    else:
        if folder not in pathlib.Path(module.__file__).parents:
            print(path, "is", module.__file__)
"""


@pytest.fixture(scope="module")
def modules():
    """Every module of the repository, by its path in the wheel."""
    paths = [path.relative_to(ROOT) for path in repository_files(".py")]
    found = {f"rlkernels/{path}" if path.parts[0] == "trainers" else str(path): ROOT / path for path in paths}
    return {name: path for name, path in found.items() if name.startswith("rlkernels/")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, modules):
    """Unpacked. Made of a copy, without the extensions."""
    copy, made, unpacked = (tmp_path_factory.mktemp(name) for name in ("sources", "wheel", "unpacked"))
    for path in (*modules.values(), *(ROOT / name for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"))):
        (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy / path.relative_to(ROOT))
    shutil.copytree(ROOT / "build_tools", copy / "build_tools")
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(made)]
    subprocess.run(command, cwd=copy, env=os.environ | {"RLKERNELS_BUILD": "0"}, check=True, capture_output=True)
    (archive,) = made.iterdir()
    zipfile.ZipFile(archive).extractall(unpacked)
    return unpacked


def test_it_holds_every_module(wheel, modules):
    assert {str(path.relative_to(wheel)) for path in wheel.rglob("*.py")} == modules.keys()


def test_every_module_imports_from_it(wheel):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RLKERNELS_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=wheel,
        env=environment | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]
