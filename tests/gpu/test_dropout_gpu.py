"""The kernels' dropout masks on a GPU."""

from __future__ import annotations

import pytest

from tests import dropout_cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("block", [16, 64])
def test_masks_are_those_of_the_reference(product, block):
    dropout_cases.check("cuda", product=product, block=block)


@pytest.mark.parametrize("features", [64, 77, 576])
def test_bits_are_those_of_the_reference(features):
    dropout_cases.check_bits("cuda", features)
