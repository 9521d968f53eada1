"""The mutations still are what they were made to be, wherever the sources have moved. `make mutants` runs them."""

import ast
from collections import Counter

import pytest

from mutants.mutations import ROOT, mutations, source_files

MUTATIONS = mutations()


@pytest.fixture(scope="module")
def sources():
    return source_files(ROOT)


def test_there_are_eighty_five():
    assert len(MUTATIONS) == 85
    assert [name for name, count in Counter(each.name for each in MUTATIONS).items() if count > 1] == []
    assert [text for text, count in Counter(each.text for each in MUTATIONS).items() if count > 1] == []


def test_their_tests_exist():
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {name for each in MUTATIONS for name in each.tests} <= names


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name)
def test_text_stands_once_in_the_sources(mutation, sources):
    path = mutation.place(sources)
    changed = sources[path].replace(mutation.text, mutation.replacement)
    assert changed != sources[path]
    if path.suffix == ".py":
        ast.parse(changed)
