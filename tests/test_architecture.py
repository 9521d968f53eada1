"""What must stay true of the tree as a whole: who may know whom, what is public, what the pages point to."""

import ast
import inspect
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import rlkernels
from rlkernels._backends import BACKENDS_OF

ROOT = Path(__file__).parents[1]
PUBLIC_API = ROOT / "tests" / "public_api.txt"
README = ROOT / "README.md"
WRITE_AGAIN = "if that is meant, run `python tests/test_architecture.py`"
OPS = sorted(path.stem for path in (ROOT / "rlkernels" / "ops").glob("[!_]*.py"))

# Each part of the package and the modules of rlkernels it may import from; all else in rlkernels is above it.
MAY_IMPORT = {
    "rlkernels/_codes.py": set(),
    "rlkernels/_backends.py": set(),
    "rlkernels/_accuracy.py": set(),
    "rlkernels/selftest.py": {"rlkernels._accuracy", "rlkernels._backends"},
    "rlkernels/_registry.py": {"rlkernels._backends"},
    "rlkernels/reference/**/*.py": {"rlkernels.reference", "rlkernels._codes"},
    "rlkernels/triton/**/*.py": {"rlkernels.triton", "rlkernels._codes", "rlkernels._registry"},
    "rlkernels/ops/**/*.py": {
        *("rlkernels.ops", "rlkernels.reference"),
        *("rlkernels._backends", "rlkernels._codes", "rlkernels._registry"),
    },
    "rlkernels/causal_lm.py": set(),
    "rlkernels/lm_head.py": {"rlkernels.ops", "rlkernels.causal_lm"},
    "rlkernels/__init__.py": {"rlkernels.ops", "rlkernels.lm_head", "rlkernels._backends"},
    "trainers/**/*.py": {"rlkernels.trainers"},
    "rlkernels/integrations/**/*.py": {"rlkernels.integrations", "rlkernels.trainers"},
    # `rlkernels info` reports on the backends and the extension themselves.
    "rlkernels/cli.py": {
        *("rlkernels.cli_commands", "rlkernels.cli_errors", "rlkernels.cli_train", "rlkernels.trainers"),
        *("rlkernels._backends", "rlkernels._C", "rlkernels.selftest"),
    },
    "rlkernels/cli_*.py": {
        *("rlkernels.cli_commands", "rlkernels.cli_data", "rlkernels.cli_errors", "rlkernels.cli_options"),
        "rlkernels.trainers",
    },
    "rlkernels/__main__.py": {"rlkernels.cli"},
    "examples/**/*.py": {"rlkernels.trainers", "rlkernels.cli"},
}


def repository_files(*suffixes: str) -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git's")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for name in names if (path := ROOT / name).is_file() and (not suffixes or path.suffix in suffixes)]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "trainers":
        parts = ("rlkernels", *parts)
    return ".".join(part for part in parts if part != "__init__")


