"""One model's tokenizer: text to ids and back. Owns the files of a tokenizer directory.

Built on the ``tokenizers`` library directly; ``transformers`` is imported only for models that
bring nothing but a SentencePiece or tiktoken file.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import WordLevel

from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.tokenizer.chat_template import ChatTemplate, read_template
from jaxllm.tokenizer.token_bytes import TokenBytes

_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tiktoken.model")
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Immutable; safe to share between threads and tasks."""

    def __init__(
        self,
        backend: HFTokenizer,
        *,
        role_tokens: dict[str, str] | None = None,
        chat_template: str | dict[str, str] | None = None,
    ):
        # A tokenizer.json may carry the padding and truncation of somebody's training run.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.role_tokens = role_tokens or {}  # "bos_token" -> "<s>", as templates name them
        self.token_bytes = TokenBytes(backend)
        self._template_source = chat_template

    @classmethod
    def from_dir(cls, directory: str | Path | None) -> "Tokenizer":
        """Read tokenizer.json (or a slow tokenizer's files), its config and the chat template.

        None gives a tokenizer without tokens, for dummy weights: every text is empty.

        Raises:
            ConfigError: there is no tokenizer, or a file cannot be read as one.
        """
        if directory is None:
            return cls(HFTokenizer(WordLevel({}, unk_token="")))
        root = Path(directory)
        config = _read_json(root / "tokenizer_config.json")
        names = _read_json(root / "special_tokens_map.json") | config
        roles = {role: _content(names[role]) for role in _ROLES if names.get(role)}
        return cls(
            _load_backend(root), role_tokens=roles, chat_template=read_template(root, config)
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Special tokens spelled out in the text become those tokens.

        Raises:
            InvalidRequestError: the text is not valid Unicode (it holds half a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"The text is not valid Unicode: a lone surrogate at character {error.start}.",
                code="invalid_value",
            ) from None
        # Of the library's calls this one releases the GIL; encode() holds it to the end.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``; broken UTF-8 becomes U+FFFD, unknown ids nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_to_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, leading space included."""
        return self.token_bytes[token_id]

    def token_string(self, token_id: int) -> str:
        """One token on its own, as shown beside its log-probability. May hold U+FFFD."""
        return self.token_bytes[token_id].decode(errors="replace")

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's logits may be wider."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of more than ``n`` times as many characters has more
        than ``n`` tokens.
        """
        return max((len(self.token_bytes[i]) for i in range(self.vocab_size)), default=1) or 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def eos_token_id(self) -> int | None:
        return self._role_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._role_id("bos_token")

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        source = self._template_source
        return None if source is None else ChatTemplate(source, self.role_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        /,
        *,
        chat_template: str | None = None,
        **options: Any,
    ) -> str:
        """The prompt text of a conversation; ``options`` as in ``ChatTemplate.render``.

        Encode it with ``add_special_tokens=False``: the template writes them itself.

        Raises:
            InvalidRequestError: no template, or it refuses these messages.
        """
        template = (
            self.chat_template
            if chat_template is None
            else ChatTemplate(chat_template, self.role_tokens)
        )
        if template is None:
            raise InvalidRequestError(
                "This model has no chat template: use /v1/completions, or give a chat_template.",
                param="messages",
                code="no_chat_template",
            )
        return template.render(messages, **options)

    def _role_id(self, role: str) -> int | None:
        token = self.role_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)


def _load_backend(root: Path) -> HFTokenizer:
    path = root / "tokenizer.json"
    if path.is_file():
        try:
            return HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path} is not a readable tokenizer: {error}") from error
    if not any((root / name).is_file() for name in _SLOW_FILES):
        raise ConfigError(f"No tokenizer in {root}: expected tokenizer.json. Use --tokenizer.")
    from transformers import AutoTokenizer  # imports slowly, and few models need it

    try:
        slow = AutoTokenizer.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(f"The tokenizer in {root} cannot be read: {error}") from error
    backend = getattr(slow, "backend_tokenizer", None)
    if not isinstance(backend, HFTokenizer):
        raise ConfigError(
            f"The tokenizer in {root} has no fast form; convert it to tokenizer.json."
        )
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    return value


def _content(token: str | dict[str, Any]) -> str:
    """Configs write a special token as a string or as an object with its text in ``content``."""
    return token if isinstance(token, str) else str(token.get("content", ""))
