"""The generator needs torch and is run by hand: pytest must not import it for doctests."""

collect_ignore = ["make_trl_fixture.py"]
