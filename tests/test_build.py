"""Building the extension modules: what is compiled again, and what is said where something is missing. The compilers
here are small shell scripts."""

import os
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools import compile, modules

ROOT = Path(__file__).parents[1]

# Writes its output and the list of what it read, and notes what it was asked for.
COMPILER = """#!/bin/sh
echo "$@" >> "$0.log"
while [ $# -gt 0 ]; do
  case "$1" in
    -o) output="$2" ;;
    -MF) dependencies="$2" ;;
    -c) source="$2" ;;
  esac
  shift
done
[ -z "$dependencies" ] || echo "$output: $source shared\\ header.h" > "$dependencies"
[ -z "$output" ] || : > "$output"
"""


def make_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two sources that include one header, and build() for it, which says what it made."""
    monkeypatch.setattr(compile, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    compiler = make_program(tmp_path / "bin" / "compiler", COMPILER)
    for name in ("a.cpp", "b.cpp", "shared header.h"):
        (tmp_path / name).touch()

    def build(*flags: str) -> list[str]:
        steps = [compile.Step([str(compiler), *flags], name, Path("build", f"{name}.o")) for name in ("a.cpp", "b.cpp")]
        log = Path(f"{compiler}.log")
        log.unlink(missing_ok=True)
        library = compile.build(compile.Module(Path("build/module.so"), steps, [str(compiler), "-shared"], ["-lc"]))
        assert library.exists()
        return sorted(line.split()[-1] for line in log.read_text().splitlines()) if log.exists() else []

    return tmp_path, build


def make_newer(path: Path) -> None:
    """Than all other files of its project, which become older: a time that has yet to come would confuse."""
    for other in path.parent.rglob("*"):
        if other.is_file():
            os.utime(other, (other.stat().st_mtime - 10,) * 2)
    path.touch()


def test_what_changed_is_compiled_again(project):
    root, build = project
    everything = ["build/a.cpp.o", "build/b.cpp.o", "build/module.so"]
    assert build() == everything
    assert build() == []
    make_newer(root / "b.cpp")
    assert build() == ["build/b.cpp.o", "build/module.so"]
    make_newer(root / "shared header.h")
    assert build() == everything
    assert build("-DCHANGED") == everything
    (root / "build" / "a.cpp.o").unlink()
    assert build("-DCHANGED") == ["build/a.cpp.o", "build/module.so"]
    (root / "shared header.h").unlink()
    assert build("-DCHANGED")[:2] == everything[:2]


def test_ccache_runs_the_compiler_where_it_is_installed(project):
    """Which compiles nothing again by itself."""
    root, build = project
    build()
    ccache = make_program(root / "bin" / "ccache", '#!/bin/sh\necho "$@" >> "$0.log"\nexec "$@"\n')
    assert build() == []
    build("-DCHANGED")
    asked = Path(f"{ccache}.log").read_text().splitlines()
    assert len(asked) == 2, "linking is not cached"
    assert all(line.startswith(f"{root / 'bin' / 'compiler'} -DCHANGED") for line in asked)


def test_a_failed_compilation_names_the_error(project):
    root, build = project
    make_program(root / "bin" / "compiler", "#!/bin/sh\necho in a function\necho 'a.cpp:3: error: absent'\nexit 1\n")
    with pytest.raises(compile.CompileError, match=r"^a\.cpp:3: error: absent$") as failed:
        build()
    assert "in a function" in failed.value.output
    assert not list((root / "build").glob("*.command")), "what failed does not pass for up to date"


def test_what_a_killed_compiler_leaves_is_compiled_again(project):
    root, build = project
    build()
    make_newer(root / "a.cpp")
    compiler = make_program(root / "bin" / "compiler", COMPILER + "kill -9 $$\n")
    with pytest.raises(compile.CompileError, match="the compiler ended with status -9"):
        build()
    make_program(compiler, COMPILER)
    assert build() == ["build/a.cpp.o", "build/module.so"]


@pytest.fixture
def checkout(tmp_path):
    """As much of the project as setup.py needs, with compilers that do nothing; `run(**environment)` builds in it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path)
    for name in ("build_tools", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "rlkernels").mkdir()
    programs = tmp_path / "bin"
    make_program(programs / "c++", COMPILER)
    make_program(
        programs / "nvcc",
        COMPILER.replace("\n", "\n[ $1 = --list-gpu-arch ] && echo compute_80 compute_90 compute_100\n", 1),
    )

    def run(**environment: str) -> tuple[list[str], set[str]]:
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=tmp_path,
            env={"PATH": str(programs), "HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
        )
        run.status = done.returncode
        built = {path.name.split(".")[0] for path in (tmp_path / "rlkernels").glob("*.so")}
        return done.stderr.splitlines(), built

    return programs, run


def test_both_modules_are_built_where_the_compilers_are(checkout):
    _, run = checkout
    assert run() == ([], {"_C", "_C_cuda"})
    assert run.status == 0


def test_variables_choose_the_modules(checkout):
    _, run = checkout
    assert run(RLKERNELS_BUILD="0") == ([], set())
    assert run() == ([], {"_C", "_C_cuda"})
    assert run(RLKERNELS_CUDA="0") == ([], {"_C"}), "an earlier module that is not built again is not loaded either"


def test_without_a_cxx_compiler_nothing_is_built(checkout):
    """With nvcc as well, which hands C++ to that compiler."""
    programs, run = checkout
    (programs / "c++").unlink()
    lines, built = run()
    assert (run.status, built) == (0, set())
    reason = "there is no C++ compiler 'c++'; install g++ or clang, or name one: CXX=..."
    assert lines == [
        f"warning: rlkernels._C is not built: {reason}; the reference serves instead",
        f"warning: rlkernels._C_cuda is not built: {reason}; Triton's kernels serve instead",
    ]


