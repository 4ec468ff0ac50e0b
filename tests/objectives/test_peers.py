"""The map from other libraries' names: complete, true to what is here, and the text of docs/switching.md."""

import json
import pathlib

import pytest

from palign import losses
from palign.objectives.peers import PEER_LOSSES, PEERS, VERSIONS, render_markdown
from palign.objectives.registry import ALIASES, METHODS, OLD_METHODS, find_method, resolve_methods

ROOT = pathlib.Path(__file__).parents[2]
TRAINERS = {
    "trainer/dpo_trainer.py": "DPOTrainer",
    "trainer/kto_trainer.py": "KTOTrainer",
    "trainer/sft_config.py": "SFTTrainer",
    "trainer/sft_trainer.py": "SFTTrainer",
    "experimental/cpo/cpo_config.py": "CPOTrainer",
    "experimental/cpo/cpo_trainer.py": "CPOTrainer",
    "experimental/orpo/orpo_trainer.py": "ORPOTrainer",
    "experimental/tpo/tpo_trainer.py": "TPOTrainer",
    "experimental/online_dpo/online_dpo_trainer.py": "OnlineDPOTrainer",
}


def names_of(trainer, peer="TRL"):
    return {x.name.removeprefix("f_divergence_type=") for x in PEER_LOSSES if (x.peer, x.trainer) == (peer, trainer)}


def test_every_loss_that_is_named_here_exists():
    for loss in PEER_LOSSES:
        for name in loss.ours.split(" + "):
            function = name.removeprefix("losses.")
            assert (function in losses.__all__) if name != function else (name in METHODS), loss


def test_every_name_of_a_loss_in_trl_s_source_is_in_the_map():
    names = json.loads((ROOT / "tests/parity/trl_losses.json").read_text())["names"]
    checked = 0
    for file, trainer in TRAINERS.items():
        missing = set(names[file]) - names_of(trainer) - {"kto_pair"}  # TRL's CPO trainer refuses that one
        assert not missing, (file, missing)
        checked += len(names[file])
    assert checked > 30


def test_trl_s_trainers_and_modifiers_that_its_names_do_not_show_are_in_the_map():
    assert {"use_weighting", "ld_alpha", "reverse_kl", "forward_kl", "js_divergence"} <= names_of("DPOTrainer")
    assert "alpha_divergence" in names_of("DPOTrainer")
    for trainer in ("RewardTrainer", "DistillationTrainer", "GKDTrainer", "ORPOTrainer"):
        assert names_of(trainer), trainer


def test_no_name_of_easydel_is_forgotten():
    pairs = {"hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_pair", "discopop", "kto"}
    assert pairs | {"sigmoid", "robust", "apo_zero", "apo_down"} <= names_of("DPOTrainer", "EasyDeL")
    assert names_of("CPOTrainer", "EasyDeL") == names_of("CPOTrainer")


def test_our_name_of_a_trl_loss_is_what_the_registry_makes_of_theirs():
    for loss in PEER_LOSSES:
        if (loss.peer, loss.trainer) == ("TRL", "DPOTrainer") and loss.name in METHODS | ALIASES:
            assert METHODS[loss.ours] is find_method(loss.name), loss


def test_a_difference_is_one_sentence_on_one_line():
    for loss in PEER_LOSSES:
        assert not loss.difference or loss.difference.endswith("."), loss
        assert "\n" not in loss.difference and "|" not in loss.difference and ". " not in loss.difference, loss


def test_every_library_is_dated_and_every_row_is_unique():
    assert set(VERSIONS) == set(PEERS) == {loss.peer for loss in PEER_LOSSES}
    assert len({loss[:3] for loss in PEER_LOSSES}) == len(PEER_LOSSES)


def test_the_page_for_switchers_is_what_the_module_renders():
    """`python -m palign.objectives.peers > docs/switching.md` makes it."""
    assert (ROOT / "docs/switching.md").read_text(encoding="utf-8") == render_markdown()


def test_the_page_has_a_row_for_every_loss():
    rows = [line for line in render_markdown().splitlines() if line.startswith("| ")]
    assert len(rows) == len(PEER_LOSSES) + 1 + len(VERSIONS) + len(PEERS)
    assert "| DPOTrainer | `sigmoid_norm` | `ln_dpo` | `beta` is 0.1 by default there, 5 here. |" in rows


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("aot_pair", "'aot_pair' is not a method; it is aot_unpaired, which sorts chosen against rejected"),
        ("kto_pair", "'kto_pair' is not a method; choose kto, "),
        *[(name, f"'{name}' is not a method; {advice}") for name, advice in OLD_METHODS.items()],
    ],
)
def test_an_old_name_is_answered_with_the_new_one(name, message):
    with pytest.raises(ValueError) as error:
        resolve_methods([name], {})
    assert str(error.value).startswith(f"config.objective.loss_type: {message}")
    assert "\n" not in str(error.value)


def test_an_old_name_never_hides_a_method():
    assert not set(OLD_METHODS) & (set(METHODS) | set(ALIASES))
