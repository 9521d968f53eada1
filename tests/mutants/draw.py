"""Draws 40 mutations of operators and numbers, at most one per file; FOLDERS says how many per folder:

    python tests/mutants/draw.py > tests/mutants/drawn.toml

The same tree gives the same ones. They are recorded, since the tree changes: draw again only to replace them all.
"""

import ast
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from mutations import ROOT, source_files

SEED = 14
FOLDERS = {
    "csrc/include": 4,
    "csrc/cpu": 4,
    "csrc/cuda": 5,
    "rlkernels/triton": 6,
    "rlkernels/ops": 6,
    "rlkernels/reference": 2,
    "rlkernels/integrations": 3,
    "trainers": 10,
}
OPERATORS = {
    **{"+": "-", "-": "+", "*": "+", "/": "*", "//": "%", "%": "//"},
    **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
}
NUMBER = r"\d+(?:\.\d*)?(?:e-?\d+)?"
# clang-format puts spaces around an operator, and none inside a template's brackets or beside a pointer's star.
CPP_SITE = re.compile(rf"(?<= )(?:[-+*/%<>]|[<>=!]=)(?= )|(?<![\w.]){NUMBER}(?=f?\b(?!\.))")
CPP_SKIP = re.compile(
    r"^\s*(//|#|template|using|enum|case|throw|static_assert|constexpr int k|k\w+ = |asm|friend)|refuse\(|\""
)
# How much is done at once, which changes the speed alone; and texts.
PYTHON_SKIP = re.compile(r"num_warps|ALIGNED|tile_columns|\"hip\"|warn|logger|\"\"\"")
# Held by `make test-peers`, but not by `make test`.
PEERS = re.compile("verl|openrlhf")


def cpp_sites(text: str) -> Iterator[tuple[int, int, int, str]]:
    """(line, first column, end, replacement) of each operator and number that may be changed."""
    for number, line in enumerate(text.splitlines()):
        code = line.split("//")[0]
        for found in () if CPP_SKIP.search(line) else CPP_SITE.finditer(code):
            yield number, found.start(), found.end(), changed(found.group())


def python_sites(text: str) -> Iterator[tuple[int, int, int, str]]:
    lines = text.splitlines()
    for node in meant(ast.parse(text)):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            token = ast.get_source_segment(text, node)
            if re.fullmatch(NUMBER, token):
                yield node.lineno - 1, node.col_offset, node.end_col_offset, changed(token)
            continue
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.BinOp) and not isinstance(node.left, ast.List | ast.Tuple):
            sides = [node.left, node.right]
        else:
            continue
        for left, right in itertools.pairwise(sides):
            if left.end_lineno == right.lineno:
                between = lines[right.lineno - 1][left.end_col_offset : right.col_offset]
                if (operator := between.strip(" ()")) in OPERATORS:
                    start = left.end_col_offset + between.index(operator)
                    yield right.lineno - 1, start, start + len(operator), OPERATORS[operator]


# Along which axis: another one is no fault that anybody overlooks.
REDUCTIONS = {"sum", "max", "min", "amax", "argmax", "cumsum", "gather", "associative_scan", "unbind"}


def meant(node: ast.AST) -> Iterator[ast.AST]:
    """All that is computed: no annotations, decorators, texts, axes, and nothing about an error."""
    is_reduction = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in REDUCTIONS
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        if is_reduction and name == "args":
            value = value[:1] if isinstance(node.func.value, ast.Name) and node.func.value.id == "tl" else []
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr | ast.Raise | ast.Assert):
                yield child
                yield from meant(child)


def changed(token: str) -> str:
    if token in OPERATORS:
        return OPERATORS[token]
    if token.isdigit():
        return str(int(token) + 1) if int(token) != 1 else "2"
    return "1.0" if float(token) == 0 else f"{2 * float(token):.12g}" if "e" in token else str(2 * float(token))


def mutation(path: Path, text: str, site: tuple[int, int, int, str], tree: str) -> tuple[str, str] | None:
    """The text of the line, with those before it that it takes to stand once in the tree, and what takes its place."""
    number, start, end, replacement = site
    lines = text.splitlines()
    for first in range(number, max(number - 4, -1), -1):
        old = "\n".join(lines[first : number + 1]).lstrip()
        if tree.count(old) == 1:
            after = lines[number][end:]
            return old, old[: len(old) - len(lines[number]) + start] + replacement + after
    return None


def tests_of(path: Path) -> list[str]:
    """The test file named after the source, else those whose names contain its name."""
    stem, part = path.stem.strip("_"), path.relative_to(ROOT).parts[:2]
    folder = ROOT / "tests" / next((name for name in ("trainers", "integrations") if name in part), "")
    names = sorted(test.name for test in folder.glob("test_*.py"))
    exact = f"test_{stem}.py"
    return [exact] if exact in names else [name for name in names if stem in name]


def draw() -> Iterator[dict]:
    choose = random.Random(SEED)
    files = source_files(ROOT)
    tree = "\n".join(files.values())
    for folder, wanted in FOLDERS.items():
        inside = [path for path in files if (ROOT / folder) in path.parents and not PEERS.search(path.name)]
        sites = []
        for path in inside:
            lines = files[path].splitlines()
            find = python_sites if path.suffix == ".py" else cpp_sites
            skip = PYTHON_SKIP if path.suffix == ".py" else CPP_SKIP
            sites += [(path, site) for site in sorted(find(files[path])) if not skip.search(lines[site[0]])]
        choose.shuffle(sites)
        taken: set[Path] = set()
        for path, site in sites:
            if len(taken) < wanted and path not in taken and (made := mutation(path, files[path], site, tree)):
                taken.add(path)
                name = f"{path.relative_to(ROOT).as_posix()}:{site[0] + 1}"
                yield {"name": name, "text": made[0], "replacement": made[1], "tests": tests_of(path)}


if __name__ == "__main__":
    print("# Drawn by draw.py, each with the place that it was drawn from; only `equivalent` is written by hand.")
    for found in draw():
        print("\n[[mutation]]")
        for key, value in found.items():
            print(f"{key} = {json.dumps(value, ensure_ascii=False)}")
