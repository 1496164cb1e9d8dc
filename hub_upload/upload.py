"""Onto the Hub, in one commit."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from icae.model_cards import CardFacts
from icae.modeling_icae import ICAEForConditionalGeneration

from .checks import check
from .layout import STALE, assemble, files_of, matches
from .verification import verify


@contextmanager
def prepared(
    checkpoint: str | Path, model: ICAEForConditionalGeneration, *, base: str | None = None, repo_id: str | None = None
) -> Iterator[str]:
    """
    A folder that is ready for the Hub, as long as the block lasts: assembled, checked and verified.

    Args:
        checkpoint (`str` or `Path`):
            A folder as `save_pretrained` or a trainer wrote it.
        model ([`ICAEForConditionalGeneration`]):
            The live model that the checkpoint holds; what others will load is compared with it.
        base (`str`, *optional*):
            Folder of the base for that comparison, see [`verify`].
        repo_id (`str`, *optional*):
            The repository that the card should name.

    Raises:
        `ValueError`: if the checkpoint is refused, see [`assemble`], [`check`] and [`verify`].
    """
    with tempfile.TemporaryDirectory() as folder:
        assemble(checkpoint, folder, tokenizer=model.tokenizer, repo_id=repo_id)
        check(folder)
        verify(folder, model, base=base)
        yield folder


def push(
    checkpoint: str | Path,
    repo_id: str,
    *,
    model: ICAEForConditionalGeneration,
    base: str | None = None,
    **upload_kwargs,
) -> CommitInfo:
    """
    Assembles, checks, verifies and uploads a checkpoint.

    Args:
        checkpoint, model, base:
            As in [`prepared`].
        repo_id (`str`):
            The repository, `"org/name"` or `"name"` for one of the user's own, made if missing.
        upload_kwargs:
            As in [`upload`]: `private`, `create_pr`, `revision`, `token`, `commit_message`, `commit_description`.

    Returns:
        `CommitInfo`: the commit.

    Raises:
        `ValueError`: if the checkpoint is refused. Nothing has been uploaded then.
    """
    if "/" not in repo_id:  # the card gives the whole name
        repo_id = f"{HfApi(token=upload_kwargs.get('token')).whoami()['name']}/{repo_id}"
    with prepared(checkpoint, model, base=base, repo_id=repo_id) as folder:
        return upload(folder, repo_id, **upload_kwargs)


def push_model(model: ICAEForConditionalGeneration, repo_id: str, **kwargs) -> CommitInfo:
    """Pushes a live model; `model.push_to_hub` is this."""
    with tempfile.TemporaryDirectory() as checkpoint:
        model.save_pretrained(checkpoint)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            # As it was loaded, so that what was said of it there still holds.
            CardFacts.of(model).save(checkpoint)
        return push(checkpoint, repo_id, model=model, **kwargs)


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload ICAE",
    commit_description: str | None = None,
    subfolders: dict[str, dict[str, Path | bytes]] | None = None,
) -> CommitInfo:
    """
    Uploads a folder in one commit, which also deletes what an earlier layout left behind: whatever happens, the
    repository is the old version or the new one. Files of the user's own are not touched.

    Args:
        folder (`str` or `Path`):
            The folder, as [`assemble`] made it.
        repo_id (`str`):
            The repository, `"org/name"`, made if missing.
        private (`bool`, *optional*):
            Whether a new repository is private. An existing public one is refused if `True`.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request instead.
        revision (`str`, *optional*):
            The branch to commit to, made if missing, or the one that a pull request is for. Default: `main`.
        token (`str` or `bool`, *optional*):
            A token with write access, by default the one of `hf auth login`.
        commit_message, commit_description (`str`, *optional*):
            What the commit says.
        subfolders (`dict[str, dict[str, Path or bytes]]`, *optional*):
            Files that go along, by their path in a folder of the repository, and replace what lies there: a trainer's
            checkpoints, to resume from.

    Returns:
        `CommitInfo`: the commit.

    Raises:
        `ValueError`: if the repository should be private but is public.
        `HfHubHTTPError`: if the Hub refuses, or a commit of somebody else came in between.
    """
    api = HfApi(token=token, library_name="icae", library_version=version("icae"))
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    info = api.model_info(repo_id)
    if private and not info.private:
        raise ValueError(
            f"Expected a private repository, got {repo_id!r}, which is there and public; make it private in its "
            "settings first, or push to another one."
        )
    if revision is not None:
        if not (create_pr or revision.startswith("refs/")):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
    files: dict[str, Path | bytes] = {**files_of(folder)}
    for path, subfolder in (subfolders or {}).items():
        files |= {f"{path}/{name}": content for name, content in subfolder.items()}
    replaced = tuple(f"{path}/" for path in subfolders or ())
    there = {sibling.rfilename for sibling in info.siblings or ()}
    stale = {name for name in there - set(files) if matches(name, STALE) or name.startswith(replaced)}
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale)),
        ],
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        parent_commit=info.sha,
    )
