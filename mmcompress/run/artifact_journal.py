"""Keeps a record of every artifact that is made for a target, also of those that are not kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from mmcompress.results.records import ArtifactJournal, ArtifactRecord, Summary
from mmcompress.results.target_met import compute_target_share
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.next_artifact import explain_choice
from mmcompress.run.training_history import count_trained_steps, read_validation_losses
from mmcompress.run.unproved import FailedProof
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.folder import RunFolder

KEPT_REASON = "it is the artifact of the run folder"
"""Reason of the record of the artifact that stays."""

LOST_REASON = "its weights were made anew before it was compared"
"""Reason of the record of an artifact that another cause than a comparison removed."""


def identify_artifact(folder: RunFolder) -> str:
    """Return a digest of the weights of an artifact."""
    digest = hashlib.sha256()
    for file in sorted(folder.weights.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def note_artifacts(folder: RunFolder) -> None:
    """Write down the finished artifacts of a folder, each in place of an earlier record of it.

    It is called where a run that is cut off goes on with the next artifact, or ends. A record
    between the summary of a miss and its move would else end the run with that miss.

    Args:
        folder: The folder of the target. The best artifact so far was made first.
    """
    records = list(_read_journal(folder))
    for place in (folder.best, folder.next):
        if place.summary.exists():
            records = _replace_record(records, _make_record(place))
    _write_journal(folder, records)


def _make_record(place: RunFolder) -> ArtifactRecord:
    """Return the record of the finished artifact of a folder."""
    fitted = read_record(FittedStructure, place.fitted)
    summary = read_record(Summary, place.summary)
    losses = summary.validation_losses
    return ArtifactRecord(
        identity=identify_artifact(place),
        candidate=fitted.candidate,
        loss=losses[-1] if losses else None,
        trained_steps=count_trained_steps(place),
        target_share=compute_target_share(summary),
        speedup=summary.speedup,
        margin=summary.latency_margin,
        met=summary.target.met,
        writing=summary.writing,
    )


def note_choice(folder: RunFolder, place: RunFolder, *, winner: Summary, loser: Summary) -> None:
    """Write down why an artifact is not kept, before it is removed.

    Args:
        folder: The folder of the target.
        place: The folder with the artifact that is removed: the best so far, or the next one.
        winner: The record of the artifact that is kept instead.
        loser: The record of the one that is removed.
    """
    identity = identify_artifact(place)
    records = []
    for record in _read_journal(folder):
        if record.identity == identity:
            record = replace(record, reason=explain_choice(winner, loser))
        records.append(record)
    _write_journal(folder, records)


def add_artifacts(folder: RunFolder, summary: Summary) -> Summary:
    """Add every artifact that was made for a target to the summary of the one that is kept.

    Args:
        folder: The folder of the target, where the artifact that is kept lies.
        summary: Its summary.

    Returns:
        The summary, which is written down.
    """
    note_artifacts(folder)
    identity = identify_artifact(folder)
    records = []
    for record in _read_journal(folder):
        is_kept = record.identity == identity
        reason = KEPT_REASON if is_kept else record.reason or LOST_REASON
        records.append(replace(record, is_kept=is_kept, reason=reason))
    complete = replace(summary, artifacts=(*records, *_list_unproved(folder)))
    if complete != summary:
        write_record(folder.summary, complete)
    return complete


def _list_unproved(folder: RunFolder) -> list[ArtifactRecord]:
    """Return the records of the artifacts whose proof failed."""
    records = []
    for unproved in folder.list_unproved():
        failed = read_record(FailedProof, unproved.failed_proof)
        losses = read_validation_losses(unproved)
        records.append(
            ArtifactRecord(
                identity=identify_artifact(unproved),
                candidate=failed.candidate,
                loss=losses[-1] if losses else None,
                trained_steps=count_trained_steps(unproved),
                reason=f"its proof failed: {failed.message}",
            )
        )
    return records


def _read_journal(folder: RunFolder) -> tuple[ArtifactRecord, ...]:
    """Return the records so far; none where nothing was finished yet."""
    if not folder.artifacts.exists():
        return ()
    return read_record(ArtifactJournal, folder.artifacts).artifacts


def _write_journal(folder: RunFolder, records: Sequence[ArtifactRecord]) -> None:
    write_record(folder.artifacts, ArtifactJournal(artifacts=tuple(records)))


def _replace_record(
    records: Sequence[ArtifactRecord], record: ArtifactRecord
) -> list[ArtifactRecord]:
    """Return records with one in the place of its earlier state, or at the end."""
    replaced = list(records)
    for i, earlier in enumerate(records):
        if earlier.identity == record.identity:
            replaced[i] = record
            return replaced
    return [*replaced, record]
