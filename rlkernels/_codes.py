"""The options that the kernels know by number: the number of each is its place in these tuples, and its value in the
enum of csrc/include/rlkernels that `tests/test_codes.py` compares with them."""

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum")

OBJECTIVES = ("ppo", "reinforce", "gspo", "cispo", "sapo", "gmpo", "dppo_tv", "dppo_kl", "vespo")
SAMPLER_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
POLICY_METRICS = (
    *("ratio_mean", "clip_fraction_low", "clip_fraction_high", "approx_kl", "ref_kl"),
    *("entropy", "sampler_weight", "sampler_capped", "num_tokens"),
)
VALUE_METRICS = ("clip_fraction", "value_mean", "return_mean", "squared_error", "explained_variance", "num_tokens")

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
STRAIGHT_THROUGH = ("k1+", "k3+", "abs+")
"""The straight-through forms: the kernels take the estimator's number and a flag."""
DIVERGENCES = ("forward", "reverse", "js")

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("group", "batch", "none")

RECURRENCES = ("gae", "discounted_returns", "td_lambda", "vtrace")
