"""A step in one call, from what one upload left on the device to the sampled tokens: see
csrc/prefill.cu for why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from llava_engine.kernels.decoder import DecoderTensors, decoder_layers
from llava_engine.kernels.library import define
from llava_engine.kernels.sampling import sample

Array = TypeVar("Array")


class StepInputs(NamedTuple, Generic[Array]):
    """The T new tokens of a step's S sequences, and how R of these sample their next one.

    On the host as numpy arrays, and on the device in one piece as `uploaded`: in this order, which
    has the wide types first, each right behind the other.
    """

    token_ids: Array
    """int64 [T], as positions and slot_mapping, which are those of rope_append."""
    positions: Array
    slot_mapping: Array
    wanted: Array
    """int64 [R], the rows after which is sampled."""
    seed: Array
    """int64 [R], as the next; these and the last four are those of kernels.sampling.sample."""
    position: Array
    seen_at: Array
    """int64 [N], where among [R, V] are the tokens that a repetition penalty applies to."""
    block_table: Array
    """int32 [S, B], as the next two those of paged_attention."""
    query_start: Array
    context_lens: Array
    top_k: Array
    temperature: Array
    top_p: Array
    repetition_penalty: Array


def _layout(sizes: Sequence[int]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each of StepInputs. sizes: [T, S, B, R, N]."""
    tokens, sequences, blocks, sampled, seen = sizes
    wide = [tokens, tokens, tokens, sampled, sampled, sampled, seen]
    narrow = [(sequences, blocks), (sequences + 1,), (sequences,), (sampled,)]
    return [
        *((torch.int64, (count,)) for count in wide),
        *((torch.int32, shape) for shape in narrow),
        *[(torch.float32, (sampled,))] * 3,
    ]


def pack(inputs: StepInputs[npt.NDArray[Any]]) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """What is to be uploaded, uint8 [bytes], read-only; and the `sizes` that tell what it is.

    The arrays are dense.
    """
    sequences, blocks = inputs.block_table.shape
    sizes = [len(inputs.token_ids), sequences, blocks, len(inputs.wanted), len(inputs.seen_at)]
    return np.frombuffer(b"".join(array.data for array in inputs), np.uint8), sizes


def unpack(uploaded: torch.Tensor, sizes: Sequence[int]) -> StepInputs[torch.Tensor]:
    """Views of `uploaded`, whatever follows. Raises RuntimeError where it has fewer bytes."""
    layout = _layout(sizes)
    nbytes = [math.prod(shape) * of.itemsize for of, shape in layout]
    *parts, _ = uploaded.split_with_sizes([*nbytes, len(uploaded) - sum(nbytes)])
    return StepInputs(
        *(part.view(of).view(shape) for part, (of, shape) in zip(parts, layout, strict=True))
    )


def prefill_step(
    tokens: torch.Tensor,
    uploaded: torch.Tensor,
    sizes: Sequence[int],
    embedding: torch.Tensor,
    features: Sequence[torch.Tensor],
    feature_rows: Sequence[int],
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    decoder: DecoderTensors,
    head: torch.Tensor,
    max_query_len: int,
) -> None:
    """tokens = what R of the step's sequences sample next; all keys and values go to the caches.

    tokens: int64 [R]. uploaded, sizes: of `pack`, and whatever follows what is uploaded.
    embedding: [V, hidden]. head: [V', hidden].
    features: rows [n, hidden] each, which stand in the place of some tokens' embeddings.
    feature_rows: for each of the features three numbers: the step's row that its rows begin at, the
    first of them, and how many. The rest is as in decoder_layers. Raises ValueError or RuntimeError
    where sizes do not belong together.
    """
    _prefill_step(
        tokens,
        uploaded,
        sizes,
        embedding,
        features,
        feature_rows,
        k_caches,
        v_caches,
        decoder.weights,
        decoder.scales,
        decoder.fp8,
        decoder.final_norm,
        decoder.cos_sin,
        head,
        decoder.workspace,
        max_query_len,
        decoder.scale,
        decoder.eps,
    )


def prefill_in_parts(
    tokens: torch.Tensor,
    uploaded: torch.Tensor,
    sizes: Sequence[int],
    embedding: torch.Tensor,
    features: Sequence[torch.Tensor],
    feature_rows: Sequence[int],
    layers: Callable[[torch.Tensor, StepInputs[torch.Tensor]], torch.Tensor],
    head: torch.Tensor,
) -> None:
    """`prefill_step` with other `layers`: embedding rows [T, hidden], which these may overwrite, to
    the wanted rows [R, hidden] after the final norm."""
    inputs = unpack(uploaded, sizes)
    embeds = F.embedding(inputs.token_ids, embedding)
    places = zip(*[iter(feature_rows)] * 3, strict=True)
    for rows, (row, first, count) in zip(features, places, strict=True):
        if not (
            0 <= row <= row + count <= len(embeds) and 0 <= first <= first + count <= len(rows)
        ):
            raise ValueError(f"there are no rows {first} to {first + count} for row {row}")
        embeds[row : row + count] = rows[first : first + count]
    hidden = layers(embeds, inputs)
    if len(hidden) == 0:
        return
    logits = F.linear(hidden, head).float()
    seen = None
    if len(inputs.seen_at):
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        seen.view(-1)[inputs.seen_at] = True
    sample(
        tokens,
        logits,
        inputs.temperature,
        inputs.top_k,
        inputs.top_p,
        inputs.repetition_penalty,
        seen,
        inputs.seed,
        inputs.position,
    )


def _prefill_step_reference(
    tokens: torch.Tensor,
    uploaded: torch.Tensor,
    sizes: Sequence[int],
    embedding: torch.Tensor,
    features: Sequence[torch.Tensor],
    feature_rows: Sequence[int],
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    fp8: Sequence[torch.Tensor],
    final_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    head: torch.Tensor,
    workspace: torch.Tensor,
    max_query_len: int,
    scale: float,
    eps: float,
) -> None:
    decoder = DecoderTensors(weights, scales, fp8, final_norm, cos_sin, workspace, scale, eps)

    def layers(embeds: torch.Tensor, inputs: StepInputs[torch.Tensor]) -> torch.Tensor:
        out = embeds.new_empty(len(inputs.wanted), embeds.shape[1])
        decoder_layers(
            out,
            embeds,
            k_caches,
            v_caches,
            decoder,
            inputs.positions,
            inputs.slot_mapping,
            inputs.block_table,
            inputs.query_start,
            inputs.context_lens,
            inputs.wanted,
            max_query_len,
        )
        return out

    prefill_in_parts(tokens, uploaded, sizes, embedding, features, feature_rows, layers, head)


_prefill_step = define(
    "prefill_step(Tensor(a!) tokens, Tensor uploaded, int[] sizes, Tensor embedding, "
    "Tensor[] features, int[] feature_rows, Tensor(b!)[] k_caches, Tensor(c!)[] v_caches, "
    "Tensor[] weights, Tensor[] scales, Tensor[] fp8, Tensor final_norm, Tensor cos_sin, "
    "Tensor head, Tensor workspace, int max_query_len, float scale, float eps) -> ()",
    _prefill_step_reference,
)
