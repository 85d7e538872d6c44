"""What tests share. Fixtures are in tests/conftest.py."""

from pathlib import Path

import pytest

# A failing assertion in here is to say what the values were, as one in a test does.
pytest.register_assert_rewrite(
    *(f"{__name__}.{path.stem}" for path in Path(__file__).parent.glob("[!_]*.py"))
)
