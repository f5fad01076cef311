"""Registration with transformers, whenever it is imported; in processes of their own, since it happens once."""

import subprocess
import sys

import pytest

SCRIPTS = {
    "importing bitwright loads nothing heavy": """
import sys, bitwright
assert not {"torch", "transformers", "compressed_tensors", "pydantic"} & set(sys.modules)
""",
    "the registry keeps its own loader, and the hook goes": """
import sys, bitwright
from bitwright.plugin import hook
assert sum(isinstance(f, hook._Finder) for f in sys.meta_path) == 1
hook.register_when_imported()
assert sum(isinstance(f, hook._Finder) for f in sys.meta_path) == 1
import transformers.quantizers.auto as auto
assert type(auto.__loader__).__name__ == type(auto.__spec__.loader).__name__ == "SourceFileLoader"
assert not [f for f in sys.meta_path if isinstance(f, hook._Finder)]
assert auto.AUTO_QUANTIZER_MAPPING["bitwright"].__name__ == "BitwrightQuantizer"
""",
    "registered at once where transformers is there, and once alone": """
import transformers.quantizers.auto as auto
assert "bitwright" not in auto.AUTO_QUANTIZER_MAPPING
import bitwright
first = auto.AUTO_QUANTIZER_MAPPING["bitwright"]
from bitwright.plugin import hook
hook.register_when_imported()
assert auto.AUTO_QUANTIZER_MAPPING["bitwright"] is first
""",
    "other imports are as they were": """
import sys, bitwright
from importlib.util import find_spec
assert find_spec("transformers.no_such_module") is None and find_spec("json.decoder").loader
assert "transformers.quantizers.auto" not in sys.modules
import bitwright.api
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
assert "bitwright" in AUTO_QUANTIZATION_CONFIG_MAPPING
""",
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_in_a_process_of_its_own(what: str) -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPTS[what]], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
