"""Tokenizers of one token per byte, with what real ones put around a text, and with a chat template."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import byte_tokenizer

from bitwright.calibration.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[{{ tools | length }} tools: {{ tools[0].function.name }}]{% endif %}"
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}</s>"
)
"""A chat template that begins with the BOS, ends with the EOS, and refuses roles that it does not know."""
MakeTokenizer = Callable[..., Tokenizer]


@pytest.fixture
def tokenizer() -> MakeTokenizer:
    """``tokenizer(around="<s> $A", template=None)``: a tokenizer of bytes; ``<s>`` is token 256, ``</s>`` 257."""

    def make(around: str = "$A", template: str | None = None, eos: bool = True) -> Tokenizer:
        inner = byte_tokenizer(around, eos=eos)
        inner.chat_template = template
        return Tokenizer(inner, Path("MODEL"))

    return make
