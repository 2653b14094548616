"""A training that was cut off goes on from its last checkpoint: weights, moments of the optimizer, what was seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(kw_only=True)
class Checkpoint:
    """A file that holds the state of one training, replaced as a whole each time it is written."""

    path: Path
    interval_seconds: float
    """Seconds of training between two of them."""
    last_saved_at: float = 0.0

    def is_due(self, elapsed: float) -> bool:
        return elapsed - self.last_saved_at >= self.interval_seconds

    def save(
        self,
        elapsed: float,
        weights: Sequence[torch.Tensor],
        *,
        optimizer: torch.optim.Optimizer,
        best: Sequence[torch.Tensor],
        state: dict[str, Any],
    ) -> None:
        """`best`: the weights that did best so far; `state`: plain data."""
        tensors = {f"weight/{i}": w.detach() for i, w in enumerate(weights)}
        tensors |= {f"best/{i}": w for i, w in enumerate(best)}
        for i, w in enumerate(weights):
            tensors |= {
                f"{k}/{i}": optimizer.state[w][k]
                for k in MOMENTS
                if k in optimizer.state.get(w, {})
            }
        ahead = self.path.with_suffix(".new")
        own = {
            k: t.clone().contiguous() for k, t in tensors.items()
        }  # tied weights share memory, files may not
        save_file(own, ahead, metadata={"state": json.dumps({**state, "elapsed": elapsed})})
        ahead.replace(self.path)
        self.last_saved_at = elapsed

    def load_(
        self, weights: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], list[torch.Tensor]] | None:
        """Take weights and moments back in place; (state, the best weights), or None where there is no checkpoint."""
        if not self.path.exists():
            return None
        with safe_open(self.path, "pt") as f, torch.no_grad():
            names, state = set(f.keys()), json.loads(f.metadata()["state"])
            for i, w in enumerate(weights):
                w.copy_(f.get_tensor(f"weight/{i}"))
                if f"{MOMENTS[0]}/{i}" in names:
                    moments = {k: f.get_tensor(f"{k}/{i}") for k in MOMENTS}
                    optimizer.state[w] = {"step": torch.tensor(float(state["step"])), **moments}
            best = [
                f.get_tensor(f"best/{i}") for i in range(sum(n.startswith("best/") for n in names))
            ]
        self.last_saved_at = float(state["elapsed"])
        return state, best

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
