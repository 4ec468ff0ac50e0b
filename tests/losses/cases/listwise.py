"""Lists of responses: rankings, LiPO's losses, softmax targets, self-play."""

from collections.abc import Mapping

from palign import losses
from tests.losses.cases.case import Case, list_extremes, list_inputs
from tests.oracles import listwise_losses as oracle


def _case(loss, expected, hyper: Mapping[str, float], *, name: str = "") -> Case:
    return Case(loss, expected, "listwise", list_inputs, list_extremes, hyper, stopped=(1, 2), name=name)


def _signed(rng, size):
    """The labels as scores of either sign."""
    policy, reference, labels, valid = list_inputs(rng, size)
    return policy, reference, 4 * labels - 2, valid


CASES: tuple[Case, ...] = (
    _case(losses.plackett_luce, oracle.plackett_luce, {"beta": 0.2}),
    _case(losses.plackett_luce, oracle.plackett_luce, {"beta": 0.2, "top": 2}, name="plackett_luce_top_2"),
    _case(losses.lipo_lambda, oracle.lipo_lambda, {"beta": 0.2}),
    _case(losses.lipo_pointwise_mse, oracle.lipo_pointwise_mse, {"beta": 0.1}),
    _case(losses.lipo_pointwise_sigmoid, oracle.lipo_pointwise_sigmoid, {"beta": 0.2}),
    _case(losses.lipo_pair_logistic, oracle.lipo_pair_logistic, {"beta": 0.2}),
    _case(losses.lipo_pair_hinge, oracle.lipo_pair_hinge, {"beta": 0.1}),
    _case(losses.lipo_softmax, oracle.lipo_softmax, {"beta": 0.2}),
    _case(losses.listnet, oracle.listnet, {"beta": 0.2, "temperature": 0.5}),
    _case(losses.info_nca, oracle.listnet, {"beta": 0.2, "temperature": 0.25}),
    _case(losses.nca, oracle.nca, {"beta": 0.2, "temperature": 0.5}),
    _case(losses.exo, oracle.exo, {"beta": 0.2, "temperature": 0.5}),
    _case(losses.sppo, oracle.sppo, {"beta": 0.05}),
    _case(losses.gpo, oracle.gpo, {"beta": 0.25})._replace(arrays=_signed),
)
