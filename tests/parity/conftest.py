"""The generators need torch or rax and are run by hand: pytest must not import them for doctests."""

collect_ignore = ["make_rax_fixture.py", "make_trl_fixture.py", "make_trl_losses.py"]
