"""A search that comes out the same whatever the workers: `search.deterministic`.

Proposals are made in batches of `search.batch`. All proposals of a batch are made before any result
of it is looked at, and results are told in the order of the proposals. So a proposal depends on the
seed and on earlier results alone, not on which worker was quicker.

A search that was cut off is replayed: it makes the same proposals again, and takes the results that
it has from the journal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import optuna
from optuna.trial import FrozenTrial

from mmcompress.results.records import Trial
from mmcompress.runtime.quiet_loggers import silence_logger
from mmcompress.search.executors import TaskResult
from mmcompress.search.problem import SearchProblem
from mmcompress.search.sampling import OPTUNA_LOGGER
from mmcompress.search.search_session import (
    Proposal,
    SearchSession,
    SessionInputs,
    TrialJournal,
    describe_error,
    never_ends,
)
from mmcompress.search.trial_writer import TrialWriter
from mmcompress.storage import build_record

ORDER = "order"
"""Attribute of a trial in the journal: the number of its proposal."""

ARTIFACT = "artifact"
"""Attribute of a trial in the journal: the structures that were measured for earlier artifacts."""


@dataclass(kw_only=True)
class OrderedTrials:
    """What the search for one artifact knows, in the order of its proposals."""

    artifact: int = -1
    """Structures that were measured for earlier artifacts; -1 before the search has begun."""
    entries: list[FrozenTrial] = field(default_factory=list)
    """Finished and failed trials: those of earlier artifacts, and those settled since."""
    outcomes: dict[str, FrozenTrial] = field(default_factory=dict)
    """Results and errors of this artifact by the key of their candidate. Those of a search that was
    cut off are settled when it makes the same proposal again."""

    @property
    def trials(self) -> list[Trial]:
        """The trials with a result."""
        records = [entry.user_attrs["trial"] for entry in self.entries if is_result(entry)]
        return [build_record(Trial, record) for record in records]

    @property
    def next_number(self) -> int:
        """The number of the next proposal."""
        return 1 + max((entry.user_attrs[ORDER] for entry in self.entries), default=-1)

    def begin(self, study: optuna.Study, artifact: int) -> None:
        """Take what the journal knows, once; later calls do nothing.

        Args:
            study: The study of the journal.
            artifact: Structures that were measured for earlier artifacts.
        """
        if self.artifact >= 0:
            return
        self.artifact = artifact
        for entry in study.get_trials(deepcopy=False):
            if ORDER not in entry.user_attrs:
                # A running trial of an earlier version.
                continue
            if entry.user_attrs[ARTIFACT] < artifact:
                self.entries.append(entry)
            else:
                self.outcomes.setdefault(entry.user_attrs["key"], entry)
        self.entries.sort(key=_get_order)


def is_result(entry: FrozenTrial) -> bool:
    """Return whether a trial of the journal holds a result; else it holds an error."""
    return "trial" in entry.user_attrs


def _get_order(entry: FrozenTrial) -> int:
    number: int = entry.user_attrs[ORDER]
    return number


@silence_logger(OPTUNA_LOGGER)
def run_ordered_study(
    study: optuna.Study,
    problem: SearchProblem,
    *,
    inputs: SessionInputs,
    ordered: OrderedTrials,
) -> list[Trial]:
    """Search as `run_study` does, the same way for any number of workers.

    Args:
        study: From `open_study`.
        problem: The space, the budget, and how points become candidates.
        inputs: What the session works with. It never ends by the clock.
        ordered: What the search knows. It has begun.

    Returns:
        One trial a candidate, those of earlier artifacts included with latencies predicted anew.

    Raises:
        ClusterError: A worker process died.
    """
    with TrialWriter(study, in_thread=False) as writer:
        journal = OrderedJournal(study, problem, inputs=inputs, ordered=ordered, writer=writer)
        OrderedSession(journal, replace(inputs, is_over=never_ends)).run()
    return list(journal.trials_by_key.values())


class OrderedJournal(TrialJournal):
    """The study of a search that is told results in the order of the proposals.

    A result is written as soon as it is there. It counts when its proposal is settled.
    """

    def __init__(
        self,
        study: optuna.Study,
        problem: SearchProblem,
        *,
        inputs: SessionInputs,
        ordered: OrderedTrials,
        writer: TrialWriter,
    ):
        super().__init__(study, problem, inputs=inputs, writer=writer)
        self.ordered = ordered
        self.numbers_by_key: dict[str, int] = {}
        self.trials_by_key = {}
        self.best_trial = None
        for trial in ordered.trials:
            self.keep_trial_of_now(trial)

    @property
    def result_count(self) -> int:
        """Settled trials."""
        return len(self.ordered.entries)

    def count_tries(self, origin: str) -> int:
        """Count the settled proposals of an origin."""
        count = 0
        for entry in self.ordered.entries:
            attributes = entry.user_attrs
            known_origin = (
                attributes["trial"]["origin"] if is_result(entry) else attributes["origin"]
            )
            count += known_origin == origin
        return count

    def begin_batch(self) -> None:
        """Begin with a sampler that depends on the settled trials alone."""
        self.sampling = self.make_sampling(self.ordered.entries)
        self.numbers_by_key.clear()

    def number_proposals(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """Number the proposals of a batch; returns those that are to be evaluated."""
        first_number = self.ordered.next_number
        unknown: list[Proposal] = []
        for number, proposal in enumerate(proposals, first_number):
            key = proposal.candidate.make_key()
            if key in self.numbers_by_key:
                continue
            self.numbers_by_key[key] = number
            if key not in self.ordered.outcomes:
                unknown.append(proposal)
        return unknown

    def record_result(self, proposal: Proposal, result: TaskResult) -> None:
        """Write a result; it counts once its proposal is settled."""
        number = self.numbers_by_key[proposal.candidate.make_key()]
        trial = self.make_trial(proposal, result, number=number)
        self._keep(proposal, self.make_finished(proposal, trial))

    def record_failure(self, proposal: Proposal, error: BaseException) -> None:
        """Write an error; it counts once its proposal is settled."""
        self._keep(proposal, self.make_failed(proposal, describe_error(error)))

    def settle(self, proposal: Proposal) -> None:
        """Let the result of a proposal count."""
        key = proposal.candidate.make_key()
        entry = self.ordered.outcomes[key]
        if key in self.trials_by_key or entry in self.ordered.entries:
            # It was given twice within a batch.
            return
        if is_result(entry):
            trial = build_record(Trial, entry.user_attrs["trial"])
            self.keep_trial(replace(trial, latency_ms=proposal.latency_ms))
        self.ordered.entries.append(entry)

    def _keep(self, proposal: Proposal, entry: FrozenTrial) -> None:
        """Write a trial to the journal, whole at once, and keep it."""
        key = proposal.candidate.make_key()
        entry.set_user_attr(ORDER, self.numbers_by_key[key])
        entry.set_user_attr(ARTIFACT, self.ordered.artifact)
        entry.set_user_attr("key", key)
        self.writer.write(entry)
        self.trial_count += 1
        self.ordered.outcomes[key] = entry


class OrderedSession(SearchSession):
    """A session that proposes batch by batch."""

    journal: OrderedJournal

    def run(self) -> None:
        """Search until nothing is left to propose."""
        self.tell_plan()
        while True:
            self.batch: list[Proposal] = []
            self.journal.begin_batch()
            self.rng = self.make_dice()
            self._fill_batch()
            if not self.batch:
                return
            for proposal in self.journal.number_proposals(self.batch):
                self.submit(proposal)
            while self.running:
                self.settle_next()
            for proposal in self.batch:
                self.journal.settle(proposal)

    def list_pending(self) -> list[Proposal]:
        """List the proposals of the batch: none of them is settled."""
        return self.batch

    def _keep_up_with_workers(self) -> None:
        """Do nothing: what is proposed must not depend on the clock."""

    def _fill_batch(self) -> None:
        """Propose until the batch is full, or nothing is left to propose for now."""
        while len(self.batch) < self.effort.batch:
            proposal = self.propose_next()
            if proposal is None:
                return
            self.batch.append(proposal)
