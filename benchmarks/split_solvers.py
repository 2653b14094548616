"""Compares two solvers of the budget split: the dynamic programme, and HiGHS by `scipy.optimize.milp`.

    python benchmarks/split_solvers.py [--blocks 72] [--problems 20]

Both choose one option for every block, so that losses add up to least within a latency budget. The
problems are random, of the shape that a pipeline gives. Losses are convex, costs fall with the
units that are cut, and one option removes the block whole.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from mmcompress.search.knapsack import choose_options_within_budget

OPTIONS_PER_BLOCK = 13
"""Options of a block: as many as a block of twelve heads has."""

BUDGET_SHARE = 0.5
"""The budget / the cost of the whole pipeline: a target of 2x."""

Rows = list[np.ndarray]
"""One array of figures for each block, an entry for each of its options."""


def draw_problem(block_count: int, seed: int) -> tuple[Rows, Rows]:
    """Return the costs and the losses of the options of every block."""
    generator = np.random.default_rng(seed)
    cut = np.linspace(0, 1, OPTIONS_PER_BLOCK)
    costs: Rows = []
    losses: Rows = []
    for _ in range(block_count):
        whole_cost = generator.uniform(0.2, 1.0)
        fixed_share = generator.uniform(0.05, 0.3)
        cost = whole_cost * (fixed_share + (1 - fixed_share) * (1 - cut))
        cost[-1] = 0.0
        exponent = generator.uniform(1.5, 3.0)
        loss = generator.lognormal(-3, 1) * cut**exponent
        costs.append(cost)
        losses.append(loss)
    return costs, losses


def solve_by_highs(costs: Rows, losses: Rows, *, budget: float) -> list[int]:
    """Choose the options by mixed-integer linear programming."""
    all_costs = np.concatenate(costs)
    columns = np.arange(len(all_costs))
    rows = np.repeat(np.arange(len(costs)), OPTIONS_PER_BLOCK)
    one_per_block = csr_matrix((np.ones(len(columns)), (rows, columns)))
    solution = milp(
        np.concatenate(losses),
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_per_block, 1, 1),
            LinearConstraint(all_costs[None], -np.inf, budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    chosen = solution.x.reshape(len(costs), OPTIONS_PER_BLOCK)
    return [int(option) for option in chosen.argmax(1)]


def sum_chosen(figures: Rows, choice: list[int]) -> float:
    """Return the sum of a figure over the chosen options."""
    return float(sum(row[option] for row, option in zip(figures, choice, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=72, help="blocks of the pipeline")
    parser.add_argument("--problems", type=int, default=20, help="problems that are solved")
    options = parser.parse_args()
    time_ratios: list[float] = []
    loss_ratios: list[float] = []
    programme_ms: list[float] = []
    for seed in range(options.problems):
        costs, losses = draw_problem(options.blocks, seed)
        budget = BUDGET_SHARE * sum_chosen(costs, [0] * len(costs))
        start = time.perf_counter()
        by_programme = choose_options_within_budget(costs, losses, budget=budget)
        middle = time.perf_counter()
        by_highs = solve_by_highs(costs, losses, budget=budget)
        end = time.perf_counter()
        assert by_programme is not None
        assert sum_chosen(costs, by_programme) <= budget
        assert sum_chosen(costs, by_highs) <= budget * (1 + 1e-6)
        programme_ms.append(1000 * (middle - start))
        time_ratios.append((end - middle) / (middle - start))
        loss_ratios.append(sum_chosen(losses, by_programme) / sum_chosen(losses, by_highs))
    print(f"{options.problems} problems of {options.blocks} blocks")
    print(f"dynamic programme: {statistics.median(programme_ms):.1f} ms, median")
    quartiles = statistics.quantiles(time_ratios, n=4)
    print(
        f"time of HiGHS / the programme's: {statistics.median(time_ratios):.1f}"
        f" ({quartiles[0]:.1f} – {quartiles[2]:.1f})"
    )
    print(
        f"loss of the programme / that of HiGHS: {statistics.median(loss_ratios):.6f},"
        f" largest {max(loss_ratios):.6f}"
    )


if __name__ == "__main__":
    main()
