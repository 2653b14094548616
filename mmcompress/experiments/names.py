"""Names of the methods of `compare` and of the tables of `ablate`. No torch: a command line checks
them before anything is loaded."""

from __future__ import annotations

METHODS = (
    "searched",
    "knapsack",
    "linearized",
    "separate",
    "uniform",
    "shortened",
    "magnitude",
    "ranking",
    "random",
    "student",
    "int8",
    "longer",
)
"""Methods of a comparison; `experiments.baselines` says what each of them is."""

TABLES = (
    "order",
    "allocation",
    "protection",
    "importance",
    "zeros",
    "schedule",
    "losses",
)
"""Tables of an ablation; `experiments.cells` lists their rows."""
