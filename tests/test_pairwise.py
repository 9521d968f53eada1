"""The cases that `make test` takes of a product of parameters."""

from itertools import combinations, product
from pathlib import Path

import pytest

import conftest
from pairwise import cover


def pairs_of(cases):
    return {pair for case in cases for pair in combinations(enumerate(case), 2)}


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 4, 2), (4, 9, 3, 3), (5, 2, 6)], ids=str)
def test_every_two_values_meet(sizes):
    cases = list(product(*map(range, sizes)))
    kept = [cases[index] for index in cover(cases)]
    assert pairs_of(kept) == pairs_of(cases)
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(kept) < len(cases)


def test_of_two_parameters_all_cases_are_kept():
    assert cover(list(product("abc", "de"))) == set(range(6))


def test_cases_that_do_not_exist_are_not_asked_for():
    assert cover([("a", 0, "x"), ("b", 1, "x"), ("b", 1, "y")]) == {0, 1, 2}
    assert cover([]) == set()


PRODUCT = """
import pytest

@pytest.mark.parametrize("dtype", ["f", "h", "b"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (3, 4)])
@pytest.mark.parametrize("option", ["on", "off", pytest.param("slow", marks=pytest.mark.thorough)])
def test_of_three(dtype, rows, columns, option):
    pass

@pytest.mark.parametrize("dtype", ["f", "h", "b"])
@pytest.mark.parametrize("rows, columns", [(1, 2), (3, 4)])
def test_of_two(dtype, rows, columns):
    pass
"""


class Collected:
    names: list[str]

    def pytest_collection_finish(self, session):
        self.names = [item.originalname for item in session.items]


@pytest.mark.parametrize(
    ("expression", "three", "two"), [("thorough", 12, 0), ("not thorough", 6, 6), ("thorough or not thorough", 18, 6)]
)
def test_the_rest_of_a_product_is_thorough(tmp_path, expression, three, two):
    """And what was marked by hand stays so. Two names that are given together are one parameter."""
    (tmp_path / "test_product.py").write_text(PRODUCT)
    configuration = Path(__file__).parents[1] / "pyproject.toml"
    collected = Collected()
    options = ["--collect-only", "-qq", "-c", str(configuration), "-m", expression]
    pytest.main([str(tmp_path), *options], plugins=[conftest, collected])
    assert (collected.names.count("test_of_three"), collected.names.count("test_of_two")) == (three, two)
