"""A session of a search: Optuna proposes, workers evaluate, the driver alone writes. No torch.

A proposal of the sampler is a direction: its pruning ratios are scaled together until the predicted
latency just meets the budget. No trial is spent far from it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, replace

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from mmcompress.graph.structure import Candidate
from mmcompress.results.records import LEVEL_SWITCH_ORIGIN, Trial
from mmcompress.runtime.progress import StageProgress, ignore_progress
from mmcompress.runtime.quiet_loggers import silence_logger
from mmcompress.search.executors import (
    Evaluate,
    ExplainsWait,
    SubmittedTask,
    TaskResult,
    retry_failed_task,
    submit_candidate,
)
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
from mmcompress.search.study import (
    DASHBOARD_CONSTRAINTS_KEY,
    count_failures,
    read_finished_trials,
)
from mmcompress.search.trial_writer import TrialWriter
from mmcompress.spec.space import Dimension, Space
from mmcompress.storage import to_plain

SAMPLER_ORIGIN = "sampler"
"""`Trial.origin` of a proposal of the sampler."""
SAMPLING_SHARE = 0.5
"""Share of its time that the driver may spend on proposals: then it keeps up with its workers."""

MIN_WORK_SECONDS = 0.05
"""Mean seconds of a trial below which workers are not waited for: estimates take no time."""

MIN_WORKERS_AHEAD = 8
"""Workers from which on proposals are made ahead, and a thread writes the results. Fewer ones
hardly wait, and every proposal then knows one result more."""

MIN_LOAD_AHEAD = 0.1
"""Seconds of the driver for a trial of each worker / seconds of a trial, from which on proposals
are made ahead."""

QUIET_SECONDS = 120.0
"""Seconds without a trial that ends, after which a person is told what tasks wait for."""

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
    max_results: int = 0
    """Results of any origin in the study. Where none is within the budget, a session adds one
    in any case. 0: no bound."""
    workers: int = 1
    """Candidates evaluated at a time."""
    retries: int = 0
    """Times a failed evaluation is tried again."""
    batch: int = 1
    """Proposals that are made before one of their results is looked at, in a deterministic search.
    """


def never_ends() -> bool:
    """Return False: there is no limit of time."""
    return False


@dataclass(frozen=True, kw_only=True)
class SessionInputs:
    """What a session of a search works with."""

    executor: Executor
    """Where candidates are evaluated."""
    evaluate: Evaluate
    """Measures one candidate on a worker."""
    effort: SearchEffort
    """How much is searched."""
    seed: int
    """Of the sampler and of the level switches, together with the trials in the study."""
    starts: Sequence[SearchPoint] = ()
    """Points of the space that the sampler proposes first."""
    seeds: SeedCandidates = ()
    """Candidates that are evaluated first, as they are."""
    sampler: str = "tpe"
    """Name in the registry of samplers."""
    is_over: Callable[[], bool] = never_ends
    """Whether the time is over. From then on nothing is proposed, once there is a trial."""
    progress: StageProgress = ignore_progress
    """Receives the best trial so far after every evaluation."""


@silence_logger(OPTUNA_LOGGER)
def run_study(study: optuna.Study, problem: SearchProblem, *, inputs: SessionInputs) -> list[Trial]:
    """Search until the proposals and level switches of the effort stand in the study.

    A candidate seen before is not evaluated again.

    Args:
        study: From `open_study`.
        problem: The space, the budget, and how points become candidates.
        inputs: What the session works with.

    Returns:
        One trial a candidate, those of earlier sessions included with latencies predicted anew.

    Raises:
        ClusterError: A worker process died.
    """
    has_many_workers = inputs.effort.workers >= MIN_WORKERS_AHEAD
    with TrialWriter(study, in_thread=has_many_workers) as writer:
        journal = TrialJournal(study, problem, inputs=inputs, writer=writer)
        SearchSession(journal, inputs).run()
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
        inputs: SessionInputs,
        writer: TrialWriter,
    ):
        self.inputs = inputs
        self.study = study
        self.writer = writer
        self.problem = problem
        self.distributions = _make_distributions(problem.space)
        earlier_trials = study.get_trials(deepcopy=False)
        self.trial_count = len(earlier_trials)
        # A resumed search must not draw the points of its first session again.
        self.sampling = self.make_sampling(earlier_trials)
        self.earlier_trials = read_finished_trials(study)
        self.trials_by_key: dict[str, Trial] = {}
        self.best_trial: Trial | None = None
        """The trial of least loss within the budget."""
        self.failed_keys: set[str] = set()
        """Candidates that failed in this session with all retries. A later one tries them again."""
        for trial in self.earlier_trials:
            self.keep_trial_of_now(trial)

    def keep_trial(self, trial: Trial) -> None:
        """Keep a trial by the key of its candidate, and as the best one if it is that."""
        self.trials_by_key[trial.candidate.make_key()] = trial
        rivals = [trial] if self.best_trial is None else [self.best_trial, trial]
        self.best_trial = find_best_trial(rivals, self.problem.budget_ms)

    def keep_trial_of_now(self, trial: Trial) -> None:
        """Keep an earlier trial with its latency predicted anew: the predictor was corrected."""
        self.keep_trial(replace(trial, latency_ms=self.problem.predict(trial.candidate)))

    def make_sampling(self, trials: Sequence[FrozenTrial]) -> Sampling:
        """Make the sampler that knows some trials; its seed depends on how many they are."""
        return Sampling(
            self.inputs.sampler,
            seed=self.inputs.seed + len(trials),
            distributions=self.distributions,
            trials=trials,
            starts=self.inputs.starts,
        )

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
        if proposal.candidate.make_key() not in self.trials_by_key:
            self.keep_trial(trial)
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
            quality=result.get("quality", {}),
            evaluation_seconds=result.get("seconds", 0.0),
            worker=result["worker"],
        )

    def tell_known(self, proposal: Proposal, known_trial: Trial) -> None:
        """Tell the sampler the result of a candidate that is known; nothing is written."""
        finished = self.make_finished(proposal, known_trial)
        assert proposal.optuna_trial is not None
        self.sampling.tell(proposal.optuna_trial, finished)

    def tell_without_result(self, proposal: Proposal) -> None:
        """Tell the sampler that a candidate is not evaluated again; nothing is written.

        It is on a worker already, or it failed there.
        """
        assert proposal.optuna_trial is not None
        failed = self.make_failed(proposal, "it is not evaluated again")
        self.sampling.tell(proposal.optuna_trial, failed)

    def record_failure(self, proposal: Proposal, error: BaseException) -> None:
        """Write the error of a proposal."""
        self.failed_keys.add(proposal.candidate.make_key())
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
        self.writer.write(trial)
        self.trial_count += 1
        if proposal.optuna_trial is not None:
            self.sampling.tell(proposal.optuna_trial, trial)
        else:
            self.sampling.add(trial)


def describe_plan(seeds: int, samples: int, *, switches: int) -> str:
    """Return what the trials of a session are, in words; empty where there is nothing to do."""
    parts: list[str] = []
    for count, noun in (
        (seeds, "given structure" if seeds == 1 else "given structures"),
        (samples, "proposals of the sampler"),
        (switches, "exchanges of units"),
    ):
        if count:
            parts.append(f"{count} {noun}")
    if not parts:
        return ""
    total = seeds + samples + switches
    return f"{total} {'trial' if total == 1 else 'trials'}: {', '.join(parts)}"


def describe_error(error: BaseException) -> str:
    """Return type and last line of an error; the lines before it are a worker's traceback."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


