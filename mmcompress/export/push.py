"""Shares a bundle on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from mmcompress.errors import BundleError, ModelError
from mmcompress.runtime.bundle import read_manifest, verify_files

CARD_FILE = "README.md"
"""The card of a bundle, which says what it is and whose weights it holds."""


def push_bundle(bundle: Path, repository: str, *, public: bool = False) -> str:
    """Upload a bundle as a model of the hub.

    https://huggingface.co/docs/huggingface_hub/guides/upload

    Args:
        bundle: The folder.
        repository: `owner/name`. It is made where it does not exist.
        public: Whether a new repository is public. One that exists stays as it is.

    Returns:
        The address of the repository.

    Raises:
        BundleError: The bundle is damaged, or has no card.
        ModelError: The hub refuses, or can't be reached.
    """
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest)
    if not (bundle / CARD_FILE).exists():
        raise BundleError(
            f"{bundle}: has no {CARD_FILE}, which says whose weights it holds; "
            "mmcompress report RUN writes it for a finished run"
        )
    client = HfApi()
    try:
        address = client.create_repo(repository, private=not public, exist_ok=True)
        client.upload_folder(
            folder_path=bundle,
            repo_id=repository,
            commit_message=f"Add {manifest.get('name', bundle.name)}",
        )
    except LocalTokenNotFoundError as error:
        raise ModelError(
            f"{repository}: the hub needs a token: run `hf auth login`, or set HF_TOKEN"
        ) from error
    except Exception as error:  # the library of the hub raises those of its HTTP client, too
        raise ModelError(f"{repository}: the hub refuses or can't be reached: {error}") from error
    return str(address)
