"""Chats as prompts: a chat model's template, in Jinja as in Hugging Face tokenizer files."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jinja2
import jinja2.sandbox

from encdec.data.chat_template import TEMPLATE_FILE
from encdec.errors import ConfigError, DataError
from encdec.serving.prompts import Prompt, PromptReader
from encdec.storage import as_path

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_FIELDS = ("role", "content", "name", "type")


class ChatTemplate:
    """Turns messages into one text.

    Args:
        source: Jinja with ``messages`` and ``add_generation_prompt``, as Hugging Face's chat
            templates; None for a model without one, whose prompt is a single message, unchanged.

    Raises:
        ConfigError: it is not valid Jinja.
    """

    def __init__(self, source: str | None = None):
        self.source = source
        self._template = None
        if source is not None:
            # Sandboxed: a template comes with a model, not from the person who runs the server.
            environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True
            )
            environment.globals["raise_exception"] = _raise
            environment.filters["tojson"] = lambda value, **kwargs: json.dumps(
                value, ensure_ascii=False, **kwargs
            )
            try:
                self._template = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise ConfigError(f"the chat template is not valid Jinja: {error}") from None

    def prompt(self, messages: Any, reader: PromptReader, *, truncate: bool = False) -> Prompt:
        """The prompt of a chat.

        Raises:
            DataError: messages are malformed, or the template refuses them.
        """
        chat = _checked(messages)
        if self.source is not None and "developer" not in self.source:
            # Templates mostly leave out what has a role that they do not know.
            for one in chat:
                one["role"] = "system" if one["role"] == "developer" else one["role"]
        if self._template is None:
            if len(chat) != 1 or chat[0]["role"] != "user":
                raise DataError(
                    f"messages has {len(chat)} entries ({', '.join(one['role'] for one in chat)}); "
                    "this model has no chat template and accepts one user message as its input "
                    "(give encdec serve a template with --chat_template)"
                )
            return reader.read(
                chat[0]["content"], marked=False, truncate=truncate, name="the message"
            )
        vocabulary = reader.format.vocabulary
        names = {token: name for name, token in vocabulary.special_tokens.items()}
        start = names.get(reader.format.decoder_start_id, "")
        try:
            text = self._template.render(
                messages=chat,
                add_generation_prompt=True,
                bos_token=start,
                eos_token=names[vocabulary.eos_id],
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"messages: the chat template rejects them: {error}") from None
        ids = vocabulary.encode_marked(text)
        reader.format.check_known(ids, text, "the chat", marked=True)
        # Templates begin with the tokens that are put in front of every input anyway, or with
        # some of them: GLM's with both its start token and its prefix.
        front = [reader.format.decoder_start_id] * (not reader.is_encoder_decoder)
        front += reader.format.inputs_prefix
        parts = [front[i:] for i in range(len(front))] + [front[:i] for i in range(len(front))]
        given = max(len(part) for part in [[], *parts] if ids[: len(part)] == part)
        return reader.read(ids[given:], marked=False, truncate=truncate, name="the chat")


def find_template(directory: str | pathlib.Path, path: str | None = None) -> ChatTemplate:
    """The template in a file, else the one in the model's directory, else none.

    Raises:
        ConfigError: the file cannot be read or is not a template.
    """
    file = as_path(path) if path else as_path(directory) / TEMPLATE_FILE
    if not path and not file.is_file():
        return ChatTemplate()
    try:
        return ChatTemplate(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat_template={file} cannot be read: {error}") from None


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _checked(messages: Any) -> list[dict[str, str]]:
    """Checked messages, whose contents are texts."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages is {messages!r}; expected an array of at least one")
    chat = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise DataError(f"{where} is {message!r}; expected an object")
        extra = {name for name, value in message.items() if value not in (None, [])}
        if unknown := sorted(extra - set(_MESSAGE_FIELDS)):
            raise DataError(
                f"{where} has {unknown[0]!r}; this server accepts role, content and name only"
            )
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise DataError(f"{where}.role is {role!r}; expected one of {', '.join(_ROLES)}")
        if isinstance(content, list):
            parts = [part if isinstance(part, dict) else {} for part in content]
            if not all(
                part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
            ):
                raise DataError(f"{where}.content has parts that are not text; leave them out")
            content = "".join(part["text"] for part in parts)
        made = {"role": role, "content": content}
        if (name := message.get("name")) is not None:
            made["name"] = name
        for field, text in made.items():
            if not isinstance(text, str):
                raise DataError(f"{where}.{field} is {text!r}; expected a text")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(
                    f"{where}.{field} contains half a character (a lone surrogate)"
                ) from None
        chat.append(made)
    return chat
