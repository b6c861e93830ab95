"""A harness that states what a LoRA kernel or trainer claims, tries it, and bounds the errors.

``python -m verify`` runs it. The layers, each importing only those above it:

- ``oracle``: float64 formulas and hand-derived gradients; imports numpy and torch only.
- ``bounds``, ``graphs``: how far a correct result may lie from the oracle, element by element.
- ``subject``: the protocol by which a kernel, an optimiser or a trainer is put before the claims.
- ``strategies``: cases nobody chose by hand, in an order fixed by the seed.
- ``claims``: one file a claim, its statement in one sentence at the top.
- ``mutants``: planted faults; each names the claim that must catch it. ``rules``: what common tolerances make of them.
- ``runner``, ``budget``, ``seeds``, ``replay``: a run within its budget, many seeds, one case again.
- ``report``, ``page``, ``terminal``: what a run leaves and prints. ``pytest_plugin``: claims in one's own tests.
- ``simple``: a subject made of plain functions. Files named ``subjects`` are the only ones that import fastlora.
"""

import time

# When this process began to import the harness, before torch: a budget is of the whole command.
BEGUN = time.monotonic()
