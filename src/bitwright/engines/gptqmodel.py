"""GPTQModel: it chooses a backend by shape, bits and groups (docs/formats/gptq.md)."""

from bitwright.core.engine import Engine, Way

ENGINE = Engine(
    name="gptqmodel",
    ways=(
        Way(
            format="gptq",
            symmetric=(2, 3, 4, 8),
            asymmetric=(2, 3, 4, 8),
            groups=(32, 64, 128, 256, 512, 1024),
            channel=True,
            models=None,
            checked="GPTQModel 7.6.0 on a CPU, llama alone: groups of 128 and per channel, one linear left alone, "
            "greedy text and perplexity; groups of 32, 64 and 256 of a small random model; a folder of its own with "
            "bits that differ; 512 and 1024 by its source",
            mixes=True,
        ),
        Way(
            format="awq",
            symmetric=(),
            asymmetric=(4,),
            groups=(32, 64, 128),
            channel=True,
            models=None,
            checked="GPTQModel 7.6.0 on a CPU, llama alone: groups of 64 and 128, per channel, one linear left alone, "
            "greedy text and perplexity; groups of 32 of small random models, of which 24 and 40 outputs fail",
            outputs=16,
            head=16,
        ),
    ),
    note="4 bits per channel need its backend gptq_torch or awq_torch; so do groups of 16, and outputs in awq that are "
    "no multiple of 16, neither of which is asked for",
)
