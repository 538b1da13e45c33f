"""A model's record to one local directory that holds its checkpoint.

Downloads and caching are huggingface_hub's, with its settings (HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE, HF_TOKEN) and its progress bars. Nothing here reads a checkpoint's weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from llava_engine.errors import ModelError, UnknownModel, WeightsError
from llava_engine.registry import ModelInfo

ALLOWED = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""The files that are downloaded. Code, pickles and other formats stay where they are."""


def resolve(info: ModelInfo) -> Path:
    """The directory of `info`'s checkpoint, downloaded first where it is not here yet.

    A hub model is one snapshot at `info.revision`; one in the cache is used when the hub cannot be
    reached. Raises UnknownModel where the hub has no such model or revision, WeightsError where
    files of the checkpoint are missing, and ModelError where it cannot be had; `retryable` is true
    of what may pass.
    """
    if info.directory is not None:
        directory = Path(info.directory)
        if not directory.is_dir():
            raise WeightsError(f"The checkpoint of {info.registry_key!r} is no directory.")
    else:
        directory = _download(info)
    _check(directory, info)
    return directory


def checkpoint_mb(directory: Path) -> int:
    """Size of a checkpoint's weights on disk in MiB, rounded up; 0 where there are none.

    Raises WeightsError where the directory cannot be read.
    """
    try:
        size = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
    except OSError as error:
        raise WeightsError("The checkpoint's files cannot be read.") from error
    return -(-size // 2**20)


def saved_quantised(directory: Path) -> bool:
    """Whether a checkpoint's matrices were quantised before they were saved, and stay so."""
    try:
        config = json.loads((Path(directory) / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # whoever loads it says what is wrong
    return isinstance(config, dict) and config.get("quantization_config") is not None


def cached(info: ModelInfo) -> Path | None:
    """Where `resolve` would find the checkpoint without a network, or None; asks nobody."""
    if info.directory is not None:
        directory: Path | None = Path(info.directory)
    else:
        import huggingface_hub

        try:
            directory = Path(
                huggingface_hub.snapshot_download(
                    str(info.repo_id),
                    revision=info.revision,
                    allow_patterns=list(ALLOWED),
                    local_files_only=True,
                )
            )
        except (OSError, ValueError):
            directory = None
    if directory is None or not (directory / "config.json").is_file():
        return None
    return directory


def _check(directory: Path, info: ModelInfo) -> None:
    if not (directory / "config.json").is_file():
        raise WeightsError(f"The checkpoint of {info.registry_key!r} has no config.json.")
    if not any(directory.glob("*.safetensors")):
        raise WeightsError(
            f"The checkpoint of {info.registry_key!r} has no safetensors files, "
            "and no other format is read."
        )


def _download(info: ModelInfo) -> Path:
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    repo = str(info.repo_id)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=info.revision, allow_patterns=list(ALLOWED)
            )
        )
    except errors.HFValidationError as error:
        raise UnknownModel(f"{repo!r} is no name of a model on the hub.") from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"The hub gives {repo!r} only to accounts that accepted its terms; "
            "log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UnknownModel(
            f"The hub has no model {repo!r}, or it is private and no valid HF_TOKEN is set."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UnknownModel(f"The hub's {repo!r} has no revision {info.revision!r}.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{repo!r} is not wholly in the local cache, and HF_HUB_OFFLINE is set."
            ) from error
        raise _passing(
            f"{repo!r} is not wholly in the local cache, and the hub cannot be reached."
        ) from error
    except (httpx.HTTPError, errors.FileMetadataError) as error:
        raise _passing(f"The hub failed while {repo!r} was fetched.") from error
    except OSError as error:
        if error.errno is not None:
            raise ModelError(
                f"{repo!r} cannot be stored in the local cache: {error.strerror}."
            ) from error
        raise _passing(f"{repo!r} arrived incomplete from the hub.") from error
    except Exception as error:  # its parts (xet, file locks) have exceptions of their own
        raise ModelError(f"{repo!r} cannot be fetched from the hub.") from error


def _passing(message: str) -> ModelError:
    """An error that may be gone at the next call."""
    error = ModelError(message)
    error.retryable = True
    return error
