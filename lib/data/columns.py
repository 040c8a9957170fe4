"""Rows to documents: which columns hold the text, and how a row becomes a document."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lib.errors import InputError

Row = dict[str, Any]
_TEXT = ("text", "content")
_CHATS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_SHOWN = 20  # columns in an error

# The prompts of the published data set, https://github.com/tatsu-lab/stanford_alpaca
_TASK = "Below is an instruction that describes a task"
_RESPONSE = "Write a response that appropriately completes the request."
_ALPACA_PROMPT = f"{_TASK}. {_RESPONSE}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n{{output}}"
_ALPACA_PROMPT_WITH_INPUT = (
    f"{_TASK}, paired with an input that provides further context. {_RESPONSE}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)


@dataclass(frozen=True)
class Reading:
    """How rows are read: the columns that are needed, how they become a document, and what a person is told of it.

    `render` raises `ValueError` for a row that it cannot read.
    """

    columns: tuple[str, ...]
    render: Callable[[Row], str | None]
    label: str


def choose(source: str, head: Sequence[Row], column: str | None, tokenizer) -> Reading:
    """How to read a table, by its first rows: the named `column`, else a text, a chat, or Alpaca's columns.

    Chats are rendered by the tokenizer's chat template. Raises `InputError`, with the columns, for any other table.
    """
    names = list(dict.fromkeys(name for row in head for name in row))
    for name in [column] if column else _likely(names):
        values = [row[name] for row in head if row.get(name) is not None]
        is_text = (values and name.lower() in _TEXT) or (column and name in names)
        if is_text and all(isinstance(value, str) for value in values):
            return Reading((name,), partial(_text, name), f"column `{name}`")
        if values and all(_is_chat(value) for value in values):
            has_template = getattr(tokenizer, "chat_template", None)
            how = "in the tokenizer's chat template" if has_template else "with role headers"
            return Reading(
                (name,), partial(_chat, name, tokenizer if has_template else None), f"chats of `{name}`, {how}"
            )
    if not column and {"instruction", "output"} <= set(names):
        return Reading(
            ("instruction", "input", "output"), _alpaca, "`instruction`, `input` and `output` in Alpaca's prompt"
        )
    found = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    if column:
        raise InputError(f"dataset {source}: no column `{column}` of text or chats; its columns are {found}")
    raise InputError(f"dataset {source}: no text column among {found}; name the one that holds it, as in PATH::column")


def _likely(names: Sequence[str]) -> list[str]:
    """The columns that may hold text or chats, the most likely first."""
    return [
        name
        for wanted in (*_TEXT, *_CHATS)
        for name in sorted(names, key=lambda name: name != wanted)
        if name.lower() == wanted
    ]


def _text(column: str, row: Row) -> str | None:
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"column `{column}` holds no text")
    return value


def _is_chat(value: Any) -> bool:
    """True for a list of messages, by OpenAI's keys or ShareGPT's."""
    return isinstance(value, list) and all(
        isinstance(message, dict) and (_is_by_role(message) or {"from", "value"} <= set(message)) for message in value
    )


def _is_by_role(message: Row) -> bool:
    return "role" in message and ("content" in message or "tool_calls" in message)


def _chat(column: str, tokenizer, row: Row) -> str | None:
    """A chat as text: in the tokenizer's template, without the token that every text begins with, or with headers."""
    if not row[column]:
        return None
    if not _is_chat(row[column]):
        raise ValueError(f"column `{column}` holds no chat")
    messages = [_message(message) for message in row[column]]
    if tokenizer is None:
        return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates come with models, and raise what they like
        raise ValueError(f"the tokenizer's chat template refuses it ({error}); take such rows out") from error
    return text.removeprefix(tokenizer.bos_token or "")


def _message(message: Row) -> Row:
    """A message by OpenAI's keys, with the text of its parts and its calls of tools."""
    is_by_role = _is_by_role(message)
    role, content = message["role" if is_by_role else "from"], message.get("content" if is_by_role else "value")
    if isinstance(content, list):
        parts = [part.get("text") or "" if isinstance(part, dict) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else parts
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise ValueError("a message is no text of a role")
    calls = {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
    return {"role": _ROLES.get(role, role), "content": content or "", **calls}


def _alpaca(row: Row) -> str:
    """Alpaca's prompt with its answer."""
    given = {name: row[name] or "" for name in ("instruction", "input", "output")}
    return (_ALPACA_PROMPT_WITH_INPUT if given["input"] else _ALPACA_PROMPT).format(**given)
