"""Conditions and the encoders that make them."""

import pytest
import torch
from safetensors.torch import save_file

from ldmfast.conditioning.base import Conditioner, Unconditional, load_conditioner
from ldmfast.conditioning.classes_and_boxes import ClassEmbedder
from ldmfast.conditioning.condition import Condition
from ldmfast.conditioning.hybrid import Hybrid
from ldmfast.released.conditioner_parts import make_conditioner


def condition(n):
    return Condition(context=torch.randn(n, 3, 4), concat=torch.randn(n, 2, 5, 6), label=torch.arange(n))


def test_a_condition_is_indexed_joined_and_cast():
    both = condition(4)
    assert len(both) == 4 and len(Condition()) == 0
    again = Condition.cat([both[:1], both[1:]]).to(dtype=torch.float64)
    assert again.context.dtype == torch.float64 and again.label.dtype == torch.int64
    assert torch.equal(again.context.float(), both.context) and torch.equal(again.label, both.label)
    with pytest.raises(ValueError, match="different parts"):
        Condition.cat([both, Condition(label=both.label)])


def test_dropout_puts_the_empty_condition_where_it_is_asked_to():
    given, empty = condition(3), Condition(torch.zeros(1, 3, 4), None, torch.zeros(1, 2, 1, 1), torch.tensor([9]))
    got = given.dropped(torch.tensor([False, True, False]), empty)
    assert got.label.tolist() == [0, 9, 2]
    assert torch.equal(got.concat[0], given.concat[0]) and not got.concat[1].any() and not got.context[1].any()


def test_no_condition_is_saved_and_loaded(tmp_path):
    Unconditional().save_pretrained(tmp_path)
    assert load_conditioner(tmp_path)([None, None]).parts() == {}
    (tmp_path / "config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(ValueError, match="describes no conditioner"):
        load_conditioner(tmp_path)


def test_weights_that_are_missing_or_do_not_fit_are_not_left_at_random(tmp_path):
    ClassEmbedder(3, 8).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    spoilt = {"only one of them has embedding.weight": "other", "does not fit config.json: size": "embedding.weight"}
    for reason, key in spoilt.items():
        save_file({key: torch.ones(3, 8)}, weights)
        with pytest.raises(ValueError, match=reason):
            load_conditioner(tmp_path)


def test_an_encoder_out_of_a_single_file_is_not_saved_by_its_name(tmp_path):
    (tmp_path / "sd.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="convert it to a folder first"):
        Conditioner(name=str(tmp_path / "sd.safetensors")).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hybrid_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="input 0 must be a dict with a"):
        Hybrid(a=Unconditional())([{"b": 1}])


def test_hybrid_has_no_place_in_the_released_layout():
    with pytest.raises(ValueError, match="side by side .Hybrid. have no place in the released layout"):
        make_conditioner({"_class_name": "Hybrid", "members": ["boxes", "map"]})
