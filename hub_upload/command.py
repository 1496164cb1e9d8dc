"""`icae push CHECKPOINT ORG/NAME`: puts a checkpoint on the Hub, after a look at what would leave."""

import argparse
import hashlib
from pathlib import Path

from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .layout import files_of
from .upload import prepared, upload


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="icae push", description=__doc__)
    parser.add_argument("checkpoint", help="folder that save_pretrained or a trainer wrote")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="repository on the Hub, made if missing")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--revision", help="branch to push to, made if missing")
    parser.add_argument("--base", help="folder or Hub id of the base, if not where the checkpoint says")
    parser.add_argument("--dry-run", action="store_true", help="print what would be uploaded; upload nothing")
    arguments = parser.parse_args(argv)

    from icae.cli import load_model

    if not (Path(arguments.checkpoint) / "config.json").is_file():
        raise ValueError(
            f"Expected CHECKPOINT to be the folder of a saved ICAE, got {arguments.checkpoint!r}, which has no "
            "config.json."
        )
    validate_repo_id(arguments.repo_id)
    if "/" not in arguments.repo_id:
        raise ValueError(f"Expected the whole name of a repository, ORG/NAME, got {arguments.repo_id!r}.")
    model = load_model(arguments.checkpoint, arguments.base, "bfloat16")
    names = {"repo_id": arguments.repo_id, "branch": arguments.revision}
    with prepared(arguments.checkpoint, model, **names) as folder:
        if arguments.dry_run:
            print(tree(folder))
            print("\n" + Path(folder, "README.md").read_text(encoding="utf-8"), end="")
            return
        try:
            commit = upload(
                folder,
                arguments.repo_id,
                private=arguments.private,
                create_pr=arguments.create_pr,
                revision=arguments.revision,
            )
        except (
            HTTPError,
            LocalEntryNotFoundError,
            RuntimeError,
        ) as error:  # as requests and uploads of large files fail
            raise OSError(
                f"Expected the Hub to take the upload, got: {error}\nThe repository holds what it held, or all of the "
                "new version. See that you are online and logged in (`hf auth login`), and push again."
            ) from error
    print(commit.pr_url or commit.commit_url)


def tree(folder: str | Path) -> str:
    """The files of a folder, one a line: SHA-256, bytes, path."""
    lines = []
    for name, file in files_of(folder).items():
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        lines.append(f"{digest}  {file.stat().st_size:>12,}  {name}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
