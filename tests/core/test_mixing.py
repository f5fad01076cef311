"""What engines may mix in one model: the first two linears in the way are named, and what is advised helps."""

import re
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest

from bitwright.core.engine import EVERY_BITS, Alike, Way, Workload
from bitwright.core.mixing import Schemes
from bitwright.core.scheme import Scheme

FREE = Way("bitwright", EVERY_BITS, EVERY_BITS, None, True, None, "1.0.0: a test", mixes=True)
JOINS = replace(FREE, joins=True)
LAYERS, MODEL = replace(FREE, experts=Alike.LAYER), replace(FREE, experts=Alike.MODEL)
ONE, WHOLE = replace(FREE, mixes=False), replace(FREE, mixes=False, leaves=False)
W3, W8 = Scheme.parse("W3A16g128"), Scheme.parse("W8A16g128")
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
LINEARS = [*ATTENTION, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
EXPERTS = [f"mlp.experts.{e}.{name}_proj" for e in range(2) for name in ("gate", "down")]


def model(linears: list[str], others: dict[str, Scheme | None] | None = None) -> dict[str, Scheme | None]:
    """Two layers of these linears at W3, the output layer left alone; ``others`` is what differs: ``0.mlp.up_proj``."""
    schemes: dict[str, Scheme | None] = {f"model.layers.{n}.{linear}": W3 for n in range(2) for linear in linears}
    return schemes | {"lm_head": None} | {f"model.layers.{name}": scheme for name, scheme in (others or {}).items()}


def advised(message: str, schemes: Schemes) -> dict[str, Scheme | None]:
    """The schemes after every ``--scheme-for`` of a message, or, if it has none, after its ``--exclude``."""
    pairs = re.findall(r"--scheme-for '(\S+)=(\S+)'", message)
    new: list[tuple[str, Scheme | None]] = [(pattern, Scheme.parse(text)) for pattern, text in pairs]
    if not new:
        new = [(pattern, None) for pattern in re.findall(r"--exclude '(\S+)'", message)[0].split(",")]
    return {
        name: next((given for pattern, given in new if fnmatchcase(name, pattern)), scheme)
        for name, scheme in schemes.items()
    }


def test_one_scheme_and_an_output_layer_left_alone_are_no_mix() -> None:
    for way in (FREE, JOINS, LAYERS, MODEL, ONE, WHOLE):
        assert way.refuses_mix(model([*LINEARS, *EXPERTS])) is None


def test_an_engine_that_mixes_freely() -> None:
    assert FREE.refuses_mix(model([*LINEARS, *EXPERTS], {"0.self_attn.k_proj": W8, "1.mlp.up_proj": None})) is None


@pytest.mark.parametrize(("others", "says"), [
    ({"0.self_attn.q_proj": W8},
     r"^model\.layers\.0\.self_attn\.q_proj at W8A16g128 beside k_proj at W3A16g128, which it joins: give them one "
     r"scheme, --scheme-for 'model\.layers\.0\.self_attn\.k_proj=W8A16g128' "
     r"--scheme-for 'model\.layers\.0\.self_attn\.v_proj=W8A16g128'$"),
    ({"0.self_attn.q_proj": W8, "1.self_attn.q_proj": W8}, r"--scheme-for 'model\.layers\.\*\.self_attn\.k_proj=W8"),
    ({"0.self_attn.q_proj": W8, "1.self_attn.v_proj": W8}, r"--scheme-for 'model\.layers\.0\.self_attn\.k_proj=W8"),
    ({"1.mlp.up_proj": W8}, r"1\.mlp\.gate_proj at W3A16g128 beside up_proj at W8A16g128, which it joins"),
    ({"1.mlp.up_proj": None}, r"1\.mlp\.gate_proj at W3A16g128 beside up_proj in full precision, which it joins: leave "
     r"all of them in full precision, --exclude 'model\.layers\.1\.mlp\.gate_proj', or none$"),
])  # fmt: skip
def test_linears_that_are_joined(others: dict[str, Scheme | None], says: str) -> None:
    schemes = model(LINEARS, others)
    message = JOINS.refuses_mix(schemes)
    assert message is not None and re.search(says, message), message
    again = JOINS.refuses_mix(advised(message, schemes))
    assert again is None or ("1.self_attn.v_proj" in others and again.startswith("model.layers.1.self_attn")), again


def test_linears_beside_those_that_are_joined() -> None:
    assert JOINS.refuses_mix(model(LINEARS, {"0.self_attn.o_proj": W8, "0.mlp.down_proj": None})) is None
    assert JOINS.refuses_mix(model(LINEARS, {f"0.self_attn.{name}_proj": W8 for name in "qkv"})) is None


def test_experts() -> None:
    schemes = model([*ATTENTION, *EXPERTS], {"1.mlp.experts.1.down_proj": W8})
    message = LAYERS.refuses_mix(schemes)
    assert message == (
        "model.layers.1.mlp.experts.0.gate_proj at W3A16g128 beside model.layers.1.mlp.experts.1.down_proj at "
        "W8A16g128: all experts of a layer need one scheme, --scheme-for 'model.layers.1.mlp.experts.*=W8A16g128', or "
        "none, --exclude 'model.layers.1.mlp.experts.*'"
    )
    layer_at_8_bits = advised(message, schemes)
    assert LAYERS.refuses_mix(layer_at_8_bits) is None
    message = MODEL.refuses_mix(layer_at_8_bits)
    assert message is not None and "all experts of the model need one scheme, --scheme-for '*.experts.*=W8" in message
    assert MODEL.refuses_mix(advised(message, layer_at_8_bits)) is None


def test_linears_beside_experts() -> None:
    schemes = model([*LINEARS, *EXPERTS], {"0.self_attn.q_proj": W8, "1.mlp.shared_experts.up_proj": W8})
    assert LAYERS.refuses_mix(schemes) is None and MODEL.refuses_mix(schemes) is None


def test_one_scheme_for_all() -> None:
    assert ONE.refuses_mix(model(LINEARS, {"1.mlp.down_proj": W8})) == (
        "model.layers.0.self_attn.q_proj at W3A16g128 beside model.layers.1.mlp.down_proj at W8A16g128: all linears "
        "need one scheme there, without --scheme-for and --allocation"
    )
    assert ONE.refuses_mix(model(LINEARS) | {"lm_head": W8}), "an output layer has the one scheme too"
    assert ONE.refuses_mix(model(LINEARS, {"1.mlp.down_proj": None})) is None


def test_no_linear_left_alone() -> None:
    assert WHOLE.refuses_mix(model(LINEARS, {"1.mlp.down_proj": None})) == (
        "model.layers.1.mlp.down_proj in full precision beside quantized linears: quantize all of them, leave "
        "--exclude out"
    )


def test_a_workload_of_several_schemes() -> None:
    workload = Workload(W3, "llama", True, exceptions={"a": W8, "b": None, "c": W3, "d": W8})
    assert workload.uniform() == [Workload(W3, "llama", True), Workload(W8, "llama", True)]
