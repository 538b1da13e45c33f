"""Fills a model from a checkpoint directory in the Hugging Face layout, or with random numbers.

safetensors only: nothing is unpickled. The files' headers are checked against the configuration
before memory is taken; then network.tensor_reader puts each tensor in its place.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from llava_engine.errors import MemoryExhausted, UnsupportedModel, WeightsError
from llava_engine.network import clip
from llava_engine.network.layers import FormatOf, unquantised
from llava_engine.network.llava import LlavaConfig, LlavaModel
from llava_engine.network.safetensors_file import SafetensorsFile, StoredTensor
from llava_engine.network.saved_weights import SavedWeight, take_saved_weights
from llava_engine.network.staging import AsSaved, Dequantised, Quantised, Room, Staged
from llava_engine.network.tensor_reader import DTYPES, read_in_turn
from llava_engine.quant import Format, bnb, fits, quantised

logger = logging.getLogger(__name__)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "language_model.lm_head.weight"
_CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

Progress = Callable[[str, int, int], None]
"""Called with a stage, the bytes that are done and the bytes in all."""


def load_model(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Format | None = None,
    progress: Progress | None = None,
) -> LlavaModel:
    """The model that `directory` holds, on `device` in `dtype`.

    quantization: of the decoder's products. Those that are saved quantised stay as they are, and
    the rest of the model is in `dtype`, saved quantised or not. progress is called as ("load",
    bytes read, bytes in all). Raises ModelError or UnsupportedModel for config.json or the
    quantization, KernelsNotBuilt where that needs a package, WeightsError for the weights and
    MemoryExhausted where they do not fit; all memory that was taken for them is given back then.
    """
    config = LlavaConfig.from_directory(directory)
    if quantization is not None and config.quantization not in (None, quantization):
        raise UnsupportedModel(
            f'EngineConfig(quantization="{quantization}") does not go with a checkpoint that was '
            f"saved in {config.quantization}; leave it out"
        )
    with ExitStack() as files:
        stored = _read_headers(directory, files)
        if _HEAD in stored:
            # As transformers does it: a head that is there counts, tied or not.
            config = replace(config, tie_word_embeddings=False)
        saved = take_saved_weights(stored, config.quantization) if config.quantization else {}
        _check(config, stored, saved)
        format_of = _saved_format(saved) if config.quantization else _format(config, quantization)
        with _fitting(device):
            try:
                return _filled(config, stored, saved, format_of, device, dtype, progress)
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # they hold the model
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # who places models asks the driver what is free
                raise


def _filled(
    config: LlavaConfig,
    stored: dict[str, StoredTensor],
    saved: dict[str, SavedWeight],
    format_of: FormatOf,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> LlavaModel:
    model = LlavaModel(config, device=device, dtype=dtype, format=format_of)
    slots = dict(model.slots())
    whole = [(stored[name], view) for name, view in slots.items() if name not in saved]
    staged: list[Staged] = [
        Dequantised(view, saved[name]) for name, view in slots.items() if name in saved
    ]
    for product, parts in model.quantised():
        names = [f"{name}.weight" for name in parts]
        if names[0] in saved:
            staged.append(AsSaved(product, [saved[name] for name in names]))
        else:
            staged.append(Quantised(product, [stored[name] for name in names], dtype))
    room = Room(staged, device)
    steps = [whole, *(room.places(index) for index in range(len(staged)))]
    total = sum(tensor.nbytes for step in steps for tensor, _ in step)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress("load", done, total)

    advance(0)
    read_in_turn(steps, device, advance, lambda step: room.use(step - 1) if step else None)
    if staged and device.type == "cuda":
        del room, steps
        torch.cuda.empty_cache()  # the staging, before others ask the driver what is free
    return model


def random_model(
    config: LlavaConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    quantization: Format | None = None,
) -> LlavaModel:
    """A model of the true shape with random weights (standard deviation 0.02), for benchmarks."""
    with _fitting(device):
        model = LlavaModel(config, device=device, dtype=dtype, format=_format(config, quantization))
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, view in model.slots():
        if "norm" in name and name.endswith(".weight"):
            view.fill_(1)
        else:
            view.normal_(0, 0.02, generator=generator)
    for product, parts in model.quantised():
        assert product.format is not None
        with _fitting(device):
            matrix = torch.empty(product.outputs, product.inputs, device=device, dtype=dtype)
            matrix.normal_(0, 0.02, generator=generator)
            product.load(quantised(product.format, torch.split(matrix, list(parts.values()))))
            del matrix
    if quantization is not None and device.type == "cuda":
        torch.cuda.empty_cache()
    return model


def quantize_for_prefill(model: LlavaModel) -> None:
    """LlavaModel.quantize_for_prefill. Raises MemoryExhausted where the copies do not fit."""
    with _fitting(model.device):
        model.quantize_for_prefill()


@contextmanager
def _fitting(device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Only of the GPU's own memory torch says it with a type.
        if (
            isinstance(error, torch.OutOfMemoryError)
            or getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY
            or "can't allocate memory" in str(error)
        ):
            raise MemoryExhausted(f"the weights do not fit the memory of {device}") from error
        raise


def _read_headers(directory: Path, files: ExitStack) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by its published name; `files` keeps the files open."""
    stored: dict[str, StoredTensor] = {}
    for file_name, listed in _shards(directory).items():
        file = files.enter_context(SafetensorsFile(directory / file_name))
        absent = listed - file.tensors.keys()
        if absent:
            raise WeightsError(f"{file_name} lacks {_some(absent)}, which {_INDEX} puts there")
        for name, tensor in sorted(file.tensors.items()):
            published = published_name(name)
            if published in stored:
                raise WeightsError(f"tensor {name} is there twice")
            stored[published] = tensor
    return stored


