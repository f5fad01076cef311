"""What is known of decoders like Llama's: held to the parameters and configurations of transformers."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitwright.core.decoder import Decoder, OddConfigError, decoder_of
from bitwright.core.errors import CheckpointError

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {}),
    ("mistral", {"tie_word_embeddings": True, "attention_bias": True}),
    ("qwen2", {"head_dim": None}),
    ("qwen2", {"tie_word_embeddings": True, "attention_bias": False}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("kind", "changes"), MODELS, ids=str)
def test_the_tensors_are_those_of_the_model_that_transformers_builds(kind: str, changes: dict[str, Any]) -> None:
    config = {key: value for key, value in {**SIZES, **changes}.items() if value is not None}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    decoder = decoder_of({"model_type": kind, **config})
    every = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    stored = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert decoder.parameters == every and decoder.tensors == stored
    linears = {name for name, module in model.model.layers[0].named_modules() if isinstance(module, torch.nn.Linear)}
    assert decoder.linears.keys() == linears
    assert {name for name in every if name.endswith(".bias")} <= decoder.biases.keys()
    assert len(decoder.biases) == 2 * len(linears)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("changes", [
    {"rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3}, {"rope_theta": 1e6}, {"sliding_window": 32},
    {"sliding_window": 32, "use_sliding_window": True}, {"sliding_window": None}, {"use_sliding_window": True},
    {"rms_norm_eps": 1e-5}, {"max_position_embeddings": 512}, {"partial_rotary_factor": 0.5},
], ids=str)  # fmt: skip
def test_what_is_said_and_left_out_means_what_it_means_to_transformers(kind: str, changes: dict[str, Any]) -> None:
    left_out = ("head_dim", "num_key_value_heads")
    sizes = {key: value for key, value in SIZES.items() if key not in left_out}
    config = {**sizes, "num_attention_heads": 32, "hidden_size": 256, **changes}
    theirs, decoder = AutoConfig.for_model(kind, **config), decoder_of({"model_type": kind, **config})
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (decoder.kv_heads, decoder.head_dim) == (theirs.num_key_value_heads, width)
    assert decoder.window == getattr(theirs, "sliding_window", None) or kind == "llama"
    assert decoder.context in (None, theirs.max_position_embeddings)
    assert (decoder.epsilon, decoder.activation) == (theirs.rms_norm_eps, theirs.hidden_act)
    rope = theirs.rope_parameters
    assert (decoder.rope.theta, decoder.rope.kind) == (rope["rope_theta"], rope["rope_type"])
    assert decoder.rope.partial == rope.get("partial_rotary_factor", 1.0)
    assert decoder.rope.original_context == rope.get("original_max_position_embeddings")


@pytest.mark.parametrize(("key", "value"), [
    ("hidden_size", None), ("hidden_size", "64"), ("num_hidden_layers", 0), ("num_hidden_layers", True),
    ("num_attention_heads", -4), ("num_key_value_heads", 0), ("head_dim", 1.5), ("vocab_size", [96]),
    ("rope_parameters", 5), ("max_position_embeddings", "long"), ("rms_norm_eps", None), ("sliding_window", "wide"),
])  # fmt: skip
def test_a_number_that_cannot_be_is_named(key: str, value: Any) -> None:
    with pytest.raises(OddConfigError, match=key) as error:
        decoder_of({"model_type": "mistral", **SIZES, key: value})
    assert (error.value.key, error.value.value) == (key, value)


def test_architectures_that_are_no_such_decoder_or_nobody_knows() -> None:
    for kind in ("opt", "gemma3", "discover", None):
        with pytest.raises(CheckpointError, match=f"says model_type '{kind}', whose tensors no file"):
            decoder_of({"model_type": kind, **SIZES})


def test_a_tied_output_layer_is_a_parameter_and_no_tensor() -> None:
    decoder = Decoder.of({**SIZES, "tie_word_embeddings": True})
    assert decoder.parameters.keys() - decoder.tensors.keys() == {"lm_head.weight"}
