"""PictureCache against preparing anew: what it decodes, what it keeps, and who may share it."""

from __future__ import annotations

import gc
import io
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from support.pictures import rows_of

from llava_engine.errors import ImageDecodeError, ImageTooLarge
from llava_engine.image import picture_cache
from llava_engine.image.load import load_image
from llava_engine.image.picture_cache import PictureCache, PreparedPicture
from llava_engine.image.preprocess import ImageProcessorConfig, picture_key, preprocess

PROCESSOR = ImageProcessorConfig(shortest_edge=56, crop_size=(56, 56))
SIZE = 3 * 56 * 56  # bytes of one resampled picture
DECODED = 3 * 70 * 90  # and of one that is not
LIMITS = {"max_bytes": 1 << 20, "max_pixels": 1 << 20}


def cache(
    capacity: int = 1 << 20, processor: ImageProcessorConfig = PROCESSOR, resample: bool = True
) -> PictureCache:
    return PictureCache(processor, **LIMITS, capacity=capacity, resample=resample)


def image(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8))


def encoded(seed: int = 0, format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    image(seed).save(file, format)
    return file.getvalue()


def fresh(source: object, processor: ImageProcessorConfig = PROCESSOR) -> tuple[bytes, np.ndarray]:
    loaded = load_image(source, **LIMITS)
    return picture_key(loaded, processor), preprocess(loaded, processor)


def values(picture: PreparedPicture) -> np.ndarray:
    """float32 [3, 56, 56], put together from the one patch that is as large as the picture."""
    return rows_of(picture.pixels, 56).view(3, 56, 56).numpy()


class Decodes:
    """Counts the files that Pillow opens, and lets a test do something as it opens one."""

    def __init__(self) -> None:
        self.count = 0
        self.before: Callable[[], None] = lambda: None


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Decodes:
    counted, real = Decodes(), ImageFile.ImageFile.__init__

    def opening(self: ImageFile.ImageFile, *args: object, **options: object) -> None:
        counted.count += 1
        counted.before()
        real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageFile.ImageFile, "__init__", opening)
    return counted


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_is_decoded_once_in_whatever_form_it_comes(
    format: str, tmp_path: Path, decodes: Decodes
) -> None:
    content = encoded(format=format)
    key, pixels = fresh(content)
    path = tmp_path / "picture"
    path.write_bytes(content)
    forms = [content, bytearray(content), memoryview(content), path, str(path), io.BytesIO(content)]
    pictures = cache()
    decodes.count = 0
    for form in forms:
        found = pictures.prepare(form)
        assert found.key == key
        np.testing.assert_array_equal(values(found), pixels, strict=True)
    assert decodes.count == 1
    assert pictures.nbytes == SIZE


