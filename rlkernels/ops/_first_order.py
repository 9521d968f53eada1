"""Gradients that are not differentiable themselves: to differentiate one again is refused, not wrong."""

import functools
from collections.abc import Callable

import torch


def no_second_derivative(name: str) -> Callable:
    """The gradient of an op that is itself a gradient."""

    def refuse(ctx, *gradients):
        raise NotImplementedError(f"rlkernels::{name} has no derivative: the gradient cannot be differentiated again")

    return lambda backend: refuse


class _Refused(torch.autograd.Function):
    """Gradients that must not pass for differentiable by the sources that they were made of."""

    @staticmethod
    def forward(ctx, name, gradients, *sources):
        ctx.name = name
        return gradients

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(f"the gradient of {ctx.name} cannot be differentiated again")


def first_order_only(name: str) -> Callable:
    """Decorates the backward of an autograd.Function: that its results are differentiated is refused, not left out of
    the graph. It is called as backward(ctx, saved, *gradients), where saved() are the tensors that it saved:
    checkpointing gives them once, and computes them for whoever asks. They must lead to all inputs that are
    differentiated; `leads_to_inputs` is one that does."""

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *gradients):
            saved = functools.cache(lambda: ctx.saved_tensors)
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            return _Refused.apply(name, results, *saved(), *gradients) if torch.is_grad_enabled() else results

        return once

    return decorate


def leads_to_inputs(like: torch.Tensor) -> torch.Tensor:
    """What the forward of an autograd.Function returns and saves where it does not save its inputs themselves: as an
    output it leads to them, and it holds no memory."""
    return like.new_empty(0)
