"""The Hugging Face hub: download a repository's config and weights, and one-line errors for downloads and uploads.

Through huggingface_hub, and so with its environment: HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT, HF_TOKEN.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from olvae.checkpoint import WEIGHT_SUFFIXES

__all__ = ["CARD", "DEFAULT_ACCESS", "HubAccess", "fetch", "is_hub_id", "snapshot", "upload_errors"]

CONFIG_PATTERNS = ("*.json", "*.yaml", "*.yml")

CARD = """---
{{ card_data }}
---

# {{ repo_id | default("LiteVAE", true) }}

An autoencoder for latent diffusion, a [LiteVAE](https://arxiv.org/abs/2405.14477), made with open-LiteVAE.

```python
from olvae import AutoencoderLiteVAE, LiteVAE

vae = LiteVAE.from_pretrained("{{ repo_id | default("OWNER/NAME", true) }}")  # a plain module
vae = AutoencoderLiteVAE.from_pretrained("{{ repo_id | default("OWNER/NAME", true) }}")  # in diffusers' pipelines
```
"""
"""The README.md that is written beside saved weights; ``olvae export`` writes a longer one."""


@dataclass(frozen=True)
class HubAccess:
    """Arguments of huggingface_hub's downloads; the defaults leave the choice to its environment."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False


DEFAULT_ACCESS = HubAccess()


def is_hub_id(text: str) -> bool:
    """Whether this could be OWNER/NAME on the hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None and not text.endswith(WEIGHT_SUFFIXES)


def fetch(repo_id: str, access: HubAccess = DEFAULT_ACCESS) -> Path:
    """Download the config and the weights, or find them in the cache; returns their folder.

    Only files at the top of the repository, and safetensors rather than pickles.

    Raises:
        FileNotFoundError: the repository or revision does not exist, or the hub can't be reached.
        OSError: the download broke off.
    """
    for suffix in WEIGHT_SUFFIXES:
        folder = snapshot(repo_id, [*CONFIG_PATTERNS, f"*{suffix}"], ["*/*"], access)
        if any(folder.glob(f"*{suffix}")):
            break
    return folder


def snapshot(
    repo_id: str, patterns: Sequence[str], ignored: Sequence[str] = (), access: HubAccess = DEFAULT_ACCESS
) -> Path:
    """Download the files of these patterns, or find them in the cache; returns their folder.

    Raises:
        FileNotFoundError, OSError: as :func:`fetch`.
    """
    where = f"{repo_id}@{access.revision}" if access.revision else repo_id
    try:
        folder = snapshot_download(repo_id, allow_patterns=[*patterns], ignore_patterns=[*ignored], **asdict(access))
    except Exception as error:
        for kind, message in _NOT_FOUND.items():
            if isinstance(error, kind):
                told = message.format(error=_first_line(error), cause=_first_line(error.__cause__ or error))
                raise FileNotFoundError(f"{where}: {told}") from error
        raise OSError(f"{where}: not downloaded: {_first_line(error)}") from error  # the connection broke off
    return Path(folder)


_NOT_FOUND: dict[type[Exception], str] = {
    HFValidationError: "no such file or folder, and not an id of the hub",
    GatedRepoError: "access is restricted: ask for it on the hub, then set HF_TOKEN",
    RepositoryNotFoundError: "no such file or folder here, and no such repository on the hub (a private one needs "
    "HF_TOKEN)",
    RevisionNotFoundError: "the repository has no such revision",
    LocalEntryNotFoundError: "no such file or folder here, not in the hub's cache, and the hub can't be reached: "
    "{cause}",
    HfHubHTTPError: "the hub answers: {error}",
}
"""Messages for huggingface_hub's errors; the first that fits, since some are kinds of others."""


@contextmanager
def upload_errors(repo_id: str) -> Iterator[None]:
    """Turn the errors of an upload into one line.

    Raises:
        OSError: the hub refuses, or can't be reached.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise OSError(f"{repo_id}: not uploaded: HF_HUB_OFFLINE is set") from error
    except HFValidationError as error:
        raise OSError(f"{repo_id}: not uploaded: not an id of the hub (OWNER/NAME)") from error
    except (TypeError, ValueError):  # the caller's
        raise
    except Exception as error:  # of HTTP, or of the connection: which class that is depends on the version
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise OSError(
                f"{repo_id}: not uploaded: the hub wants a token that may write there: set HF_TOKEN, or run "
                f"hf auth login ({error.response.status_code})"
            ) from error
        raise OSError(f"{repo_id}: not uploaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
