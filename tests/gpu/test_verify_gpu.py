"""Every claim of the harness on the GPU's kernels, a few cases each."""

from __future__ import annotations

import pytest

from verify import subjects
from verify.claims import CLAIMS
from verify.claims.outcome import Budget

pytestmark = pytest.mark.gpu

# repeat and invariance go through the operations by turns: one case each.
CASES = {"accuracy": 24, "splits": 8, "updates": 6, "gradients": 12, "guards": 24, "parity": 2}


@pytest.fixture(scope="module")
def subject():
    return subjects.built_in("cuda")[0]


@pytest.mark.parametrize("name", CLAIMS)
def test_claim_holds_on_the_gpu(name, subject):
    count = CASES.get(name, 2 * len(subject.operations.operations))
    outcome = CLAIMS[name].run(subject, Budget(cases=count), 0)
    assert outcome.failures == []
    assert outcome.cases == count
    if name == "invariance":
        # Rows of a stream of 8,192 have the bits they have in one of 64, the least a document is padded to.
        (told,) = [note for note in outcome.notes if note.startswith("streams of")]
        assert told == "streams of 64 to 8192 rows"
