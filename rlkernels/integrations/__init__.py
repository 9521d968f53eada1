"""Ours under the names that other projects know.

    trl, verl, openrlhf   patch(), patched() and unpatch(): their functions replaced by ours
    transformers          apply(model): the fused head in the loss of any transformers.Trainer
    rewards               reward functions of theirs for our trainers, and ours for them

Each imports the project it is for, when it is used; this module none.
"""

from rlkernels.integrations._patch import PatchError

__all__ = ["PatchError"]
