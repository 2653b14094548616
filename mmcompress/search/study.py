"""The search: Optuna proposes, workers evaluate, the driver alone writes. No torch.

A proposal of the sampler is a direction: its pruning ratios are scaled together until the predicted
latency just meets the budget. No trial is spent far from it. The study is a journal file in the run
folder: every finished trial is written to it whole. The sampler has a study in memory
(`sampling.py`).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from mmcompress.errors import DataError
from mmcompress.graph.structure import Candidate
from mmcompress.results.records import LEVEL_SWITCH_ORIGIN, Trial
from mmcompress.runtime.progress import StageProgress, ignore_progress
from mmcompress.runtime.quiet_loggers import silence_logger
from mmcompress.search.executors import (
    Evaluate,
    SubmittedTask,
    TaskResult,
    retry_failed_task,
    submit_candidate,
)
from mmcompress.search.journal_repair import PlainRecord, find_damaged_line, repair_journal
from mmcompress.search.neighbors import switch_levels
from mmcompress.search.problem import (
    SearchPoint,
    SearchProblem,
    find_best_trial,
    scale_to_budget,
    to_overrides,
    to_search_point,
)
from mmcompress.search.sampling import OPTUNA_LOGGER, Sampling
from mmcompress.spec.space import Dimension, Space
from mmcompress.storage import InvalidValue, build_record, to_plain

STUDY_NAME = "mmcompress"
"""Name of the only study in a journal."""

KEPT_TRIALS = "kept_trials"
"""Attribute of a study: finished trials of lines that were damaged."""

SAMPLER_ORIGIN = "sampler"
"""`Trial.origin` of a proposal of the sampler."""

DASHBOARD_CONSTRAINTS_KEY = "constraints"
"""System attribute under which optuna-dashboard looks for constraints: a list, as in Optuna 4."""

SAMPLING_SHARE = 0.5
"""Share of its time that the driver may spend on proposals: then it keeps up with its workers."""

MIN_WORK_SECONDS = 0.05
"""Mean seconds of a trial below which workers are not waited for: estimates take no time."""

MAX_REPEATS_PER_TRIAL = 4
"""Known candidates a sampler may propose, per trial of the session, before nothing more is sampled.

Samplers repeat points in small spaces: without a limit, searching one that is exhausted never ends.
"""

SeedCandidates = Sequence[tuple[str, Candidate]]
"""(origin, candidate): evaluated as they are, before anything is sampled."""


@dataclass(frozen=True, kw_only=True)
class SearchEffort:
    """How much is searched. Trials that stand in the study count."""

    trials: int
    """Proposals of the sampler."""
    level_switches: int
    """Neighbours of the best trial, after the proposals."""
    workers: int = 1
    """Candidates evaluated at a time."""
    retries: int = 0
    """Times a failed evaluation is tried again."""
    batch: int = 1
    """Proposals that are made before one of their results is looked at, in a deterministic search.
    """


@silence_logger(OPTUNA_LOGGER)
def open_study(path: Path, *, tell: Callable[[str], None] = ignore_progress) -> optuna.Study:
    """Open the study of a journal file, or make it.

    What is damaged of the file is put aside, and the finished trials in it are kept. Trials that an
    earlier version left running are marked as failed.

    Args:
        path: The journal file.
        tell: Receives what was damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    repair = repair_journal(path)
    try:
        storage = _load_storage(path)
    except Exception:  # Optuna replays the lines, and meets whatever is wrong with them
        repair = repair_journal(path, keep_lines=False)
        storage = _load_storage(path)
    if repair.lines_aside:
        tell(repair.describe(path))
    names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    # To create a study that is there writes a line each time.
    make_study = optuna.load_study if STUDY_NAME in names else optuna.create_study
    study: optuna.Study = make_study(study_name=STUDY_NAME, storage=storage)
    _keep_trials(study, repair.trials)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _keep_trials(study: optuna.Study, records: Sequence[PlainRecord]) -> None:
    """Keep the finished trials of a journal that its damage hides from Optuna."""
    known_texts = {json.dumps(record, sort_keys=True) for record in _list_records(study)}
    hidden_records = []
    for record in records:
        if json.dumps(record, sort_keys=True) not in known_texts:
            hidden_records.append(record)
    if hidden_records:
        kept_records = [*study.user_attrs.get(KEPT_TRIALS, ()), *hidden_records]
        study.set_user_attr(KEPT_TRIALS, kept_records)


