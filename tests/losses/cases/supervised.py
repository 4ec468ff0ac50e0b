"""None: `nll` and `dft` take one array of any shape, so there is no wrong shape to answer.

`test_losses_supervised.py` has them against their oracles, at extremes, in all types and under jit.
"""

from tests.losses.cases.case import Case

CASES: tuple[Case, ...] = ()
