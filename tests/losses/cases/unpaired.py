"""Not filled in yet."""

from tests.losses.cases.case import Case

CASES: tuple[Case, ...] = ()
