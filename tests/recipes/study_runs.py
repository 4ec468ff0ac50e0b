"""Made-up results of a small study, for tests of what is done with them."""

from palign.recipes.study_config import MethodConfig, StudyConfig
from palign.recipes.study_measures import Point, Result, Rewards

PROMPTS = 4


def method(loss="dpo", label="", **more):
    grid = more.pop("grid", {"learning_rate": (1e-3,)})
    return MethodConfig(label=label or loss.upper(), loss=loss, grid=grid, **more)


def study(methods=None, **more):
    """A study of DPO at three betas, reverse DPO and two others."""
    if methods is None:
        methods = {
            "ipo": method("ipo"),
            "dpo": method("dpo", grid={"learning_rate": (1e-3,), "beta": (0.25, 0.5, 1.0)}),
            "reverse": method("dpo", "reverse DPO", data="reversed", grid={"learning_rate": (1e-3,), "beta": (0.5,)}),
            "simpo": method("simpo"),
        }
    return StudyConfig(**{"methods": methods, "test_prompts": PROMPTS, "steps": 20, "checkpoints": 2, **more})


def result(gold=1.0, **more):
    """A result with a curve from 0 through `gold` + `over` to `gold`."""
    over = more.pop("over", 0.0)
    curve = (Point(0, 0.0, 0.0, 0.9), Point(10, 1.0, gold + over, 0.8), Point(20, 2.0, gold, 0.7))
    values = dict(
        gold=(gold,) * PROMPTS, kl=2.0, valid=0.75, words=12.0, distinct=1.0, curve=curve, ranking=0.6, idealised=0.8,
        idealised_certain=1.0, chosen_change=-1.0, rejected_change=-3.0, displaced=0.5,
        rewards=Rewards(0.7, 0.5, 0.4), contrastive=None,
    )  # fmt: skip
    return Result(**values | more)
