"""What bytes a token stands for. Knows the three ways in which vocabularies spell bytes."""

import json
import re
from enum import Enum

from tokenizers import Tokenizer as HFTokenizer

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling(Enum):
    BYTE_LEVEL = "byte_level"  # every byte is one printable character (GPT-2 and its heirs)
    METASPACE = "metaspace"  # a space is U+2581, a lone byte is "<0xNN>" (SentencePiece)
    OTHER = "other"  # only the tokenizer's own decoder knows


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_level_alphabet()


class TokenBytes:
    """Token id -> bytes, remembered. Concatenated they are the text, but for U+FFFD repairs."""

    def __init__(self, backend: HFTokenizer):
        self._backend = backend
        self._known: dict[int, bytes] = {}
        self.spelling, self._pure_byte_level = _spelling_of(backend)

    @property
    def exact(self) -> bool:
        """True if decoding is nothing but concatenating these bytes and reading them as UTF-8."""
        return self._pure_byte_level

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._find(token_id)
        return known

    def _find(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:  # logits are often wider than the vocabulary
            return b""
        if self.spelling is Spelling.BYTE_LEVEL:
            try:
                return bytes(map(_BYTE_OF.__getitem__, token))
            except KeyError:
                return token.encode()
        if self.spelling is Spelling.METASPACE:
            if match := _BYTE_FALLBACK.fullmatch(token):
                return bytes((int(match[1], 16),))
            return token.replace("\u2581", " ").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()


def _spelling_of(backend: HFTokenizer) -> tuple[Spelling, bool]:
    if backend.decoder is None:
        return Spelling.OTHER, False
    decoder = json.loads(backend.decoder.__getstate__())
    stages = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [stage["type"] for stage in stages]
    if "ByteLevel" in kinds:
        return Spelling.BYTE_LEVEL, kinds == ["ByteLevel"]
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return Spelling.METASPACE, False
    return Spelling.OTHER, False
