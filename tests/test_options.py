"""Options as objects: the text that represents them in a graph, copies and pickles of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cudfast import CUDOptions, DUSOptions, Projection, WClip
from cudfast.functional import cud_loss
from cudfast.options import LinearOptions, parse, parse_linear

OPTIONS = [
    CUDOptions(temperature=3.0, calibration=WClip(budget=0.25), reduction="none"),
    CUDOptions(calibration=None, unlabeled_index=None),
    DUSOptions(gamma=2.0, num_classes=7, differentiate_gate=True),
    LinearOptions(memory_budget=1 << 20, accumulate_dtype=torch.bfloat16, softcap=30.0),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_text_holds_every_field(options: Any) -> None:
    options = options if isinstance(options, LinearOptions) else options.rows
    parsed = (parse_linear if isinstance(options, LinearOptions) else parse)(options.text)
    assert parsed == options
    assert set(json.loads(options.text)) == {"kind", *(field.name for field in dataclasses.fields(options))}


def test_a_projection_is_left_out_of_the_text() -> None:
    options = CUDOptions(calibration=Projection(min_near_mass=torch.tensor([0.5])))
    assert parse(options.rows.text) == CUDOptions(calibration=None).rows


def test_a_text_is_no_field() -> None:
    options = CUDOptions(temperature=3.0)
    assert "text" not in repr(options)
    assert options == CUDOptions(temperature=3.0)
    assert hash(options) == hash(CUDOptions(temperature=3.0))
    assert options != CUDOptions(temperature=4.0)
    changed = dataclasses.replace(options, temperature=4.0)
    assert changed.text == CUDOptions(temperature=4.0).text != options.text


def _as_pickled_before_there_was_a_text(options: Any) -> Any:
    state = {name: value for name, value in vars(options).items() if name != "text"}
    other = object.__new__(type(options))
    vars(other).update(state)
    return pickle.loads(pickle.dumps(other))


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), _as_pickled_before_there_was_a_text],
)
@pytest.mark.parametrize("options", OPTIONS)
def test_copies(options: Any, copied: Callable[[Any], Any]) -> None:
    other = copied(options)
    assert other == options
    assert other.text == options.text


def test_options_that_are_made_while_tracing() -> None:
    """A graph cannot contain them: an error states that, or the graph breaks if that is allowed."""
    torch._dynamo.reset()
    student, teacher, labels = torch.randn(4, 30), torch.randn(4, 30) * 3, torch.tensor([1, -1, 7, 9])

    def inside(x: Tensor) -> Tensor:
        return cud_loss(x, teacher, labels, CUDOptions(ce_weight=3.0))

    with pytest.raises(Exception, match=r"options and losses are made outside|CUDOptions\("):  # or the line at fault
        torch.compile(inside, backend="aot_eager", fullgraph=True)(student)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(inside, backend="aot_eager")(student), inside(student))
