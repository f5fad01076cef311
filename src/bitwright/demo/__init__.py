"""The embedded demonstration model, so that tutorials, tests and ``make demo`` run without a download.

It is a small language model of the Llama architecture with a byte-level BPE tokenizer of its own, trained on the source
of the Python standard library by ``tools/train_demo_model.py``. ``bitwright.demo.texts`` gives the parts of the library
that were held out of its training, for calibration and for evaluation.
"""

from pathlib import Path
from typing import Final

MODEL_DIR: Final[Path] = Path(__file__).resolve().parent / "model"
"""The folder of the embedded model (config.json, model.safetensors, tokenizer.json and the rest)."""

__all__ = ["MODEL_DIR"]
