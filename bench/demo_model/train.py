"""Trains llava-tiny from a seed on one GPU and writes it in the Hugging Face layout.

    python -m bench.demo_model.train --out llava_engine/demo/llava-tiny

Each step encodes a picture once and learns all its answers at the same time: the questions are
branches behind one picture prefix that cannot see each other. A second head, thrown away at the
end, names what lies at each patch: it teaches the vision tower long before the answers could.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from bench.demo_model import data
from bench.demo_model.data import BRANCH_TOKENS, BRANCHES, EDGE, GRID, IGNORE, LONG, SHORT, Rows
from bench.demo_model.questions import KINDS
from bench.demo_model.scenes import COLOURS, SHAPES
from bench.demo_model.tokenizer import VOCAB_SIZE, build_tokenizer

WIDTH, HEADS = 192, 6
PATCH_CLASSES = (1 + len(COLOURS), 1 + len(SHAPES), 1 + len(data.LETTERS))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VALIDATION_SEED = 1_000_003
VALIDATION_ROWS = 1024


def make_config(image_token: int) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            image_size=EDGE,
            patch_size=data.PATCH,
            projection_dim=WIDTH,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=WIDTH,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        image_token_index=image_token,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )


def initialise(model: LlavaForConditionalGeneration) -> None:
    """Weights for a width of 192: the published initialisers assume a far wider model."""
    depth = 2 * model.config.text_config.num_hidden_layers
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        std = weight[0].numel() ** -0.5
        if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
            std /= depth**0.5
        if "embed" in name and "patch" not in name:
            std = 0.1
        if name == "lm_head.weight":
            std = 0.02
        nn.init.normal_(weight, std=std)


class Student(nn.Module):
    """The model together with what only training needs: the branch layout and the patch head."""

    mask: Tensor
    positions: Tensor
    prefix: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, model: LlavaForConditionalGeneration, prefix: list[int]) -> None:
        super().__init__()
        self.model = model
        self.patch_head = nn.Linear(WIDTH, sum(PATCH_CLASSES))
        shared = len(prefix)
        branch = torch.tensor([0] * LONG + [1 + i // SHORT for i in range(BRANCH_TOKENS - LONG)])
        owner = torch.cat((torch.full((shared,), -1), branch))
        order = torch.arange(shared + BRANCH_TOKENS)
        visible = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
        self.register_buffer("mask", (visible & (order[None, :] <= order[:, None]))[None, None])
        begin = torch.where(branch == 0, 0, LONG + (branch - 1) * SHORT)
        inside = torch.arange(BRANCH_TOKENS) - begin
        self.register_buffer("positions", torch.cat((torch.arange(shared), shared + inside))[None])
        self.register_buffer("prefix", torch.tensor(prefix[: shared - GRID * GRID]))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [n, BRANCH_TOKENS, WIDTH] and patch logits [n, patches, classes]."""
        core = self.model.model
        values = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        seen = core.vision_tower(values).last_hidden_state[:, 1:]
        embed = core.language_model.embed_tokens
        head = embed(self.prefix)[None].expand(len(pixels), -1, -1)
        rows = torch.cat(
            (head, core.multi_modal_projector(seen).to(head.dtype), embed(tokens)), dim=1
        )
        hidden = core.language_model(
            inputs_embeds=rows,
            attention_mask=self.mask.expand(len(pixels), 1, -1, -1),
            position_ids=self.positions,
            use_cache=False,
        ).last_hidden_state
        return hidden[:, -BRANCH_TOKENS:], self.patch_head(seen)


class Shelf:
    """Rows on the device, filled by a thread while training reads the part that is there."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.pixels = torch.empty((count, EDGE, EDGE, 3), dtype=torch.uint8, device=device)
        self.tokens = torch.empty((count, BRANCH_TOKENS), dtype=torch.int16, device=device)
        self.targets = torch.empty((count, BRANCH_TOKENS), dtype=torch.int16, device=device)
        self.kinds = torch.empty((count, BRANCHES), dtype=torch.uint8, device=device)
        self.patches = torch.empty((count, 3, GRID * GRID), dtype=torch.uint8, device=device)
        self.ready = 0
        self.grown = threading.Condition()

    def put(self, rows: Rows) -> None:
        end = self.ready + len(rows.pixels)
        for name in ("pixels", "tokens", "targets", "kinds", "patches"):
            getattr(self, name)[self.ready : end].copy_(torch.from_numpy(getattr(rows, name)))
        with self.grown:
            self.ready = end
            self.grown.notify_all()

    def wait_for(self, count: int) -> None:
        with self.grown:
            self.grown.wait_for(lambda: self.ready >= count)


Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def losses(
    forward: Forward, lm_head: nn.Linear, shelf: Shelf, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the answers' tokens and of the patch labels."""
    hidden, patch_logits = forward(shelf.pixels[index], shelf.tokens[index].int())
    targets = shelf.targets[index].long()
    answered = targets != IGNORE
    logits = lm_head(hidden[answered]).float()
    answer_loss = nn.functional.cross_entropy(logits, targets[answered])
    labels = shelf.patches[index].long()
    parts = patch_logits.float().split(PATCH_CLASSES, dim=-1)
    patch_loss = torch.stack(
        [
            nn.functional.cross_entropy(p.flatten(0, 1), labels[:, i].flatten())
            for i, p in enumerate(parts)
        ]
    ).sum()
    return answer_loss, patch_loss


