"""Reach the Hugging Face hub: download files, and upload an autoencoder with a short card.

huggingface_hub does it, with its environment: HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT, HF_TOKEN. It
takes longer to import than all of this package: import this file where the hub is used.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from olvae.config import ADDRESS, Config
from olvae.files import first_line, write_json
from olvae.models.spec import CONFIG_NAME


def snapshot(
    repo_id: str, patterns: Sequence[str], ignored: Sequence[str] = (), **access: Any
) -> Path:
    """Download the files of these patterns, or find them in the cache; return their folder.

    FileNotFoundError if the repository or revision does not exist, or the hub can't be reached;
    OSError if the connection breaks off.
    """
    where = f"{repo_id}@{access['revision']}" if access.get("revision") else repo_id
    access = {"allow_patterns": [*patterns], "ignore_patterns": [*ignored], **access}
    try:
        return Path(snapshot_download(repo_id, **access))
    except Exception as error:
        for kind, message in _NOT_FOUND.items():
            if isinstance(error, kind):
                text = message.format(
                    error=first_line(error), why=first_line(error.__cause__ or error)
                )
                raise FileNotFoundError(f"{where}: {text}") from error
        raise OSError(f"{where}: not downloaded: {first_line(error)}") from error


_NOT_FOUND: dict[type[Exception], str] = {
    HFValidationError: "no such file or folder, and not an id of the hub",
    GatedRepoError: "access is restricted: ask for it on the hub, then set HF_TOKEN",
    RepositoryNotFoundError: (
        "no such file or folder here, no such repository on the hub (private: set HF_TOKEN)"
    ),
    RevisionNotFoundError: "the repository has no such revision",
    LocalEntryNotFoundError: (
        "no such file or folder here, not in the hub's cache, and the hub can't be reached: {why}"
    ),
    HfHubHTTPError: "the hub answers: {error}",
}
"""Messages for huggingface_hub's errors. The first that fits is taken: some derive from others."""


class HubExport(
    ModelHubMixin,
    library_name="diffusers",
    pipeline_tag="image-to-image",
    tags=["autoencoder", "vae", "litevae"],
    repo_url=ADDRESS,
    paper_url="https://arxiv.org/abs/2405.14477",
):
    """An export as huggingface_hub's mixin takes it, which adds a short card, and uploads."""

    def __init__(self, write: Callable[[Path], None], content: Config) -> None:
        self.write = write  # fills a folder
        self.content = content  # its config.json

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder)
        return super().save_pretrained(folder, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        # The mixin, which calls this, has just removed the file.
        write_json(self.content, save_directory / CONFIG_NAME)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload as :meth:`LiteVAE.push_to_hub` does; OSError if the hub can't be used."""
        try:
            return super().push_to_hub(repo_id, **kwargs)
        except (TypeError, ValueError):
            raise  # the caller's mistake, such as an id of another form
        except Exception as error:
            # Of HTTP or the connection; their classes depend on huggingface_hub's version.
            message = first_line(error)
            if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
                message = (
                    "the hub wants a token that may write there: set HF_TOKEN, or run hf auth "
                    f"login ({error.response.status_code})"
                )
            raise OSError(f"{repo_id}: not uploaded: {message}") from error
