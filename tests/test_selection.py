"""The tests that `make test` leaves to `make test-all`."""

from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import settings

from selection import cover, mark_thorough


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

@pytest.fixture(params=[1, 2])
def made(request):
    return request.param

@pytest.mark.parametrize("dtype", ["f", "h"])
@pytest.mark.parametrize("option", ["on", "off"])
def test_with_a_fixture(dtype, option, made):
    pass

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


class Selection:
    names: list[str]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        mark_thorough(items)

    def pytest_collection_finish(self, session):
        self.names = [item.originalname for item in session.items]


@pytest.mark.parametrize(
    ("expression", "of_three", "of_two", "with_a_fixture"),
    [("thorough", 12, 0, 4), ("not thorough", 6, 6, 4), ("thorough or not thorough", 18, 6, 8)],
)
def test_the_rest_of_a_product_is_thorough(tmp_path, expression, of_three, of_two, with_a_fixture):
    """And what was marked by hand stays so. Two names that are given together are one parameter."""
    (tmp_path / "test_product.py").write_text(PRODUCT)
    configuration = Path(__file__).parents[1] / "pyproject.toml"
    selection = Selection()
    options = ["--collect-only", "-qq", "-c", str(configuration), "-m", expression]
    pytest.main([str(tmp_path), *options], plugins=[selection])
    counts = [selection.names.count(f"test_{name}") for name in ("of_three", "of_two", "with_a_fixture")]
    assert counts == [of_three, of_two, with_a_fixture]


def test_the_hypothesis_profile_is_the_one_asked_for(request):
    """Not undone by a file that is collected later."""
    wanted = request.config.getoption("--hypothesis-profile") or "quick"
    assert settings.get_current_profile_name() == wanted
