"""How many inputs a property is tried on: at most 40 in the ordinary run, its full number in `make nightly`."""

from typing import Any

from hypothesis import settings

# A shared machine is slow now and then: no example fails for the time it takes.
settings.register_profile("ordinary", max_examples=40, deadline=None)
settings.register_profile("nightly", max_examples=100, deadline=None)


def examples(number: int, **options: Any) -> settings:
    """Settings of a property whose full number of inputs is `number`; the ordinary profile lowers it."""
    if settings.get_current_profile_name() != "nightly":
        number = min(number, settings.default.max_examples)
    return settings(max_examples=number, **options)
