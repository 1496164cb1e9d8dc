"""Onto the Hub, in one commit."""

import inspect
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from icae.model_cards import CardFacts, is_changed, is_generated, is_written
from icae.modeling_icae import ICAEForConditionalGeneration

from .checks import check
from .layout import OF_MODELS, STALE, assemble, files_of, matches
from .verification import verify


logger = logging.get_logger(__name__)
CARD = "README.md"


@contextmanager
def prepared(
    checkpoint: str | Path,
    model: ICAEForConditionalGeneration,
    *,
    base: str | None = None,
    repo_id: str | None = None,
    branch: str | None = None,
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
        repo_id (`str`, *optional*), branch (`str`, *optional*):
            The repository that the card should name, and its branch if not `main`.

    Raises:
        `ValueError`: if the checkpoint is refused, see [`assemble`], [`check`] and [`verify`].
    """
    with tempfile.TemporaryDirectory() as folder:
        assemble(checkpoint, folder, tokenizer=model.tokenizer, repo_id=repo_id, branch=branch)
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
        `TypeError`: if an argument is none of [`upload`]'s.
    """
    inspect.signature(upload).bind(checkpoint, repo_id, **upload_kwargs)  # now, not after the verification
    validate_repo_id(repo_id)
    if "/" not in repo_id:  # the card gives the whole name
        repo_id = f"{HfApi(token=upload_kwargs.get('token')).whoami()['name']}/{repo_id}"
    with prepared(checkpoint, model, base=base, repo_id=repo_id, branch=upload_kwargs.get("revision")) as folder:
        return upload(folder, repo_id, **upload_kwargs)


def push_model(
    model: ICAEForConditionalGeneration, repo_id: str, *, tags: str | list[str] | None = None, **kwargs
) -> CommitInfo:
    """Pushes a live model, with `tags` of its own in the card; `model.push_to_hub` is this."""
    with tempfile.TemporaryDirectory() as checkpoint:
        model.save_pretrained(checkpoint)
        # What was said of the model where it was loaded from holds as long as nothing of it is in training.
        changed = any(parameter.requires_grad for parameter in model.parameters())
        facts = CardFacts() if changed else CardFacts.of(model)
        tags = [tags] if isinstance(tags, str) else tags
        replace(facts, tags=tags or facts.tags).save(checkpoint)
        source = Path(model.name_or_path)
        if not changed and model.name_or_path and (source / "config.json").is_file() and is_changed(source / CARD):
            shutil.copyfile(source / CARD, Path(checkpoint, CARD))
        return push(checkpoint, repo_id, model=model, **kwargs)


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    subfolders: dict[str, str | Path] | None = None,
) -> CommitInfo:
    """
    Uploads a folder in one commit, which also deletes what an earlier layout left behind: whatever happens, the
    repository is the old version or the new one. Files of the user's own are not touched, nor is a card there that
    somebody wrote or changed, unless the folder's is such a one as well.

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
            What the commit says, by default "Upload ICAE".
        subfolders (`dict[str, str or Path]`, *optional*):
            Folders that go along, by their path in the repository, and replace what lies there: a trainer's
            checkpoints, to resume from.

    Returns:
        `CommitInfo`: the commit.

    Raises:
        `ValueError`: if the repository is refused, see [`repository`].
        `HfHubHTTPError`: if the Hub refuses, or a commit of somebody else came in between.
    """
    api, info = repository(repo_id, private=private, create_pr=create_pr, revision=revision, token=token)
    files = files_of(folder)
    for path, subfolder in (subfolders or {}).items():
        files |= {f"{path}/{name}": file for name, file in files_of(subfolder).items()}
    replaced = tuple(f"{path}/" for path in subfolders or ())
    there = {sibling.rfilename for sibling in info.siblings or ()}
    if CARD in there & set(files) and is_generated(files[CARD].read_text(encoding="utf-8")):
        if is_written(_content(api, info, CARD)):
            logger.warning(
                f"The card of {info.id} stays as somebody wrote it; delete it there to have it written anew."
            )
            del files[CARD]
    stale = {name for name in there - set(files) if matches(name, STALE) or name.startswith(replaced)}
    return api.create_commit(
        info.id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale)),
        ],
        commit_message=commit_message or "Upload ICAE",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        parent_commit=info.sha,
    )


def repository(
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[HfApi, ModelInfo]:
    """
    The repository that an upload goes to, made if missing, and what it holds.

    Args:
        repo_id, private, create_pr, revision, token:
            As in [`upload`].

    Raises:
        `ValueError`: if the repository should be private but is public, or if it holds another kind of model.
    """
    api = HfApi(token=token, library_name="icae", library_version=version("icae"))
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    info, missing = api.model_info(repo_id), False
    if revision is not None:
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            if create_pr or revision.startswith("refs/"):
                raise
            missing = True  # a new branch begins as the main one is now
    if private and not info.private:
        raise ValueError(
            f"Expected a private repository, got {repo_id!r}, which is there and public; make it private in its "
            "settings first, or push to another one."
        )
    there = {sibling.rfilename for sibling in info.siblings or ()}
    if "config.json" in there:
        found = json.loads(_content(api, info, "config.json")).get("model_type")
        if found != "icae":
            raise ValueError(
                f"Expected {repo_id!r} to hold an ICAE or no model, got one of the type {found!r}, whose weights an "
                "upload would delete; push to another repository, or delete its 'config.json' if it is to be replaced."
            )
    elif others := sorted(name for name in there if matches(name, OF_MODELS)):
        raise ValueError(
            f"Expected {repo_id!r} to hold an ICAE or no model, got another one's {others[0]!r}, which an upload "
            "would delete; push to another repository, or delete it there if it is to be replaced."
        )
    if missing:
        api.create_branch(repo_id, branch=revision, exist_ok=True)  # type: ignore[arg-type]
    return api, info


def _content(api: HfApi, info: ModelInfo, name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = api.hf_hub_download(info.id, name, revision=info.sha, local_dir=folder)
        return Path(file).read_text(encoding="utf-8")
