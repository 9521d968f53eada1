"""What a Hugging Face causal language model does at its LM head and to its logits afterwards. A model that does
anything else is refused. Neither transformers nor peft is imported."""

from typing import Any

import torch
from torch import Tensor, nn

# Head outputs that show scale and softcap: the least gives the slope at 0, the greatest the ceiling, and the second
# tells whether the scale is rounded to bfloat16 or float16.
LEAST, GREATEST = 2.0**-30, 2.0**100
POINTS = (0.0, *(sign * x for x in (LEAST, 1 + 2.0**-12, 2.0**5, 2.0**10, GREATEST) for sign in (1.0, -1.0)))


def scale_and_softcap(lm: Any) -> tuple[float, float | None]:
    """(scale, softcap) of logits = softcap * tanh(scale * head / softcap). A model that does anything else to the
    head's output is refused."""
    linear_map(lm, lm.get_output_embeddings())
    if lm.config.is_encoder_decoder:
        raise refusal(lm, "it is an encoder-decoder model, whose labels are not shifted")
    seen: list[tuple[Tensor, Tensor]] = []

    def replace(head, inputs, kwargs, output):
        points = torch.tensor(POINTS, dtype=torch.float64, device=output.device)
        rows = torch.arange(tokens.numel(), device=output.device).view(*tokens.shape, 1)
        index = rows + torch.arange(output.shape[-1], device=output.device)
        # Copies, because the model may change these tensors in place.
        seen.append((only_input(lm, inputs, kwargs).detach().clone(), points[index % len(points)]))
        return seen[-1][1].clone()

    # It runs before the head's other hooks, so that what they change is measured too.
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
        raise refusal(lm, f"it could not be run on four tokens, {type(error).__name__}: {error}") from error
    finally:
        handle.remove()
        for module in training:
            module.training = True
    if len(seen) != 1:
        raise refusal(lm, f"its LM head was called {len(seen)} times, not once")
    hidden, x = seen[0]
    if hidden.shape[:-1] != tokens.shape:
        raise refusal(lm, f"its LM head gets hidden states {list(hidden.shape)} of tokens {list(tokens.shape)}")
    change, size = (hidden[1] - hidden[0]).abs().mean(-1), hidden[0].abs().mean(-1)
    if (change > 4 * max(torch.finfo(hidden.dtype).eps, 1e-6) * size)[:-1].any():
        raise refusal(lm, "positions see the tokens after them")
    if logits.requires_grad:
        raise refusal(lm, "its logits depend on more than the LM head's output: a parameter, or hidden states")
    if logits.shape != x.shape:
        raise refusal(lm, f"the LM head's {list(x.shape)} become logits {list(logits.shape)}")
    x, y = x.cpu(), logits.double().cpu()
    scale, ceiling = (y[x == LEAST].median() / LEAST).item(), y[x == GREATEST].median().item()
    softcap = None if ceiling > scale * GREATEST / 2 else ceiling
    if scale > 0 and ceiling > 0:
        expected = scale * x if softcap is None else softcap * torch.tanh(x * (scale / softcap))
        wrong = ~torch.isclose(y, expected, rtol=1e-5, atol=0.0)
        if not wrong.any():
            return scale, softcap
        x, y = x[wrong], y[wrong]
    example = f"{x.flatten()[0]:g} from the LM head becomes {y.flatten()[0]:g}"
    raise refusal(lm, f"its logits are neither scaled nor soft-capped, but changed in another way: {example}")


def linear_map(lm: nn.Module, head: Any, hidden: Tensor | None = None) -> tuple:
    """(weight, bias, adapter) of the linear map `head`. Without hidden states this only checks that it is linear."""
    if _path(head) == "peft.utils.other.ModulesToSaveWrapper":
        active = [] if head.disable_adapters else [n for n in head.active_adapters if n in head.modules_to_save]
        head = head.modules_to_save[active[0]] if active else head.original_module
    adapter = None
    if _path(head) == "peft.tuners.lora.layer.Linear":
        adapter = _lora(lm, head, hidden)
        head = head.base_layer
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        raise refusal(lm, f"its LM head is {_path(head)}, not torch.nn.Linear")
    # accelerate's device hooks replace forward too, but the result is the same.
    if "forward" in vars(head) and not hasattr(head, "_hf_hook"):
        raise refusal(lm, "the forward of its LM head was replaced")
    weight = head.weight
    if weight.dim() != 2 or weight.is_meta or not weight.is_floating_point() or hasattr(weight, "full_tensor"):
        got = f"a {type(weight).__name__}, {weight.dtype} {list(weight.shape)} on {weight.device}"
        raise refusal(lm, f"the weight of its LM head is {got}; wanted a floating-point [V, H], whole and in memory")
    return weight, head.bias, adapter


def _lora(lm: nn.Module, layer: Any, hidden: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """scaling * dropout(hidden) @ A.T and B of all active adapters, side by side."""
    if layer.disable_adapters and layer.merged and hidden is not None:
        layer.unmerge()  # as its own forward would, before the weight is read
    active = [] if layer.disable_adapters or layer.merged else [n for n in layer.active_adapters if n in layer.lora_A]
    for name in active:
        if name in layer.lora_variant or layer.lora_B[name].bias is not None:
            kind = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else "LoRA with a bias"
            raise refusal(lm, f"the adapter '{name}' of its LM head is {kind}, not plain LoRA")
    if not active or hidden is None:
        return None
    down = []
    for name in active:
        a, dropout = layer.lora_A[name], layer.lora_dropout[name]
        down.append(a(dropout(hidden.to(a.weight.dtype))) * layer.scaling[name])
    up = torch.cat([layer.lora_B[name].weight for name in active], 1)
    return torch.cat(down, -1).to(hidden.dtype), up.to(hidden.dtype)


def find_causal_lm(model: Any) -> Any:
    """The causal LM inside torch.compile, DDP and PEFT."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "config")):
        raise TypeError(f"model must be a Hugging Face causal LM; got {type(model).__name__}")
    return model


def only_input(lm: nn.Module, inputs: tuple, kwargs: dict) -> Tensor:
    if len(inputs) != 1 or kwargs or inputs[0].dim() != 3:
        shapes = [list(each.shape) for each in inputs if isinstance(each, Tensor)]
        raise refusal(lm, f"its LM head gets {shapes} and {sorted(kwargs)}, not just hidden states [B, T, H]")
    return inputs[0]


def _path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def refusal(lm: nn.Module, reason: str) -> ValueError:
    return ValueError(f"{type(lm).__name__} cannot give log-probabilities without logits: {reason}")
