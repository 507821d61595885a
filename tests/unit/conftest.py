"""What several unit tests start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sandbox_attacks import FORMS

from xbai.sandbox import landlock
from xbai.sandbox.process import Sandbox


@pytest.fixture(scope="module", params=FORMS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A started one in every form that works here; its `form` says which."""
    if request.param == "landlock" and not landlock.is_available():
        pytest.skip("the kernel has no Landlock")
    with FORMS[request.param]() as sandbox:
        sandbox.start()
        if request.param == "bubblewrap" and "bubblewrap" in sandbox.warning:
            pytest.skip(sandbox.warning)
        sandbox.form = request.param
        yield sandbox
