"""A harness that states what a LoRA kernel or trainer claims, tries it, and bounds the errors.

``python -m verify`` runs it. The layers, each importing only those above it:

- ``oracle``: float64 formulas and hand-derived gradients; imports numpy and torch only.
- ``bounds``, ``graphs``: how far a correct result may lie from the oracle, element by element.
- ``subject``: the protocol by which a kernel, an optimiser or a trainer is put before the claims.
- ``strategies``: cases nobody chose by hand, in an order fixed by the seed.
- ``claims``: one file a claim, its statement in one sentence at the top.
- ``mutants``: planted faults; each names the claim that must catch it.
- ``subjects``: the only file that imports fastlora.
"""
