"""What models compute on the same random tokens, and how far apart that is: all that ``verify`` needs of a text."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitwright.core.progress import Listener, Progress
from bitwright.model.config import model_config
from bitwright.stream.memory import peak_memory

TOKENS, SEED = 64, 0


def cannot_run(config: Mapping[str, Any]) -> str | None:
    """Why nothing can be computed with a model of this config.json, however sound: transformers has no class for it."""
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return f"transformers does not know the architecture '{kind}'"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"transformers has no causal language model of '{kind}'"
    return None


def random_tokens(folder: Path) -> Int[Tensor, "1 T"]:
    """The same for every folder with as many tokens in its vocabulary."""
    vocabulary = int(model_config(folder).vocab_size)
    return torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(SEED))


@torch.inference_mode()
def logits_of(
    make: Callable[[], PreTrainedModel], tokens: Int[Tensor, "1 T"], listener: Listener, what: str
) -> Float[Tensor, "T V"]:
    """Of a model that is held for no longer than this takes."""
    listener(Progress("verify", 0, 1, "logits", peak_memory(), detail=what))
    model = make()
    found: Tensor = model(tokens, use_cache=False).logits[0].float()
    return found


def divergence_from(reference: Float[Tensor, "T V"], found: Float[Tensor, "T V"]) -> float:
    """KL divergence in nats per token."""
    log_p, log_q = reference.log_softmax(-1), found.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def of_chance(logits: Float[Tensor, "T V"]) -> float:
    """KL of a model that knows nothing, all tokens alike, from one with these logits."""
    log_p = logits.log_softmax(-1)
    return float((log_p.exp() * log_p).sum(-1).mean()) + torch.tensor(float(logits.shape[-1])).log().item()
