"""How close is close enough: no worse than PyTorch, by the rule in rlkernels/_accuracy.py."""

from torch import Tensor

from rlkernels._accuracy import comparable, measures, ulp

__all__ = ["assert_as_accurate_as_torch", "ulp"]


def assert_as_accurate_as_torch(
    got: Tensor, oracle: Tensor, naive: Tensor, *, what: str = "output", gradient: bool = False
) -> None:
    """Raise AssertionError naming each measure by which `got` is worse than the rule allows."""
    got, oracle, naive, dtype = comparable(got, oracle, naive, what)
    found = measures(got, oracle, naive, dtype, gradient=gradient)
    worse = [f"{name} {is_:.3g} > {may:.3g}" for name, (is_, may) in found.items() if not is_ <= may]
    if worse:
        at = (got - oracle).abs().argmax().item()
        raise AssertionError(
            f"{what}: {', '.join(worse)} ({got.numel()} elements of {dtype}, largest {oracle.abs().max():.3g}; "
            f"furthest: {got[at].item()!r}, wanted {oracle[at].item()!r}, PyTorch {naive[at].item()!r})"
        )
