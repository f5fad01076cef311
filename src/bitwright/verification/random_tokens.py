"""Logits of models on the same random tokens, and how far apart they are; ``verify`` needs no text."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitwright.core.progress import Listener, Progress
from bitwright.model.config import text_config
from bitwright.model.source import open_checkpoint
from bitwright.stream.memory import peak_memory

TOKENS, SEED = 64, 0


def cannot_run(config: Mapping[str, Any]) -> str | None:
    """Why a model with this config.json cannot run, however sound: transformers has no class for it; None if it can."""
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return f"transformers does not know the architecture '{kind}'"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"transformers has no causal language model of '{kind}'"
    return None


def random_tokens(folder: Path) -> Int[Tensor, "1 T"]:
    """Random tokens, equal for all folders with as many tokens in their vocabularies."""
    vocabulary = int(text_config(open_checkpoint(folder)).vocab_size)
    return torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(SEED))


@torch.no_grad()
def logits_of(
    make: Callable[[], PreTrainedModel], tokens: Int[Tensor, "1 T"], listener: Listener, what: str
) -> Float[Tensor, "T V"]:
    """The logits of a model, which is in memory for no longer than this takes."""
    listener(Progress("verify", 0, 1, "logits", peak_memory(), detail=what))
    model = make()
    logits: Tensor = model(tokens, use_cache=False).logits[0].float()
    return logits


def divergence_from(reference: Float[Tensor, "T V"], logits: Float[Tensor, "T V"]) -> float:
    """KL divergence in nats per token."""
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def of_chance(logits: Float[Tensor, "T V"]) -> float:
    """KL divergence, in nats per token, of a model to which all tokens are alike from one with these logits."""
    log_p = logits.log_softmax(-1)
    return float((log_p.exp() * log_p).sum(-1).mean()) + torch.tensor(float(logits.shape[-1])).log().item()
