"""llama.cpp, and programs that use it: they run GGUF files, in which each tensor has its own type."""

from bitwright.core.engine import EVERY_BITS, BenchInput, Engine, Way

ENGINE = Engine(
    name="llama.cpp",
    ways=(
        Way(
            format="gguf",
            symmetric=EVERY_BITS,
            asymmetric=EVERY_BITS[:-1],
            groups=None,
            channel=True,
            models=("llama", "mistral", "qwen2", "qwen3"),
            checked="xllamacpp 2026.10.11549: 2, 3, 4, 5 and 8 bits of llama, greedy text and perplexity; logits of "
            "the others in F16; every tensor names its own type, two types of linears in one file were not run",
            multiples=(32,),
            mixes=True,
        ),
    ),
    note="2 and 3 bits take the room of 4, 5 to 7 that of 8",
    bench=BenchInput.GGUF,
)
