"""Chats as a model is shown them: the messages of a row, in one spelling, through the model's own chat template.

Transformers renders a template in jinja's immutable sandbox: it computes with the messages, and runs no code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bitwright.calibration.rows import MOST_BYTES, Chat, require_characters
from bitwright.core.errors import CalibrationError, shown

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""The roles behind the names in ``from``, beside ``value``."""
LONGEST_MESSAGE = 300
"""The most characters that an error says of what a template complains about."""


def rendered(chat: Chat, tokenizer: Any, folder: object) -> str:
    """Render a chat, and the tools it may call, with the chat template of a tokenizer of transformers.

    Raises CalibrationError if the tokenizer has no template, or if the template refuses the chat.
    """
    if not tokenizer.chat_template:
        raise _without_template(chat, folder)
    messages = [_message(message, f"{chat.where}, message {number}") for number, message in enumerate(chat.messages, 1)]
    try:
        text = tokenizer.apply_chat_template(messages, tools=chat.tools, tokenize=False)
    except Exception as error:  # a template raises what it likes, and jinja many kinds
        what = f"{type(error).__name__}: {error}".splitlines()[0][:LONGEST_MESSAGE]
        raise CalibrationError(
            f"{chat.where}: the chat template in {folder} cannot render this chat ({what}); mend the row or leave it "
            "out. Its roles are " + ", ".join(str(message.get("role"))[:20] for message in messages[:12])
        ) from None
    if len(text) > MOST_BYTES:
        raise CalibrationError(
            f"{chat.where}: the chat template in {folder} makes {len(text):,} characters of this chat; leave it out"
        )
    return require_characters(text, chat.where)


def transcript(chat: Chat) -> str:
    """A chat as plain text, for a base model without a chat template."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message.get('content') or ''}" for message in chat.messages)


def _without_template(chat: Chat, folder: object) -> CalibrationError:
    others = [name for name in chat.fields if name != chat.field]
    texts = f"; its other fields are {', '.join(others[:20])}" if others else ""
    return CalibrationError(
        f"{chat.where} is a chat (field '{chat.field}'), and the tokenizer in {folder} has no chat template to render "
        "it with: no chat_template.jinja, and no chat_template in tokenizer_config.json. Copy the template from the "
        f"original repository, give plain text, or name a field that holds text: --text-field NAME{texts}"
    )


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message with role and content, however it was spelled. Raises CalibrationError."""
    if "role" not in message and "from" not in message:
        raise CalibrationError(
            f"{where} has no role: neither 'role' and 'content', nor 'from' and 'value'; its keys are "
            f"{', '.join(map(str, message))[:LONGEST_MESSAGE]}"
        )
    if "role" in message:
        spelled = {**message}
    else:
        spelled = {key: value for key, value in message.items() if key not in ("from", "value")}
        spelled |= {"role": _role(message["from"], where), "content": message.get("value")}
    if spelled.get("content") is None and not spelled.get("tool_calls"):
        raise CalibrationError(f"{where} ({shown(spelled['role'])}) has no content; mend the row or leave it out")
    return spelled | {"content": _content(spelled.get("content"), where)}


def _role(name: Any, where: str) -> str:
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise CalibrationError(f"{where} is from {shown(name)}, and the names are {', '.join(ROLES)}; rename it")
    return ROLES[name.lower()]


def _content(content: Any, where: str) -> Any:
    """The content of a message; parts of text become one text. Raises CalibrationError for parts of other kinds."""
    if not isinstance(content, list):
        return content
    return "".join(_text(part, where) for part in content)


def _text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise CalibrationError(f"{where} has a part of type {shown(kind)}, and only text is read; leave the row out")


def ends_with(tokens: Sequence[int], end: int | None, within: int = 3) -> bool:
    """Whether a rendered chat ends with this token, perhaps with a line break behind it."""
    return end is not None and end in tokens[-within:]
