"""Modality tags find the cross-modal layers, and say why."""

from __future__ import annotations

from mmcompress.graph import validate
from mmcompress.graph.modality import classify_layers, find_cross_modal_blocks, propagate_modalities
from mmcompress.graph.references import sort_nodes


def test_order_follows_the_edges(spec):
    place = {n: i for i, n in enumerate(sort_nodes(spec))}
    assert place["vision"] < place["captioner"] < place["text"] < place["choose"]


def test_tags_flow_along_the_edges(spec):
    tags = propagate_modalities(spec)
    assert tags["vision"] == {"image"} and tags["captioner"] == {"image", "text"}


def test_only_cross_attention_is_cross_modal_among_the_blocks(spec, models):
    found = find_cross_modal_blocks(spec, {n: m.blocks for n, m in models.items()})
    assert set(found["captioner"]) == {"0.cross_attention", "1.cross_attention"}
    assert set(found["vision"]) == {"projection"} and set(found["text"]) == {"projection"}
    assert "image from 'context'" in found["captioner"]["0.cross_attention"]


def test_modality_is_derived_not_read_from_names(spec, models):
    """The same blocks fed from a text node would not be cross-modal: the rule looks at tags."""
    import dataclasses

    blocks = {n: m.blocks for n, m in models.items()}
    renamed = {
        n: tuple(dataclasses.replace(b, name=f"b{i}", kind="attention") for i, b in enumerate(bs))
        for n, bs in blocks.items()
    }
    crossing = lambda of: [
        x for x in classify_layers(of, renamed) if x.node == "captioner" and x.cross_modal
    ]
    assert len(crossing(spec)) == 2
    assert not crossing(dataclasses.replace(spec, inputs={"image": "text"}))


def test_a_pipeline_of_more_nodes_than_a_bundle_holds_is_refused(spec, monkeypatch):
    monkeypatch.setattr(validate, "MAX_NODES", len(spec.nodes))
    assert validate.list_problems(spec) == []
    monkeypatch.setattr(validate, "MAX_NODES", len(spec.nodes) - 1)
    (problem,) = validate.list_problems(spec)
    assert problem == (("nodes",), "4 nodes: a bundle holds at most 3")
