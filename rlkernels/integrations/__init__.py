"""rlkernels inside other projects.

    trl, verl, openrlhf   patch(), patched() and unpatch() replace the project's functions by ours
    transformers          apply(model) puts the fused head into the loss of any transformers.Trainer
    rewards               turns other projects' reward functions into ours, and ours into theirs
    _patch                Patch, the table of replacements of one project, with the checks of its versions
    _verl_*, _openrlhf_*  our functions with the parameters and results of theirs
    _rewards              what the adapters in rewards share

A module imports its project when it is used. This package imports none.
"""

from rlkernels.integrations._patch import PatchError

__all__ = ["PatchError"]
