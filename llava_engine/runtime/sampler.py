"""Turns the logits of a step's rows into token ids, each row under its own parameters."""

from __future__ import annotations

import torch

from llava_engine.kernels.sampling import sample
from llava_engine.runtime.sequence import Sequence


class Sampler:
    """Builds the sampling op's per-row arguments.

    vocab_size: columns of the logits. image_token_id: counts as seen by the repetition penalty in
    prompts with a picture, as it does in transformers.
    """

    def __init__(self, vocab_size: int, image_token_id: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._image_token_id = image_token_id
        self._device = device

    def __call__(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
        """The next token of each sequence. logits: float32 [len(sequences), vocab_size]."""
        params = [sequence.sampling for sequence in sequences]
        out = torch.empty(len(sequences), dtype=torch.int64, device=self._device)
        sample(
            out,
            logits,
            self._column([p.temperature for p in params], torch.float32),
            self._column([p.top_k for p in params], torch.int32),
            self._column([p.top_p for p in params], torch.float32),
            self._column([p.repetition_penalty for p in params], torch.float32),
            self._seen(sequences),
            self._column([sequence.seed for sequence in sequences], torch.int64),
            self._column([sequence.completion_len for sequence in sequences], torch.int64),
        )
        tokens: list[int] = out.tolist()
        return tokens

    def _column(self, values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _seen(self, sequences: list[Sequence]) -> torch.Tensor | None:
        """bool [rows, vocab_size]: the tokens that a row's penalty applies to; None without any."""
        if all(sequence.sampling.repetition_penalty == 1.0 for sequence in sequences):
            return None
        seen = torch.zeros(
            (len(sequences), self._vocab_size), dtype=torch.bool, device=self._device
        )
        for row, sequence in enumerate(sequences):
            if sequence.sampling.repetition_penalty != 1.0:
                ids = seen_ids(sequence, self._image_token_id)
                seen[row, self._column(ids, torch.int64)] = True
        return seen


def seen_ids(sequence: Sequence, image_token_id: int) -> list[int]:
    """The vocabulary ids that a repetition penalty applies to."""
    ids = {token for token in sequence.token_ids if token >= 0}
    if sequence.pictures:
        ids.add(image_token_id)
    return sorted(ids)
