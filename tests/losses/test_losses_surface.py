"""What `from palign import losses` offers, and what it must not load."""

import inspect
import subprocess
import sys

from palign import losses

FORBIDDEN = {"flax", "optax", "orbax", "tensorflow_datasets", "tensorflow", "grain", "ml_collections"}


def test_the_import_loads_no_training_library():
    program = "import sys, palign.losses; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "palign.losses.dense" in loaded
    assert not {name.split(".")[0] for name in loaded} & FORBIDDEN
    assert {name for name in loaded if name.startswith("palign.")} <= {
        name for name in loaded if name.startswith("palign.losses")
    }


def test_every_public_function_tells_all_that_a_borrower_needs():
    functions = {name: getattr(losses, name) for name in losses.__all__} | vars(losses.dense)
    functions = {
        name: value
        for name, value in functions.items()
        if inspect.isfunction(value) and value.__module__.startswith("palign.losses.") and not name.startswith("_")
    }
    functions = {n: f for n, f in functions.items() if f.__module__ != "palign.losses.checks"}
    assert len(functions) >= 24
    for name, function in functions.items():
        for section in ("Args:", "Returns:", "References:", "Examples:"):
            assert section in function.__doc__, (name, section)
        parameters = inspect.signature(function).parameters
        for parameter in parameters.values():
            assert f"{parameter.name}:" in function.__doc__, (name, parameter.name)
            # Arrays by position; numbers by name, and none of them a switch.
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert not isinstance(parameter.default, bool | str), (name, parameter.name)


def test_the_names_are_sorted_and_exist():
    assert losses.__all__ == sorted(losses.__all__, key=lambda name: (name[0].islower(), name))
    assert all(hasattr(losses, name) for name in losses.__all__)
