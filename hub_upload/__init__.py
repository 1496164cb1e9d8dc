"""
From a checkpoint to a Hub repository that loads with `trust_remote_code=True` where this package is not installed.

`push` is the whole way: [`assemble`] makes the complete layout in a folder, [`check`] refuses what must not leave this
machine, [`verify`] loads the folder as a stranger would and compares it with the live model, [`upload`] puts it on the
Hub in one commit. On the command line: `icae push CHECKPOINT ORG/NAME`.
"""

from .checks import check, check_base_id, check_training_state
from .layout import assemble, training_state
from .upload import prepared, push, push_model, repository, upload
from .verification import verify


__all__ = [
    "assemble",
    "check",
    "check_base_id",
    "check_training_state",
    "prepared",
    "push",
    "push_model",
    "repository",
    "training_state",
    "upload",
    "verify",
]