def test_what_is_kept_unresampled_counts_with_all_that_it_holds(decodes: Decodes) -> None:
    """What the crop shows is a view, which holds the picture, and a copy if that is much larger."""
    pictures = cache(2 * DECODED + DECODED // 2, resample=False)
    for seed, count in ((1, 1), (2, 2), (1, 2), (3, 2)):
        found = pictures.prepare(encoded(seed))
        np.testing.assert_array_equal(values(found), fresh(encoded(seed))[1], strict=True)
        assert found.pixels.pixels.nbytes < found.pixels.nbytes == DECODED
        assert pictures.nbytes == count * DECODED
    decodes.count = 0
    pictures.prepare(encoded(1))
    assert decodes.count == 0

    file = io.BytesIO()
    image(1).resize((230, 70)).save(file, "PNG")
    long = cache(resample=False)
    found = long.prepare(file.getvalue())
    assert found.pixels.pixels.base is None
    assert long.nbytes == found.pixels.nbytes == found.pixels.pixels.nbytes < 3 * 70 * 115


def test_while_much_waits_for_a_device_pictures_are_resampled_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(picture_cache, "_MOST_DECODED", 2 * DECODED)
    pictures = cache(capacity=0, resample=False)
    found = [pictures.prepare(image(seed)) for seed in range(5)]
    assert [picture.pixels.nbytes for picture in found] == 3 * [DECODED] + 2 * [SIZE]
    for seed, picture in enumerate(found):
        np.testing.assert_array_equal(values(picture), fresh(image(seed))[1], strict=True)
    del found, picture
    gc.collect()
    assert pictures.prepare(image(5)).pixels.nbytes == DECODED


def test_other_bytes_are_another_file(tmp_path: Path) -> None:
    pictures = cache()
    path, held = tmp_path / "picture", bytearray(encoded(1))
    path.write_bytes(held)
    for source in (path, held):
        assert pictures.prepare(source).key == fresh(encoded(1))[0]
    path.write_bytes(encoded(2))
    held[:] = encoded(3)
    for source, seed in ((path, 2), (held, 3)):
        found = pictures.prepare(source)
        np.testing.assert_array_equal(values(found), fresh(encoded(seed))[1], strict=True)
        assert found.key == fresh(encoded(seed))[0]


def test_images_and_arrays_are_prepared_each_time_and_not_kept() -> None:
    pictures = cache()
    array = np.asarray(image(1)).copy()
    for source in (image(1), array):
        found = pictures.prepare(source)
        assert found.key == fresh(source)[0]
        np.testing.assert_array_equal(values(found), fresh(image(1))[1], strict=True)
    array[:] = np.asarray(image(2))
    np.testing.assert_array_equal(values(pictures.prepare(array)), fresh(image(2))[1], strict=True)
    assert pictures.nbytes == 0


def test_what_requests_share_cannot_be_written_into() -> None:
    for resample in (True, False):
        pictures = cache(resample=resample)
        for _ in range(2):
            for array in pictures.prepare(encoded()).pixels.arrays:
                with pytest.raises(ValueError, match="read-only"):
                    array[0, 0] = 1


def test_another_processor_makes_another_picture() -> None:
    others = [PROCESSOR, ImageProcessorConfig(shortest_edge=60, crop_size=(56, 56))]
    found = [cache(processor=processor).prepare(encoded()) for processor in others]
    assert found[0].key != found[1].key
    for picture, processor in zip(found, others, strict=True):
        np.testing.assert_array_equal(values(picture), fresh(encoded(), processor)[1], strict=True)


def test_the_least_recently_used_go_first(decodes: Decodes) -> None:
    pictures = cache(3 * SIZE + SIZE // 2)

    def decoded(*seeds: int) -> list[bool]:
        made = []
        for seed in seeds:
            decodes.count = 0
            pictures.prepare(encoded(seed))
            made.append(decodes.count == 1)
        assert pictures.nbytes <= 3 * SIZE
        return made

    assert decoded(1, 2, 3) == [True, True, True]
    assert decoded(1, 4) == [False, True]  # 4 drives 2 out, since 1 was used again
    assert decoded(1, 3, 4) == [False, False, False]
    assert decoded(2, 3, 4, 1) == [True, False, False, True]


@pytest.mark.parametrize("capacity", [0, SIZE - 1])
def test_without_room_for_a_picture_nothing_is_kept(capacity: int, decodes: Decodes) -> None:
    pictures = cache(capacity)
    for _ in range(2):
        np.testing.assert_array_equal(
            values(pictures.prepare(encoded())), fresh(encoded())[1], strict=True
        )
    assert decodes.count == 4 and pictures.nbytes == 0


def test_a_picture_that_fails_is_judged_anew(decodes: Decodes) -> None:
    pictures = cache()
    for _ in range(2):
        with pytest.raises(ImageDecodeError):
            pictures.prepare(encoded()[:-200])
    assert decodes.count == 2 and pictures.nbytes == 0

    def no_memory() -> None:
        raise MemoryError

    decodes.before = no_memory
    with pytest.raises(ImageTooLarge):
        pictures.prepare(encoded())
    decodes.before = lambda: None
    assert pictures.prepare(encoded()).key == fresh(encoded())[0]


def test_the_limits_hold_for_pictures_seen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded()
    room = {"capacity": 1 << 20, "resample": True}
    small = PictureCache(PROCESSOR, max_bytes=len(content) - 1, max_pixels=1 << 20, **room)
    narrow = PictureCache(PROCESSOR, max_bytes=1 << 20, max_pixels=70 * 90 - 1, **room)
    for pictures in (small, narrow):
        for _ in range(2):
            with pytest.raises(ImageTooLarge):
                pictures.prepare(content)
    pictures = cache()
    pictures.prepare(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70 * 90 - 1)
    with pytest.raises(ImageTooLarge):
        pictures.prepare(content)


def test_two_that_bring_the_same_new_file_at_once(decodes: Decodes) -> None:
    pictures = cache()
    key, pixels = fresh(encoded())
    both = threading.Barrier(2, timeout=30)

    def meet() -> None:  # each is within its decode while the other is
        both.wait()

    decodes.before = meet
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(pictures.prepare, [encoded()] * 2))
    assert [picture.key for picture in found] == [key, key]
    for picture in found:
        np.testing.assert_array_equal(values(picture), pixels, strict=True)
    assert pictures.nbytes == SIZE
    decodes.before = pytest.fail
    assert pictures.prepare(encoded()).key == key


def test_many_threads_in_little_room() -> None:
    pictures = cache(4 * SIZE)
    files = [encoded(seed) for seed in range(10)]
    expected = [fresh(file) for file in files]

    def reader(number: int) -> int:
        most = 0
        for seed in np.random.default_rng(number).integers(0, len(files), 60):
            found = pictures.prepare(files[seed])
            assert found.key == expected[seed][0]
            np.testing.assert_array_equal(values(found), expected[seed][1], strict=True)
            most = max(most, pictures.nbytes)
        return most

    with ThreadPoolExecutor(8) as threads:
        most = max(threads.map(reader, range(8)))
    assert most == pictures.nbytes == 4 * SIZE


def test_closing_gives_the_memory_back_even_from_under_a_decode(decodes: Decodes) -> None:
    pictures = cache()
    kept = weakref.ref(pictures.prepare(encoded(1)).pixels.pixels)
    assert kept() is not None and pictures.nbytes == SIZE
    decodes.before = pictures.close
    late = weakref.ref(pictures.prepare(encoded(2)).pixels.pixels)
    gc.collect()
    assert kept() is None and late() is None and pictures.nbytes == 0
