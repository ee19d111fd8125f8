"""Uploading a written folder to the Hugging Face hub."""

import re
from pathlib import Path

import huggingface_hub

from hvp_ray.errors import ConfigError, first_line

_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)")


def repository_of(uri: str) -> str:
    """Return OWNER/NAME of hf://OWNER/NAME, after checking that there is a token.

    Raises:
        ConfigError: it is no such URI, or no token was found.
    """
    found = _ADDRESS.fullmatch(uri)
    if found is None:
        raise ConfigError(f"--push {uri} is not allowed; expected hf://OWNER/NAME, the repository of a model")
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            f"--push {uri} needs a token of the Hugging Face hub that may write; set HF_TOKEN, or run: hf auth login"
        )
    return found[1]


def push(folder: Path, repository: str) -> str:
    """Upload a folder as one commit and return the address of the repository. A new repository is private.

    Raises:
        ConfigError: the hub refused, or cannot be reached.
    """
    try:
        hub = huggingface_hub.HfApi()
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Encoder, written by hvp_ray")
    except Exception as error:  # each version of the library has other errors
        raise ConfigError(
            f"--push hf://{repository} failed: {first_line(error)}. The folder is complete; to upload it later, run: "
            f"hf upload {repository} {folder}"
        ) from error
    return str(address)
