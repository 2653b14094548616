"""A training that two workers of Ray share: `shared_training.py SPEC OUT STEPS [options]`.

With a storage URL, its checkpoints go there. Without an address, a local Ray is started.

What it tells goes to standard output, a line each. With a training under way in OUT it goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmcompress.graph.structure import cut_each_block
from mmcompress.prune.surgery import copy_resized
from mmcompress.run.compress import train_on_ray
from mmcompress.run.compress.training import train_pruned_models_
from mmcompress.workspace.context import open_run

SETTINGS = {
    "search.executor": "ray",
    "resources.distill.workers": 2,
    "distill.batch": 8,
    "distill.minutes": 20,
    "distill.find_learning_rate": False,
}


def main(spec: str, out: Path, steps: int, *, url: str, ray_address: str) -> None:
    """Train the tiny pipeline, cut by half."""
    # A report of a checkpoint takes Ray some two seconds.
    train_on_ray.SHARED_CHECKPOINT_SECONDS = 4.0
    run = open_run(
        spec,
        out,
        overrides={**SETTINGS, "distill.steps": steps, "search.ray_address": ray_address or None},
        resume=out.exists(),
        on_progress=lambda stage, message, share: print(message, flush=True),
    )
    run.storage_url = url
    # The storage names the state of a training after the structure.
    run.folder.fitted.write_text("the same in every try")
    models = {
        name: copy_resized(model, cut_each_block(model.blocks, 0.5))
        for name, model in run.models.items()
    }
    trained_steps = train_pruned_models_(
        run, models, budget_share=1.0, history=run.folder.training_history
    )
    print(f"trained {trained_steps} steps", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("spec")
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--url", default="")
    parser.add_argument("--ray-address", default="")
    given = parser.parse_args()
    main(given.spec, given.out, given.steps, url=given.url, ray_address=given.ray_address)
