"""A server of Azure's blobs at 127.0.0.1 (Azurite, of npm), for tests."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from free_port import find_free_port

PROGRAM = "azurite-blob"
"""The server: `npm install azurite` brings it."""
ACCOUNT = "mmcompress"
"""Name of the only account."""
ACCOUNT_KEY = base64.b64encode(b"a key for tests").decode()
"""What its clients sign with."""
START_SECONDS = 30.0
"""Seconds that the server may take to answer."""


@contextmanager
def serve_azure(container: str) -> Iterator[str]:
    """Serve an empty container, and point the environment at it until the block ends.

    Yields:
        The URL of the container.
    """
    from azure.core.exceptions import ServiceRequestError
    from azure.storage.blob import BlobServiceClient

    port = find_free_port()
    connection = (
        f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};"
        f"BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT};"
    )
    folder = tempfile.mkdtemp(prefix="azurite-")
    command = [
        str(shutil.which(PROGRAM)),
        *("--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", folder),
        *("--silent", "--skipApiVersionCheck", "--disableTelemetry"),
    ]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        client = BlobServiceClient.from_connection_string(connection)
        give_up_at = time.monotonic() + START_SECONDS
        while True:
            try:
                client.create_container(container)
                break
            except ServiceRequestError:
                # It does not listen yet.
                if server.poll() is not None or time.monotonic() > give_up_at:
                    raise
                time.sleep(0.2)
        client.close()
        with mock.patch.dict(os.environ, {"AZURE_STORAGE_CONNECTION_STRING": connection}):
            yield f"abfs://{container}"
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)
