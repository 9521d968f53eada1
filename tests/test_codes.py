"""The numbers of options, rlkernels/_codes.py, are those of the C++ headers."""

import re
from pathlib import Path

import pytest

from rlkernels import _codes

HEADERS = sorted((Path(__file__).parents[1] / "csrc" / "include" / "rlkernels").glob("*.h"))
TEXT = "".join(path.read_text() for path in HEADERS)
ENUMS = {
    "Aggregation": _codes.AGGREGATIONS,
    "Objective": _codes.OBJECTIVES,
    "SamplerCorrection": _codes.SAMPLER_CORRECTIONS,
    "PolicyMetric": _codes.POLICY_METRICS,
    "ValueMetric": _codes.VALUE_METRICS,
    "KlEstimator": _codes.KL_ESTIMATORS,
    "KlKind": _codes.DIVERGENCES,
    "GroupBaseline": _codes.BASELINES,
    "GroupScale": _codes.SCALES,
    "RecurrenceKind": _codes.RECURRENCES,
}
# An unscoped enum's names are also its neighbours', and so some say more than the option's name.
PREFIXES = ("baseline_", "scale_")
NAMES = {
    "jensen_shannon": "js",
    "clip_low": "clip_fraction_low",
    "clip_high": "clip_fraction_high",
    "value_tokens": "num_tokens",
}


def option(enumerator: str) -> str:
    """kSeqMeanTokenSum: seq_mean_token_sum."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enumerator.removeprefix("k")).lower()
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return NAMES.get(name, name)


def numbers(enum: str) -> dict[str, int]:
    (body,) = re.findall(rf"enum {enum} {{(.*?)}};", TEXT, re.DOTALL)
    return {option(name): int(number) for name, number in re.findall(r"(k\w+) = (\d+)", body)}


@pytest.mark.parametrize("enum", ENUMS)
def test_an_option_has_the_number_of_the_headers(enum):
    assert numbers(enum) == {name: number for number, name in enumerate(ENUMS[enum])}


def test_every_enum_of_the_headers_is_compared():
    assert set(re.findall(r"\benum (\w+)", TEXT)) == ENUMS.keys()


def test_the_headers_count_the_objectives():
    (count,) = re.findall(r"constexpr int kObjectives = (\d+);", TEXT)
    assert int(count) == len(_codes.OBJECTIVES)


def test_straight_through_forms_are_of_estimators_that_there_are():
    assert {name.removesuffix("+") for name in _codes.STRAIGHT_THROUGH} < set(_codes.KL_ESTIMATORS)
