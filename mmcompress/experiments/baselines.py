"""Methods to compare the search with, each a row of `BASELINES`.

A method differs in how it chooses a structure, or in how that is trained. Refit, distillation,
export and measurement are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mmcompress.errors import SpecError
from mmcompress.experiments.proposals import (
    propose_at_random,
    propose_by_knapsack,
    propose_by_ranking,
    propose_linearized,
    propose_separately,
    propose_uniform,
)
from mmcompress.graph.structure import Candidate
from mmcompress.run.fit_structure import OpenProposals, open_search
from mmcompress.search.linearize import count_max_evaluations
from mmcompress.workspace.context import RunContext, list_precisions


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """How a method chooses its structure, and how it trains it.

    Exactly one of `open_proposals`, `make_candidate` and `structure_of` is set.
    """

    about: str
    """What the method is, for reports."""
    open_proposals: OpenProposals | None = None
    """Proposes structures, which are fitted to the target."""
    make_candidate: Callable[[RunContext], Candidate] | None = None
    """Makes the one structure of the method; it is not fitted to the target."""
    structure_of: str = ""
    """Name of the method or cell whose fitted structure this one takes."""
    importance: str = ""
    """Name of the importance criterion. Empty: the one of the spec."""
    from_scratch: bool = False
    """Whether the kept weights are drawn anew before training."""
    is_trained: bool = True
    """Whether the structure is trained at all."""
    task_loss_only: bool = False
    """Whether it learns from the loss of its task alone, without a teacher."""
    needs_positions: bool = False
    """Whether it makes sense only where the space cuts positions of sequences."""
    needs_linearization: bool = False
    """Whether it makes sense only where the search has linearization rounds."""

    @property
    def why_unsuitable(self) -> str:
        """Why the method makes no sense where it is not suitable."""
        if self.needs_positions:
            return "the search space cuts no positions"
        return "search.linearization_rounds is off"

    def is_suitable(self, run: RunContext) -> bool:
        """Return whether the method makes sense in the search space of a run."""
        if self.needs_positions:
            dimensions = run.space.dimensions
            if not any(path.endswith(".prune.tokens") for path in dimensions):
                return False
        return not self.needs_linearization or count_max_evaluations(run) > 0


def keep_whole_pipeline(run: RunContext, *, precision: str) -> Candidate:
    """Keep every unit; put each node into a precision where the space allows it.

    Args:
        run: The run; its space tells which precisions a node may have.
        precision: The precision. A node that may not have it gets the first one that it may have.

    Returns:
        The structure.

    Raises:
        SpecError: No node may have the precision.
    """
    kept_units: dict[str, dict[str, int]] = {}
    for node_name, blocks in run.blocks.items():
        kept_units[node_name] = {block.name: block.units for block in blocks}
    precisions: dict[str, str] = {}
    for node_name, choices in list_precisions(run).items():
        is_allowed = precision == "fp32" or precision in choices
        precisions[node_name] = precision if is_allowed else choices[0]
    if precision != "fp32" and precision not in precisions.values():
        raise SpecError(
            f"compare: no node may be {precision} in this search space; leave '{precision}' out"
        )
    return Candidate(kept_units=kept_units, precision=precisions)


BASELINES = {
    "searched": Baseline(about="the search of this tool", open_proposals=open_search),
    "knapsack": Baseline(
        about="the best split of the budget by measured loss increases, without a search",
        open_proposals=propose_by_knapsack,
    ),
    "linearized": Baseline(
        about="the knapsack on loss increases measured again in its own split, without a search",
        open_proposals=propose_linearized,
        needs_linearization=True,
    ),
    "separate": Baseline(
        about="a budget for each model instead of one for all", open_proposals=propose_separately
    ),
    "uniform": Baseline(about="the same share of every block", open_proposals=propose_uniform),
    "shortened": Baseline(
        about="the same share of every block and of the positions",
        open_proposals=partial(propose_uniform, cut_positions=True),
        needs_positions=True,
    ),
    "magnitude": Baseline(
        about="the same share of every block, units by the norm of their weights",
        open_proposals=propose_uniform,
        importance="magnitude",
    ),
    "ranking": Baseline(
        about="one threshold over the normalized scores of all units",
        open_proposals=propose_by_ranking,
    ),
    "random": Baseline(
        about="as many evaluations as the search, of structures drawn at random",
        open_proposals=propose_at_random,
    ),
    "student": Baseline(
        about="the searched structure trained from scratch",
        from_scratch=True,
        structure_of="searched",
    ),
    "int8": Baseline(
        about="int8 alone, nothing cut or trained",
        make_candidate=partial(keep_whole_pipeline, precision="int8"),
        is_trained=False,
    ),
    "longer": Baseline(
        about="the dense pipeline trained for as many steps by its own loss: "
        "what training alone brings",
        make_candidate=partial(keep_whole_pipeline, precision="fp32"),
        task_loss_only=True,
    ),
}
"""The methods by name, in the order of the tables."""
