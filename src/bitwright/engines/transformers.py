"""transformers: it loads compressed-tensors by itself, and the bitwright format after ``import bitwright``.

In compressed-tensors, transformers unpacks all experts of a model with one config group (``get_experts_scheme`` in
``transformers/integrations/compressed_tensors.py``), so they need one scheme.
"""

from bitwright.core.engine import EVERY_BITS, Alike, BenchInput, Engine, Way

_WITH_GPTQMODEL = "with gptqmodel and optimum beside it, which pass over linears left alone"

ENGINE = Engine(
    name="transformers",
    ways=(
        Way(
            format="compressed-tensors",
            symmetric=EVERY_BITS,
            asymmetric=EVERY_BITS,
            groups=None,
            channel=True,
            models=None,
            checked="transformers 5.22.2, compressed-tensors 0.20.0: weights of llama bit for bit at 2 to 8 bits, opt "
            "and experts (tests); greedy text and perplexity of llama at W4A16g128 and W3A16g128; weights of a folder "
            "of llm-compressor in which linears have 4 and 8 bits",
            activations=True,
            cache=True,
            mixes=True,
            experts=Alike.MODEL,
        ),
        Way(
            format="bitwright",
            symmetric=EVERY_BITS,
            asymmetric=EVERY_BITS,
            groups=None,
            channel=True,
            models=None,
            checked="transformers 5.22.2 after import bitwright: the tests, with llama, opt and experts, some "
            "linears left alone; bits that differ were not run",
            activations=True,
            cache=True,
            outliers=True,
            per_input=True,
            mixes=True,
        ),
    ),
    note="what plain transformers cannot load is in format bitwright, which it loads after import bitwright",
    also={
        "dense": "as any folder, in 16 bits",
        "gptq": _WITH_GPTQMODEL,
        "awq": _WITH_GPTQMODEL,
    },
    bench=BenchInput.FOLDER,
)
