"""All cases, family by family."""

from tests.losses.cases import distill, experimental, listwise, pairwise, pairwise_shaped, reward, supervised, unpaired
from tests.losses.cases.case import Case

CASES: tuple[Case, ...] = (
    *pairwise.CASES,
    *pairwise_shaped.CASES,
    *unpaired.CASES,
    *listwise.CASES,
    *reward.CASES,
    *supervised.CASES,
    *distill.CASES,
    *experimental.CASES,
)
