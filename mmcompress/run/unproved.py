"""Artifacts whose proof failed: they are set aside with their evidence, and others are made. No
torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmcompress.errors import ProofFailed
from mmcompress.graph.structure import Candidate
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.next_artifact import Retry
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.move_artifacts import move_unproved_artifact

MAX_UNPROVED_ARTIFACTS = 3
"""Artifacts of one session whose proof may fail before it ends: a fault that strikes three
structures strikes the next one, too."""


@dataclass(frozen=True, kw_only=True)
class FailedProof:
    """Why an artifact was set aside. `failed_proof.json` beside its weights."""

    candidate: Candidate
    """The structure that was made."""
    message: str
    """The node, the proof, its difference and bound, and the blocks whose cut is wrong."""


def exclude_unproved(plan: Retry, folder: RunFolder) -> Retry:
    """Return a plan that leaves out every structure whose proof failed."""
    excluded = []
    for unproved in folder.list_unproved():
        record = read_record(FailedProof, unproved.failed_proof)
        excluded.append(record.candidate.make_key())
    return replace(plan, excluded=tuple(excluded))


def set_unproved_aside(
    run: RunContext, fitted: FittedStructure, *, error: ProofFailed, count: int
) -> None:
    """Set an artifact aside whose proof failed; its weights and the proof stay in the run folder.

    Args:
        run: The run with one target.
        fitted: The structure that was made.
        error: The proof that failed.
        count: Artifacts of this session whose proof failed, this one included.

    Raises:
        ProofFailed: `count` has reached `MAX_UNPROVED_ARTIFACTS`, and no other artifact is there.
    """
    folder = run.folder
    write_record(folder.failed_proof, FailedProof(candidate=fitted.candidate, message=str(error)))
    unproved = move_unproved_artifact(folder)
    message = f"unproved: {error}; its weights are kept in {unproved}"
    if folder.is_next:
        run.on_progress("prove", f"{message}; the artifact made before it stays", None)
        return
    if count >= MAX_UNPROVED_ARTIFACTS:
        raise ProofFailed(
            f"{message}. The proofs of {count} structures failed one after the other, so none is "
            "called a result. --resume tries other structures than these"
        ) from error
    run.on_progress("prove", f"{message}; another structure is made", None)
