"""The router loss of a mixture of experts, which makes its routers use all experts (Shazeer et al. 2017, arXiv
1701.06538; Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The names of its weight, in a model's config or in the model.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


class RouterLoss:
    """The load-balancing loss of a model, and the weight `coef` that it has in training."""

    def __init__(self, model: Any, coef: float) -> None:
        self.model, self.coef = model, coef

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Yields a list. Each forward pass of the model inside the context appends its router loss, without `coef`."""
        seen: list[Tensor] = []

        def ask(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
            return args, {**kwargs, "output_router_logits": True}

        def see(model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            found = router_loss(model, output, kwargs.get("attention_mask"))
            if found is None:  # the model could not run before, when its router loss was looked for
                raise _refusal(model, self.coef)
            seen.append(found)

        handles = [
            self.model.register_forward_pre_hook(ask, with_kwargs=True),
            self.model.register_forward_hook(see, with_kwargs=True),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def router_loss(model: Any, output: Any, attention_mask: Tensor | None) -> Tensor | None:
    """The model's own router loss, or else, as in TRL, Mixtral's, from the router logits; None if the model gives
    neither."""
    found, logits = (getattr(output, name, None) for name in ("aux_loss", "router_logits"))
    top_k = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if isinstance(found, Tensor) or not logits or top_k is None:
        return found
    return load_balancing_loss_func(
        tuple(each.flatten(0, -2) for each in logits), logits[0].shape[-1], top_k, attention_mask
    )


def find_router_loss(model: Any, coef: float | None, device: torch.device) -> RouterLoss | None:
    """The router loss of a causal language model, with the weight `coef`, or if that is None the one that the model
    declares. None if the model has no router loss, or the weight is 0. Warns of anything else that the model adds to
    the loss of its tokens, which is not trained. `device` is the one that the model is trained on.

    Raises:
        ValueError: if coef is not 0, and the model has no router loss.
    """
    while hasattr(model, "get_base_model"):  # PEFT's
        model = model.get_base_model()
    name, config = type(model).__name__, model.config.get_text_config()
    declared = [getattr(place, each) for place in (config, model) for each in COEFFICIENTS if hasattr(place, each)]
    own = declared[0] if declared else 0.0
    weight = own if coef is None else coef
    has_routers = hasattr(config, "output_router_logits")
    wanted = has_routers and weight != 0
    output = _run(model, device, output_router_logits=True) if wanted else None
    found = None if output is None else router_loss(model, output, None)
    if output is None:
        output = _run(model, device)
    if output is None:
        return RouterLoss(model, weight) if wanted else None
    if found is None and coef:
        raise _refusal(model, coef)
    if found is None and wanted:
        logger.warning(f"{name} declares the weight {own} of a router loss, but gives none: none is trained.")
    if output.loss is not None:
        logits = output.logits[0].float()
        of_tokens = nn.functional.cross_entropy(logits[:-1], _tokens(model)[0, 1:].to(logits.device))
        told = output.loss.float() - (own * found if found is not None and output.get("aux_loss") is found else 0.0)
        if (told - of_tokens).abs() > 1e-4 * of_tokens:
            logger.warning(
                f"{name}: its own loss of a few tokens is {told:.4g}, the cross-entropy of its logits is "
                f"{of_tokens:.4g}. What the model adds is not trained."
            )
    return None if found is None else RouterLoss(model, weight)


def _refusal(model: Any, coef: float) -> ValueError:
    name = type(model).__name__
    return ValueError(f"router_aux_loss_coef must be 0 or unset for {name}, which gives no router loss; got {coef}")


def _tokens(model: Any) -> Tensor:
    weight = model.get_input_embeddings().weight
    return torch.arange(5, 9, device=weight.device).clamp(max=len(weight) - 1).unsqueeze(0)


@torch.no_grad()
def _run(model: Any, device: torch.device, **options: Any) -> Any:
    """The model's output for a few tokens; None if it cannot run."""
    flash = "flash" in model.config._attn_implementation
    if flash and model.device != device:
        return None  # the model cannot run before FSDP places it
    tokens = _tokens(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=flash):  # flash attention has no float32
            return model(input_ids=tokens, labels=tokens, use_cache=False, return_dict=True, **options)
    except Exception:
        return None
    finally:
        for module in training:
            module.training = True
