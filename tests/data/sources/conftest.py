from __future__ import annotations

import pytest

from distiljax.data.sources import documents
from distiljax.errors import UserError


@pytest.fixture
def refused():
    """The one line with which a source is refused."""

    def read(*args, **options):
        with pytest.raises(UserError) as caught:
            list(documents(*args, **options))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return read


class Said(list):
    """Messages as data.on_error=skip takes them; those that are said again by other parts are only counted."""

    def __init__(self):
        super().__init__()
        self.repeated = 0

    def __call__(self, message, repeated=False):
        if repeated:
            self.repeated += 1
        else:
            self.append(message)


@pytest.fixture
def said():
    return Said()


@pytest.fixture
def texts():
    """The texts of a source's documents."""
    return lambda *args, **options: [document.text for document in documents(*args, **options)]
