"""A picture seen before, through the whole pool with the demo checkpoint: the same answer, without
decoding it again, whatever else of it is still kept."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image, ImageFile
from support.http_server import HttpServer
from support.pool_fakes import model_of

import llava_engine
from llava_engine import EngineConfig, ImageDecodeError, PoolConfig, VisionModel, WorkerPool

QUERY = "Describe the picture."
ASKED = {"max_new_tokens": 16, "ignore_eos": True}


def config(**fields: int) -> EngineConfig:
    return EngineConfig(device="cpu", kv_cache_mb=32, allow_hosts=("127.0.0.1",), **fields)


def jpeg(seed: int = 0) -> bytes:
    image = Image.new("RGB", (160, 112), (200, 200, 190))
    image.paste((200, 30, 30), (10 + seed, 10, 50 + seed, 50))
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by an entry with each file that Pillow opens."""
    files: list[str] = []
    real = ImageFile.ImageFile.__init__

    def opening(self: ImageFile.ImageFile, *args: object, **options: object) -> None:
        files.append(type(self).__name__)
        real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageFile.ImageFile, "__init__", opening)
    return files


def ids(model: VisionModel, image: object, **more: object) -> tuple[list[int], int]:
    """The answer's token ids, and how many of the prompt's were cached."""
    stream = model.describe_image(image, QUERY, **ASKED, **more)
    tokens = [token for chunk in stream for token in chunk.token_ids]
    return tokens, stream.usage.cached_tokens


def test_bytes_paths_and_urls_of_one_picture_are_decoded_once(
    tmp_path: Path, opened: list[str]
) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(jpeg())
    answers = {}
    for kept in (0, 8):
        opened.clear()
        with WorkerPool(PoolConfig()) as pool, HttpServer({"/picture.jpg": jpeg()}) as server:
            model = llava_engine.get("llava-tiny", config(pixel_cache_mb=kept), pool=pool)
            said = [ids(model, source) for source in (jpeg(), path, io.BytesIO(jpeg()))]
            stream = model.describe_url(server.url("/picture.jpg"), QUERY, **ASKED)
            tokens = [token for chunk in stream for token in chunk.token_ids]
            answers[kept] = [*said, (tokens, stream.usage.cached_tokens)]
        assert len(opened) == (1 if kept else 4)
    assert answers[8] == answers[0]
    assert [tokens for tokens, _ in answers[8]] == [answers[0][0][0]] * 4
    assert [cached > 0 for _, cached in answers[8]] == [False, True, True, True]


def test_pixels_are_there_when_features_and_kv_blocks_are_not(opened: list[str]) -> None:
    with WorkerPool(PoolConfig()) as pool:
        model = llava_engine.get("llava-tiny", config(image_cache_mb=0), pool=pool)
        first = ids(model, jpeg(), cache_salt="one")
        again = ids(model, jpeg(), cache_salt="two")  # which shares no KV block with the first
        other = ids(model, jpeg(60), cache_salt="three")
    assert first == again and first[1] == 0 and other != first
    assert len(opened) == 2


def test_a_broken_picture_is_refused_each_time(opened: list[str]) -> None:
    with WorkerPool(PoolConfig()) as pool:
        model = llava_engine.get("llava-tiny", config(), pool=pool)
        for _ in range(2):
            with pytest.raises(ImageDecodeError):
                model.describe_image(jpeg()[:-100], QUERY).text()
        assert len(opened) == 2
        assert ids(model, jpeg())[0]


def test_without_a_gpu_the_kept_pixels_count_as_the_models_memory() -> None:
    used = {}
    for kept in (0, 1, 64):
        with WorkerPool(PoolConfig()) as pool:
            model = llava_engine.get("llava-tiny", config(pixel_cache_mb=kept), pool=pool)
            for seed in range(100):
                model.describe_image(jpeg(seed), QUERY, max_new_tokens=1).text()
            (site,) = model_of(pool, model.registry_key).sites.values()
            used[kept] = site.backend.memory_mb()
    size = 3 * 112 * 112  # bytes of one picture's pixels
    assert 100 * size >> 20 == 3
    assert used[1] - used[0] in (0, 1)
    assert used[64] - used[0] in (3, 4)
