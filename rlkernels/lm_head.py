"""Log-probabilities from a Hugging Face causal language model whose logits never exist."""

import dataclasses
import functools
import inspect
import itertools
import threading
import types
from typing import Any

from torch import nn

from rlkernels.causal_lm import find_causal_lm, linear_map, only_input, refusal, scale_and_softcap
from rlkernels.ops.linear_logprobs import linear_token_logprobs

IGNORE_INDEX = -100  # the label of unscored tokens in all of Hugging Face
FIELDS = ("token_logprobs", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1", "head_output")
# The options of linear_token_logprobs, except what the model determines.
FROM_MODEL = {"hidden", "weight", "token_ids", "bias", "adapter", "softcap", "scale", "ignore_index"}
OPTIONS = set(inspect.signature(linear_token_logprobs).parameters) - FROM_MODEL

_COUNT = itertools.count()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.ident = threading.get_ident()  # torch.compile can trace an attribute, but not get_ident


_THREAD = _Thread()


def wrap_lm_head(model: nn.Module, *, scale: float | None = None, softcap: float | None = None, **options: Any) -> Any:
    """Teach a Hugging Face causal LM to give log-probabilities of its labels without ever computing logits.

        output = model(input_ids, attention_mask=..., labels=labels, return_token_logprobs=True)
        output.token_logprobs[b, t] = log p(labels[b, t] | input_ids[b, :t])     float32 [B, T], as labels
        output.entropy[b, t]        = entropy of that distribution

    Both are 0 at t = 0, which nothing predicts, and where labels are -100, so that they line up with labels, masks and
    advantages. Only positions whose next label is scored are projected: to train on completions alone, set the other
    labels to -100 (logits_to_keep is not needed). Give shift_labels instead of labels if they are already shifted, as
    in Hugging Face's losses: token_logprobs[b, t] = log p(shift_labels[b, t] | input_ids[b, :t + 1]).

    With head_function=f instead of return_token_logprobs, output.head_output is f(hidden, weight, token_ids, bias=,
    adapter=, scale=, softcap=, ignore_index=), where token_ids are shift_labels, or labels shifted. A partial of
    linear_policy_loss or linear_preference_logps then runs where DDP, FSDP2 and autocast expect the head to run.

    The rest of the output is the model's own (past_key_values, hidden_states, attentions, aux_loss ...), but logits and
    loss are None. Without either argument the model does what it always did.

    `linear_token_logprobs` gets the input of the model's output embedding, and that embedding's weight and bias. What
    the model does to the logits afterwards (Gemma's softcap, Cohere's and Granite's scale) is measured: the model runs
    once, on two rows of four tokens, in evaluation mode, with known numbers as the head's output. A hook on the head
    that changes logits and is added later goes unseen: wrap the model again.

    Args:
        model: a causal LM, as it is or inside PEFT, DDP or torch.compile. Go on calling the outermost module. Wrap the
            model before it is compiled or sharded.
        scale, softcap: as in linear_token_logprobs. With either of them nothing is measured and nothing checks it. This
            is for a model that cannot run yet (on the meta device, say) and whose forward you know.
        **options: options of linear_token_logprobs: temperature, num_scored, logits_budget_mb ...; outputs, each of
            them a field of the output; and return_entropy, True by default. `logprob_options={...}` overrides them in
            one call. head_function does not get them.

    Returns:
        model. Wrapping it again replaces the options; `unwrap_lm_head` undoes it. Parameters, state_dict and
        save_pretrained are untouched. A deep copy is wrapped too; a pickle is not: wrap it again. Several threads may
        call the model at once, and head_function may call it.

    Differentiable: as in linear_token_logprobs. PEFT may come before or after: LoRA on the head (several adapters,
    disabled, merged) and modules_to_save are served; with prompt tuning the results have the virtual tokens too, as the
    model's logits do. Gradient checkpointing, DDP, FSDP2 and autocast need nothing special; a head that is a unit of
    FSDP2 stays whole from its forward pass to its backward pass.

    Raises:
        TypeError: for what is no causal LM, and for unknown options.
        ValueError: with the reason, wherever the model's own logits could give anything else: a head that is not an
            nn.Linear, is not called exactly once, or has another adapter (DoRA, trainable tokens, quantised weights);
            logits changed in another way or by a parameter; positions that see later tokens; encoder-decoder models; a
            weight that is sharded in another way than by FSDP2 (ZeRO-3, tensor parallelism); labels of another shape
            than the tokens; a LLaMA-Adapter around the model, which holds its present forward (wrap the model before).

    Traffic: that of linear_token_logprobs.
    """
    lm = find_causal_lm(model)
    _check_options(options)
    others = (module for module in model.modules() if module is not lm)
    holding = [each for each in others if getattr(vars(each).get("forward"), "__self__", None) is lm]
    if holding:
        raise refusal(lm, f"{type(holding[0]).__name__} around it holds its present forward; wrap the model before")
    if scale is None and softcap is None:
        scale, softcap = scale_and_softcap(lm)
    if _own_forward(lm) is not None:
        unwrap_lm_head(lm)
    constants = {"scale": 1.0 if scale is None else scale, "softcap": softcap, "ignore_index": IGNORE_INDEX}
    defaults = {"return_entropy": True, **options}
    # Our forward calls a forward of the instance (accelerate's device hooks). The model holds it, not the closure, so
    # that a deep copy calls its own. Its name is unique, since ours may wrap another of ours.
    under = f"_forward_under_wrap_{next(_COUNT)}" if "forward" in vars(lm) else None
    if under is not None:
        setattr(lm, under, lm.forward)

    @functools.wraps(type(lm).forward)
    def forward(self, *args, return_token_logprobs=False, head_function=None, logprob_options=None, **kwargs):
        own = types.MethodType(type(self).forward, self) if under is None else getattr(self, under)
        if not return_token_logprobs and head_function is None:
            return own(*args, **kwargs)
        if head_function is not None and logprob_options:
            raise TypeError("logprob_options cannot be given with head_function, which has its own options")
        _check_options(logprob_options or {})
        options = defaults | (logprob_options or {})
        return _run(self, functools.partial(own, *args), kwargs, head_function, constants, options)

    forward.wrap_lm_head = forward, under, constants  # type: ignore[attr-defined]
    lm.forward = types.MethodType(forward, lm)
    return model


def unwrap_lm_head(model: nn.Module) -> Any:
    """Undo `wrap_lm_head`: the model is what it was before. Returns model.

    Raises:
        ValueError: if the model is not wrapped, or its forward was replaced since (undo that first).
    """
    lm = find_causal_lm(model)
    wrapped = _own_forward(lm)
    if wrapped is None:
        raise ValueError(f"model: the forward of {type(lm).__name__} is not the one that wrap_lm_head gave it")
    del lm.forward
    if wrapped[1] is not None:
        lm.forward = vars(lm).pop(wrapped[1])
    return model


def _own_forward(lm: nn.Module) -> tuple | None:
    """(function, name of the forward under it, constants), or None if the forward is not ours. functools.wraps may have
    copied the attributes of ours to another."""
    function = getattr(vars(lm).get("forward"), "__func__", None)
    wrapped = getattr(function, "wrap_lm_head", (None,))
    return wrapped if function is not None and wrapped[0] is function else None


def _run(lm, own, kwargs, head_function, constants, options):
    labels, targets = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    shift = targets is None
    if shift:
        if labels is None:
            raise ValueError("log-probabilities need labels= or shift_labels=, of the shape of input_ids")
        targets = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    head = lm.get_output_embeddings()
    if hasattr(head, "set_reshard_after_forward"):  # a unit of FSDP2 stays whole from forward to backward pass
        head.set_reshard_after_forward(False, recurse=False)
    else:
        linear_map(lm, head)  # a check, before a hook gathers a weight that is sharded in another way
    results = []
    ident, scoring = _THREAD.ident, False

    def score(module, args, kwargs=None):
        nonlocal scoring
        # The hook also sees calls that are not this one: from another thread (without kwargs if this call ends
        # meanwhile), from within the head's function, or of a copy that was made there.
        if _THREAD.ident != ident or scoring or module is not head:
            return None
        scoring = True
        hidden = only_input(lm, args, kwargs)
        if hidden.shape[:-1] != targets.shape:
            wanted, got = list(hidden.shape[:-1]), list(targets.shape)
            raise ValueError(f"labels must have the shape of the hidden states, {wanted}; got {got}")
        weight, bias, adapter = linear_map(lm, head, hidden)
        hidden, token_ids = hidden.to(weight.device), targets.to(weight.device)
        inputs = {"bias": bias, "adapter": adapter, **constants, **({} if head_function else options)}
        results.append((head_function or linear_token_logprobs)(hidden, weight, token_ids, **inputs))
        scoring = False
        return (hidden[:, :0],), {}  # the head still runs, with all its hooks, but on no rows

    handle = head.register_forward_pre_hook(score, with_kwargs=True)
    try:
        output = own(**{**kwargs, "return_dict": True})
    finally:
        handle.remove()
    if len(results) != 1:
        raise refusal(lm, f"its LM head was called {len(results)} times, not once")
    fields = {"head_output": results[0]}
    if head_function is None:
        names = [*FIELDS[: 1 + options["return_entropy"]], *options.get("outputs", ())]
        found = results[0] if isinstance(results[0], tuple) else results
        padded = [nn.functional.pad(value, (1, -1)) if shift else value for value in found]
        fields = dict(zip(names, padded, strict=True))
    return _output_class(type(output))(**{**output, "loss": None, "logits": None, **fields})


@functools.cache
def _output_class(base: type) -> type:
    """A model's own output class with further fields, so that accelerate and DDP handle it as they do the model's."""
    fields = [(name, Any, None) for name in FIELDS]
    return dataclasses.make_dataclass(f"TokenLogprobs{base.__name__}", fields, bases=(base,))


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"options must be among {', '.join(sorted(OPTIONS))}; got {name}")