def imported_from_rlkernels(path: Path) -> set[str]:
    """Every module or name of rlkernels that a file imports, at its top or inside a function, as a dotted path."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]) if base else ".".join(above)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "rlkernels"}


def is_public(name: str) -> bool:
    """`rlkernels` itself, or a name that stands in its `__all__`."""
    return name == "rlkernels" or name.removeprefix("rlkernels.") in rlkernels.__all__


@pytest.mark.parametrize("pattern", MAY_IMPORT)
def test_dependencies_point_one_way(pattern):
    files = sorted(ROOT.glob(pattern))
    assert files, f"no file matches {pattern}"
    above_the_ops = pattern.startswith(
        ("trainers", "rlkernels/integrations", "rlkernels/cli", "rlkernels/selftest", "examples")
    )
    wrong = []
    for path in files:
        for name in imported_from_rlkernels(path):
            allowed = any(name == prefix or name.startswith(prefix + ".") for prefix in MAY_IMPORT[pattern])
            if not allowed and not (above_the_ops and is_public(name)):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_benchmarks_need_nothing_of_the_tests():
    """`rlkernels bench` runs them. resources.py alone reports on the kernels that a test compiles."""
    names = {path.stem for path in (ROOT / "tests").iterdir()} - {path.stem for path in (ROOT / "benchmarks").iterdir()}
    wrong = []
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        wrong += [f"{path.name} imports {name}" for name in imported if name.split(".")[0] in names]
    assert {text for text in wrong if not text.startswith("resources.py ")} == set()


def test_every_module_has_its_layer():
    modules = {path for folder in ("rlkernels", "trainers") for path in ROOT.glob(f"{folder}/**/*.py")}
    modules -= {path for pattern in MAY_IMPORT for path in ROOT.glob(pattern)}
    assert not [str(path.relative_to(ROOT)) for path in modules]


# Only ops.h and, in csrc/cuda/, <op>.cpp and what they share know torch, whose headers take longer to compile than the
# kernels.
KNOW_TORCH = ("csrc/include/rlkernels/ops.h", "csrc/cuda/*.cpp", "csrc/cuda/tensors.h")


def test_formulas_and_cuda_kernels_know_no_torch_header():
    files = {*ROOT.glob("csrc/include/**/*.h"), *(path for path in ROOT.glob("csrc/cuda/**/*") if path.is_file())}
    files -= {path for pattern in KNOW_TORCH for path in ROOT.glob(pattern)}
    assert {path.suffix for path in files} == {".h", ".cu", ".cuh"}
    foreign = re.compile(r'#\s*include\s*[<"](?:torch|ATen|c10|pybind11|tensors\.h)\b')
    assert not [str(path.relative_to(ROOT)) for path in files if foreign.search(path.read_text())]


def test_import_is_light():
    """Without a GPU nothing but torch is needed, so nothing but torch may be loaded."""
    code = "import sys, rlkernels; print(*sorted({'transformers', 'trl', 'triton', 'datasets'} & set(sys.modules)))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "RLKERNELS_"))}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert done.stderr == ""


def backends_of_file(op: str) -> set[str]:
    """The backends that rlkernels/ops/<op>.py needs kernels for: none where it defines no op for them to implement, or
    implements it in Python itself, by the kernels of other ops."""
    text = (ROOT / "rlkernels" / "ops" / f"{op}.py").read_text()
    if "_registry.implement(" in text:
        return set()
    return {backend for name in re.findall(r'part_of="(\w+)"', text) for backend in BACKENDS_OF[name]}


@pytest.mark.parametrize("op", OPS)
def test_op_stands_under_one_name_in_every_backend(op):
    places = {
        "cpu": [f"csrc/cpu/{op}.h", f"csrc/cpu/{op}.cpp", f"csrc/cpu/bindings/{op}.cpp"],
        "cuda": [f"csrc/cuda/{op}.{kind}" for kind in ("cuh", "h", "cu", "cpp")],
        "triton": [f"rlkernels/triton/{op}.py"],
    }
    wanted = backends_of_file(op)
    for backend, files in places.items():
        assert [(ROOT / file).is_file() for file in files] == [backend in wanted] * len(files), (backend, files)
    if wanted:
        assert (ROOT / f"csrc/include/rlkernels/{op}.h").is_file()
        assert (ROOT / f"rlkernels/reference/{op}.py").is_file()


def test_every_public_op_is_recorded_with_its_backends():
    assert set(BACKENDS_OF) == set(rlkernels.__all__) - {"use_backend", "wrap_lm_head", "unwrap_lm_head"}
    assert any(backends_of_file(op) == {"cpu", "triton"} for op in OPS)
    assert any(backends_of_file(op) == {"cpu", "triton", "cuda"} for op in OPS)


# What proves the kernels of a backend, in README's table.
PROOFS = {"cpu": "run", "triton": "interpreted, compiled", "cuda": "emulated, compiled"}


def table_of_ops() -> str:
    """README's table: the ops of each file, and what proves them on each backend."""
    lines = [f"| | reference | {' | '.join(PROOFS)} |", "|---" * (len(PROOFS) + 2) + "|"]
    for _, names in itertools.groupby(BACKENDS_OF, lambda name: getattr(rlkernels, name).__module__):
        ops = list(names)
        backends = BACKENDS_OF[ops[0]]
        assert all(BACKENDS_OF[name] == backends for name in ops)
        reference = "specification" if backends else "plain PyTorch, equal to TRL's"
        without = "served by Triton" if "triton" in backends else "-"
        kernels = [text if name in backends else without for name, text in PROOFS.items()]
        lines.append(f"| {' | '.join([', '.join(f'`{name}`' for name in ops), reference, *kernels])} |")
    return "\n".join(lines) + "\n\n"


