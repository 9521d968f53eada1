"""Log-probabilities from a Hugging Face causal language model whose logits never exist."""

import dataclasses
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rlkernels.ops.linear_logprobs import linear_token_logprobs

IGNORE_INDEX = -100  # of labels, in all of Hugging Face
FIELDS = ("token_logprobs", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1", "head_output")
# What linear_token_logprobs takes, without what the model determines.
FROM_MODEL = {"hidden", "weight", "token_ids", "bias", "adapter", "softcap", "scale", "ignore_index"}
OPTIONS = set(inspect.signature(linear_token_logprobs).parameters) - FROM_MODEL

# Head outputs that tell one scale and softcap from another: the least gives the slope at 0, the greatest the ceiling,
# and the second shows a scale that is rounded to bfloat16 or float16.
LEAST, GREATEST = 2.0**-30, 2.0**100
POINTS = (0.0, *(sign * x for x in (LEAST, 1 + 2.0**-12, 2.0**5, 2.0**10, GREATEST) for sign in (1.0, -1.0)))


def wrap_lm_head(model: nn.Module, *, scale: float | None = None, softcap: float | None = None, **options: Any) -> Any:
    """Teach a Hugging Face causal LM to give log-probabilities of its labels without ever computing logits.

        output = model(input_ids, attention_mask=..., labels=labels, return_token_logprobs=True)
        output.token_logprobs[b, t] = log p(labels[b, t] | input_ids[b, :t])     float32 [B, T], as labels
        output.entropy[b, t]        = entropy of that distribution

    Both are 0 at t = 0, which nothing predicts, and where labels are -100, so that they line up with labels, masks and
    advantages. Only positions whose next label is scored meet the LM head: to train on completions alone, set the other
    labels to -100 (logits_to_keep is not needed). In the place of labels, shift_labels are already those of the next
    position, as in Hugging Face's losses: token_logprobs[b, t] = log p(shift_labels[b, t] | input_ids[b, :t + 1]).

    With head_function=f instead of return_token_logprobs, output.head_output is f(hidden, weight, token_ids, bias=,
    adapter=, scale=, softcap=, ignore_index=), where token_ids are shift_labels, or labels shifted: a partial of
    linear_policy_loss or linear_preference_logps then runs where DDP, FSDP2 and autocast expect the head to.

    The rest of the output is the model's own (past_key_values, hidden_states, attentions, aux_loss ...), but logits and
    loss are None. Without either argument the model does what it always did.

    `linear_token_logprobs` is given what the model hands to its output embedding, and that embedding's weight and bias.
    What becomes of the logits afterwards (Gemma's softcap, Cohere's and Granite's scale) is measured: the model runs
    once, on two rows of four tokens, in evaluation mode, with known numbers in the place of the head's output.

    Args:
        model: a causal LM, as it is or inside PEFT, DDP or torch.compile; call what it is inside of as ever. Wrap it
            before it is compiled or sharded.
        scale, softcap: of the logits, as in linear_token_logprobs. Giving either omits the measurement, for a model
            that cannot run yet (on the meta device, say) and whose forward you know: nothing then checks it.
        **options: of linear_token_logprobs: temperature, num_scored, logits_budget_mb, tile ...; outputs, each of which
            becomes a field; and return_entropy, True by default. `logprob_options={...}` overrides them in one call.

    Returns:
        model. Wrapping it again replaces the options; `unwrap_lm_head` makes it what it was. Parameters, state_dict and
        save_pretrained are untouched, and a deep copy is wrapped too.

    Differentiable: as in linear_token_logprobs. PEFT may come before or after: LoRA on the head (several adapters,
    disabled, merged) and modules_to_save are served; with prompt tuning the results have the virtual tokens too, as the
    model's logits do. Gradient checkpointing, DDP, FSDP2 and autocast need nothing special.

    Raises:
        TypeError: for what is no causal LM, and for unknown options.
        ValueError: with the reason, wherever the model's own logits could give anything else: a head that is no
            nn.Linear, that is not called exactly once, or that has another adapter (DoRA, trainable tokens, quantised
            weights); logits changed in another way or by a parameter; positions that see later tokens;
            encoder-decoder models; a weight that is sharded by itself (fully_shard on the head alone, ZeRO-3, tensor
            parallelism); labels of another shape than the tokens.

    Traffic: that of linear_token_logprobs.
    """
    lm = _causal_lm(model)
    _check_options(options)
    if scale is None and softcap is None:
        scale, softcap = _measure(lm)
    if isinstance(vars(lm).get("forward"), _WrappedForward):
        unwrap_lm_head(lm)
    constants = {"scale": 1.0 if scale is None else scale, "softcap": softcap, "ignore_index": IGNORE_INDEX}
    lm.forward = _WrappedForward(lm, constants, {"return_entropy": True, **options})
    return model


def unwrap_lm_head(model: nn.Module) -> Any:
    """Undo `wrap_lm_head`: the model is what it was before. Returns model.

    Raises:
        ValueError: if the model is not wrapped, or its forward was replaced since (undo that first).
    """
    lm = _causal_lm(model)
    wrapped = vars(lm).get("forward")
    if not isinstance(wrapped, _WrappedForward):
        raise ValueError(f"model: the forward of {type(lm).__name__} is not the one that wrap_lm_head gave it")
    del lm.forward
    if wrapped.of_instance:
        lm.forward = wrapped.__wrapped__
    return model


class _WrappedForward:
    """What stands in the place of a model's forward; no closure, so that a deep copy of the model has its own."""

    def __init__(self, lm: Any, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self.lm, self.constants, self.options = lm, constants, options
        self.of_instance = "forward" in vars(lm)  # accelerate's device hooks, say
        self.__wrapped__ = lm.forward  # under this name its signature is taken for ours, as generate() does

    def __call__(self, *args, return_token_logprobs=False, head_function=None, logprob_options=None, **kwargs):
        if not return_token_logprobs and head_function is None:
            return self.__wrapped__(*args, **kwargs)
        labels, targets = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        shift = targets is None
        if shift:
            if labels is None:
                raise ValueError("log-probabilities need labels= or shift_labels=, shaped as input_ids")
            targets = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        _check_options(logprob_options or {})
        options = self.options | (logprob_options or {})
        lm, results = self.lm, []
        _linear(lm, lm.get_output_embeddings())  # before a hook makes one that is sharded by itself whole for a moment

        def score(head, args, kwargs):
            hidden = _only_input(lm, args, kwargs)
            if hidden.shape[:-1] != targets.shape:
                wanted, got = list(hidden.shape[:-1]), list(targets.shape)
                raise ValueError(f"labels must have the shape of the hidden states, {wanted}; got {got}")
            weight, bias, adapter = _linear(lm, head, hidden)
            hidden, token_ids = hidden.to(weight.device), targets.to(weight.device)
            inputs = {"bias": bias, "adapter": adapter, **self.constants, **({} if head_function else options)}
            results.append((head_function or linear_token_logprobs)(hidden, weight, token_ids, **inputs))
            return (hidden[:, :0],), {}  # the head runs as ever, with all its hooks, on no rows

        handle = lm.get_output_embeddings().register_forward_pre_hook(score, with_kwargs=True)
        try:
            output = self.__wrapped__(*args, **{**kwargs, "return_dict": True})
        finally:
            handle.remove()
        if len(results) != 1:
            raise _refusal(lm, f"its LM head was called {len(results)} times, not once")
        fields = {"head_output": results[0]}
        if head_function is None:
            names = [*FIELDS[: 1 + options["return_entropy"]], *options.get("outputs", ())]
            found = results[0] if isinstance(results[0], tuple) else results
            padded = [nn.functional.pad(value, (1, -1)) if shift else value for value in found]
            fields = dict(zip(names, padded, strict=True))
        return _output_class(type(output))(**{**output, "loss": None, "logits": None, **fields})


@functools.cache
def _output_class(base: type) -> type:
    """A model's own output with further fields: whatever handles the one (accelerate, DDP) handles the other."""
    fields = [(name, Any, None) for name in FIELDS]
    return dataclasses.make_dataclass(f"TokenLogprobs{base.__name__}", fields, bases=(base,))


def _measure(lm: Any) -> tuple[float, float | None]:
    """(scale, softcap) of logits = softcap * tanh(scale * head / softcap), the only thing done to the head's output."""
    _linear(lm, lm.get_output_embeddings())
    if lm.config.is_encoder_decoder:
        raise _refusal(lm, "it is an encoder-decoder model, whose labels are not shifted")
    seen: list[tuple[Tensor, Tensor]] = []

    def replace(head, inputs, kwargs, output):
        points = torch.tensor(POINTS, dtype=torch.float64, device=output.device)
        rows = torch.arange(tokens.numel(), device=output.device).view(*tokens.shape, 1)
        index = rows + torch.arange(output.shape[-1], device=output.device)
        seen.append((_only_input(lm, inputs, kwargs).detach(), points[index % len(points)]))
        return seen[-1][1]

    # The first of the head's hooks, so that what another changes is measured as well.
    handle = lm.get_output_embeddings().register_forward_hook(replace, with_kwargs=True, prepend=True)
    training = [module for module in lm.modules() if module.training]
    lm.eval()
    try:
        embedding = lm.get_input_embeddings().weight
        special = {value for name, value in lm.config.to_dict().items() if "token" in name and isinstance(value, int)}
        plain = [token for token in range(len(embedding)) if token not in special]
        tokens = torch.tensor([plain[:4], [*plain[:3], plain[4]]], device=embedding.device)
        with torch.enable_grad():
            logits = lm(input_ids=tokens, return_dict=True).logits
    except Exception as error:
        raise _refusal(lm, f"it could not be run on four tokens, {type(error).__name__}: {error}") from error
    finally:
        handle.remove()
        for module in training:
            module.training = True
    if len(seen) != 1:
        raise _refusal(lm, f"its LM head was called {len(seen)} times, not once")
    hidden, x = seen[0]
    change, size = (hidden[1] - hidden[0]).abs().mean(-1), hidden[0].abs().mean(-1)
    if (change > 4 * max(torch.finfo(hidden.dtype).eps, 1e-6) * size)[:-1].any():
        raise _refusal(lm, "positions see the tokens after them")
    if logits.requires_grad:
        raise _refusal(lm, "its logits depend on more than the LM head's output: a parameter, or hidden states")
    if logits.shape != x.shape:
        raise _refusal(lm, f"the LM head's {list(x.shape)} become logits {list(logits.shape)}")
    x, y = x.cpu(), logits.double().cpu()
    scale, ceiling = (y[x == LEAST][0] / LEAST).item(), y[x == GREATEST][0].item()
    softcap = None if ceiling > scale * GREATEST / 2 else ceiling
    if scale > 0 and ceiling > 0:
        expected = scale * x if softcap is None else softcap * torch.tanh(x * (scale / softcap))
        wrong = ~torch.isclose(y, expected, rtol=1e-5, atol=0.0)
        if not wrong.any():
            return scale, softcap
        x, y = x[wrong], y[wrong]
    example = f"{x.flatten()[0]:g} from the LM head becomes {y.flatten()[0]:g}"
    raise _refusal(lm, f"its logits are neither scaled nor soft-capped, but changed in another way: {example}")


def _linear(lm: nn.Module, head: Any, hidden: Tensor | None = None) -> tuple:
    """(weight, bias, adapter) of the linear map that `head` is; without hidden states, a check that it is one."""
    if _path(head) == "peft.utils.other.ModulesToSaveWrapper":
        active = [] if head.disable_adapters else [n for n in head.active_adapters if n in head.modules_to_save]
        head = head.modules_to_save[active[0]] if active else head.original_module
    adapter = None
    if _path(head) == "peft.tuners.lora.layer.Linear":
        adapter = _lora(lm, head, hidden)
        head = head.base_layer
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        raise _refusal(lm, f"its LM head is {_path(head)}, not torch.nn.Linear")
    # accelerate's device hooks replace forward too, but not what it computes.
    if "forward" in vars(head) and not hasattr(head, "_hf_hook"):
        raise _refusal(lm, "the forward of its LM head was replaced")
    weight = head.weight
    if weight.dim() != 2 or weight.is_meta or not weight.is_floating_point() or hasattr(weight, "full_tensor"):
        got = f"a {type(weight).__name__}, {weight.dtype} {list(weight.shape)} on {weight.device}"
        raise _refusal(lm, f"the weight of its LM head is {got}; wanted a floating-point [V, H], whole and in memory")
    return weight, head.bias, adapter


def _lora(lm: nn.Module, layer: Any, hidden: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """scaling * dropout(hidden) @ A.T and B of all active adapters, side by side."""
    if layer.disable_adapters and layer.merged and hidden is not None:
        layer.unmerge()  # as its own forward would, before the weight is read
    active = [] if layer.disable_adapters or layer.merged else [n for n in layer.active_adapters if n in layer.lora_A]
    for name in active:
        if name in layer.lora_variant or layer.lora_B[name].bias is not None:
            kind = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else "LoRA with a bias"
            raise _refusal(lm, f"the adapter '{name}' of its LM head is {kind}, not plain LoRA")
    if not active or hidden is None:
        return None
    down = []
    for name in active:
        a, dropout = layer.lora_A[name], layer.lora_dropout[name]
        down.append(a(dropout(hidden.to(a.weight.dtype))) * layer.scaling[name])
    up = torch.cat([layer.lora_B[name].weight for name in active], 1)
    return torch.cat(down, -1).to(hidden.dtype), up.to(hidden.dtype)


def _causal_lm(model: Any) -> Any:
    """The model itself, out of torch.compile, DDP and PEFT."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "config")):
        raise TypeError(f"model must be a Hugging Face causal LM; got {type(model).__name__}")
    return model


def _only_input(lm: nn.Module, inputs: tuple, kwargs: dict) -> Tensor:
    if len(inputs) != 1 or kwargs or inputs[0].dim() != 3:
        shapes = [list(each.shape) for each in inputs if isinstance(each, Tensor)]
        raise _refusal(lm, f"its LM head gets {shapes} and {sorted(kwargs)}, not just hidden states [B, T, H]")
    return inputs[0]


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"options must be among {', '.join(sorted(OPTIONS))}; got {name}")


def _path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _refusal(lm: nn.Module, reason: str) -> ValueError:
    return ValueError(f"{type(lm).__name__} cannot give log-probabilities without logits: {reason}")
