"""The faults that the tests must find: 40 by hand, 40 that were drawn."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ("csrc", "rlkernels", "trainers")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")


@dataclass(frozen=True)
class Mutation:
    name: str
    text: str
    """It stands once in the sources, which says where it is."""
    replacement: str
    tests: list[str]
    """Files of tests that are tried first."""
    equivalent: str = ""
    """Why no test can tell the two apart, if none can."""

    def place(self, files: dict[Path, str]) -> Path:
        found = [path for path, text in files.items() for _ in range(text.count(self.text))]
        if len(found) != 1:
            raise ValueError(f"mutation {self.name!r}: its text must stand once in the sources; found in {found}")
        return found[0]


def mutations() -> list[Mutation]:
    files = (HERE / "by_hand.toml", HERE / "drawn.toml")
    return [Mutation(**row) for file in files for row in tomllib.loads(file.read_text())["mutation"]]


def source_files(root: Path) -> dict[Path, str]:
    """Every source file and its text. trainers/ may be linked into the package: it counts once."""
    found = {path for folder in SOURCES for path in (root / folder).rglob("*") if path.suffix in SUFFIXES}
    linked = root / "rlkernels" / "trainers"
    return {path: path.read_text() for path in sorted(found) if linked not in path.parents}
