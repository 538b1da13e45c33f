"""Turns the logits of a step's rows into token ids, each row under its own parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llava_engine.kernels.sampling import sample
from llava_engine.runtime.sequence import Sequence


class Sampler:
    """Builds the sampling op's per-row arguments.

    vocab_size: columns of the logits. image_token_id: counts as seen by the repetition penalty in
    prompts with a picture, as it does in transformers.
    """

    def __init__(self, vocab_size: int, image_token_id: int) -> None:
        self._vocab_size = vocab_size
        self._image_token_id = image_token_id

    def arguments(self, sequences: list[Sequence]) -> list[npt.NDArray[Any]]:
        """What `__call__` needs on its device to sample the sequences' next tokens."""
        params = [sequence.sampling for sequence in sequences]
        penalised = [
            seen_ids(sequence, self._image_token_id)
            if sequence.sampling.repetition_penalty != 1.0
            else []
            for sequence in sequences
        ]
        rows = np.repeat(np.arange(len(sequences)), [len(ids) for ids in penalised])
        return [
            np.array([p.temperature for p in params], np.float32),
            np.array([p.top_k for p in params], np.int32),
            np.array([p.top_p for p in params], np.float32),
            np.array([p.repetition_penalty for p in params], np.float32),
            np.array([sequence.seed for sequence in sequences], np.int64),
            np.array([sequence.completion_len for sequence in sequences], np.int64),
            # Of every token that a row's penalty applies to, its place in a matrix of the logits'.
            rows * self._vocab_size + np.concatenate([np.array(i, np.int64) for i in penalised]),
        ]

    def __call__(self, logits: torch.Tensor, arguments: list[torch.Tensor]) -> torch.Tensor:
        """The next token of each sequence, int64 [S]. logits: float32 [S, vocab_size]."""
        temperature, top_k, top_p, penalty, seed, position, seen_at = arguments
        seen = None
        if len(seen_at):
            seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            seen.view(-1)[seen_at] = True
        out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        sample(out, logits, temperature, top_k, top_p, penalty, seen, seed, position)
        return out


def seen_ids(sequence: Sequence, image_token_id: int) -> list[int]:
    """The vocabulary ids that a repetition penalty applies to."""
    ids = {token for token in sequence.token_ids if token >= 0}
    if sequence.pictures:
        ids.add(image_token_id)
    return sorted(ids)
