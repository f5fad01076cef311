"""The skeleton of a model: it is built without weights, and one block at a time is filled and emptied again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.block import Block, Family, LinearGroup, Outline, Topology

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Skeleton:
    """A transformers model on the meta device, which is filled part by part from a checkpoint.

    ``dtype`` and ``device`` are those of the forward passes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: "PretrainedConfig",
        family: Family,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        from transformers import AutoModelForCausalLM  # takes seconds, so only if a model is built

        self.checkpoint, self.family, self.dtype, self.device = checkpoint, family, dtype, device
        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        self.model.requires_grad_(False)
        self.model.eval()
        self.outline = self._outlined()
        checkpoint.require_complete(self.outline)

    def _outlined(self) -> Outline:
        blocks = self.model.get_submodule(self.family.blocks)
        names = tuple(f"{self.family.blocks}.{name}" for name, _ in blocks.named_children())
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}
        return Outline(self.family, shapes, names, bool(self.model.config.tie_word_embeddings))

    @property
    def block_names(self) -> tuple[str, ...]:
        """The names of the blocks in the model."""
        return self.outline.blocks

    @property
    def tied(self) -> bool:
        """Whether the output layer shares its weight with the embedding."""
        return self.outline.tied

    def meta_block(self, index: int) -> Block:
        """A block without weights: its shapes and topology."""
        name = self.block_names[index]
        return Block(index, name, self.model.get_submodule(name), self.family.topology)

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """A context with a block and its weights, which are freed at the end."""
        block = self.meta_block(index)
        with self.materialised(block.name):
            yield block

    @contextmanager
    def head(self) -> Iterator[Block]:
        """A context with the output layer as a block, which comes after the last one."""
        family = self.family
        with self.materialised(family.final_norm) as norm, self.materialised(family.head) as head:
            topology = Topology((LinearGroup((family.head,), enclosing=family.head),))
            yield Block(len(self.block_names), "", Head(norm, head, family.head), topology)

    @contextmanager
    def materialised(self, name: str) -> Iterator[nn.Module]:
        """A context with a part of the model and its weights in the compute dtype, which are freed at the end."""
        module = self.model.get_submodule(name)
        self.fill(module, {key: self._read(f"{name}.{key}") for key, _ in module.named_parameters()})
        try:
            yield module
        finally:
            module.to("meta")

    def fill(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Give a module these tensors, in the compute dtype, and its computed buffers."""
        for key, tensor in tensors.items():
            owner, _, leaf = key.rpartition(".")
            parameter = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
            setattr(module.get_submodule(owner), leaf, parameter)
        self._compute_buffers(module)

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(self.outline.source(name))

    def _compute_buffers(self, part: nn.Module) -> None:
        """Let transformers compute the buffers that are in no checkpoint (rotary frequencies)."""
        for module in part.modules():
            missing = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
            for name, buffer in missing.items():
                module.register_buffer(name, torch.empty_like(buffer, device=self.device), persistent=False)
            if missing:
                self.model._init_weights(module)


class Recorder(nn.Module):
    """A placeholder for a block; it records its arguments and returns its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}
        # Some models choose a layer's mask by an attribute of the layer.
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Record the hidden states and the other arguments."""
        self.hidden, self.kwargs = hidden, kwargs
        return hidden


class Head(nn.Module):
    """The final norm and the output layer, as one more block."""

    def __init__(self, norm: nn.Module, head: nn.Module, head_name: str) -> None:
        super().__init__()
        self.norm = norm
        self.head_name = head_name
        self.add_module(head_name, head)

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        """The logits [N, T, V] of hidden states [N, T, D]."""
        logits: Tensor = self.get_submodule(self.head_name)(self.norm(hidden))
        return logits
