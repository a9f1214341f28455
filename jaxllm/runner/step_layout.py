"""All per-step metadata in one int32 buffer, so that a step costs one host-to-device copy.

``views`` works on NumPy arrays (the host writes through them) and inside a traced function.
"""

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from jaxllm.config.plan import BatchBucket, BatchKind


@dataclass(frozen=True)
class StepLayout:
    bucket: BatchBucket
    block_size: int
    token_params: int = 0  # numbers that requests bring of every token of their prompts

    @property
    def max_patches(self) -> int:
        """Row-state changes one step can carry. More go ahead in steps of their own (see
        ModelRunner).
        """
        rows, tokens = self.bucket.num_rows, self.bucket.num_tokens
        if self.bucket.kind is BatchKind.DECODE:
            return 2 * rows + 128
        return 24 * rows + tokens // self.block_size + 256

    @cached_property
    def fields(self) -> dict[str, tuple[int, int]]:
        """name -> (offset, length)"""
        tokens, rows = self.bucket.num_tokens, self.bucket.num_rows
        lengths = {
            "token_ids": tokens,  # -1: the token this row sampled last
            "positions": tokens,  # -1: padding
            "token_slots": tokens,
            "rows": rows,  # permanent row of each slot; padding points to the scratch row
            "query_start_loc": rows + 1,
            "seq_lens": rows,
            "logits_index": rows,  # token whose hidden state gives the slot's logits
            "samples": rows,  # 1: the slot's sampled token is real
            "reset_rows": rows,  # rows whose token counts start anew
            "patch_index": self.max_patches,  # row * width + column
            "patch_value": self.max_patches,
            "num_decode_rows": 1,  # slots that the decode form of attention serves
        }
        if self.bucket.kind is BatchKind.MIXED:  # in other steps all tokens have the defaults
            lengths["token_params"] = self.token_params * tokens  # bits, param after param
        else:
            lengths["token_params"] = 0
        fields: dict[str, tuple[int, int]] = {}
        offset = 0
        for name, length in lengths.items():
            fields[name] = (offset, length)
            offset += length
        return fields

    @cached_property
    def size(self) -> int:
        return sum(length for _, length in self.fields.values())

    def views(self, buffer: Any) -> SimpleNamespace:
        """One attribute per field."""
        parts = {name: buffer[start : start + n] for name, (start, n) in self.fields.items()}
        return SimpleNamespace(**parts)
