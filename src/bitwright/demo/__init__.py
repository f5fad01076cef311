"""The embedded demonstration model: a small Llama-architecture language model with its own byte-level BPE
tokenizer, trained on the source of the Python standard library by ``tools/train_demo_model.py``, so that the
tutorials, the tests and ``make demo`` run without any download. ``bitwright.demo.texts`` gives the standard
library texts that were held out of its training, for calibration and for evaluation."""

from pathlib import Path
from typing import Final

MODEL_DIR: Final[Path] = Path(__file__).resolve().parent / "model"
"""Folder of the embedded model (config.json, model.safetensors, tokenizer.json and the rest)."""

__all__ = ["MODEL_DIR"]