def test_table_of_ops_is_what_is_recorded():
    assert table_of_ops() in README.read_text(), f"the table of ops is not what the registry records; {WRITE_AGAIN}"


@pytest.mark.parametrize(("name", "limit"), [("setup.py", 80), ("trainers/grpo.py", 650)])
def test_file_stays_short(name, limit):
    assert len((ROOT / name).read_text().splitlines()) < limit


def test_a_trainer_is_read_from_two_classes():
    """README says that each method is read in one sitting: nothing stands between it and the optimizer step."""
    from rlkernels import trainers
    from rlkernels.trainers.base.hf import HFTrainer
    from rlkernels.trainers.base.trainer import BaseTrainer

    for name in ("SFT", "Reward", "DPO", "PPO", "GRPO"):
        trainer = getattr(trainers, f"{name}Trainer")
        assert trainer.__mro__[1:4] == (BaseTrainer, HFTrainer, transformers.Trainer)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_method_imports_at_most_eight_modules_of_ours(method):
    path = ROOT / "trainers" / f"{method}.py"
    names = imported_from_rlkernels(path)
    modules = {name if (ROOT / file_of(name)).is_file() else name.rpartition(".")[0] or name for name in names}
    assert len(modules) <= 8, sorted(modules)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert not [each for each in ast.walk(node) if isinstance(each, ast.Import | ast.ImportFrom)], node.name


@pytest.mark.parametrize("room", ["base", "batch", "losses", "rollouts", "rewards"])
def test_a_room_lists_its_modules(room):
    folder = ROOT / "trainers" / room
    listed = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert not [path.stem for path in folder.glob("[!_]*.py") if not re.search(rf"\b{path.stem}\b", listed)]


def file_of(module: str) -> str:
    """Where a module of that name would stand."""
    return module.replace("rlkernels.trainers", "trainers", 1).replace(".", "/") + ".py"


def public_api() -> str:
    """One line per public name: parameters, defaults, attributes; for a config, the fields that are ours."""
    import rlkernels.integrations.rewards
    import rlkernels.integrations.transformers
    import rlkernels.trainers

    integrations = rlkernels.integrations
    lines = []
    for module in (rlkernels, integrations, integrations.rewards, integrations.transformers, rlkernels.trainers):
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if hasattr(value, "__dataclass_fields__"):
                ours = [kind for kind in reversed(value.__mro__) if kind.__module__.startswith("rlkernels.")]
                fields = dict.fromkeys(field for kind in ours for field in kind.__annotations__ if field[0] != "_")
                text = "".join(f"\n    {field} = {getattr(value, field, '...')!r}" for field in fields)
            elif inspect.isfunction(value) or "__init__" in vars(value):
                signature = inspect.signature(value)
                bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
                data = {name: each for name, each in vars(value).items() if name[0] != "_" and not callable(each)}
                named = [(name, each) for name, each in data.items() if not isinstance(each, property)]
                text = str(inspect.Signature(bare)) + "".join(f"\n    {name} = {data!r}" for name, data in named)
            else:
                text = f"({value.__base__.__name__})"
            lines.append(f"{module.__name__}.{name}{text}")
    return "\n".join(lines) + "\n"


def test_public_api_is_as_recorded():
    recorded = PUBLIC_API.read_text()
    assert public_api() == recorded, f"the public names changed; {WRITE_AGAIN} and note it in CHANGELOG.md"


@pytest.mark.parametrize("page", ["README.md", "docs/integrations.md"])
def test_code_in_a_page_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_links_between_pages_resolve():
    pages = repository_files(".md")
    assert pages
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            elsewhere = target.startswith(("http://", "https://", "mailto:", "#"))
            if not elsewhere and not (page.parent / target.split("#")[0]).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


# Pages that lead through the tree: every path and name in them exists.
MAPS = ("docs/architecture.md", "CONTRIBUTING.md")
PLACEHOLDERS = {"<op>": "kl", "<method>": "grpo"}
SOURCES = (".py", ".h", ".cuh", ".cu", ".cpp", ".md", ".toml", ".txt", ".yaml")
# Other projects, whose names are not looked for.
OTHERS = {"torch", "triton", "transformers", "accelerate", "dataclasses", "functools"}
FOLDERS = "csrc|rlkernels|trainers|tests|benchmarks|docs|examples|build_tools"
PATH = re.compile(rf"(?<![\w/.])(?:{FOLDERS})/[\w./*-]*(?<![.*])")
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")


