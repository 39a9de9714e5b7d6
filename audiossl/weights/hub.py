"""How does an encoder reach the HuggingFace hub, and come back?

A model there is a folder with a history; ours holds what an export does (encoder.safetensors, encoder.json) and a
README.md, the model card. `huggingface_hub` moves the files, checks their hashes and keeps a cache, so that what was
loaded once loads without a network.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from audiossl.errors import UserError
from audiossl.version import __version__
from audiossl.weights.modelcard import model_card

FILES = ["encoder.safetensors", "encoder.json"]
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt")


def find_export(source: str | os.PathLike, *, revision: str | None = None, **how: Any) -> Path:
    """Find an export: `source` itself where it is a path here, else the files of the model `user/name` on the hub.

    `revision` is a branch, tag or commit there; `how` is for `huggingface_hub.snapshot_download` (token, cache_dir,
    force_download, local_files_only). Raises `UserError` where there is neither, or the hub cannot be reached and its
    cache has no such model.
    """
    path, name = Path(source), str(source)
    if path.exists() or not HUB_ID.fullmatch(name) or name.endswith(SUFFIXES):
        if revision is not None:
            raise UserError(f"{source}: is a path here, and revision={revision} is for models on the hub")
        return path
    folder = download(name, FILES, revision=revision, **how)
    if not (folder / FILES[0]).exists():
        raise UserError(f"{source}: is on the hub, but audiossl did not export it: it holds no {FILES[0]}")
    return folder


def download(name: str, patterns: list[str], *, revision: str | None = None, **how: Any) -> Path:
    """Fetch the files of `user/name` that match `patterns` into the hub's cache; raise `UserError` if that fails."""
    who = dict(library_name="audiossl", library_version=__version__)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **who, **how))
    except Exception as error:  # its network library's errors are of several families
        raise UserError(f"{name}: {_reason(error, revision)}") from error


def _reason(error: Exception, revision: str | None) -> str:
    hub = constants.ENDPOINT
    match error:
        case GatedRepoError():
            return f"on {hub} its owner has to let you in first: ask there, then log in with `hf auth login`"
        case RepositoryNotFoundError():
            return f"no such folder or file here, and no such model on {hub} (private ones need `hf auth login`)"
        case RevisionNotFoundError():
            return f"the model on {hub} has no revision {revision}"
        case LocalEntryNotFoundError():
            return f"no such folder or file here; {hub} cannot be reached, and the cache does not hold all of it"
        case HfHubHTTPError():
            return f"no such folder or file here, and {hub} answered {error.response.status_code}"
    lines = str(error).splitlines() or [type(error).__name__]
    return f"no such folder or file here, and it did not come from {hub} ({lines[0][:160]})"


class HubModel(ModelHubMixin, library_name="audiossl", tags=["audio"]):
    """Let a `PretrainedEncoder` be saved, pushed to the hub and loaded from it, as other libraries' models are.

    `save_pretrained(folder)` writes an export with a model card, `push_to_hub("user/name")` uploads one (after `hf auth
    login`, or with token=...), and gives the address of the commit. There is no config.json: encoder.json says more.
    """

    def __new__(cls, *_args: Any, **_settings: Any):
        return super(ModelHubMixin, cls).__new__(cls)  # the mixin's own would write a config.json of its arguments

    def _save_pretrained(self, save_directory: Path) -> None:
        from audiossl.weights.export import write_export

        about = self.description, save_directory / FILES[0]
        write_export(self.encoder, self.head, *about, attention=self.attention)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ):
        """Load as `audiossl.load` does; the other arguments are `huggingface_hub`'s."""
        from audiossl.weights.export import load_encoder

        how = dict(token=token, cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only)
        return load_encoder(find_export(pretrained_model_name_or_path, revision=revision, **how))

    def push_to_hub(self, repo_id: str, **how: Any) -> str:
        """Upload the export and its card to `user/name`, made if need be; `how` as in `huggingface_hub`."""
        return super().push_to_hub(repo_id, **{"model_card_kwargs": {"repo_id": repo_id}, **how})

    def generate_model_card(self, *, repo_id: str | None = None) -> ModelCard:
        """Write the card; `repo_id` is what its example loads."""
        return ModelCard(model_card(self.description, repo_id))
