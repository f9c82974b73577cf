"""How a public name changes: the old one goes on working, with a warning, until the version that it names."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def renamed_parameters(gone_in: str, **new_names: str) -> Callable[[F], F]:
    """Takes keyword arguments by their old names, too: @renamed_parameters("0.3", tau="temperature").

    An old name raises FutureWarning, which Python shows by default, unlike DeprecationWarning; both names TypeError.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            for old in new_names.keys() & options.keys():
                new, name = new_names[old], function.__name__
                if new in options:
                    raise TypeError(f"{name}: expected {new}, got {new} and {old}")
                said = f"{name}: {old} is {new} from now on; {old} goes with version {gone_in}"
                warnings.warn(said, FutureWarning, stacklevel=2)
                options[new] = options.pop(old)
            return function(*args, **options)

        return call  # type: ignore[return-value]

    return decorate
