"""Pieces of llguidance's Lark."""

import json
import re

from llguidance import LLTokenizer

ANY = "/(?s:.*)/"


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def without(piece: str) -> str:
    """In a terminal: any text in which ``piece``, a literal, does not occur."""
    return f"({ANY} & ~({ANY} {piece} {ANY}))"


def spelled(text: str, tokenizer: LLTokenizer | None) -> list[str]:
    """In a rule: ``text`` with its special tokens as such; without a ``tokenizer``, all as text.

    Ordinary tokens may spell what is no special token in any way that gives the same bytes.
    """
    pieces: list[str] = []
    ids = tokenizer.tokenize_str(text, parse_special=True) if tokenizer is not None else []
    for id in ids:
        if tokenizer is not None and tokenizer.is_special_token(id):
            before, _, text = text.partition(tokenizer.decode_str([id]))
            pieces += [literal(before), f"<[{id}]>"]
    return [piece for piece in (*pieces, literal(text)) if piece]


def is_token(piece: str) -> bool:
    return re.fullmatch(r"<\[\d+\]>", piece) is not None
