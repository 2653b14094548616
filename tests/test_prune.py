"""Surgery equals masking, refit repairs, importance follows its definition, every policy removes the same share."""

from __future__ import annotations

import itertools
import threading
from functools import partial

import numpy as np
import pytest
import torch

from mmcompress.export.proofs import (
    SURGERY_BOUND,
    compare_outputs,
    compare_tensors,
    prove_surgery,
)
from mmcompress.graph.blocks import count_steps, count_units_after
from mmcompress.graph.structure import measure_removed_share
from mmcompress.models.replacements import ConstantOutput
from mmcompress.prune.importance import gradients as gradient_criteria
from mmcompress.prune.importance.gradients import compute_mask_gradients
from mmcompress.prune.importance.inputs import ImportanceInputs, score_units
from mmcompress.prune.masks import mask_units, sample_units
from mmcompress.prune.refit import measure_grams, refit_from_gram_, refit_in_order_, solve_ridge
from mmcompress.prune.side_by_side import run_side_by_side
from mmcompress.prune.surgery import (
    copy_constants_,
    copy_resized,
    copy_without_units,
    resize_model_,
    restore_units,
)
from mmcompress.prune.units import choose_units
from mmcompress.registry import ALLOCATIONS, IMPORTANCE
from mmcompress.search.allocation import NodeAllocation, allocate_node
from mmcompress.search.sensitivity.curves import SensitivityCurve
from mmcompress.spec.schema import NodePrune


def cut(model, kind, share):
    """Keep the first part of every block of one kind."""
    return {
        b.name: torch.arange(max(0, round(b.units * (1 - share))))
        for b in model.blocks
        if b.kind == kind
    }


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["attention", "cross_attention", "ffn"])
def test_masked_equals_sliced_for_every_unit_kind(pipeline, models, batch, kind, share):
    proofs = prove_surgery(
        pipeline, models, units={n: cut(m, kind, share) for n, m in models.items()}, batch=batch
    )
    assert all(p.passed for p in proofs), proofs


@pytest.mark.parametrize("seed", range(4))
def test_masked_equals_sliced_for_random_mixtures(pipeline, models, batch, seed):
    g = torch.Generator().manual_seed(seed)
    units = {
        n: {
            b.name: torch.sort(
                torch.randperm(b.units, generator=g)[
                    : int(torch.randint(0, b.units + 1, (1,), generator=g))
                ]
            ).values
            for b in m.weighted_blocks
        }
        for n, m in models.items()
    }
    proofs = prove_surgery(pipeline, models, units=units, batch=batch)
    assert max(p.difference for p in proofs) <= SURGERY_BOUND


def test_the_proof_can_fail(pipeline, models, batch, monkeypatch):
    """Slicing the wrong heads is noticed."""
    from mmcompress.export import proofs

    wrong = lambda m, kept: copy_without_units(
        m, {k: (v + 1) % m.get_block(k).units for k, v in kept.items()}
    )
    monkeypatch.setattr(proofs, "copy_without_units", wrong)
    found = prove_surgery(
        pipeline,
        models,
        units={n: cut(m, "attention", 0.5) for n, m in models.items()},
        batch=batch,
    )
    assert not any(p.passed for p in found)
    assert all("'0.attention'" in p.detail for p in found)


def test_parameters_fall_as_computed(models):
    for model in models.values():
        units = cut(model, "ffn", 0.5)
        small = copy_without_units(model, units)
        expected = 0
        for b in model.blocks:
            if b.name in units:
                gone = b.units - len(units[b.name])
                for w in b.writers:
                    expected += (
                        gone * w.width * w.parts * (model.get_linear(w.path).in_features + 1)
                    )
                expected += gone * b.width * model.get_linear(b.reader).out_features
        count = lambda m: sum(p.numel() for p in m.parameters())
        assert count(model) - count(small) == expected > 0