class SearchSession:
    """One session of a search: proposes while workers are free, records what comes back."""

    def __init__(self, journal: TrialJournal, inputs: SessionInputs):
        self.journal = journal
        self.problem = journal.problem
        self.inputs = inputs
        effort = inputs.effort
        self.effort = effort
        self.progress = inputs.progress
        self.sampled = journal.count_tries(SAMPLER_ORIGIN)
        self.switched = journal.count_tries(LEVEL_SWITCH_ORIGIN)
        seeds = self._list_unknown_seeds()
        samples_left = max(effort.trials - self.sampled, 0)
        switches_left = max(effort.level_switches - self.switched, 0)
        room = len(seeds) + samples_left + switches_left
        if effort.max_results:
            # A budget that has moved may leave nothing within it: one more finds something.
            least = 0 if journal.best_trial else 1
            room = min(room, max(effort.max_results - journal.result_count, least))
        self.seeds_left = seeds[:room]
        samples_left = min(samples_left, room - len(self.seeds_left))
        switches_left = min(switches_left, room - len(self.seeds_left) - samples_left)
        self.max_samples = self.sampled + samples_left
        """Proposals of the sampler, those of earlier sessions included."""
        self.max_switches = self.switched + switches_left
        """Level switches, those of earlier sessions included."""
        self.total = max(1, len(self.seeds_left) + samples_left + switches_left)
        self.plan = describe_plan(len(self.seeds_left), samples_left, switches=switches_left)
        # A resumed search must not draw the level switches of its first session again.
        self.rng = self.make_dice()
        self.running: dict[Future[TaskResult], RunningTrial] = {}
        self.evaluated = 0
        self.evaluation_seconds = 0.0
        self.driver_seconds = 0.0
        self.repeats = 0

    def run(self) -> None:
        """Search until nothing is left to propose and nothing is running."""
        self.tell_plan()
        while True:
            self._fill_workers()
            if not self.running:
                return
            self.settle_next()

    def settle_next(self) -> None:
        """Wait for a trial to end, and settle it; tell a person when none does."""
        finished, _ = wait(self.running, timeout=QUIET_SECONDS, return_when=FIRST_COMPLETED)
        if not finished:
            self.tell_wait()
        start = time.perf_counter()
        for future in finished:
            self.settle_trial(self.running.pop(future))
        self.driver_seconds += time.perf_counter() - start

    def _list_unknown_seeds(self) -> list[tuple[str, Candidate]]:
        """List the seeds to evaluate, each once: several may have been cut to one structure."""
        seeds_by_key: dict[str, tuple[str, Candidate]] = {}
        for origin, candidate in self.inputs.seeds:
            key = candidate.make_key()
            if key not in self.journal.trials_by_key:
                seeds_by_key.setdefault(key, (origin, candidate))
        return list(seeds_by_key.values())

    def make_dice(self) -> random.Random:
        """Make the dice of the level switches: they depend on how many results are known."""
        return random.Random(f"{self.inputs.seed}:{self.journal.result_count}")

    def tell_plan(self) -> None:
        """Tell what the trials of this session are."""
        if self.plan:
            self.progress(self.plan, 0.0)

    def tell_wait(self) -> None:
        """Tell that no trial has ended for a while, and what the executor says of it."""
        message = f"no trial has ended for {QUIET_SECONDS / 60:.0f} min"
        executor = self.inputs.executor
        if isinstance(executor, ExplainsWait):
            message += f": {executor.explain_wait()}"
        self.progress(message, None)

    def _fill_workers(self) -> None:
        """Propose and submit candidates until every worker has one, and a few wait for the next."""
        start = time.perf_counter()
        wanted = self.effort.workers + self._count_ahead()
        while len(self.running) < wanted:
            if self.journal.trials_by_key and self.inputs.is_over():
                break
            proposal = self.propose_next()
            if proposal is None:
                break
            self.submit(proposal)
        self.driver_seconds += time.perf_counter() - start

    def _count_ahead(self) -> int:
        """Count the proposals that wait for a worker, so that none waits for a proposal.

        The driver is busy for a while with every trial. Many workers that end at once would each
        wait for all before them.
        """
        workers = self.effort.workers
        if workers < MIN_WORKERS_AHEAD or not self.evaluated:
            return 0
        mean_seconds = self.evaluation_seconds / self.evaluated
        if mean_seconds < MIN_WORK_SECONDS:
            return 0
        load = workers * self.driver_seconds / self.evaluated / mean_seconds
        return 0 if load < MIN_LOAD_AHEAD else min(math.ceil(load * workers), workers)

    def submit(self, proposal: Proposal) -> None:
        """Hand a proposal to the executor."""
        task = submit_candidate(
            proposal.candidate,
            self.inputs.evaluate,
            executor=self.inputs.executor,
            retries=self.effort.retries,
        )
        self.running[task.future] = RunningTrial(proposal=proposal, task=task)

    def propose_next(self) -> Proposal | None:
        """Propose seeds, then samples, then level switches; None at the end or while these wait."""
        if self.seeds_left:
            origin, candidate = self.seeds_left.pop(0)
            return self._make_proposal(origin, candidate)
        if self.sampled < self.max_samples:
            self.sampled += 1
            proposal = self._sample_unknown()
            if proposal is not None:
                return proposal
            # The sampler knows no other structure: do not ask again.
            self.sampled = self.max_samples
        if self.switched >= self.max_switches or self._awaits_other_origins():
            return None
        candidate_or_none = switch_levels(
            self.problem, self.journal.best_trial, seen_keys=self._list_known_keys(), rng=self.rng
        )
        if candidate_or_none is None:
            # No neighbour is left: do not look again.
            self.switched = self.max_switches
            return None
        self.switched += 1
        return self._make_proposal(LEVEL_SWITCH_ORIGIN, candidate_or_none)

    def _awaits_other_origins(self) -> bool:
        """Return whether a seed or a sample is running: it may become the best trial."""
        origins = {proposal.origin for proposal in self.list_pending()}
        return bool(origins - {LEVEL_SWITCH_ORIGIN})

    def _list_known_keys(self) -> set[str]:
        """List the keys of all candidates that are evaluated, that failed, or that are running."""
        pending_keys = {proposal.candidate.make_key() for proposal in self.list_pending()}
        return self.journal.trials_by_key.keys() | self.journal.failed_keys | pending_keys

    def _is_known(self, key: str) -> bool:
        """Return whether the candidate with a key is evaluated, failed, or running."""
        if key in self.journal.trials_by_key or key in self.journal.failed_keys:
            return True
        return any(proposal.candidate.make_key() == key for proposal in self.list_pending())

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
            if not self._is_known(key):
                return proposal
            self.repeats += 1
            known_trial = self.journal.trials_by_key.get(key)
            if known_trial is not None:
                self.journal.tell_known(proposal, known_trial)
            else:
                self.journal.tell_without_result(proposal)
        return None

    def settle_trial(self, trial: RunningTrial) -> None:
        """Record a finished trial, or submit it again after an error."""
        if retry_failed_task(trial.task):
            self.running[trial.task.future] = trial
            return
        error = trial.task.future.exception()
        if error is None:
            result = trial.task.future.result()
            self.evaluation_seconds += result.get("seconds", 0.0)
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
        best_trial = self.journal.best_trial
        if best_trial is None:
            text = "nothing within the budget yet"
        else:
            text = (
                f"best loss {best_trial.loss:.3f} at {best_trial.latency_ms:.2f} of "
                f"{self.problem.budget_ms:.2f} ms"
            )
        share = min(self.evaluated / self.total, 1.0)
        self.progress(f"trial {self.evaluated} of {self.total}: {text}", share)


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
