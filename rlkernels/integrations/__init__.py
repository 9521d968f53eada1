"""Ours under the names that other projects know: `rlkernels.integrations.trl`, `verl`, `openrlhf`, `transformers`.

Each imports the project it is for, so none is imported here.
"""
