"""How the rows of a step are sampled, each under its own parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llava_engine.runtime.sequence import Sequence


def sampling_inputs(
    sequences: list[Sequence], vocab_size: int, image_token_id: int
) -> dict[str, npt.NDArray[Any]]:
    """Those of kernels.prefill.StepInputs that say how the sequences' next tokens are sampled.

    vocab_size: columns of the logits. image_token_id: as in `seen_ids`.
    """
    params = [sequence.sampling for sequence in sequences]
    seen_at = [
        row * vocab_size + token
        for row, sequence in enumerate(sequences)
        if sequence.sampling.repetition_penalty != 1.0
        for token in seen_ids(sequence, image_token_id)
    ]
    return {
        "seed": np.array([sequence.seed for sequence in sequences], np.int64),
        "position": np.array([sequence.completion_len for sequence in sequences], np.int64),
        "seen_at": np.array(seen_at, np.int64),
        "top_k": np.array([p.top_k for p in params], np.int32),
        "temperature": np.array([p.temperature for p in params], np.float32),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "repetition_penalty": np.array([p.repetition_penalty for p in params], np.float32),
    }


def seen_ids(sequence: Sequence, image_token_id: int) -> list[int]:
    """The vocabulary ids that a repetition penalty applies to.

    image_token_id: one of them in prompts with a picture, as in transformers.
    """
    ids = {token for token in sequence.token_ids if token >= 0}
    if sequence.pictures:
        ids.add(image_token_id)
    return sorted(ids)