def _shards(directory: Path) -> dict[str, set[str]]:
    """The checkpoint's files, each with the tensors that the index, if there is one, puts there."""
    if (directory / _SINGLE).exists():
        return {_SINGLE: set()}
    try:
        index = json.loads((directory / _INDEX).read_bytes())
    except FileNotFoundError as error:
        raise WeightsError(
            f"the model's directory has neither {_SINGLE} nor {_INDEX}; other formats are not read"
        ) from error
    except OSError as error:
        raise WeightsError(f"{_INDEX} cannot be read") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{_INDEX} is not valid JSON") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{_INDEX} has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        # A shard stands beside the index: a name that leads elsewhere is no shard of this model.
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file_name):
            raise WeightsError(f"{_INDEX} puts {name} in {file_name!r}, which is no shard's name")
        shards.setdefault(file_name, set()).add(name)
    for file_name in shards:
        if not (directory / file_name).is_file():
            raise WeightsError(f"{file_name} is missing, which {_INDEX} names")
    return dict(sorted(shards.items()))


_RENAMES = (
    (re.compile(r"model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)"), ""),
    (re.compile(r"lm_head\."), "language_model.lm_head."),
    (re.compile(r"language_model\.(?!model\.|lm_head\.)"), "language_model.model."),
    (re.compile(r"vision_tower\.(?!vision_model\.)"), "vision_tower.vision_model."),
)


def published_name(name: str) -> str:
    """A tensor's name as in the published checkpoints, whichever way this one names it.

    Published: language_model.model.*, language_model.lm_head, vision_tower.vision_model.*; newer
    transformers: model.language_model.*, lm_head, model.vision_tower.*, or a mixture.
    """
    for pattern, replacement in _RENAMES:
        match = pattern.match(name)
        if match:
            name = replacement + name[match.end() :]
    return name


def _format(config: LlavaConfig, quantization: Format | None) -> FormatOf:
    """Every product in the format, but for those whose inputs it does not take.

    Raises UnsupportedModel where there is no other, and KernelsNotBuilt without the package that
    quantises.
    """
    if quantization is None:
        return unquantised
    text = config.text
    widths = {text.hidden_size, text.num_heads * text.head_dim, text.intermediate_size}
    left = sorted(width for width in widths if not fits(quantization, width))
    if len(left) == len(widths):
        raise UnsupportedModel(
            f"no product of this model can be quantised to {quantization}: it takes no inputs of "
            f"{' or '.join(map(str, left))}"
        )
    if left:
        logger.info("Products of %s inputs are not quantised to %s.", left, quantization)
    if quantization != "fp8":
        bnb.functional(quantization)
    return lambda names, inputs: quantization if fits(quantization, inputs) else None


def _saved_format(saved: dict[str, SavedWeight]) -> FormatOf:
    """Products whose matrices were all saved quantised stay so, if their rows can be stacked."""

    def format_of(names: Iterable[str], inputs: int) -> Format | None:
        found = [saved.get(name) for name in names]
        first = found[0]
        return first.format if first and all(part and part.stacks for part in found) else None

    return format_of


def _check(
    config: LlavaConfig, stored: dict[str, StoredTensor], saved: dict[str, SavedWeight]
) -> None:
    """Raise WeightsError unless both together are what the configuration promises."""
    model = LlavaModel(config, device=torch.device("meta"), dtype=torch.float32)
    wanted = {name: tuple(view.shape) for name, view in model.slots()}
    for name, weight in saved.items():
        tensor = weight.tensors["weight"]
        if name not in wanted and not _unused(config).fullmatch(name):
            raise WeightsError(f"config.json has no place for tensor {tensor.name}")
        if weight.shape != wanted.pop(name, weight.shape):
            raise WeightsError(
                f"tensor {tensor.name} has shape {list(weight.shape)}, quantised; "
                "config.json asks for another"
            )
    missing = wanted.keys() - stored.keys()
    if missing:
        raise WeightsError(f"the checkpoint lacks {_some(missing)}")
    for name, shape in wanted.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise WeightsError(
                f"tensor {tensor.name} has shape {list(tensor.shape)}; "
                f"config.json asks for {list(shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise WeightsError(
                f"tensor {tensor.name} is of type {tensor.dtype}; read are {', '.join(DTYPES)}"
            )
    unused = _unused(config)
    surplus = [
        stored[name].name for name in stored.keys() - wanted.keys() if not unused.fullmatch(name)
    ]
    if surplus:
        raise WeightsError(f"config.json has no place for {_some(surplus)}")


def _unused(config: LlavaConfig) -> re.Pattern[str]:
    """Names of tensors that checkpoints hold and this engine has no use for."""
    tower = re.escape(clip.PREFIX)
    built = max(config.vision_feature_layers)
    layers = "|".join(str(index) for index in range(built, config.vision.num_layers))
    patterns = [
        rf"{tower}\.embeddings\.position_ids",
        rf"{tower}\.post_layernorm\.(weight|bias)",
        r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    ]
    if layers:
        parts = r"(self_attn\.(q|k|v|out)_proj|layer_norm[12]|mlp\.fc[12])\.(weight|bias)"
        patterns.append(rf"{tower}\.encoder\.layers\.({layers})\.{parts}")
    return re.compile("|".join(patterns))


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    if not others:
        return f"tensor {first}"
    return f"tensor {first} and {len(others)} more"
