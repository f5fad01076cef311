"""The built-in mix of calibration data: chats, code, prose, and several languages, written for this purpose.

It is for models whose users have no data of their own. Each line of the files in ``mix_texts/`` is a document.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.calibration.chat import rendered, transcript
from bitwright.calibration.rows import Chat, Document
from bitwright.core.errors import CalibrationError

if TYPE_CHECKING:
    from bitwright.calibration.tokenizer import Tokenizer

FOLDER = Path(__file__).with_name("mix_texts")
NAME = "the built-in mix"


def documents() -> Iterator[Document]:
    """All documents, the kinds in turn, so that every segment holds several."""
    files = [path.read_text(encoding="utf-8").splitlines() for path in sorted(FOLDER.glob("*.jsonl"))]
    for number in range(max(map(len, files))):
        for lines in files:
            if number < len(lines):
                row = json.loads(lines[number])
                where = f"{NAME}, document {number + 1}"
                yield row["text"] if "text" in row else Chat(row["messages"], row.get("tools"), where, "messages", ())


def fitted(documents: Sequence[Document], tokenizer: "Tokenizer", say: Callable[[str], None]) -> list[Document]:
    """The documents that a model can be shown.

    Without a chat template, chats become transcripts. Chats that the template refuses are left out. ``say`` hears both.
    """
    chats = [document for document in documents if isinstance(document, Chat)]
    if not tokenizer.inner.chat_template:
        say(f"the tokenizer has no chat template: the {len(chats)} chats of {NAME} are plain transcripts")
        return [transcript(document) if isinstance(document, Chat) else document for document in documents]
    kept = [document for document in documents if not isinstance(document, Chat) or _renders(document, tokenizer)]
    if left := len(documents) - len(kept):
        say(f"{left} of {len(chats)} chats of {NAME} are left out, because the model's chat template refuses them")
    return kept


def _renders(chat: Chat, tokenizer: "Tokenizer") -> bool:
    try:
        rendered(chat, tokenizer.inner, tokenizer.folder)
    except CalibrationError:
        return False
    return True
