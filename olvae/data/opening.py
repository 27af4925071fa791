"""Opening what shards are read from; and why it ended, where a command brings it."""

import signal
from subprocess import PIPE
from typing import Any

from webdataset.gopen import Pipe, gopen, rewrite_url, set_options

__all__ = ["failure", "open_url"]

CURL = ("curl", "-fsSL", "--connect-timeout", "30")
RETRIES = ("--retry", "30", "--retry-delay", "2")
"""curl waits for a minute for a server that is busy or gone; a refusal, such as 404, it takes at once."""


class _Download(Pipe):
    """As webdataset opens it, but what the command says of its failure is kept."""

    said = ""

    def __init__(self, command: list[str]) -> None:
        super().__init__(command, mode="rb", ignore_status=[141, 23], stderr=PIPE)

    def close(self) -> None:
        super().close()
        if not self.proc.stderr.closed:
            lines = self.proc.stderr.read().decode(errors="replace").split("\n")
            self.said = next((line.strip() for line in reversed(lines) if line.strip()), "")
            self.proc.stderr.close()


def open_url(url: str) -> Any:
    """A stream of a file, a URL or a ``pipe:`` command. Where that fails, reading ends: ask :func:`failure` then.

    Raises:
        OSError, ValueError: it can't be opened.
    """
    address = rewrite_url(url)
    try:
        if address.startswith(("http://", "https://")):
            stream = _Download([*CURL, *RETRIES, address])
        elif address.startswith("s3://"):  # webdataset would have none of it
            stream = _Download(["aws", "s3", "cp", address, "-"])
        else:
            stream = gopen(url)
    except FileNotFoundError as error:
        if "://" not in address or address.startswith("file:"):
            raise
        command = f"it takes the command {error.filename}, which is not installed"
        raise OSError(command if error.filename else str(error)) from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever the hub's library raises
        raise OSError(str(error) or type(error).__name__) from error
    set_options(stream, ignore_errors=True)  # it would lose what is read already
    return stream


def failure(stream: Any) -> str | None:
    """Why the command behind a stream that was read to its end failed, if it did. Closes it."""
    if not isinstance(stream, Pipe):
        return None
    stream.close()
    if stream.status in (*stream.ignore_status, -signal.SIGPIPE):
        return None
    if isinstance(stream, _Download) and stream.said:
        return stream.said
    if stream.status < 0:
        return f"the command was ended by {signal.Signals(-stream.status).name}"
    return f"the command failed with exit status {stream.status}"
