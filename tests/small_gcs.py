"""A server of Google's storage at 127.0.0.1 (gcp-storage-emulator), for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from free_port import find_free_port


@contextmanager
def serve_gcs(bucket: str) -> Iterator[str]:
    """Serve an empty bucket, and point the environment at it until the block ends.

    Yields:
        The URL of the bucket.
    """
    import fsspec.config
    from gcp_storage_emulator.server import create_server

    port = find_free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)
    server.start()
    settings = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        # What asks for the layout of a bucket does so by gRPC, which the emulator does not speak.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    # The emulator asks for no credentials, and none may be looked for in the network.
    anonymous = {"gs": {"token": "anon"}}
    try:
        with mock.patch.dict(os.environ, settings), mock.patch.dict(fsspec.config.conf, anonymous):
            yield f"gs://{bucket}"
    finally:
        server.stop()