def bound(body: list[ast.stmt]) -> set[str]:
    """The names that these statements define, and the attributes that they give to `self`."""
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.FunctionDef):
            stored = (each for each in ast.walk(node) if isinstance(each, ast.Attribute))
            found |= {each.attr for each in stored if isinstance(each.ctx, ast.Store)}
    return found


def names_in_the_tree() -> dict[str, set[str]]:
    """What can stand before a dot, a module by its file name or a class, and what can stand behind it."""
    names: dict[str, set[str]] = {"rlkernels": {*rlkernels.__all__, "trainers"}}
    bases: dict[str, set[str]] = {}
    for path in repository_files(".py"):
        tree = ast.parse(path.read_text())
        stem = path.parent.name if path.name == "__init__.py" else path.stem
        names.setdefault(stem, set()).update(bound(tree.body))
        names.setdefault(path.parent.name, set()).add(path.stem)
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, set()).update(bound(node.body))
                bases[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
    for kind in bases:
        above = list(bases[kind])
        for each in above:
            names[kind] |= names.get(each, set())
            above += [base for base in bases.get(each, ()) if base not in above]
    return names


def is_there(path: str) -> bool:
    return any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


def is_known(name: str, names: dict[str, set[str]]) -> bool:
    parts = name.split(".")
    if parts[0] in OTHERS:
        return True
    return all(after in names.get(before, ()) for before, after in itertools.pairwise(parts))


def missing_in(text: str, names: dict[str, set[str]]) -> list[str]:
    """The paths and names of a page that are not in the tree.

    In backticks every file name, `module.name` and `Class.name` is looked for, and every word with an underscore or a
    capital in the sources; in plain blocks names that begin with a module or class of ours. Paths count everywhere."""
    for placeholder, example in PLACEHOLDERS.items():
        text = text.replace(placeholder, example)
    missing = [path for path in PATH.findall(text) if not is_there(path)]
    files = {path.name for path in repository_files()}
    words = {word for path in repository_files() for word in words_of(path)}
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    plain = "".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
    for span in re.findall(r"`([^`]+)`", prose):
        if "/" not in span and span.endswith(SOURCES) and " " not in span:
            missing += [span] * (span not in files)
        elif DOTTED.fullmatch(span):
            missing += [span] * (not is_known(span, names))
        elif re.fullmatch(r"\w*(?:_|[A-Z])\w*", span):
            missing += [span] * (span not in words)
    found = DOTTED.findall(PATH.sub("", plain))
    return missing + [name for name in found if name.split(".")[0] in names and not is_known(name, names)]


def words_of(path: Path) -> set[str]:
    is_source = path.name == "Makefile" or (path.suffix in SOURCES and path.suffix != ".md")
    return set(re.findall(r"\w+", path.read_text())) if is_source else set()


@pytest.mark.parametrize("page", MAPS)
def test_paths_and_names_in_a_map_exist(page):
    assert missing_in((ROOT / page).read_text(), names_in_the_tree()) == []


def test_what_is_not_in_the_tree_is_found():
    unknown = "_".join(("no", "such", "word"))  # which stands in this file neither
    text = f"""`trainers/no_such_file.py` `csrc/cuda/<op>.c` `no_such_file.py` `Collector.no_such_method` `_backends.no`
    `{unknown}` `Collector.collect` `rlkernels.wrap_lm_head` `GRPOTrainer.training_step` `torch.compile`
    ```
    tests/no_such_file.py   Batch.no_such_field   Batch.lay_out
    ```"""
    wrong = ["trainers/no_such_file.py", "csrc/cuda/kl.c", "tests/no_such_file.py", "no_such_file.py"]
    wrong += ["Collector.no_such_method", "_backends.no", unknown, "Batch.no_such_field"]
    assert missing_in(text, names_in_the_tree()) == wrong


def test_no_file_names_the_machine_it_was_written_on():
    machine_path = re.compile(r"/(?:root|work|home/\w+|Users/\w+)/|/tmp/(?!$)\w")
    found = []
    for path in repository_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in machine_path.finditer(text)]
    assert not found


if __name__ == "__main__":
    PUBLIC_API.write_text(public_api())
    before, after = re.split(r"\| \| reference .*?\n\n", README.read_text(), flags=re.DOTALL)
    README.write_text(before + table_of_ops() + after)