def test_a_compiler_of_an_older_cxx_builds_nothing(checkout):
    programs, run = checkout
    make_program(programs / "c++", "#!/bin/sh\necho 'error: unrecognized command-line option -std=c++20' >&2\nexit 1\n")
    lines, built = run(RLKERNELS_CUDA="0")
    assert (run.status, built) == (0, set())
    assert lines == [
        "warning: rlkernels._C is not built: 'c++' cannot compile the C++20 of the kernels "
        "(error: unrecognized command-line option -std=c++20); g++ can from version 11 on; the reference serves instead"
    ]


def test_cuda_asked_for_without_nvcc(checkout):
    programs, run = checkout
    (programs / "nvcc").unlink()
    lines, built = run(RLKERNELS_CUDA="1")
    assert (run.status, built) == (0, {"_C"})
    assert lines == ["warning: rlkernels._C_cuda is not built: there is no nvcc; Triton's kernels serve instead"]
    assert run() == ([], {"_C"}), "not asked for, it is not missed"


def test_a_failed_cuda_build_warns_once_and_leaves_no_older_module(checkout):
    programs, run = checkout
    run()
    works = (programs / "nvcc").read_text()
    make_program(programs / "nvcc", works + "echo 'launch.h(7): error: no such macro' >&2\nexit 2\n")
    for path in (programs.parent / "build").glob("cuda*/*.o"):
        path.unlink()
    lines, built = run()
    assert (run.status, built) == (0, {"_C"})
    assert lines == [
        "warning: rlkernels._C_cuda is not built: launch.h(7): error: no such macro; Triton's kernels serve instead"
    ]


def test_a_kernel_that_does_not_compile_ends_the_build(checkout):
    """By a mistake in it, where the compiler has shown that it is good enough."""
    programs, run = checkout
    make_program(
        programs / "c++",
        COMPILER + "case $source in *cpu/kl.cpp) echo 'kl.cpp:9: error: a mistake' >&2; exit 1 ;; esac\n",
    )
    lines, built = run(RLKERNELS_CUDA="0")
    assert (run.status, built) == (1, set())
    assert lines[-1] == "error: rlkernels._C is not built: kl.cpp:9: error: a mistake"
    assert "Traceback" not in "\n".join(lines)


def test_a_header_that_does_not_compile_ends_the_build(checkout):
    """The compiler is not blamed for it, though it compiles no kernel."""
    programs, run = checkout
    mistake = "case \"$*\" in *csrc/cpu/*.cpp*) echo 'simd.h:9: error: a mistake' >&2; exit 1 ;; esac"
    make_program(programs / "c++", COMPILER.replace("\n", f"\n{mistake}\n", 1))
    lines, built = run(RLKERNELS_CUDA="0")
    assert (run.status, built) == (1, set())
    assert lines[-1] == "error: rlkernels._C is not built: simd.h:9: error: a mistake"


@pytest.mark.parametrize(
    ("variable", "command"),
    [("", ["c++"]), ("ccache g++ -m64", ["g++", "-m64"]), ("/usr/bin/ccache g++", ["g++"]), ("ccache", ["ccache"])],
)
def test_the_compiler_that_is_named(monkeypatch, variable, command):
    """Without ccache before it, which is put there where it serves."""
    monkeypatch.setenv("CXX", variable)
    assert runpy.run_path(modules.__file__)["CXX"] == command


def test_the_compiler_here_is_good_enough_and_an_older_standard_is_not(monkeypatch):
    if shutil.which(modules.CXX[0]) is None:
        pytest.skip("there is no C++ compiler")
    assert modules.compiler_fault() is None
    monkeypatch.setattr(modules, "CPU_FLAGS", ["-std=c++17"])
    assert "cannot compile the C++20 of the kernels (<stdin>:" in modules.compiler_fault.__wrapped__()


@pytest.mark.parametrize(
    ("listed", "architectures"),
    [("9.0\n9.0\n", (90,)), ("12.0\n8.6\n", (86, 120)), ("[N/A]\n", ()), ("NVIDIA-SMI has failed\n", ())],
)
def test_the_architectures_of_the_gpus_that_are_here(tmp_path, monkeypatch, listed, architectures):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    make_program(tmp_path / "nvidia-smi", f"#!/bin/sh\necho '{listed}'\n")
    assert modules.own_architectures() == architectures


def test_cuda_is_compiled_for_the_gpus_that_are_here_or_else_for_all(checkout):
    programs, run = checkout
    compiled_for = {}
    for capability in ("", "9.0"):
        Path(f"{programs / 'nvcc'}.log").unlink(missing_ok=True)
        if capability:
            make_program(programs / "nvidia-smi", f"#!/bin/sh\necho {capability}\n")
        run()
        commands = [line for line in Path(f"{programs / 'nvcc'}.log").read_text().splitlines() if "kl.cu " in line]
        compiled_for[capability] = [part[-2:] for part in commands[0].split() if "code=sm" in part]
    assert compiled_for == {"": ["80", "90", "00"], "9.0": ["90"]}


def test_the_widest_vectors_of_the_processor_are_used():
    """Once a feature that the compiler's library did not know made it the narrowest, which nothing told."""
    _C = pytest.importorskip("rlkernels._C", reason="the C++ extension is not built")
    flags = set()
    if Path("/proc/cpuinfo").exists():
        listed = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")]
        flags = set(" ".join(listed[:1]).split())
    if not {"avx2", "fma"} <= flags:
        pytest.skip("the processor has no AVX2")
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    assert _C.instruction_set() == os.environ.get("RLKERNELS_CPU_ISA", "avx512" if wide else "avx2")
