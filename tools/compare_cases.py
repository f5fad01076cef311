"""The cases that ``compare_trees.py`` runs with each tree, and the small random models that some of them take."""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"
"""The name of the embedded model here."""
OUTCOME, LEARNED = "outcome.json", "learned.safetensors"
"""Files in the folder of a case: what the call returned, or why it refused; learned parameters that it saved."""


@dataclass(frozen=True)
class Case:
    """One call of ``quantize``, or of ``export`` if it has a ``source``. ``name`` is its folder too.

    ``how`` are keys of a Recipe, or arguments of ``export``. ``source``, ``loads`` and ``base`` name earlier cases:
    whose output is exported, whose learned parameters are loaded, whose file is the base. For each number of ``kills``
    the process is killed at the call of the listener that has this number, and the same call is made again.
    """

    name: str
    model: str = ""
    how: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    loads: str = ""
    base: str = ""
    saves: bool = False
    workers: int | None = None
    kills: tuple[int, ...] = ()
    refused: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of cases that this one needs; they come before it."""
        return tuple(name for name in (self.source, self.loads, self.base) if name)


TEXT: dict[str, Any] = {"calibration": "builtin", "samples": 4, "seqlen": 64}
TRAINED: dict[str, Any] = TEXT | {"epochs": 1}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {}, "easyquant": {}, "equalize+rtn": {}, "equalize+easyquant": {}, "gptq": TEXT, "awq": TEXT,
    "awq+gptq": TEXT, "smoothquant": TEXT, "smoothquant+gptq": TEXT, "osplus": TEXT, "osplus+gptq": TEXT,
    "adadim": TEXT, "adadim+gptq": TEXT, "easyquant-outliers+gptq": TEXT, "lwc": TRAINED, "lwc+gptq": TRAINED,
    "let+lwc": TRAINED | {"sites": "all"}, "let+lwc+gptq": TRAINED | {"sites": "all"}, "omniquant": TRAINED,
    "smoothquant+lwc": TRAINED, "osplus+lwc": TRAINED, "awq+lwc": TRAINED, "adadim+lwc": TRAINED | {"refine": False},
    "easyquant+lwc": TRAINED, "pact": TRAINED, "lsq": TRAINED,
}  # fmt: skip
QUICK: dict[str, Any] = {"refine": False}
REFINED = (("small", "gptq"), ("small", "lwc"), ("small", "let+lwc+gptq"))
"""The trained methods and gptq that refine ranges; the others leave it out, since nothing takes longer."""
FORMATS: dict[str, str] = {
    "default": "W4A16g128", "compressed-tensors": "W2A16g64sym", "bitwright": "W3A16g64", "dense": "W3A16g32",
    "gptq": "W4A16g32", "awq": "W4A16g64", "gguf": "W4A16g32", "mlc": "mlc:q4f16_1",
}  # fmt: skip
"""Formats, each with a scheme that it holds."""
HOLD_ALL = ("default", "bitwright", "dense")
"""Formats that hold outliers, and groups along the output."""
SCHEMES = (
    "W4A16g128", "W4A16g32", "W3A16", "W2A16g64sym", "W5A16sym", "W6A16g64", "W8A16g32", "W3A16g64ic", "W4A16g32icsym",
    "W4A4KV4", "W8A8", "W4A8KV4", "W4A16KV4", "mlc:q4f16_1", "mlc:q3f16_1", "mlc:q2f16_1",
)  # fmt: skip
EXPORTS: dict[str, dict[str, dict[str, Any]]] = {
    "small/rtn/default": {"bitwright": {}, "dense": {}, "gguf": {}, "mlc": {}},
    "settings/rtn_with_text": {"gptq": {}, "awq": {}},
    "small/gptq/gptq": {"compressed-tensors": {}, "bitwright": {}, "dense": {}, "awq": {}, "gguf": {},
                        "mlc": {"lossy": True}},
    "small/awq/awq": {"compressed-tensors": {}, "bitwright": {}, "dense": {}, "gptq": {}, "gguf": {},
                      "mlc": {"lossy": True}},
    "small/lwc/bitwright": {"compressed-tensors": {}, "dense": {}, "gptq": {}, "awq": {"lossy": True}, "gguf": {},
                            "mlc": {}},
    "small/easyquant/bitwright": {"compressed-tensors": {"lossy": True}, "dense": {}, "gptq": {"lossy": True},
                                  "awq": {"lossy": True}, "gguf": {"lossy": True}, "mlc": {"lossy": True}},
    "small/adadim/default": {"dense": {}, "gptq": {"lossy": True}, "gguf": {"lossy": True}, "mlc": {"lossy": True}},
    "small/gptq/compressed-tensors": {"bitwright": {"shard_size": "100KB"}, "dense": {}, "gptq": {}, "gguf": {},
                                      "mlc": {}},
    "llama/gptq/mlc_q3f16_1": {"dense": {}, "gptq": {"lossy": True}, "gguf": {"lossy": True}, "mlc": {}},
    "llama/gptq/mlc_q2f16_1": {"gguf": {"embeddings": "q4_0"}, "mlc": {}},
    "llama/rtn/W3A16g64ic": {"dense": {}, "awq": {"lossy": True}},
    "llama/rtn/W8A16g32": {"gptq": {}, "gguf": {"lossy": True}},
    "llama/rtn/W4A4KV4": {"bitwright": {}},
    "llama/rtn/W4A8KV4": {"bitwright": {}},
    "settings/lm_head/default": {"gptq": {}, "awq": {}, "gguf": {"embeddings": "f16"},
                                 "mlc": {"lossy": True}},
    "settings/tied_head/default": {"gptq": {}, "gguf": {}},
    "embedded/rtn/default": {"gptq": {}, "awq": {}, "gguf": {}, "mlc": {}, "dense": {}, "bitwright": {}},
    "embedded/adadim/default": {"gguf": {"lossy": True}, "gptq": {"lossy": True}},
    "qwen2/rtn/compressed-tensors": {"gguf": {}, "mlc": {"embeddings": "f16"}, "gptq": {}},
    "opt/gptq/default": {"gptq": {}, "awq": {}, "bitwright": {}, "dense": {}},
    "experts/rtn/compressed-tensors": {"bitwright": {}, "dense": {}, "gptq": {}},
}  # fmt: skip
"""Exports: by the case whose output is read, the formats that are written, with arguments."""
W4 = {"scheme": "W4A16g32"}
RTN, GPTQ, LWC = (W4 | {"method": "rtn"}, W4 | TEXT | {"method": "gptq"}, W4 | TRAINED | {"method": "lwc"})
EASYQUANT = W4 | {"method": "easyquant"}
LET = TRAINED | {"scheme": "W4A4", "method": "let+lwc"}
LM_HEAD = {"quantize_lm_head": True}
FEWER = {"exclude": "*.o_proj,*layers.1.mlp.*"}
OTHERS = (
    Case("settings/lm_head/default", "llama", RTN | LM_HEAD),
    Case("settings/lm_head/gptq", "llama", GPTQ | LM_HEAD | {"format": "gptq"}),
    Case("settings/lm_head/gguf", "llama", GPTQ | LM_HEAD | {"format": "gguf"}),
    Case("settings/lm_head/mlc", "llama", GPTQ | LM_HEAD | {"format": "mlc", "scheme": "mlc:q4f16_1"}),
    Case("settings/lm_head/lwc", "llama", LWC | LM_HEAD),
    Case("settings/lm_head/adadim", "llama", TEXT | LM_HEAD | {"scheme": "W4A16g32", "method": "adadim+gptq"}),
    Case("settings/tied_head/default", EMBEDDED, RTN | LM_HEAD),
    Case("settings/tied_head/awq", EMBEDDED, RTN | LM_HEAD | {"format": "awq"}),
    Case("settings/shards/rtn", EMBEDDED, RTN | {"shard_size": "300KB"}),
    Case("settings/shards/gptq", "llama", GPTQ | LM_HEAD | {"shard_size": "60KB"}),
    Case("settings/shards/dense", "llama", RTN | {"shard_size": "60KB", "format": "dense"}),
    Case("settings/include", "llama", RTN | {"include": "*.mlp.*"}),
    Case("settings/exclude", "llama", EASYQUANT | FEWER),
    Case("settings/exclude_gptq", "llama", RTN | FEWER | {"format": "gptq"}),
    Case("settings/exclude_awq", "llama", RTN | FEWER | {"format": "awq"}),
    Case("settings/exclude_gguf", "llama", RTN | FEWER | {"format": "gguf"}),
    Case("settings/rtn_with_text", "llama", RTN | TEXT),
    Case("settings/easyquant_with_text", "llama", EASYQUANT | TEXT),
    Case("settings/outliers", "llama", EASYQUANT | {"outliers": "0.5%"}),
    Case("settings/axis_auto", "llama", EASYQUANT | {"axis": "auto", "outliers": "0"}),
    Case("settings/axis_ic", "llama", EASYQUANT | {"axis": "ic"}),
    Case("settings/range_paper", "llama", EASYQUANT | {"range": "paper", "scheme": "W4A16g32sym"}),
    Case("settings/norm", "llama", EASYQUANT | {"norm": 2.4}),
    Case("settings/alignment", "llama", EASYQUANT | {"alignment": 0}),
    Case("settings/adadim_ic", "llama", W4 | TEXT | {"method": "adadim", "axis": "ic"}),
    Case("settings/adadim_refined", "small", LWC | {"method": "adadim+lwc"}),
    Case("settings/gptq", "llama", GPTQ | {"act_order": False, "damping": 0.05, "refine": False, "drift": False}),
    Case("settings/seed", "llama", GPTQ | {"seed": 3}),
    Case("settings/alpha", "llama", W4 | TEXT | {"method": "smoothquant", "alpha": 0.7, "sites": "all"}),
    Case("settings/osplus_sites", "llama", W4 | TEXT | {"method": "osplus", "sites": "all"}),
    Case("settings/paper", "llama", LWC | {"training": "paper", "scheme": "W2A16g32"}),
    Case("settings/training", "llama", LWC | {"batch_size": 2, "lwc_lr": 0.02, "aug_loss": True, "epochs": 2}),
    Case("settings/constant", "llama", LWC | {"schedule": "constant", "refine": False, "drift": False}),
    Case("settings/precision", "llama", LWC | {"precision": "float32"}),
    Case("settings/bfloat16", "llama", LWC | {"precision": "bfloat16"}),
    Case("settings/no_epochs", "llama", LWC | {"epochs": 0}),
    Case("settings/let_lr", "llama", LET | {"let_lr": 0.01, "alpha": 0.6}),
    Case("settings/queries", "llama", LET | {"scheme": "W4A8KV4", "format": "bitwright"}),
    Case("settings/no_method", "llama", W4),
    Case("settings/no_method_with_text", "llama", W4 | TRAINED),
    Case("settings/engine", "llama", RTN | {"engines": "llama.cpp"}),
    Case("settings/engine_with_channels", "llama", RTN | {"engines": "transformers", "scheme": "W4A16"}),
    Case("settings/embeddings_f16", "llama", RTN | {"format": "gguf", "embeddings": "f16"}),
    Case("settings/embeddings_q4_0", "llama", RTN | {"format": "gguf", "embeddings": "q4_0"}),
    Case("settings/mlc_f16", "llama", RTN | {"format": "mlc", "scheme": "mlc:q4f16_1", "embeddings": "f16"}),
    Case("settings/mlc_awq", "llama", GPTQ | {"format": "mlc", "scheme": "W4A16g128"}),
    Case("settings/mlc_three_bits", "llama", GPTQ | {"format": "mlc", "scheme": "mlc:q3f16_1"}),
    Case("settings/base", "llama", RTN | {"format": "gguf"}, base="settings/embeddings_f16"),
    Case("saved/let", "llama", LET, saves=True),
    Case("saved/lwc", "llama", LWC, saves=True),
    Case("saved/opt", "opt", LWC | {"method": "let+lwc"}, saves=True),
    Case("loaded/let", "llama", LET, loads="saved/let"),
    Case("loaded/lwc", "llama", LWC, loads="saved/lwc"),
    Case("loaded/lwc_as_dense", "llama", LWC | {"format": "dense"}, loads="saved/lwc"),
    Case("loaded/opt", "opt", LWC | {"method": "let+lwc"}, loads="saved/opt"),
    Case("opt/rtn/default", "opt", RTN),
    Case("opt/easyquant/default", "opt", EASYQUANT),
    Case("opt/gptq/default", "opt", GPTQ),
    Case("opt/awq/default", "opt", W4 | TEXT | {"method": "awq"}),
    Case("opt/omniquant/W2A16g32", "opt", LWC | {"method": "omniquant", "scheme": "W2A16g32"}),
    Case("opt/omniquant/W4A4", "opt", LET | {"method": "omniquant"}),
    Case("opt/smoothquant/W8A8", "opt", TEXT | {"scheme": "W8A8", "method": "smoothquant"}),
    Case("opt/osplus/W6A6", "opt", TEXT | {"scheme": "W6A6", "method": "osplus+lwc", "epochs": 1}),
    Case("opt/equalize/default", "opt", W4 | {"method": "equalize+rtn"}),
    Case("opt/adadim/default", "opt", W4 | TEXT | {"method": "adadim+gptq"}),
    Case("qwen2/rtn/gguf", "qwen2", RTN | {"format": "gguf"}),
    Case("qwen2/rtn/mlc", "qwen2", RTN | {"format": "mlc", "scheme": "mlc:q4f16_1"}),
    Case("qwen2/easyquant/default", "qwen2", EASYQUANT),
    Case("qwen2/rtn/compressed-tensors", "qwen2", RTN | {"scheme": "W4A16g32sym"}),
    Case("experts/rtn/compressed-tensors", "experts", RTN | {"scheme": "W4A16g32sym"}),
    Case("experts/rtn/default", "experts", RTN),
    Case("experts/rtn/gptq", "experts", RTN | {"format": "gptq"}),
    Case("experts/easyquant/bitwright", "experts", EASYQUANT | {"format": "bitwright"}),
    Case("experts/rtn/dense", "experts", RTN | {"format": "dense"}),
    Case("fused/rtn/default", "fused", RTN),
    Case("fused/rtn/W3A16g32ic", "fused", RTN | {"scheme": "W3A16g32ic"}),
    Case("fused/rtn/mlc_q4f16_1", "fused", RTN | {"scheme": "mlc:q4f16_1"}),
    Case("fused/easyquant/bitwright", "fused", EASYQUANT | {"axis": "auto"}),
    Case("fused/rtn/dense", "fused", RTN | {"format": "dense"}),
    Case("workers/rtn/default", EMBEDDED, RTN, workers=2),
    Case("workers/easyquant/bitwright", EMBEDDED, EASYQUANT | {"format": "bitwright"}, workers=2),
    Case("workers/rtn/gguf", EMBEDDED, RTN | {"format": "gguf"}, workers=2),
    Case("workers/fused", "fused", EASYQUANT, workers=2),
    Case("killed/gptq", "llama", GPTQ | LM_HEAD, kills=(24,)),
    Case("killed/learned", "llama", LET, kills=(30, 24)),
    Case("killed/adadim", EMBEDDED, TEXT | {"scheme": "W4A16g128", "method": "adadim"}, kills=(41,)),
    Case("killed/rtn", "llama", RTN | {"shard_size": "60KB"}, kills=(17, 2)),
    Case("killed/easyquant", EMBEDDED, EASYQUANT, kills=(20,)),
    Case("killed/workers", EMBEDDED, RTN, workers=2, kills=(30,)),
    Case("killed/gguf", "llama", RTN | {"format": "gguf"}, kills=(30,)),
    Case("killed/export_gptq", how={"format": "gptq"}, source="settings/rtn_with_text", kills=(3,)),
    Case("killed/export_gguf", how={"format": "gguf"}, source="settings/rtn_with_text", kills=(9,)),
    Case("export/unquantized/gguf", how={"format": "gguf"}, source="settings/shards/dense"),
    Case("export/with_base", how={"format": "gguf"}, source="settings/rtn_with_text", base="settings/embeddings_f16"),
)
REFUSED = (
    Case("refused/no_scheme", "llama", {"scheme": "W4B16"}),
    Case("refused/bits", "llama", {"scheme": "W9A16g128"}),
    Case("refused/group", "llama", {"scheme": "W4A16g96"}),
    Case("refused/no_method", "llama", W4 | {"method": "gptk"}),
    Case("refused/order", "llama", W4 | TEXT | {"method": "gptq+lwc"}),
    Case("refused/two_writers", "llama", W4 | TEXT | {"method": "awq+pact"}),
    Case("refused/no_text", "llama", W4 | {"method": "gptq"}),
    Case("refused/no_format", "llama", RTN | {"format": "ggml"}),
    Case("refused/idle_setting", "llama", RTN | {"damping": 0.1}),
    Case("refused/range", "llama", EASYQUANT | {"range": "paper"}),
    Case("refused/key", "llama", RTN | {"samples": "many"}),
    Case("refused/shard_size", "llama", RTN | {"shard_size": "some"}),
    Case("refused/awq_bits", "llama", RTN | {"scheme": "W3A16g32", "format": "awq"}),
    Case("refused/gptq_outliers", "llama", EASYQUANT | {"format": "gptq"}),
    Case("refused/ic_in_compressed_tensors", "llama", RTN | {"scheme": "W4A16g32ic", "format": "compressed-tensors"}),
    Case("refused/gguf_group", "llama", RTN | {"scheme": "W4A16g16", "format": "gguf"}),
    Case("refused/gguf_activations", "llama", RTN | {"scheme": "W4A4", "format": "gguf"}),
    Case("refused/mlc_group", "llama", RTN | {"format": "mlc"}),
    Case("refused/fixed_axis", "llama", TEXT | {"scheme": "mlc:q4f16_1", "method": "adadim"}),
    Case("refused/engine", "llama", RTN | {"engines": "llama.cpp", "scheme": "W4A16g16"}),
    Case("refused/engines_format", "llama", RTN | {"engines": "vllm", "format": "gguf"}),
    Case("refused/no_engine", "llama", RTN | {"engines": "lama.cpp"}),
    Case("refused/two_engines", "llama", RTN | {"engines": "llama.cpp,mlc"}),
    Case("refused/workers", "llama", GPTQ, workers=2),
    Case("refused/include", "llama", RTN | {"include": "*.nothing"}),
    Case("refused/no_model", "nowhere", RTN),
    Case("refused/unknown_blocks", "fused", GPTQ),
    Case("refused/fused_in_gptq", "fused", RTN | {"format": "gptq"}),
    Case("refused/parameters", "llama", LWC | {"scheme": "W3A16g32"}, loads="saved/lwc"),
    Case("refused/export_outliers", how={"format": "gptq"}, source="small/easyquant/bitwright"),
    Case("refused/export_bits", how={"format": "awq"}, source="llama/rtn/W8A16g32"),
    Case("refused/export_same", how={"format": "gptq"}, source="small/gptq/gptq"),
    Case("refused/export_activations", how={"format": "gguf"}, source="llama/rtn/W4A4KV4"),
    Case("refused/export_fused", how={"format": "dense"}, source="fused/rtn/default"),
    Case("refused/export_idle", how={"format": "gptq", "embeddings": "f16"}, source="small/rtn/default"),
)


def cases(models: Sequence[str]) -> list[Case]:
    """List all cases. ``models`` are the larger ones: each takes every method twice, and every format."""
    listed = [_case("small", method, format, format != "default") for method in METHODS for format in FORMATS]
    for scheme in SCHEMES:
        for method in ("rtn", "gptq") if "A16" in scheme or "mlc" in scheme else ("rtn", "smoothquant", "omniquant"):
            listed.append(_with_scheme("llama", method, scheme))
    for model in models:
        for at, method in enumerate(METHODS):
            listed += [_case(model, method, format, quick=True) for format in ("default", list(FORMATS)[1 + at % 7])]
        listed += [_case(model, "rtn", format) for format in FORMATS]
        listed += [_with_scheme(model, "rtn", scheme) for scheme in (*SCHEMES, "W3A16g128ic")]
    listed += OTHERS
    for source, formats in EXPORTS.items():
        listed += [Case(f"export/{source}/{format}", how=how | {"format": format}, source=source)
                  for format, how in formats.items()]  # fmt: skip
    listed += [replace(case, refused=True) for case in REFUSED]
    return list({case.name: case for case in listed}.values())


def _case(model: str, method: str, format: str, quick: bool = False) -> Case:
    """Make the case of a method and a format; the method decides only what the format holds."""
    how = METHODS[method] | {"scheme": FORMATS[format], "method": method}
    if quick and ("lwc" in method or "gptq" in method) and (model, method) not in REFINED:
        how |= QUICK
    if format != "default":
        how["format"] = format
    if format not in HOLD_ALL and "easyquant" in method:
        how["outliers"] = "0"
    if format not in HOLD_ALL and "adadim" in method:
        how |= {"axis": "oc"} | ({"scheme": "W4A16g128"} if format == "mlc" else {})
    return Case(f"{model}/{method}/{format}", model, how)


def _with_scheme(model: str, method: str, scheme: str) -> Case:
    """Make the case of a method and a scheme; the recipe names no format."""
    how = METHODS[method] | {"scheme": scheme, "method": method}
    return Case(f"{model}/{method}/{scheme.replace(':', '_')}", model, how)


SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "bfloat16", {}),
    "small": ("Llama", "bfloat16", {"num_hidden_layers": 1}),
    "qwen2": ("Qwen2", "float16", {"num_hidden_layers": 1}),
    "opt": ("OPT", "bfloat16", {"ffn_dim": 256, "word_embed_proj_dim": 128, "pad_token_id": 1}),
    "experts": ("Qwen3Moe", "bfloat16", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "fused": ("GptOss", "float32", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
}
"""Random models by name: their class in transformers, their dtype, and what is not as in SIZES."""


def make_models(folder: Path, wanted: Collection[str]) -> Iterator[str]:
    """Make the wanted models that are not there yet; yield their names."""
    for name, (kind, dtype, changes) in MODELS.items():
        if name in wanted and not (folder / name).exists():
            shutil.rmtree(folder / f"{name}.new", ignore_errors=True)
            _make(folder / f"{name}.new", kind, dtype, SIZES | changes)
            (folder / f"{name}.new").rename(folder / name)
            yield name


def _make(folder: Path, kind: str, dtype: str, sizes: dict[str, Any]) -> None:
    """Write a random model in several shards, with a few input channels larger than the others."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(2024)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * drawn if "norm" in name and "bias" not in name else 0.3 * drawn)
            else:
                drawn *= 0.5 if "embed" in name else 1.2 / parameter.shape[-1] ** 0.5
                drawn[..., 5::48] *= 1 if "embed" in name else 6
                parameter.copy_(drawn)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="200KB")
    _save_tokenizer(folder)


def _save_tokenizer(folder: Path) -> None:
    """Save a tokenizer with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
