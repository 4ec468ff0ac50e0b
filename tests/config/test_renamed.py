"""Settings that users bring from TRL are answered with their name here."""

import dataclasses
import re
import typing

import pytest

from palign.config.load import resolve_run
from palign.config.renamed import RENAMED
from palign.config.schema import RunConfig
from palign.objectives.base import hyper_defaults
from palign.objectives.registry import METHODS

HYPER = {key for method in METHODS.values() for key in hyper_defaults(method)}
SECTIONS = {
    name: {field.name for field in dataclasses.fields(hint)}
    for name, hint in typing.get_type_hints(RunConfig).items()
    if dataclasses.is_dataclass(hint)
}


@pytest.mark.parametrize("value", [0.5, "text"])
@pytest.mark.parametrize("section", ["objective", "train"])
@pytest.mark.parametrize("key", RENAMED)
def test_a_setting_of_another_name_is_answered_with_ours(key, section, value):
    with pytest.raises(ValueError) as error:
        resolve_run({section: {key: value}})
    assert str(error.value) == f"config.{section}.{key}: no such setting; {RENAMED[key]}"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", RENAMED)
def test_so_is_one_at_the_top_as_in_a_flat_file(key):
    with pytest.raises(ValueError) as error:
        resolve_run({key: 1})
    assert str(error.value) == f"config.{key}: no such setting; {RENAMED[key]}"


def test_no_setting_or_hyper_parameter_of_ours_is_refused():
    assert {"label_smoothing", "desirable_weight", "alpha"} <= HYPER
    own = HYPER | {field.name for field in dataclasses.fields(RunConfig)} | set().union(*SECTIONS.values())
    assert not set(RENAMED) & own


def test_every_setting_that_an_advice_names_exists():
    named = [place for advice in RENAMED.values() for place in re.findall(r"config\.(\w+)(?:\.(\w+))?", advice)]
    assert len(named) > 30
    for section, key in named:
        if section in SECTIONS:
            assert key in SECTIONS[section] or (section == "objective" and key in HYPER), (section, key)
        else:
            assert section in {field.name for field in dataclasses.fields(RunConfig)} and not key, (section, key)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 1e-6}, "config.learning_rate: no such setting; it is config.optimizer.learning_rate"),
        ({"train": {"max_length": 9}}, "config.train.max_length: no such setting; it is config.data.max_length"),
        ({"seed": 1}, "config.seed: no such setting; it is config.data.seed or config.train.seed"),
        ({"beta": 0.1}, "stand in config.objective"),
    ],
)
def test_a_setting_of_another_section_is_answered_with_its_place(given, message):
    with pytest.raises(ValueError) as error:
        resolve_run(given)
    assert message in str(error.value)
