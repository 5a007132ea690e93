"""The outputs of the models as plain containers; as trees and in compiled code they are tested with each framework."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from clipmb import BaseModelOutput, CLIPOutput, CLIPTextModelOutput
from clipmb.common.outputs import default, returned

STATES = np.arange(6.0).reshape(2, 3)
OUTPUT = BaseModelOutput(last_hidden_state=STATES, attentions=(STATES, STATES))


def test_a_field_by_name_attribute_and_position():
    assert list(OUTPUT) == ["last_hidden_state", "attentions"]
    assert OUTPUT["attentions"] is OUTPUT.attentions is OUTPUT[1]
    assert OUTPUT[:1] == (STATES,)
    assert OUTPUT.hidden_states is None
    assert "hidden_states" not in OUTPUT
    with pytest.raises(KeyError):
        OUTPUT["hidden_states"]
    with pytest.raises(IndexError):
        OUTPUT[2]


def test_the_order_is_that_of_the_class():
    assert list(CLIPTextModelOutput(last_hidden_state=1, text_embeds=2)) == ["text_embeds", "last_hidden_state"]
    assert CLIPOutput.fields[0] == "loss"
    assert CLIPOutput({"logits_per_text": 1}).to_tuple() == (1,)


def test_setting_a_field():
    output = BaseModelOutput(last_hidden_state=STATES)
    output.hidden_states = (STATES,)
    assert output["hidden_states"] == (STATES,)
    assert output.to_tuple() == (STATES, (STATES,))


def test_tuples_hold_tuples_of_nested_outputs():
    output = CLIPOutput(logits_per_image=1, text_model_output=OUTPUT)
    assert output.to_tuple() == (1, (STATES, (STATES, STATES)))


def test_fields_that_there_are_not():
    with pytest.raises(TypeError, match=r"BaseModelOutput has the fields last_hidden_state, .*Received: \['logits'\]"):
        BaseModelOutput(logits=1)
    with pytest.raises(AttributeError, match="has no field 'logits'; it has last_hidden_state"):
        OUTPUT.logits  # noqa: B018


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))])
def test_copies(again):
    other = again(OUTPUT)
    assert type(other) is BaseModelOutput
    assert list(other) == list(OUTPUT)
    assert np.array_equal(other.attentions[1], STATES)


def test_what_a_model_returns():
    assert returned(OUTPUT, None, True) is returned(OUTPUT, True, False) is OUTPUT
    assert returned(OUTPUT, None, False) == returned(OUTPUT, False, True) == (STATES, (STATES, STATES))
    assert (default(None, True), default(False, True), default(True, False)) == (True, False, True)