def _list_records(study: optuna.Study) -> list[PlainRecord]:
    """List every trial with a result as plain data."""
    # Of damaged lines only the results are left. Samplers don't see them.
    records = list(study.user_attrs.get(KEPT_TRIALS, ()))
    for optuna_trial in study.get_trials(deepcopy=False):
        if "trial" in optuna_trial.user_attrs:
            records.append(optuna_trial.user_attrs["trial"])
    return records


def _load_storage(path: Path) -> JournalStorage:
    """Load a journal, and read all of it."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    for study in storage.get_all_studies():
        storage.get_all_trials(study._study_id, deepcopy=False)
    return storage


@silence_logger(OPTUNA_LOGGER)
def list_study_faults(path: Path) -> list[str]:
    """List what is wrong with the journal of a study that nobody works on. Nothing is written.

    Args:
        path: The journal.

    Returns:
        Faults in words; empty for a journal that is whole.
    """
    damaged_line = find_damaged_line(path)
    if damaged_line is not None:
        return [f"line {damaged_line} is damaged"]
    try:
        study = optuna.load_study(study_name=STUDY_NAME, storage=_load_storage(path))
        trials = read_finished_trials(study)
    except Exception as error:  # Optuna replays the lines, and meets whatever is wrong with them
        return [f"it can't be replayed: {type(error).__name__}: {error}"]
    faults: list[str] = []
    numbers = [trial.number for trial in trials]
    for number in sorted(set(numbers)):
        if numbers.count(number) > 1:
            faults.append(f"trial {number} stands in it {numbers.count(number)} times")
    for optuna_trial in study.get_trials(deepcopy=False):
        if optuna_trial.state == TrialState.RUNNING:
            faults.append(f"trial {optuna_trial.number} is still running, and nobody works on it")
        is_finished = optuna_trial.state == TrialState.COMPLETE
        if is_finished and DASHBOARD_CONSTRAINTS_KEY not in optuna_trial.system_attrs:
            faults.append(f"trial {optuna_trial.number} has no constraint: it counts as feasible")
        if is_finished and "trial" not in optuna_trial.user_attrs:
            faults.append(f"trial {optuna_trial.number} has no structure")
    return faults


def read_finished_trials(study: optuna.Study) -> list[Trial]:
    """Read every trial with a result, oldest first.

    Raises:
        DataError: Another version of mmcompress wrote them otherwise.
    """
    try:
        trials = [build_record(Trial, record) for record in _list_records(study)]
    except InvalidValue as error:
        raise DataError(
            f"the study holds trials of another version of mmcompress: {error}; use a new --out"
        ) from error
    return sorted(trials, key=_get_number)


def _get_number(trial: Trial) -> int:
    """Return the key that sorts trials by age, and leaves equal ones in their order."""
    return trial.number


def read_first_error(study: optuna.Study) -> str:
    """Read the error of the first failed trial; empty where none failed."""
    for optuna_trial in study.get_trials(deepcopy=False):
        if "error" in optuna_trial.user_attrs:
            return str(optuna_trial.user_attrs["error"])
    return ""


def count_failures(study: optuna.Study, origin: str | None = None) -> int:
    """Count trials whose evaluation raised an error, of one origin or of all.

    Trials that a dead driver left behind do not count: they are asked for again.
    """
    failures = 0
    for optuna_trial in study.get_trials(deepcopy=False):
        attributes = optuna_trial.user_attrs
        if "error" in attributes and origin in (None, attributes.get("origin")):
            failures += 1
    return failures


def never_ends() -> bool:
    """Return False: there is no limit of time."""
    return False


@silence_logger(OPTUNA_LOGGER)
def run_study(
    study: optuna.Study,
    problem: SearchProblem,
    *,
    executor: Executor,
    evaluate: Evaluate,
    starts: Sequence[SearchPoint],
    seeds: SeedCandidates,
    effort: SearchEffort,
    seed: int,
    sampler: str = "tpe",
    is_over: Callable[[], bool] = never_ends,
    progress: StageProgress = ignore_progress,
) -> list[Trial]:
    """Search until the proposals and level switches of `effort` stand in the study.

    A candidate seen before is not evaluated again.

    Args:
        study: From `open_study`.
        problem: The space, the budget, and how points become candidates.
        executor: Where candidates are evaluated.
        evaluate: Measures one candidate on a worker.
        starts: Points of the space that the sampler proposes first.
        seeds: Candidates that are evaluated first, as they are.
        effort: How much is searched.
        seed: Of the sampler and of the level switches, together with the trials in the study.
        sampler: Name in the registry of samplers.
        is_over: Whether the time is over. From then on nothing is proposed, once there is a trial.
        progress: Receives the best trial so far after every evaluation.

    Returns:
        One trial a candidate, those of earlier sessions included with latencies predicted anew.

    Raises:
        ClusterError: A worker process died.
    """
    journal = TrialJournal(study, problem, sampler=sampler, seed=seed, starts=starts)
    session = SearchSession(
        journal,
        executor,
        evaluate=evaluate,
        seeds=seeds,
        effort=effort,
        seed=seed,
        is_over=is_over,
        progress=progress,
    )
    session.run()
    return list(journal.trials_by_key.values())


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A candidate before it is evaluated."""

    origin: str
    """What proposed it: a sampler, a split of the budget, a level switch."""
    overrides: SearchPoint
    """The point of the search space: spec overrides that give the candidate."""
    candidate: Candidate
    """Its structure and precisions."""
    latency_ms: float
    """Predicted milliseconds of a request."""
    optuna_trial: optuna.trial.Trial | None
    """The open trial of the sampler; None for a candidate that no sampler proposed."""


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """A proposal on a worker."""

    proposal: Proposal
    """What is evaluated."""
    task: SubmittedTask
    """The evaluation on the executor."""


