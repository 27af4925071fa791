"""The Hugging Face hub: a repository's config and weights as a local folder, and an export put there.

Through huggingface_hub, which honours its environment: HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT, HF_TOKEN.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from olvae.checkpoint import WEIGHT_SUFFIXES

__all__ = ["CONFIG_PATTERNS", "fetch", "is_hub_id", "snapshot", "upload"]

CONFIG_PATTERNS = ("*.json", "*.yaml", "*.yml")


def is_hub_id(text: str) -> bool:
    """Whether this could be OWNER/NAME on the hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None and not text.endswith(WEIGHT_SUFFIXES)


def fetch(repo_id: str, revision: str | None = None, patterns: Sequence[str] = CONFIG_PATTERNS) -> Path:
    """Download the files of these patterns and the weights, or find them in the cache; the folder they are in.

    Of the weights, files at the top of the repository only, safetensors rather than pickles.

    Raises:
        FileNotFoundError: there is no such repository or revision, or the hub can't be reached.
        OSError: the download broke off.
    """
    for suffix in WEIGHT_SUFFIXES:
        folder = snapshot(repo_id, [*patterns, f"*{suffix}"], ["*/*"], revision)
        if any(folder.glob(f"*{suffix}")):
            break
    return folder


def upload(folder: Path, repo_id: str, private: bool, message: str, token: str | None) -> str:
    """Make the repository if need be, and upload a folder to it; the address of the commit.

    Raises:
        OSError: the hub refuses, or can't be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=message))
    except OfflineModeIsEnabled as error:
        raise OSError(f"{repo_id}: not uploaded: HF_HUB_OFFLINE is set") from error
    except Exception as error:  # of HTTP, or of the connection: which class that is depends on the version
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise OSError(
                f"{repo_id}: not uploaded: the hub wants a token that may write there: set HF_TOKEN, or run "
                f"hf auth login ({error.response.status_code})"
            ) from error
        raise OSError(f"{repo_id}: not uploaded: {_first_line(error)}") from error


def snapshot(repo_id: str, patterns: Sequence[str], ignored: Sequence[str] = (), revision: str | None = None) -> Path:
    """Download the files of these patterns, or find them in the cache; the folder they are in. Raises as fetch."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repo_id}@{revision}" if revision else repo_id
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=[*patterns], ignore_patterns=[*ignored])
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo_id}: no such file or folder, and not an id of the hub") from error
    except GatedRepoError as error:
        raise FileNotFoundError(f"{where}: access is restricted: ask for it on the hub, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: no such file or folder here, and no such repository on the hub (a private one needs HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{where}: the repository has no such revision") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: no such file or folder here, not in the hub's cache, and the hub can't be reached: "
            f"{_first_line(error.__cause__ or error)}"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"{where}: the hub answers: {_first_line(error)}") from error
    except Exception as error:  # the connection broke off
        raise OSError(f"{where}: not downloaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
