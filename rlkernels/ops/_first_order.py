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
    """Gradients whose own backward pass raises, in place of a graph that leaves their sources out."""

    @staticmethod
    def forward(ctx, name, gradients, *sources):
        ctx.name = name
        return gradients

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(f"the gradient of {ctx.name} cannot be differentiated again")


def first_order_only(name: str) -> Callable:
    """Decorates the backward of an autograd.Function, so that differentiating its results again raises.

    The decorated function is called as backward(ctx, saved, *gradients). saved() gives the tensors that the forward
    saved; under checkpointing they are computed only when asked for, and given once. In autograd's graph they must
    depend on every input that is differentiated; `leads_to_inputs` gives a tensor that does."""

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
    """An empty tensor for the forward of an autograd.Function to return and save, where it does not save its inputs. As
    an output it depends on them all, and it holds no memory."""
    return like.new_empty(0)