class TrialJournal:
    """The study as its only writer sees it: records results and failures."""

    def __init__(
        self,
        study: optuna.Study,
        problem: SearchProblem,
        *,
        sampler: str,
        seed: int,
        starts: Sequence[SearchPoint],
    ):
        self.study = study
        self.problem = problem
        self.distributions = _make_distributions(problem.space)
        earlier_trials = study.get_trials(deepcopy=False)
        self.trial_count = len(earlier_trials)
        # A resumed search must not draw the points of its first session again.
        self.sampling = Sampling(
            sampler,
            seed=seed + self.trial_count,
            distributions=self.distributions,
            trials=earlier_trials,
            starts=starts,
        )
        self.earlier_trials = read_finished_trials(study)
        self.trials_by_key: dict[str, Trial] = {}
        for trial in self.earlier_trials:
            # The predictor may have been corrected since.
            latency_ms = problem.predict(trial.candidate)
            self.trials_by_key[trial.candidate.make_key()] = replace(trial, latency_ms=latency_ms)

    @property
    def result_count(self) -> int:
        """Results that stood in the study when this session began."""
        return len(self.earlier_trials)

    def count_tries(self, origin: str) -> int:
        """Count the candidates of an origin that earlier sessions evaluated or failed at."""
        keys = {t.candidate.make_key() for t in self.earlier_trials if t.origin == origin}
        return len(keys) + count_failures(self.study, origin)

    def record_result(self, proposal: Proposal, result: TaskResult) -> None:
        """Write the result of a proposal; a candidate's first result stays the one of its key."""
        trial = self.make_trial(proposal, result, number=self.trial_count)
        self.trials_by_key.setdefault(proposal.candidate.make_key(), trial)
        self._write(proposal, self.make_finished(proposal, trial))

    @staticmethod
    def make_trial(proposal: Proposal, result: TaskResult, *, number: int) -> Trial:
        """Make the record of a proposal that was evaluated."""
        return Trial(
            number=number,
            origin=proposal.origin,
            overrides=proposal.overrides,
            candidate=proposal.candidate,
            latency_ms=proposal.latency_ms,
            loss=result["loss"],
            quality=result["quality"],
            evaluation_seconds=result["seconds"],
            worker=result["worker"],
        )

    def tell_known(self, proposal: Proposal, known_trial: Trial) -> None:
        """Tell the sampler the result of a candidate that is known; nothing is written."""
        finished = self.make_finished(proposal, known_trial)
        assert proposal.optuna_trial is not None
        self.sampling.tell(proposal.optuna_trial, finished)

    def tell_pending(self, proposal: Proposal) -> None:
        """Tell the sampler that a candidate is on a worker already; nothing is written."""
        assert proposal.optuna_trial is not None
        failed = self.make_failed(proposal, "it is on a worker already")
        self.sampling.tell(proposal.optuna_trial, failed)

    def record_failure(self, proposal: Proposal, error: BaseException) -> None:
        """Write the error of a proposal."""
        self._write(proposal, self.make_failed(proposal, describe_error(error)))

    def make_failed(self, proposal: Proposal, error: str) -> FrozenTrial:
        """Make the trial of Optuna that holds an error."""
        optuna_trial = proposal.optuna_trial
        return create_trial(
            state=TrialState.FAIL,
            params=dict(optuna_trial.params) if optuna_trial else {},
            distributions=self.distributions if optuna_trial else {},
            user_attrs={
                "error": error,
                "origin": proposal.origin,
                "key": proposal.candidate.make_key(),
            },
        )

    def make_finished(self, proposal: Proposal, trial: Trial) -> FrozenTrial:
        """Make the trial of Optuna that holds a result, and by how much it exceeds the budget."""
        excess_ms = proposal.latency_ms - self.problem.budget_ms
        params = to_search_point(self.problem, proposal.candidate)
        if proposal.optuna_trial is not None:
            # The sampler learns of the point that it proposed.
            params = dict(proposal.optuna_trial.params)
        return create_trial(
            state=TrialState.COMPLETE,
            # Without parameters the samplers would take the space for an empty one.
            params=params,
            distributions=self.distributions,
            value=trial.loss,
            user_attrs={"trial": to_plain(trial)},
            # Optuna takes a trial without a constraint for feasible.
            constraints={"latency": excess_ms},
            system_attrs={DASHBOARD_CONSTRAINTS_KEY: [excess_ms]},
        )

    def _write(self, proposal: Proposal, trial: FrozenTrial) -> None:
        """Write a trial to the journal, whole at once, and tell the sampler."""
        self.study.add_trial(trial)
        self.trial_count += 1
        if proposal.optuna_trial is not None:
            self.sampling.tell(proposal.optuna_trial, trial)
        else:
            self.sampling.add(trial)


