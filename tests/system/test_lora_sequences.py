"""A few of the sequences of lora_sequences.py; its command runs more, each final state in a process of its own."""

from __future__ import annotations

import numpy as np
import pytest
from lora_sequences import KINDS, Sequence, compare, draw, final_state, fresh, weights, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_sequence_the_picture_is_that_of_a_new_pipeline(kind, seed, files):
    sequence = Sequence(kind, seed, files)
    got = sequence.run()
    assert compare(sequence, got, fresh(final_state(sequence), files)) is None, sequence.taken


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_weight_and_a_stale_picture_are_seen(kind, files):
    sequence = Sequence(kind, 0, files)
    stale = draw(sequence.pipe)
    sequence.load()
    assert np.abs(draw(sequence.pipe) - stale).max() > 0.02
    wanted = fresh(final_state(sequence), files)
    assert compare(sequence, draw(sequence.pipe), wanted) is None
    assert "its picture is" in compare(sequence, stale, wanted)
    next(iter(weights(sequence.pipe)["unet"].values())).data += 0.1
    assert "from what it must be" in compare(sequence, draw(sequence.pipe), wanted)