def test_a_structure_is_rebuilt_from_its_counts(models):
    for model in models.values():
        units = {b.name: torch.arange(b.units // 2) for b in model.blocks[:-1]} | {
            model.blocks[-1].name: torch.arange(0)
        }
        small = copy_without_units(model, units)
        again = resize_model_(copy_without_units(model, {}), {k: len(v) for k, v in units.items()})
        again.load_state_dict(small.state_dict())
        assert [b.units for b in again.blocks] == [b.units for b in small.blocks]


def test_what_stands_in_for_a_removed_block_does_not_go_back(models):
    for m in models.values():
        for b in (b for b in m.blocks if b.drop):
            small = copy_without_units(m, {b.name: torch.arange(0)})
            with torch.no_grad():
                for p in small.parameters():
                    p.add_(1.0)
            whole, before = (
                restore_units(m, small, kept={b.name: torch.arange(0)}),
                dict(m.named_parameters()),
            )
            parts = [*(w.path for w in b.writers), b.reader]
            mine = [n for n in before if any(n.startswith(f"{part}.") for part in parts)]
            assert mine and all(
                torch.equal(dict(whole.named_parameters())[n], before[n]) for n in mine
            )


def test_what_a_cut_model_learnt_goes_back_to_its_place(models):
    g = torch.Generator().manual_seed(3)
    for m in models.values():
        units = {
            b.name: sample_units(
                b, max(b.min_units, b.units // 2 // b.granularity * b.granularity), generator=g
            )
            for b in m.blocks
        }
        small = copy_without_units(m, units)
        with torch.no_grad():
            for p in small.parameters():
                p.add_(1.0)
        whole = restore_units(m, small, kept=units)
        again, untouched = (
            dict(copy_without_units(whole, units).named_parameters()),
            dict(m.named_parameters()),
        )
        assert all(torch.equal(p, again[name]) for name, p in small.named_parameters())
        for name, p in whole.named_parameters():
            new = p != untouched[name]
            assert torch.equal(p[~new], untouched[name][~new])
            if name in again:
                assert int(new.sum()) == again[name].numel()  # nothing else has moved


def test_the_solver_is_ridge_least_squares():
    x = np.random.default_rng(0).standard_normal((200, 6))
    y = x @ np.arange(12.0).reshape(6, 2)
    w = solve_ridge(
        torch.tensor(y.T @ x / 200).float(), torch.tensor(x.T @ x / 200).float(), ridge=1e-6
    )
    assert np.allclose(w.numpy(), np.arange(12.0).reshape(6, 2).T, atol=1e-3)


@pytest.mark.parametrize("how", ["from moments", "in order"])
def test_refit_brings_the_output_closer(pipeline, models, batch, how):
    grams = measure_grams(pipeline, models, batch=batch)
    want = pipeline.forward_in_pieces(models, batch)["vision"]["tokens"]
    units = {b.name: torch.arange(0, b.units, 2) for b in models["vision"].weighted_blocks}
    plain = copy_without_units(models["vision"], units)
    fitted = copy_without_units(models["vision"], units)
    if how == "from moments":
        refit_from_gram_(fitted, models["vision"], units=units, grams=grams["vision"], ridge=0.01)
    else:
        refit_in_order_(
            pipeline, {**models, "vision": fitted}, dense=models, batch=batch, ridge=0.01
        )
    error = lambda m: (m(batch.inputs["vision"])[1] - want).square().mean().item()
    assert error(fitted) < 0.9 * error(plain)


def test_what_is_taken_off_a_trained_structure_is_refitted_to_it(pipeline, models, batch):
    """Its positions are those that are left of it, and its blocks give what they learned to give."""
    vision = models["vision"]
    count = vision.token_selector.count
    kept = torch.tensor([0, *range(count // 2, count)])
    halves = {b.name: torch.arange(0, b.units, 2) for b in vision.weighted_blocks}
    trained = copy_without_units(vision, {**halves, "tokens": kept})
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    trained_pipeline = {**models, "vision": trained}
    want = pipeline.forward_in_pieces(trained_pipeline, batch)["vision"]["tokens"]
    for positions in (torch.arange(len(kept)), torch.arange(1, len(kept))):
        cut = {b.name: torch.arange(0, b.units, 2) for b in trained.weighted_blocks}
        plain = copy_without_units(trained, {**cut, "tokens": positions})
        fitted = copy_without_units(trained, {**cut, "tokens": positions})
        refit_in_order_(
            pipeline, {**models, "vision": fitted}, dense=trained_pipeline, batch=batch, ridge=0.01
        )
        extra = want.shape[1] - len(kept)
        rows = [*range(extra), *(extra + positions).tolist()]
        left = want[:, rows]
        errors = [
            (model(batch.inputs["vision"])[1] - left).square().mean().item()
            for model in (fitted, plain)
        ]
        assert errors[0] < 0.9 * errors[1]


def test_refit_of_a_dropped_block_is_its_mean(pipeline, models, batch):
    name = models["vision"].weighted_blocks[1].name
    units = {name: torch.arange(0)}
    small = copy_without_units(models["vision"], units)
    grams = measure_grams(pipeline, models, batch=batch)
    refit_from_gram_(small, models["vision"], units=units, grams=grams["vision"], ridge=0.01)
    seen = []
    handle = (
        models["vision"]
        .get_linear(models["vision"].weighted_blocks[1].reader)
        .register_forward_hook(lambda m, a, o: seen.append(o))
    )
    models["vision"](batch.inputs["vision"])
    handle.remove()
    bias = next(
        p
        for n, p in small.named_parameters()
        if n.endswith("mlp.c_proj.bias") and "resblocks.0" in n
    )
    assert torch.allclose(bias, seen[0].flatten(0, 1).mean(0), atol=1e-4)


@pytest.fixture()
def material(pipeline, models, batch):
    return ImportanceInputs(
        pipeline=pipeline,
        models=models,
        batch=batch,
        grams=measure_grams(pipeline, models, batch=batch),
        seed=3,
    )


@pytest.mark.parametrize("name", IMPORTANCE.list_names())
def test_every_importance_scores_every_unit(material, models, name):
    scores = score_units(IMPORTANCE.get(name), material)
    for n, m in models.items():
        for b in m.blocks:
            s = scores[n][b.name]
            assert s.shape == (b.units,) and torch.isfinite(s).all() and s.std() > 0
            assert (s >= 0).all() or b.group == "tokens" or name == "movement"


def test_mask_gradients_are_the_derivative_of_the_loss(material, pipeline, models, batch):
    gradients = compute_mask_gradients(material)
    block = models["captioner"].blocks[1]

    def loss(value):
        mask = torch.ones(block.units)
        mask[0] = value
        with mask_units(models["captioner"], {block.name: mask}):
            return sum(
                pipeline.compute_losses(pipeline.forward(models, batch), batch).values()
            ).item()

    numeric = (loss(1.05) - loss(0.95)) / 0.1
    assert float(gradients["captioner"][block.name][:, 0].mean()) == pytest.approx(
        numeric, rel=0.05, abs=1e-4
    )


def test_magnitude_is_the_norm_of_the_units_weights(material, models):
    scores = IMPORTANCE.get("magnitude")(material)
    m, b = models["text"], models["text"].weighted_blocks[1]
    fc, proj = m.get_linear(b.writers[0].path).weight, m.get_linear(b.reader).weight
    assert torch.allclose(
        scores["text"][b.name], (fc.square().sum(1) + proj.square().sum(0)).sqrt(), rtol=1e-4
    )


def curves(blocks, rng):
    return {
        b.name: SensitivityCurve(
            kept_units=(0, b.units // 2, b.units),
            loss_increases=(*tuple(sorted(rng.random(2), reverse=True)), 0.0),
        )
        for b in blocks
    }


@pytest.mark.parametrize("name", ALLOCATIONS.list_names())
def test_every_policy_removes_the_same_share(models, name):
    rng = np.random.default_rng(0)
    for n, m in models.items():
        scores = {b.name: torch.rand(b.units) for b in m.blocks}
        kept = allocate_node(
            m.blocks,
            NodePrune(heads=0.5, ffn=0.5),
            inputs=NodeAllocation(
                cross_modal={},
                protection=1.0,
                policy=ALLOCATIONS.get(name),
                curves=curves(m.blocks, rng),
                scores=scores,
            ),
        )
        for group in ("heads", "ffn"):
            part = [b for b in m.blocks if b.group == group]
            kinds = {b.kind for b in part}
            cut = sum((b.units - kept[b.name]) / b.granularity for b in part)
            assert cut == pytest.approx(0.5 * sum(count_steps(b) for b in part), abs=len(kinds)), n


def test_the_knapsack_is_optimal(models):
    rng = np.random.default_rng(1)
    blocks = [b for b in models["captioner"].blocks if b.group == "heads"]
    c, scores = curves(blocks, rng), {b.name: torch.rand(b.units) for b in blocks}
    kept = ALLOCATIONS.get("knapsack")(blocks, 7, c, scores)
    mine = sum(float(c[b.name].interpolate(kept[b.name])) for b in blocks)
    options = itertools.product(*(range(count_steps(b) + 1) for b in blocks))
    best = min(
        sum(
            float(c[b.name].interpolate(count_units_after(b, k)))
            for b, k in zip(blocks, cuts, strict=True)
        )
        for cuts in options
        if sum(cuts) == 7
    )
    assert mine == pytest.approx(best)


def test_protection_cuts_cross_modal_units_less(models, spec):
    m = models["captioner"]
    cross = {b.name: "" for b in m.blocks if b.kind == "cross_attention"}
    rng = np.random.default_rng(2)
    scores = {b.name: torch.rand(b.units) for b in m.blocks}
    for protection, expected in ((1.0, 0.5), (2.0, 0.25), (4.0, 0.125)):
        kept = allocate_node(
            m.blocks,
            NodePrune(heads=0.5, ffn=0.5),
            inputs=NodeAllocation(
                cross_modal=cross,
                protection=protection,
                policy=ALLOCATIONS.get("uniform"),
                curves=curves(m.blocks, rng),
                scores=scores,
            ),
        )
        assert measure_removed_share(
            {"c": kept}, {"c": m.blocks}, cross={"c": cross}, crossing=True
        ) == pytest.approx(expected)
        assert measure_removed_share(
            {"c": kept}, {"c": m.blocks}, cross={"c": cross}, crossing=False
        ) == pytest.approx(0.5, abs=0.05)


def test_what_nothing_reads_is_held_to_what_it_was(loose, models):
    """Else it would be cut for free: no join and no generator says what it is good for."""
    from mmcompress.data.open_dataset import open_dataset
    from mmcompress.graph.load_spec import load_spec
    from mmcompress.pipeline.forward import TorchPipeline

    spec = load_spec(*loose)
    p = TorchPipeline(spec, models)
    batch = p.collate(open_dataset(spec.data).load("train", 8))
    anchors, cut = (
        p.compute_reference_outputs(models, batch),
        copy_resized(models["text"], {"0.ffn": 8}),
    )
    assert set(p.compute_losses(p.forward_in_pieces(models, batch), batch, dense=anchors)) == {
        "caption.captioner",
        "drift.text",
    }
    assert (
        p.compute_loss({**models, "text": cut}, batch, dense=anchors)
        > p.compute_loss(models, batch, dense=anchors) + 1e-4
    )


def test_the_most_important_units_stay():
    from mmcompress.graph.blocks import Block

    b = Block(
        name="x",
        kind="ffn",
        reader="o",
        writers=(),
        units=6,
        width=1,
        granularity=1,
        module="m",
        reads=("stream",),
        drop=(("m", "plain"),),
    )
    units = choose_units({"x": 3}, [b], scores={"x": torch.tensor([5.0, 1, 9, 2, 7, 0])})
    assert units["x"].tolist() == [0, 2, 4]


def test_drop_removes_the_least_damaging_blocks(models):
    m = models["vision"]
    c = {
        b.name: SensitivityCurve(kept_units=(0, b.units), loss_increases=(float(i), 0.0))
        for i, b in enumerate(m.blocks)
    }
    scores = {b.name: torch.rand(b.units) for b in m.blocks}
    kept = allocate_node(
        m.blocks,
        NodePrune(drop=2),
        inputs=NodeAllocation(
            cross_modal={},
            protection=2.0,
            policy=ALLOCATIONS.get("knapsack"),
            curves=c,
            scores=scores,
        ),
    )
    assert [k for k, v in kept.items() if v == 0] == [b.name for b in m.weighted_blocks[:2]]


def test_a_trial_is_the_same_whatever_was_tried_before(spec, pipeline, models, batch):
    from mmcompress.graph.structure import Candidate
    from mmcompress.search.worker import (
        OutputCache,
        _load_state,
        evaluate_candidate,
        make_worker_context,
    )
    from mmcompress.storage import to_plain

    scores = {n: {b.name: torch.rand(b.units) for b in m.blocks} for n, m in models.items()}
    context = make_worker_context(
        spec,
        scores=scores,
        grams=measure_grams(pipeline, models, batch=batch),
        fp32_blocks={},
        batch=batch,
        more_pairs=None,
        key="trial test",
        threads=1,
    )
    full = {n: {b.name: b.units for b in m.blocks} for n, m in models.items()}
    halved = lambda n: {
        **full,
        n: {b.name: int(count_units_after(b, count_steps(b) // 2)) for b in models[n].blocks},
    }
    fp32 = dict.fromkeys(models, "fp32")
    trials = [
        Candidate(kept_units=full, precision=fp32),
        *(Candidate(kept_units=halved(n), precision=fp32) for n in models),
    ]
    trials += [Candidate(kept_units=full, precision={**fp32, "vision": "int8"})]
    said = [evaluate_candidate(context, to_plain(c)) for c in trials]
    for c, first in zip(trials, said, strict=True):
        _load_state(context).output_cache = OutputCache()
        again = evaluate_candidate(context, to_plain(c))
        assert (again["loss"], again["quality"]) == (first["loss"], first["quality"])
    torch.set_num_threads(2)
    try:
        assert evaluate_candidate(context, to_plain(trials[0]))["loss"] == pytest.approx(
            said[0]["loss"], rel=1e-4
        )
        assert torch.get_num_threads() == 2  # in the process that trains, too
    finally:
        torch.set_num_threads(1)
    assert len({s["loss"] for s in said}) == len(said)


def test_outputs_larger_than_the_cache_are_not_kept_and_push_nothing_out():
    from mmcompress.search.worker import OutputCache

    cache = OutputCache(max_bytes=40)
    cache.put("small", {"x": torch.zeros(4)})
    cache.put("large", {"x": torch.zeros(8), "y": torch.zeros(8)})
    assert cache.get("large") is None and cache.get("small") is not None and cache.size_bytes == 16
    cache.put("second", {"x": torch.zeros(6)})
    assert cache.size_bytes == 40
    assert cache.get("small") is not None  # it is now the one used last
    cache.put("third", {"x": torch.zeros(6)})
    assert cache.get("second") is None and cache.get("small") is not None


def test_the_gradual_plan_is_cubic_and_ends_where_it_should(models):
    from mmcompress.prune.schedule import plan_rounds

    blocks = {n: m.blocks for n, m in models.items()}
    final = {
        n: {b.name: int(count_units_after(b, count_steps(b) // 2)) for b in bs}
        for n, bs in blocks.items()
    }
    final["captioner"]["0.ffn"] = 0
    rounds = plan_rounds(blocks, final, rounds=3)
    assert rounds[-1] == final
    for n, bs in blocks.items():
        for b in bs:
            kept = [b.units, *(r[n][b.name] for r in rounds)]
            assert kept == sorted(kept, reverse=True) and all(kept[:-1])
            for i in (1, 2):
                wanted = (1 - (1 - i / 3) ** 3) * (b.units - final[n][b.name])
                assert 0 <= wanted - (b.units - kept[i]) < 2 * b.granularity


def test_rounds_leave_a_part_of_the_dense_units(pipeline, models, batch):
    from mmcompress.prune.schedule import list_all_units, narrow_models, plan_rounds

    blocks = {n: m.blocks for n, m in models.items()}
    final = {
        n: {b.name: int(count_units_after(b, count_steps(b) // 2)) for b in bs}
        for n, bs in blocks.items()
    }
    now, survivors, g = models, list_all_units(blocks), torch.Generator().manual_seed(0)
    for kept in plan_rounds(blocks, final, rounds=3):
        scores = {
            n: {b.name: torch.rand(b.units, generator=g) for b in m.blocks} for n, m in now.items()
        }
        before = survivors
        now, survivors = narrow_models(now, survivors, kept=kept, scores=scores)
        for n, by in survivors.items():
            assert all(set(u.tolist()) <= set(before[n][b].tolist()) for b, u in by.items())
    direct = {n: copy_without_units(m, survivors[n]) for n, m in models.items()}
    want, got = pipeline.forward_in_pieces(direct, batch), pipeline.forward_in_pieces(now, batch)
    assert all(torch.equal(want[n][k], got[n][k]) for n in want for k in want[n])


def test_l1_and_l2_magnitude_are_those_norms(material, models):
    m, b = models["captioner"], models["captioner"].get_block("0.ffn")
    w, r = m.get_linear(b.writers[0].path).weight, m.get_linear(b.reader).weight
    l1, l2 = (
        IMPORTANCE.get(k)(material)["captioner"]["0.ffn"] for k in ("magnitude_l1", "magnitude")
    )
    assert torch.allclose(l1[3], w[3].abs().sum() + r[:, 3].abs().sum())
    assert torch.allclose(l2[3], (w[3].square().sum() + r[:, 3].square().sum()).sqrt())


def test_movement_is_the_sum_of_weight_times_gradient_at_the_start(
    material, models, pipeline, batch, monkeypatch
):
    monkeypatch.setattr(gradient_criteria, "MOVEMENT_STEPS", 1)
    pipeline.batch_size = 10**6
    scores = gradient_criteria.score_by_movement(material)
    m, b = models["captioner"], models["captioner"].get_block("1.ffn")
    piece = batch.split_evenly(10**6)[0]
    sum(pipeline.compute_losses(pipeline.forward(models, piece), piece).values()).backward()
    out = m.get_linear(b.reader)
    want = -(out.weight * out.weight.grad).sum(0)
    assert torch.allclose(scores["captioner"]["1.ffn"], want, atol=1e-5)


def test_a_mixture_is_the_sum_of_scores_normalized_within_a_kind(material, models):
    mixed = IMPORTANCE.get("magnitude + 0.5 * activation")(material)
    parts = [IMPORTANCE.get(k)(material) for k in ("magnitude", "activation")]
    for n, m in models.items():
        for b in m.weighted_blocks:
            same = [x.name for x in m.weighted_blocks if x.kind == b.kind]
            a, c = (p[n][b.name] / torch.cat([p[n][x] for x in same]).mean() for p in parts)
            assert torch.allclose(mixed[n][b.name], a + 0.5 * c, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fisher + tailor", "did you mean 'taylor'"),
        ("-1 * fisher", "not a positive weight"),
        ("x*fisher", "'x'"),
    ],
)
def test_a_wrong_mixture_is_told(name, message):
    assert message in (IMPORTANCE.find_problem(name) or "")


@pytest.mark.parametrize(("pattern", "share"), [("unstructured", 0.7), ("2:4", 0.5)])
def test_single_weights_go_where_they_are_smallest_and_stay_gone(models, pattern, share):
    from mmcompress.prune.sparsity import measure_zero_share, zero_weights_

    before = [
        m.weight.detach().clone() for model in models.values() for m in model.list_linear_layers()
    ]
    embedding = (
        next(p for n, p in models["captioner"].named_parameters() if "embed_tokens" in n)
        .detach()
        .clone()
    )
    hold_ = zero_weights_(models, pattern, share=share)
    after = [m.weight for model in models.values() for m in model.list_linear_layers()]
    for old, new in zip(before, after, strict=True):
        gone = new == 0
        if pattern == "2:4":
            assert gone.view(len(new), -1, 4).sum(2).eq(2).all()
            kept = (~gone).view(len(new), -1, 4)
            low = torch.where(kept, old.abs().view_as(kept), torch.inf).amin(2)
            assert (low >= torch.where(kept, 0.0, old.abs().view_as(kept)).amax(2)).all()
        else:
            assert gone.sum(1).eq(round(share * new.shape[1])).all()
        assert torch.equal(new[~gone], old[~gone])
        new.data += 1.0
    hold_()
    assert measure_zero_share(models["vision"]) == pytest.approx(share, abs=0.02)
    now = next(p for n, p in models["captioner"].named_parameters() if "embed_tokens" in n)
    assert torch.equal(now, embedding)


def test_finalists_are_judged_on_more_pairs_as_many_at_a_time(spec, pipeline, models):
    from mmcompress.data.open_dataset import open_dataset
    from mmcompress.graph.structure import Candidate
    from mmcompress.search.worker import (
        evaluate_candidate,
        evaluate_on_more_pairs,
        make_worker_context,
    )
    from mmcompress.storage import to_plain

    every = pipeline.collate(open_dataset(spec.data).load("val", 12))
    few, more = every[slice(0, 4)], every[slice(4, 12)]
    scores = {n: {b.name: torch.rand(b.units) for b in m.blocks} for n, m in models.items()}
    grams = measure_grams(pipeline, models, batch=few)
    make_context = partial(
        make_worker_context, spec, scores=scores, grams=grams, fp32_blocks={}, threads=1
    )
    context = make_context(batch=few, more_pairs=more, key="finals test")
    c = to_plain(
        Candidate(
            kept_units={n: {b.name: b.units for b in m.blocks} for n, m in models.items()},
            precision=dict.fromkeys(models, "fp32"),
        )
    )
    losses = []
    for piece in more.split_evenly(4):
        losses.append(
            evaluate_candidate(
                make_context(batch=piece, more_pairs=None, key=f"piece {len(losses)}"), c
            )["loss"]
        )
    assert evaluate_on_more_pairs(context, c)["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_a_nan_is_no_small_difference():
    one = torch.ones(3)
    bad = torch.tensor([1.0, float("nan"), 1.0])
    assert compare_tensors(one, bad) == compare_tensors(bad, one) == float("inf")
    assert compare_outputs([one, one], [one, bad]) == float("inf")


def list_constants(model):
    """Return what stands in for the dropped sub-layers of a model."""
    return [module for module in model.modules() if isinstance(module, ConstantOutput)]


def test_what_stands_in_for_a_dropped_block_is_copied_from_a_trained_model(models):
    model = models["vision"]
    dropped = {"0.ffn": torch.arange(0), "1.attention": torch.arange(0)}
    trained = copy_without_units(model, dropped)
    for constant in list_constants(trained):
        constant.bias.data += 0.5
    smaller = copy_without_units(model, {**dropped, "0.attention": torch.arange(2)})
    copy_constants_(smaller, trained)
    constants = list_constants(smaller)
    assert len(constants) == 2
    for constant, source in zip(constants, list_constants(trained), strict=True):
        assert torch.equal(constant.bias, source.bias)
    # A block that the trained model still has keeps the constant of its own.
    other = copy_without_units(model, {"1.ffn": torch.arange(0)})
    before = list_constants(other)[0].bias.clone()
    copy_constants_(other, trained)
    assert torch.equal(list_constants(other)[0].bias, before)


def test_pieces_of_work_beside_each_other_use_one_thread_each_and_keep_their_order():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    meeting = threading.Barrier(2, timeout=60)

    def work(number):
        # Each waits for the other: one after the other they would never meet.
        meeting.wait()
        return number, torch.get_num_threads()

    try:
        results = run_side_by_side([lambda: work(0), lambda: work(1)])
        assert results == [(0, 1), (1, 1)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
