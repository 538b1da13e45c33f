"""The decoder's prefill on the GPU, whose products differ with the rows: against transformers with
the same weights, at twice its error. For fp8 that of the references, from the same copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.gpu import GPU, NEEDS_GPU
from support.kernels import poisoned, within_twice
from transformers import LlavaForConditionalGeneration

from llava_engine.kernels.library import references
from llava_engine.network.llama import Batch
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import load_model

pytestmark = NEEDS_GPU

BLOCK_SIZE = 64
TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1104,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}
ROWS = [127, 128, 511, 512, 620, 959, 960, 1301]  # about the limits in csrc/decoder.cpp


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(made, seed=5, text_config=TEXT)
    return made


def prefilled(
    model: LlavaModel, embeds: torch.Tensor, wanted: torch.Tensor | None = None
) -> torch.Tensor:
    """Hidden rows of one sequence, over blocks that are dealt out of order."""
    rows, text = len(embeds), model.config.text
    count = -(-rows // BLOCK_SIZE)
    shape = (count, text.num_kv_heads, BLOCK_SIZE, text.head_dim)
    caches = [
        [poisoned(*shape, dtype=model.dtype, device=str(GPU)) for _ in range(text.num_layers)]
        for _ in "kv"
    ]
    blocks, positions = torch.randperm(count, device=GPU), torch.arange(rows, device=GPU)
    batch = Batch(
        positions=positions,
        slot_mapping=blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_table=blocks.int().unsqueeze(0),
        query_start=torch.tensor([0, rows], dtype=torch.int32, device=GPU),
        context_lens=torch.tensor([rows], dtype=torch.int32, device=GPU),
        max_query_len=rows,
    )
    return model.forward(embeds.clone(), batch, *caches, wanted)


@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_every_number_of_rows_gives_transformers_rows(
    dtype: torch.dtype, fp8: bool, directory: Path
) -> None:
    if fp8 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 needs Hopper")
    ours = load_model(directory, device=GPU, dtype=dtype)
    if fp8:
        ours.quantize_for_prefill()
    theirs = LlavaForConditionalGeneration.from_pretrained(directory, dtype=dtype)
    decoder = theirs.eval().to(GPU).model.language_model
    generator = torch.Generator(GPU)
    print("seed", generator.seed())
    given = torch.randn(max(ROWS), TEXT["hidden_size"], generator=generator, device=GPU).to(dtype)

    def oracle(embeds: torch.Tensor) -> torch.Tensor:
        return decoder(inputs_embeds=embeds.unsqueeze(0)).last_hidden_state[0]

    plain = oracle(given)
    if fp8:
        with references():
            plain = prefilled(ours, given)
    decoder.double()
    truth = oracle(given.double())
    for rows in ROWS:
        hidden = prefilled(ours, given[:rows])
        within_twice(hidden, plain[:rows], truth[:rows])  # causal: the first rows of more
        wanted = torch.tensor([rows - 1, 5, 17], device=GPU)
        some = prefilled(ours, given[:rows], wanted)
        within_twice(some, plain[wanted], truth[wanted])
        none = prefilled(ours, given[:rows], wanted[:0])
        assert none.shape == (0, TEXT["hidden_size"])
