"""Run every method on small models of many architectures; load what was written, and compare it.

    python benchmarks/zoo.py .zoo                  # every model folder in .zoo
    python benchmarks/zoo.py .zoo --only qwen3 --only gpt_oss

The models are tiny, with random weights, so the KL divergence says only that nothing is broken: Bitwright has no list
of architectures, and this is how it shows. A cell is the KL divergence from the original on random tokens, measured on
the folder as transformers loads it. ``verify`` has to say yes, and the model has to generate. What is refused before
the work says why below the table. Finished rows
are kept in benchmarks/results/zoo.jsonl; zoo.md is made anew.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rows import Kept, Row, measured_on
from transformers.utils import logging

import bitwright
from bitwright.core.errors import UserError
from bitwright.model.config import read_config
from bitwright.model.view import class_of

SAMPLES, SEQLEN, WINDOWS, TOKENS, NEW, SEED = 8, 64, 4, 32, 4, 2026
METHODS: dict[str, Row] = {
    "rtn": {"method": "rtn", "scheme": "W4A16g32"},
    "easyquant": {"method": "easyquant", "scheme": "W4A16g32"},
    "gptq": {"method": "gptq", "scheme": "W4A16g32"},
    "awq": {"method": "awq", "scheme": "W4A16g32"},
    "adadim+gptq": {"method": "adadim+gptq", "scheme": "W4A16g32"},
    "lwc": {"method": "lwc", "scheme": "W4A16g32", "epochs": 1},
    "lwc+gptq": {"method": "lwc+gptq", "scheme": "W4A16g32", "epochs": 1},
    "omniquant": {"method": "omniquant", "scheme": "W4A16g32", "epochs": 1},
    "W8A8": {"method": "rtn", "scheme": "W8A8"},
}
WITHOUT_DATA = ("rtn", "easyquant")
NOT_IN_BLOCKS = ("outside of the blocks", "of vision or audio")
COLUMNS = ("architecture", "in the blocks", "sites", *METHODS)


def main(
    folder: Annotated[Path, typer.Argument(help="The folder with a model in each folder of it.")],
    only: Annotated[list[str] | None, typer.Option(help="A model; repeatable.")] = None,
    name: str = "zoo",
) -> None:
    """Measure the rows that are missing and write the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kept = Kept(name, {"samples": SAMPLES, "seqlen": SEQLEN, "tokens": TOKENS, "windows": WINDOWS, "seed": SEED})
    models = [path for path in sorted(folder.iterdir()) if (path / "config.json").is_file()]
    rows: dict[str, list[Row]] = {}
    for model in models:
        if not only or model.name in only:
            rows[model.name] = [kept.row({"model": model.name, "what": "inside"}, partial(_inside, model))]
            for method in METHODS:
                measured = kept.row({"model": model.name, "what": method}, partial(_measured, model, method))
                rows[model.name].append(measured)
    every = [row for own in rows.values() for row in own]
    refused = sorted({f"{row['model']}, {row['what']}: {row['refused']}" for row in every if row.get("refused")})
    kept.write_table(
        "Every method on every architecture",
        f"Models of random weights, two to four blocks wide 128, as transformers makes them; {SAMPLES} calibration "
        f"segments of {SEQLEN} tokens. Beside the share of the matrices inside blocks that is quantized stand the "
        "kinds of sites that were found and proven by arithmetic; then for each method the KL divergence of the folder "
        f"as transformers loads it, on {WINDOWS} windows of {TOKENS} random tokens. In every cell with a number the "
        f"folder passed `verify` and generated text. {measured_on(every)}\n\n"
        + "\n".join(f"- refused before the work: {line}" for line in refused),
        COLUMNS,
        [_cells(model, own) for model, own in rows.items()],
    )


def _inside(model: Path) -> Row:
    """What is found in the blocks: the share of matrices that is quantized, and kinds of sites."""
    result = bitwright.inspect(model, sites=True)
    kinds = {_kind(site) for block in result.inside for site in block.sites if site.readers}
    return {"sites": sorted(kinds), "kinds_of_blocks": len(result.inside)}


def _kind(site: Any) -> str:
    """Where a site lies: behind a norm, in attention, or in the MLP."""
    if "norm" in site.name:
        return "norm"
    return "v to o" if "att" in site.readers[0] else "up to down"


def _measured(model: Path, name: str) -> Row:
    """Run a method, and measure the folder as transformers loads it."""
    asked = dict(METHODS[name])
    if asked["method"] not in WITHOUT_DATA:
        asked |= {"calibration": "builtin", "samples": SAMPLES, "seqlen": SEQLEN}
    with TemporaryDirectory() as scratch:
        try:
            result = bitwright.quantize(bitwright.Recipe(str(model), **asked), f"{scratch}/out")
        except UserError as error:
            return {"refused": str(error)}
        except Exception as error:  # a fault of ours: it has its place in the table
            return {"failed": f"{type(error).__name__}: {error}"[:300]}
        inside = {why: share for why, share in result.left_alone.items() if why not in ("embedding", "output layer")}
        verified = bitwright.verify(f"{scratch}/out", model).passed
        loaded, original = _load(Path(scratch) / "out"), _load(model)
        tokens = torch.randint(100, 4000, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(SEED))
        return {
            "format": result.format,
            "left_alone": inside,
            "fallbacks": len(result.fallbacks),
            "verified": verified,
            "kl": _divergence(loaded, original, tokens),
            "generated": loaded.generate(tokens[:1], max_new_tokens=NEW, do_sample=False).shape[1] - TOKENS,
        }


def _load(folder: Path) -> Any:
    """The model as transformers loads it, in float32."""
    chosen = class_of(read_config(folder))
    return chosen.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@torch.no_grad()
def _divergence(model: Any, original: Any, tokens: torch.Tensor) -> float:
    """KL(original || model) per token, in nats."""
    ours, theirs = (one(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1) for one in (model, original))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def _cells(model: str, rows: Sequence[Row]) -> list[str]:
    inside, *measured = rows
    left = next((row["left_alone"] for row in measured if "left_alone" in row), {})
    left = {why: share for why, share in left.items() if why not in NOT_IN_BLOCKS}
    cells = [
        "refused" if row.get("refused") else "**failed**" if row.get("failed") else _figure(row) for row in measured
    ]
    return [model, f"{1 - sum(left.values()):.3f}", ", ".join(inside["sites"]) or "none", *cells]


def _figure(row: Row) -> str:
    good = row["verified"] and row["generated"] == NEW
    return f"{row['kl']:.4f}" if good else f"**{row['kl']:.4f}, verify {row['verified']}, {row['generated']} tokens**"


if __name__ == "__main__":
    typer.run(main)