@torch.no_grad()
def exact_by_kind(student: Student, shelf: Shelf, autocast: torch.autocast) -> dict[str, float]:
    """Share of questions whose every token is the greedy one, as greedy decoding would answer."""
    right, asked = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
    for start in range(0, shelf.ready, 128):
        index = torch.arange(start, min(start + 128, shelf.ready), device=shelf.pixels.device)
        with autocast:
            hidden, _ = student(shelf.pixels[index], shelf.tokens[index].int())
            best = student.model.lm_head(hidden).argmax(-1)
        targets = shelf.targets[index].long()
        fine = ((best == targets) | (targets == IGNORE)).float()
        kinds = shelf.kinds[index].long().cpu()
        parts = [fine[:, :LONG], *fine[:, LONG:].split(SHORT, dim=1)]
        exact = torch.stack([part.amin(1) for part in parts], dim=1).cpu()
        right.index_add_(0, kinds.flatten(), exact.flatten())
        asked.index_add_(0, kinds.flatten(), torch.ones(kinds.numel()))
    return {kind: float(right[i] / asked[i].clamp(min=1)) for i, kind in enumerate(KINDS)}


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """The checkpoint directory, weights in fp16."""
    half = LlavaForConditionalGeneration(model.config).to(torch.float16)
    half.load_state_dict({k: v.to(torch.float16) for k, v in model.state_dict().items()})
    half.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    processor.save_pretrained(out)
    processor.image_processor.save_pretrained(out)


def schedule(step: int, steps: int, warm: int) -> float:
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) * 0.99 + 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=256, help="pictures in a step")
    parser.add_argument("--pictures", type=int, default=256_000)
    parser.add_argument(
        "--first", type=int, default=20_480, help="pictures drawn before the first step"
    )
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--validate", type=int, default=1000, help="steps between two validations")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    started = time.monotonic()
    tokenizer = build_tokenizer()
    backend: Tokenizer = tokenizer.backend_tokenizer
    rows = data.stream_rows(backend, args.seed, args.pictures, args.workers)
    first_rows = next(rows)  # starts the worker processes, before CUDA is touched

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    shelf, checked = Shelf(args.pictures, device), Shelf(VALIDATION_ROWS, device)

    def fill() -> None:
        shelf.put(first_rows)
        for chunk in rows:
            shelf.put(chunk)

    threading.Thread(target=fill, daemon=True).start()
    checked.put(data.make_rows(backend, VALIDATION_SEED, 0, VALIDATION_ROWS))

    config = make_config(tokenizer.image_token_id)
    model = LlavaForConditionalGeneration(config)
    initialise(model)
    student = Student(model, data.prefix_ids(backend)).to(device)
    average = Student(LlavaForConditionalGeneration(config), data.prefix_ids(backend)).to(device)
    average.load_state_dict(student.state_dict())
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}
        ),
        tokenizer=tokenizer,
        patch_size=data.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    weights = [p for p in student.parameters() if p.dim() >= 2]
    others = [p for p in student.parameters() if p.dim() < 2]
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), fused=True)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    forward = torch.compile(student) if args.compile else student
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters on {device}, {args.workers} workers", flush=True)

    def validate(step: int) -> None:
        table = exact_by_kind(average, checked, autocast)
        line = "  ".join(f"{kind} {100 * share:.1f}" for kind, share in table.items())
        print(f"  step {step}: {line}", flush=True)

    draw = torch.Generator().manual_seed(args.seed)
    warm = min(500, args.steps // 10 + 1)
    for step in range(args.steps):
        grown = min(1.0, step / (0.7 * args.steps))
        known = int(args.first + (args.pictures - args.first) * grown) // data.CHUNK * data.CHUNK
        shelf.wait_for(known)
        index = torch.randint(known, (args.batch,), generator=draw).to(device)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * schedule(step, args.steps, warm)
        with autocast:
            answer_loss, patch_loss = losses(forward, model.lm_head, shelf, index)
        (answer_loss + 0.3 * patch_loss).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.999, (step + 1) / (step + 10))
        pairs = list(average.parameters()), list(student.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(*pairs, 1 - decay)
        if step % 100 == 0 or step + 1 == args.steps:
            took = time.monotonic() - started
            shown = f"answer {answer_loss.item():.4f} patch {patch_loss.item():.4f}"
            print(f"step {step} {shown} known {known} drawn {shelf.ready} {took:.1f} s", flush=True)
        if (step + 1) % args.validate == 0:
            validate(step + 1)
        if step + 1 == args.steps // 2:
            save(average.model, processor, args.out)
    validate(args.steps)
    save(average.model, processor, args.out)
    summary = {**vars(args), "out": str(args.out), "seconds": round(time.monotonic() - started)}
    print("trained", json.dumps(summary), flush=True)
    os._exit(0)  # the worker processes may still be drawing pictures that are not needed


if __name__ == "__main__":
    main()
