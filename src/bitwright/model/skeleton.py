"""The skeleton of a model: it is built without weights, and one block at a time is filled and emptied again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bitwright.checkpoint.reader import Checkpoint
from bitwright.model.sources import Sources
from bitwright.model.view import class_of
from bitwright.model.walk import Stops, Walk

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


MATRIX = 2
"""The least number of dimensions of a weight that multiplies."""


class Skeleton:
    """A transformers model on the meta device, which is filled part by part from a checkpoint.

    ``dtype`` and ``device`` are those of the blocks' forward passes; everything else of the model runs on the CPU.
    ``parts`` are the modules that may be blocks, by their paths: the elements of the outermost lists of modules.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: "PretrainedConfig", dtype: torch.dtype, device: torch.device
    ) -> None:
        """Build the model. Raises whatever transformers raises for a config that it cannot build."""
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        with torch.device("meta"):
            self.model: PreTrainedModel = class_of(config)._from_config(config, dtype=dtype)
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")  # one expert after the other, each a product of its own
        self.model.requires_grad_(False)
        self.model.eval()
        self._compute_buffers()
        self.sources = Sources(checkpoint, self.model)
        self.parts = dict(_parts(self.model))
        head = self.model.get_output_embeddings()
        self.head = next((name for name, module in self.model.named_modules() if module is head), None)
        Stops(self.parts | ({} if head is None or self.head is None else {self.head: head}))

    @contextmanager
    def filled(self, path: str, *, random: bool = False) -> Iterator[nn.Module]:
        """A context with a part of the model and its weights in the compute dtype, which are freed at the end.

        With ``random``, the weights are those of a new model, and nothing is read.
        """
        module = self.model.get_submodule(path)
        if random:
            self._randomize(module, path, self.device, recurse=True)
        else:
            self._fill(module, path, self.device, recurse=True)
        try:
            yield module
        finally:
            _empty(module)

    @contextmanager
    def walk(self, tokens: Int[Tensor, "N T"], *, random: bool = False) -> Iterator[Walk]:
        """A context with segments in front of the first block; the rest of the model is filled as it is used.

        With ``random``, its weights are random too.
        """
        hooks, used = [], dict[str, nn.Module]()
        inside, embedding = tuple(f"{path}." for path in self.parts), self.model.get_input_embeddings()
        for path, module in self.model.named_modules():
            if module is embedding:  # models ask for its device before they call it
                self._filler(path, used, random)(module, ())
            if path not in self.parts and not path.startswith(inside) and path != self.head:
                hooks.append(module.register_forward_pre_hook(self._filler(path, used, random), prepend=True))
        try:
            walk = Walk(self.model, tokens)
            try:
                yield walk
            finally:
                walk.close()
        finally:
            for hook in hooks:
                hook.remove()
            for module in used.values():
                _empty(module)

    def _filler(self, path: str, used: dict[str, nn.Module], random: bool) -> Callable[[nn.Module, object], None]:
        def fill(module: nn.Module, _: object) -> None:
            if path not in used:
                used[path] = module
                if random:
                    self._randomize(module, path, torch.device("cpu"), recurse=False)
                else:
                    self._fill(module, path, torch.device("cpu"), recurse=False)

        return fill

    def _fill(self, part: nn.Module, path: str, device: torch.device, *, recurse: bool) -> None:
        """Give a module its parameters, and the buffers that the checkpoint has."""
        prefix = f"{path}." if path else ""
        names = [name for name, _ in part.named_parameters(recurse=recurse, remove_duplicate=False)]
        buffers = dict(part.named_buffers(recurse=recurse, remove_duplicate=False))
        stored = [name for name in buffers if f"{prefix}{name}" in self.sources.conversions]
        read = self.sources.read_all(f"{prefix}{name}" for name in (*names, *stored))
        for name in names:
            tensor = read[f"{prefix}{name}"]
            _set(part, name, nn.Parameter(tensor.to(device, self._dtype(tensor)), requires_grad=False))
        for name, buffer in buffers.items():
            value = buffer if name not in stored else read[f"{prefix}{name}"].to(buffer.dtype).reshape(buffer.shape)
            _set(part, name, value.to(device))

    @torch.no_grad()
    def _randomize(self, part: nn.Module, path: str, device: torch.device, *, recurse: bool) -> None:
        """Give a module the weights of a new model, all a little apart from zeros and ones."""
        for name, parameter in list(part.named_parameters(recurse=recurse, remove_duplicate=False)):
            dtype = self.dtype if parameter.is_floating_point() else parameter.dtype
            _set(part, name, nn.Parameter(torch.zeros_like(parameter, device=device, dtype=dtype), requires_grad=False))
        initialize = self._initializer(path)
        if recurse:
            _initialize(part, initialize)
        else:
            initialize(part)
        for parameter in part.parameters(recurse=recurse):
            if parameter.is_floating_point():
                size = 0.1 if parameter.dim() < MATRIX else parameter.shape[-1] ** -0.5
                parameter.add_(torch.randn_like(parameter), alpha=size)
        for name, buffer in list(part.named_buffers(recurse=recurse)):
            _set(part, name, buffer.to(device))

    def _initializer(self, path: str) -> Callable[[nn.Module], None]:
        """The function that initializes a module: that of the innermost model that it belongs to."""
        owner: nn.Module = self.model
        for outer in accumulate(path.split("."), "{}.{}".format) if path else ():
            module = self.model.get_submodule(outer)
            owner = module if hasattr(module, "_init_weights") else owner
        initialize: Callable[[nn.Module], None] = getattr(owner, "_init_weights")  # noqa: B009
        return initialize

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    def _compute_buffers(self) -> None:
        """Let transformers compute the buffers that are in no checkpoint (rotary frequencies), on the CPU."""
        for module in self.model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                kept = key not in module._non_persistent_buffers_set
                module.register_buffer(key, torch.zeros_like(buffer, device="cpu"), persistent=kept)
        _initialize(self.model, self.model._init_weights)


def _initialize(module: nn.Module, initialize: Callable[[nn.Module], None]) -> None:
    """Initialize a module after its children, each by the model that it belongs to. Nothing happens on meta."""
    for child in module.children():
        _initialize(child, getattr(child, "_init_weights", initialize))
    initialize(module)


def _set(part: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = part.get_submodule(owner)
    if isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor


def _empty(part: nn.Module) -> None:
    """Free the weights of a part; its buffers stay."""
    for name, parameter in list(part.named_parameters(remove_duplicate=False)):
        _set(part, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The elements of the outermost lists of modules that have matrices inside."""
    lists: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
            elements = dict(module.named_children())
            if all(next(element.children(), None) is not None for element in elements.values()) and elements:
                lists.append(path)
                yield from ((f"{path}.{name}", element) for name, element in elements.items())
