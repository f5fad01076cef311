"""Put packed linears into a transformers model, and check them against the folder, which is not trusted."""

from collections.abc import Iterator, Mapping

from torch import nn

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, SchemeError
from bitwright.core.grid import Grid
from bitwright.formats.bitwright.config import Config, Integers
from bitwright.kernels.reference import PackedLinear
from bitwright.plugin.stored import AGAIN, check_kind, check_numbers, check_tile
from bitwright.steps.activations import quantize_attention


def linears_of(model: nn.Module) -> list[str]:
    """The names of a model's linears that are not packed, in its order.

    A linear with a forward pass of its own, such as the router of Llama 4, does not count: a packed linear could not
    replace it.
    """
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name, module in modules if type(module).forward is nn.Linear.forward]


def pack_linears(model: nn.Module, config: Config, names: Mapping[str, str]) -> dict[str, PackedLinear]:
    """Replace linears by empty packed ones; ``names`` maps names in the model to names in the folder.

    Returns the packed linears by their names in the model. Raises CheckpointError if config and model do not fit.
    """
    packed = {}
    for name, in_folder in names.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        packed[name] = _packed(in_folder, linear, config)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed[name])
    return packed


def _packed(name: str, linear: nn.Linear, config: Config) -> PackedLinear:
    shape, outliers = (linear.out_features, linear.in_features), config.outliers(name)
    if outliers > shape[0] * shape[1]:
        raise CheckpointError(f"the quantization_config says {outliers} outliers of {name} {list(shape)}; {AGAIN}")
    try:
        with linear.weight.device:
            return PackedLinear(
                shape,
                config.grid(name),
                config.tile(name),
                config.dtype,
                outliers=outliers,
                bias=linear.bias,
                activations=_grid(config.activations),
            )
    except SchemeError as error:
        raise CheckpointError(f"the tile that the quantization_config says of {name}: {error}; {AGAIN}") from None


def check_headers(packed: Mapping[str, PackedLinear], names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, before any tensor is loaded, if a folder's tensors do not match its config.

    Transformers itself would accept a tensor of another shape, and initialize a missing one at random.
    """
    for name, linear in packed.items():
        for leaf, buffer in linear.named_buffers():
            check_kind(checkpoint, f"{names[name]}.{leaf}", (buffer.dtype, tuple(buffer.shape)))


def check_values(model: nn.Module) -> None:
    """Raise CheckpointError for loaded values that no writer writes.

    These are shapes that contradict the config, scales that are not finite, and outliers outside the weight or out of
    order.
    """
    for name, linear in _linears(model):
        shape = [linear.out_features, linear.in_features]
        if linear.weight_shape.tolist() != shape:
            raise CheckpointError(f"{name}.weight_shape says {linear.weight_shape.tolist()}, not {shape}; {AGAIN}")
        check_tile(name, linear.weight_tile, linear.tile.size((linear.out_features, linear.in_features)))
        check_numbers(name, linear.weight_scale, linear.outlier_index, linear.outlier_value, shape[0] * shape[1])


def quantize_attention_of(model: nn.Module, config: Config) -> None:
    """Quantize queries, keys and values as the config says."""
    quantize_attention(model, _grid(config.queries), _grid(config.keys_values))


def _linears(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear))


def _grid(integers: Integers | None) -> Grid | None:
    return None if integers is None else integers.grid