def describe_plan(seeds: int, samples: int, *, switches: int) -> str:
    """Return what the trials of a session are, in words; empty where there is nothing to do."""
    parts: list[str] = []
    for count, noun in (
        (seeds, "given"),
        (samples, "proposals of the sampler"),
        (switches, "exchanges of units"),
    ):
        if count:
            parts.append(f"{count} {noun}")
    if not parts:
        return ""
    return f"{seeds + samples + switches} trials: {', '.join(parts)}"


def describe_error(error: BaseException) -> str:
    """Return type and last line of an error; the lines before it are a worker's traceback."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


class SearchSession:
    """One session of a search: proposes while workers are free, records what comes back."""

    def __init__(
        self,
        journal: TrialJournal,
        executor: Executor,
        *,
        evaluate: Evaluate,
        seeds: SeedCandidates,
        effort: SearchEffort,
        seed: int,
        is_over: Callable[[], bool],
        progress: StageProgress,
    ):
        self.journal = journal
        self.problem = journal.problem
        self.executor = executor
        self.evaluate = evaluate
        self.effort = effort
        self.is_over = is_over
        self.progress = progress
        self.sampled = journal.count_tries(SAMPLER_ORIGIN)
        self.switched = journal.count_tries(LEVEL_SWITCH_ORIGIN)
        self.seeds_left = [
            (origin, candidate)
            for origin, candidate in seeds
            if candidate.make_key() not in journal.trials_by_key
        ]
        samples_left = max(effort.trials - self.sampled, 0)
        switches_left = max(effort.level_switches - self.switched, 0)
        self.total = max(1, len(self.seeds_left) + samples_left + switches_left)
        self.plan = describe_plan(len(self.seeds_left), samples_left, switches=switches_left)
        # A resumed search must not draw the level switches of its first session again.
        self.seed = seed
        self.rng = random.Random(f"{seed}:{journal.result_count}")
        self.running: dict[Future[TaskResult], RunningTrial] = {}
        self.evaluated = 0
        self.evaluation_seconds = 0.0
        self.repeats = 0

    def run(self) -> None:
        """Search until nothing is left to propose and nothing is running."""
        self.tell_plan()
        while True:
            self._fill_workers()
            if not self.running:
                return
            finished, _ = wait(self.running, return_when=FIRST_COMPLETED)
            for future in finished:
                self.settle_trial(self.running.pop(future))

    def tell_plan(self) -> None:
        """Tell what the trials of this session are."""
        if self.plan:
            self.progress(self.plan, 0.0)

    def _fill_workers(self) -> None:
        """Propose and submit candidates until every worker has one."""
        while len(self.running) < self.effort.workers:
            if self.journal.trials_by_key and self.is_over():
                return
            proposal = self.propose_next()
            if proposal is None:
                return
            self.submit(proposal)

    def submit(self, proposal: Proposal) -> None:
        """Hand a proposal to the executor."""
        task = submit_candidate(
            proposal.candidate,
            self.evaluate,
            executor=self.executor,
            retries=self.effort.retries,
        )
        self.running[task.future] = RunningTrial(proposal=proposal, task=task)

    def propose_next(self) -> Proposal | None:
        """Propose seeds, then samples, then level switches; None at the end or while these wait."""
        if self.seeds_left:
            origin, candidate = self.seeds_left.pop(0)
            return self._make_proposal(origin, candidate)
        if self.sampled < self.effort.trials:
            self.sampled += 1
            proposal = self._sample_unknown()
            if proposal is not None:
                return proposal
            # The sampler knows no other structure: do not ask again.
            self.sampled = self.effort.trials
        if self.switched >= self.effort.level_switches or self._awaits_other_origins():
            return None
        candidate_or_none = switch_levels(
            self.problem, self._find_best(), seen_keys=self._list_known_keys(), rng=self.rng
        )
        if candidate_or_none is None:
            # No neighbour is left: do not look again.
            self.switched = self.effort.level_switches
            return None
        self.switched += 1
        return self._make_proposal(LEVEL_SWITCH_ORIGIN, candidate_or_none)

    def _awaits_other_origins(self) -> bool:
        """Return whether a seed or a sample is running: it may become the best trial."""
        origins = {proposal.origin for proposal in self.list_pending()}
        return bool(origins - {LEVEL_SWITCH_ORIGIN})

    def _list_known_keys(self) -> set[str]:
        """List the keys of all candidates that are evaluated or running."""
        pending_keys = {proposal.candidate.make_key() for proposal in self.list_pending()}
        return self.journal.trials_by_key.keys() | pending_keys

    def list_pending(self) -> list[Proposal]:
        """List the proposals that are not settled."""
        return [trial.proposal for trial in self.running.values()]

    def _make_proposal(self, origin: str, candidate: Candidate) -> Proposal:
        """Make the proposal of a candidate that no sampler proposed."""
        return Proposal(
            origin=origin,
            overrides=to_overrides(self.problem, candidate),
            candidate=candidate,
            latency_ms=self.problem.predict(candidate),
            optuna_trial=None,
        )

    def _sample_unknown(self) -> Proposal | None:
        """Ask the sampler until it proposes an unknown candidate; tell it results of known ones.

        Returns:
            The proposal; None where the sampler has repeated itself too often.
        """
        while self.repeats < MAX_REPEATS_PER_TRIAL * self.total:
            optuna_trial = self.journal.sampling.ask()
            overrides, candidate = scale_to_budget(self.problem, dict(optuna_trial.params))
            proposal = Proposal(
                origin=SAMPLER_ORIGIN,
                overrides=overrides,
                candidate=candidate,
                latency_ms=self.problem.predict(candidate),
                optuna_trial=optuna_trial,
            )
            key = candidate.make_key()
            if key not in self._list_known_keys():
                return proposal
            self.repeats += 1
            known_trial = self.journal.trials_by_key.get(key)
            if known_trial is not None:
                self.journal.tell_known(proposal, known_trial)
            else:
                self.journal.tell_pending(proposal)
        return None

    def settle_trial(self, trial: RunningTrial) -> None:
        """Record a finished trial, or submit it again after an error."""
        if retry_failed_task(trial.task):
            self.running[trial.task.future] = trial
            return
        error = trial.task.future.exception()
        if error is None:
            result = trial.task.future.result()
            self.evaluation_seconds += result["seconds"]
            if math.isfinite(result["loss"]):
                self.journal.record_result(trial.proposal, result)
            else:
                error = ArithmeticError(f"the loss is {result['loss']}")
        if error is not None:
            self.journal.record_failure(trial.proposal, error)
            self.progress(f"a trial failed, the search goes on: {describe_error(error)}", None)
        self.evaluated += 1
        self._report_progress()
        self._keep_up_with_workers()

    def _keep_up_with_workers(self) -> None:
        """Let the sampler look at fewer trials, when many workers wait for its proposals."""
        mean_seconds = self.evaluation_seconds / self.evaluated
        if self.effort.workers == 1 or mean_seconds < MIN_WORK_SECONDS:
            return
        self.journal.sampling.keep_up_(SAMPLING_SHARE * mean_seconds / self.effort.workers)

    def _report_progress(self) -> None:
        """Tell the best trial so far."""
        best_trial = self._find_best()
        if best_trial is None:
            text = "nothing within the budget yet"
        else:
            text = f"best loss {best_trial.loss:.3f} at {best_trial.latency_ms:.2f} ms"
        share = min(self.evaluated / self.total, 1.0)
        self.progress(f"trial {self.evaluated} of {self.total}: {text}", share)

    def _find_best(self) -> Trial | None:
        """Find the trial of least loss within the budget."""
        return find_best_trial(list(self.journal.trials_by_key.values()), self.problem.budget_ms)


def _make_distributions(space: Space) -> dict[str, BaseDistribution]:
    """Make Optuna's distribution of every dimension."""
    return {path: _make_distribution(dimension) for path, dimension in space.dimensions.items()}


def _make_distribution(dimension: Dimension) -> BaseDistribution:
    """Make Optuna's distribution of one dimension."""
    if dimension.choices:
        return CategoricalDistribution(list(dimension.choices))
    low = dimension.low or 0.0
    high = dimension.high or 0.0
    if dimension.step and dimension.step >= 1:
        return IntDistribution(int(low), int(high), step=int(dimension.step))
    return FloatDistribution(low, high, step=dimension.step)
