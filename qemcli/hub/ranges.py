"""Some bytes of a file of a repository, without the rest of it."""

from __future__ import annotations

from collections.abc import Callable

from qemcli.errors import InputError
from qemcli.hub import repository
from qemcli.hub.reference import Reference
from qemcli.hub.repository import told

SECONDS = 30  # without a byte


def reader(ref: Reference, commit: str, path: str) -> Callable[[int, int], bytes]:
    """read(start, count) -> bytes of one file at one commit, each a request.

    A server that knows no ranges sends everything from its beginning: it is left when enough is
    there. Raises EnvironmentFailure where the Hub does not answer, InputError where the file is
    shorter.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(
        ref.name, path, repo_type=ref.kind, revision=commit, endpoint=repository.endpoint()
    )
    headers = {**build_hf_headers(library_name="qem"), "Accept-Encoding": "identity"}

    def read(start: int, count: int) -> bytes:
        if not count:
            return b""
        asked = {**headers, "Range": f"bytes={start}-{start + count - 1}"}
        stream = http_stream_backoff("GET", url, headers=asked, timeout=SECONDS)
        with told(ref), stream as response:
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else start
            data = b""
            for piece in response.iter_raw():
                data += piece
                if len(data) >= skip + count:
                    break
        if len(data) < skip + count:
            raise InputError(f"{path}: it ends before byte {start + count}")
        return data[skip : skip + count]

    return read
