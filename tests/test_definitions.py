"""Criteria, repairs and losses against their definitions, computed here a second time by other means."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from mmcompress.distill import losses
from mmcompress.graph.blocks import Block
from mmcompress.kinds.base import SIMILARITY_SCALE
from mmcompress.models.device import CPU
from mmcompress.prune.importance.inputs import ImportanceInputs
from mmcompress.prune.importance.reconstruction import ELIMINATION_RIDGE, score_by_elimination
from mmcompress.prune.masks import mask_units
from mmcompress.prune.refit import Gram, fit_linear_, measure_grams, refit_from_gram_
from mmcompress.prune.surgery import copy_without_units
from mmcompress.registry import IMPORTANCE
from mmcompress.search.sensitivity import measure as sensitivity_measure
from mmcompress.search.sensitivity import measured_curves
from mmcompress.search.sensitivity.measured_curves import CurveKeeper, MeasuredCurves
from mmcompress.storage import read_record
from mmcompress.workspace.folder import RunFolder

BLOCKS = [
    ("vision", "0.ffn"),
    ("vision", "1.attention"),
    ("captioner", "1.cross_attention"),
    ("text", "0.attention"),
]


@pytest.fixture()
def few(batch):
    return batch[slice(0, 3)]


@pytest.fixture()
def material(pipeline, models, few, monkeypatch):
    monkeypatch.setattr(
        pipeline, "batch_size", 10**6
    )  # one piece: a contrastive loss is of the pairs beside each other
    return ImportanceInputs(
        pipeline=pipeline,
        models=models,
        batch=few,
        grams=measure_grams(pipeline, models, batch=few),
        seed=3,
    )


@pytest.mark.parametrize(
    ("node", "name"), [("vision", "0.ffn"), ("captioner", "0.attention"), ("text", "1.ffn")]
)
def test_fisher_and_taylor_from_differences_of_the_loss_pair_by_pair(
    material, pipeline, models, few, node, name
):
    """Fisher: the sum over pairs of squared derivatives; Taylor: the size of their mean."""
    block, step = models[node].get_block(name), 0.01

    def slope(pair: int, unit: int) -> float:
        values = []
        for sign in (1, -1):
            mask = torch.ones(len(few), block.units)
            mask[pair, unit] += sign * step
            with torch.no_grad(), mask_units(models[node], {name: mask}):
                values.append(
                    float(sum(pipeline.compute_losses(pipeline.forward(models, few), few).values()))
                )
        return len(few) * (values[0] - values[1]) / (2 * step)

    fisher, taylor = (IMPORTANCE.get(k)(material)[node][name] for k in ("fisher", "taylor"))
    strong = fisher.argsort(descending=True)[:3].tolist()
    for unit in strong:
        slopes = np.array([slope(pair, unit) for pair in range(len(few))])
        assert float(fisher[unit]) == pytest.approx(float((slopes**2).sum()), rel=0.05)
        assert float(taylor[unit]) == pytest.approx(
            abs(float(slopes.mean())), rel=0.08, abs=0.02 * abs(slopes).max()
        )


@pytest.mark.parametrize(("node", "name"), [("vision", "0.ffn"), ("vision", "1.attention")])
@pytest.mark.parametrize("bias", [True, False])
def test_reconstruction_is_the_error_of_the_best_that_is_left(models, node, name, bias):
    """Units go one by one, always the one whose loss leaves the least ridge error; computed by least squares anew."""
    block, rng = models[node].get_block(name), np.random.default_rng(0)
    units, width, rows = 6, block.width, 400
    block = dataclasses.replace(block, units=units)
    mixed = rng.normal(size=(units * width, units * width)) * rng.uniform(0.1, 2, units * width)
    x = rng.normal(size=(rows, units * width)) @ mixed + rng.normal(size=units * width)
    torch.manual_seed(0)
    out = torch.nn.Linear(units * width, 5, bias=bias)
    w = out.weight.detach().double().numpy()
    gram = Gram.make_empty(units * width, device=CPU)
    gram.add_(torch.from_numpy(x).float())
    c = x - x.mean(0) if bias else x
    moments = c.T @ c / rows
    a = moments + ELIMINATION_RIDGE * np.diag(moments).mean() * np.eye(len(moments))

    def error(
        kept,
    ):  # of the best weights on what is kept, for the dense ones: min (W - V) A (W - V)'
        k = np.array([u * width + i for u in kept for i in range(width)], int)
        v = np.zeros_like(w)
        if len(k):
            v[:, k] = np.linalg.solve(a[np.ix_(k, k)], a[k] @ w.T).T
        return float(np.trace((w - v) @ a @ (w - v).T))

    left, want = list(range(units)), np.zeros(units)
    while left:
        least = min(left, key=lambda u: error([v for v in left if v != u]))
        left.remove(least)
        want[least] = error(left)
    np.testing.assert_allclose(score_by_elimination(out, block, gram=gram).numpy(), want, rtol=2e-3)


@pytest.mark.parametrize(("node", "name"), BLOCKS[:2])
def test_wanda_and_flap_from_the_activations_themselves(
    material, pipeline, models, few, node, name
):
    """Squared weights times mean squares (Wanda) or variances (FLAP) of what they read, over a unit's features."""
    m, b, seen = models[node], models[node].get_block(name), []
    handle = m.get_submodule(b.reader).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        pipeline.forward(models, few)
    handle.remove()
    x = seen[0].reshape(-1, b.units * b.width).double().numpy()
    w = m.get_linear(b.reader).weight.detach().double().numpy()
    for criterion, moment in (("activation", (x**2).mean(0)), ("fluctuation", x.var(0))):
        want = np.zeros(b.units)
        for unit in range(b.units):
            for feature in range(unit * b.width, (unit + 1) * b.width):
                want[unit] += sum(w[o, feature] ** 2 for o in range(len(w))) * moment[feature]
        found = IMPORTANCE.get(criterion)(material)[node][name].numpy()
        np.testing.assert_allclose(found, want, rtol=2e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_refit_is_ridge_regression_with_a_free_constant(pipeline, models, few, bias):
    """Least squares on centred inputs, the ridge a share of the mean variance, the constant not held small.

    Without a bias there is no constant: the same about the origin.
    """
    ridge, name = 0.3, "0.ffn"
    m, seen = copy.deepcopy(models["vision"]), []
    b = m.get_block(name)
    if not bias:
        m.get_linear(b.reader).bias = None
    models = {**models, "vision": m}
    handle = m.get_submodule(b.reader).register_forward_hook(
        lambda _, args, out: seen.append((args[0], out))
    )
    with torch.no_grad():
        pipeline.forward(models, few)
    handle.remove()
    x, y = (t.reshape(-1, t.shape[-1]).double().numpy() for t in seen[0])
    keep = np.arange(0, b.units, 3)
    mx, my = (x[:, keep].mean(0), y.mean(0)) if bias else (0.0, 0.0)
    k = x[:, keep] - mx
    r = ridge * (k**2).sum(0).mean()
    rows = np.vstack([k, np.sqrt(r) * np.eye(len(keep))])  # the ridge as rows of its own
    target = np.vstack([y - my, np.zeros((len(keep), y.shape[1]))])
    w = np.linalg.lstsq(rows, target, rcond=None)[0].T
    units = {name: torch.from_numpy(keep)}
    small = copy_without_units(m, units)
    refit_from_gram_(
        small,
        m,
        units=units,
        grams=measure_grams(pipeline, models, batch=few)["vision"],
        ridge=ridge,
    )
    new, again = small.get_linear(b.reader), torch.nn.Linear(len(keep), y.shape[1], bias=bias)
    fit_linear_(
        again, torch.from_numpy(x[:, keep]).float(), target=torch.from_numpy(y).float(), ridge=ridge
    )
    for found in (new, again):
        np.testing.assert_allclose(found.weight.detach().numpy(), w, atol=2e-4)
        if bias:
            np.testing.assert_allclose(found.bias.detach().numpy(), my - w @ mx, atol=2e-4)


def test_a_loss_increase_is_what_one_cut_alone_adds_to_the_loss(pipeline, models, few):
    grams = measure_grams(pipeline, models, batch=few)
    scores = {
        n: {b.name: torch.arange(b.units).float() for b in m.blocks} for n, m in models.items()
    }
    curves = sensitivity_measure.measure_sensitivity(
        pipeline, models, batch=few, scores=scores, grams=grams, ridge=0.01
    )
    anchors = pipeline.compute_reference_outputs(models, few)
    base = pipeline.compute_loss(models, few, dense=anchors)
    for node, name in BLOCKS:
        b = models[node].get_block(name)
        assert curves[node][name].interpolate(b.units) == 0
        units = {name: torch.arange(b.units // 2, b.units)}  # the upper half scores higher
        cut = copy_without_units(models[node], units)
        refit_from_gram_(cut, models[node], units=units, grams=grams[node], ridge=0.01)
        rise = pipeline.compute_loss({**models, node: cut.eval()}, few, dense=anchors) - base
        assert float(curves[node][name].interpolate(b.units // 2)) == pytest.approx(
            max(rise, 0.0), abs=1e-4
        )


def test_a_stopped_measurement_of_cuts_goes_on_behind_the_last_one(
    pipeline, models, few, tmp_path, monkeypatch
):
    monkeypatch.setattr(measured_curves, "WRITE_SECONDS", 0.0)
    folder = RunFolder(path=tmp_path)
    measured = []

    def measure(stop_at=None, keeper=None):
        measured.clear()

        def note(block_name, share):
            if len(measured) == stop_at:
                raise KeyboardInterrupt
            measured.append(block_name)

        return sensitivity_measure.measure_sensitivity(
            pipeline,
            models,
            batch=few,
            scores={
                n: {b.name: torch.arange(b.units).float() for b in m.blocks}
                for n, m in models.items()
            },
            grams=measure_grams(pipeline, models, batch=few),
            ridge=0.01,
            progress=note,
            keeper=keeper,
        )

    expected = measure()
    with pytest.raises(KeyboardInterrupt):
        measure(stop_at=3, keeper=CurveKeeper(folder))
    kept = read_record(MeasuredCurves, folder.sensitivity_curves).curves
    assert sum(len(curves) for curves in kept.values()) == 3
    asked = []
    compute_loss = pipeline.compute_loss
    monkeypatch.setattr(
        pipeline, "compute_loss", lambda *a, **o: asked.append(1) or compute_loss(*a, **o)
    )
    keeper = CurveKeeper(folder)
    assert measure(keeper=keeper) == expected
    rest = len(asked)
    asked.clear()
    measure()
    assert 0 < rest < len(asked)
    keeper.discard()
    assert not folder.sensitivity_curves.exists()


def test_damage_of_positions_is_measured_as_far_as_they_may_be_cut():
    """What hears the end of a window only reads silence there, until a sound is cut short."""
    tokens = Block(
        name="tokens",
        kind="tokens",
        reader="kept",
        writers=(),
        units=1500,
        width=1,
        granularity=50,
        module="",
        reads=("audio",),
        drop=(),
        prefix_only=True,
    )
    ffn = Block(
        name="0.ffn",
        kind="ffn",
        reader="out",
        writers=(),
        units=64,
        width=1,
        granularity=16,
        module="",
        reads=("audio",),
        drop=(("mlp", "zero"),),
    )
    within = sensitivity_measure.list_measured_levels(tokens, 0.6)
    assert (
        len(within) == 4
        and within[-1] == 600
        and sensitivity_measure.list_measured_levels(tokens, 0.0)[-1] <= 50
    )
    assert sensitivity_measure.list_measured_levels(ffn, 0.6) == [48, 32, 16, 0]


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """From the teacher p to the student q."""
    return float((p * (np.log(p) - np.log(q))).sum())


def test_logits_are_the_mean_divergence_from_the_teacher_over_judged_places():
    g = torch.Generator().manual_seed(1)
    s, t = (torch.randn(2, 3, 5, generator=g) for _ in range(2))
    keep = torch.tensor([[True, True, False], [True, False, False]])
    places = [(0, 0), (0, 1), (1, 0)]
    want = np.mean(
        [kl(softmax(t[i, j].numpy(), 0), softmax(s[i, j].numpy(), 0)) for i, j in places]
    )
    assert float(losses.compute_logit_loss(s, t, keep=keep)) == pytest.approx(want, rel=1e-5)


def test_affinity_is_the_divergence_of_similarities_both_ways():
    g = torch.Generator().manual_seed(2)
    unit = lambda: torch.nn.functional.normalize(torch.randn(4, 3, generator=g), dim=-1)
    student, teacher = (unit(), unit()), (unit(), unit())
    s, t = (SIMILARITY_SCALE * (q @ k.T).double().numpy() for q, k in (student, teacher))
    rows = np.mean([kl(softmax(t, 1)[i], softmax(s, 1)[i]) for i in range(4)])
    columns = np.mean([kl(softmax(t, 0)[:, j], softmax(s, 0)[:, j]) for j in range(4)])
    assert float(losses.compute_affinity_loss(student, teacher)) == pytest.approx(
        (rows + columns) / 2, rel=1e-4
    )


def test_features_are_squared_distances():
    g = torch.Generator().manual_seed(3)
    s, t = (torch.randn(3, 4, 6, generator=g) for _ in range(2))
    a, b = s.double().numpy(), t.double().numpy()
    assert float(losses.compute_embedding_loss(s[:, 0], t[:, 0])) == pytest.approx(
        ((a - b)[:, 0] ** 2).sum(1).mean(), rel=1e-5
    )
    assert float(losses.compute_token_loss(s, t)) == pytest.approx(
        ((a - b) ** 2).mean() / b.var(ddof=1), rel=1e-5
    )


def test_unstructured_zeros_are_the_smallest_weights_of_each_row(models):
    from mmcompress.prune.sparsity import zero_weights_

    before = [
        m.weight.detach().clone().abs()
        for model in models.values()
        for m in model.list_linear_layers()
    ]
    zero_weights_(models, "unstructured", share=0.5)
    for old, m in zip(
        before, (m for model in models.values() for m in model.list_linear_layers()), strict=True
    ):
        gone = m.weight == 0
        assert (
            torch.where(gone, old, 0.0).amax(1) <= torch.where(gone, torch.inf, old).amin(1)
        ).all()
