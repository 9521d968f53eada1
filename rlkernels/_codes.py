"""The options that the kernels know by number: the number of each is its place in these tuples, and its value in the
enum of csrc/include/rlkernels that `tests/test_codes.py` compares with them; and the options of policy_loss together,
as the kernels take them."""

from typing import NamedTuple

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum")

OBJECTIVES = ("ppo", "reinforce", "gspo", "cispo", "sapo", "gmpo", "dppo_tv", "dppo_kl", "vespo")
SAMPLER_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
POLICY_METRICS = (
    *("ratio_mean", "clip_fraction_low", "clip_fraction_high", "approx_kl", "ref_kl"),
    *("entropy", "sampler_weight", "sampler_capped", "num_tokens"),
)


class PolicyOptions(NamedTuple):
    """In the order of the op's schema. A bound that was not given is infinite."""

    aggregation: int
    objective: int
    clip_low: float
    clip_high: float
    dual_clip: float
    delta: float
    log_ratio_clamp: float
    k_pos: float
    k_neg: float
    rate_pos: float
    rate_neg: float
    """vespo: k and lambda; the temperatures of sapo are rates."""
    kl_coef: float
    kl_estimator: int
    kl_straight_through: bool
    entropy_coef: float
    sampler_correction: int
    sampler_cap: float


VALUE_METRICS = ("clip_fraction", "value_mean", "return_mean", "squared_error", "explained_variance", "num_tokens")

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
STRAIGHT_THROUGH = ("k1+", "k3+", "abs+")
"""The straight-through forms: the kernels take the estimator's number and a flag."""
DIVERGENCES = ("forward", "reverse", "js")

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("group", "batch", "none")

RECURRENCES = ("gae", "discounted_returns", "td_lambda", "vtrace")
