"""MLC-LLM: its model library is compiled for one preset, so all linears have that preset."""

from bitwright.core.engine import Engine, Way

_MODELS = ("llama", "mistral", "qwen2", "qwen3")
_CHECKED = "mlc-llm's model (79d603f) in TVM 0.26.0's virtual machine on a CPU: greedy text and perplexity of "

ENGINE = Engine(
    name="mlc",
    ways=(
        Way(
            format="mlc",
            symmetric=(4,),
            asymmetric=(3,),
            groups=None,
            channel=True,
            models=_MODELS,
            checked=_CHECKED + "mlc:q4f16_1 with llama; random small models of the others",
            multiples=(32,),
            joins=True,
            leaves=False,
        ),
        Way(
            format="mlc",
            symmetric=(2, 3),
            asymmetric=(2,),
            groups=None,
            channel=True,
            models=_MODELS,
            checked=_CHECKED + "mlc:q3f16_1 and mlc:q2f16_1 with llama",
            multiples=(32, 40),
            joins=True,
            leaves=False,
        ),
        Way(
            format="mlc",
            symmetric=(),
            asymmetric=(4,),
            groups=None,
            channel=False,
            models=("llama",),
            checked=_CHECKED + "q4f16_autoawq at W4A16g128 with llama",
            multiples=(128,),
            joins=True,
            leaves=False,
        ),
    ),
    note="mlc:q4f16_1, mlc:q3f16_1 and mlc:q2f16_1 are its own; zero points at 4 bits are its q4f16_autoawq; its "
    "engine, phones and GPUs were not tried",
    also={"dense": "after mlc_llm convert_weight, which rounds it once more"},
)
