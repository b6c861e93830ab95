"""What a planted fault is, and how it is put into a part of a subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from verify.subject import Subject


@dataclass(frozen=True)
class Mutant:
    """One planted fault.

    ``part``: "linear", "optimizer", "trainer" or "operations". ``wrap``: the part with the fault in it.
    ``killer``: the claim that must catch it. ``seen_on``: says why not, for a subject on which the
    fault cannot show.
    """

    name: str
    sentence: str
    part: str
    killer: str
    wrap: Callable
    unseen_on: Callable[[Subject], str] = lambda subject: ""

    def plant(self, subject: Subject) -> Subject:
        """The subject with this fault. The other parts are left out, so that only it can be caught."""
        parts = {"linear": None, "optimizer": None, "trainer": None, "operations": None}
        faulty = self.wrap(getattr(subject, self.part))
        if self.part == "trainer":
            parts["optimizer"] = subject.optimizer
        return replace(subject, **{**parts, self.part: faulty})

    def why_unseen(self, subject: Subject) -> str:
        """Why the fault cannot show on this subject, empty if it can."""
        if getattr(subject, self.part) is None:
            return f"the subject has no {self.part}"
        if self.part == "trainer" and not subject.trainer.supports_hooks:
            return "the trainer takes no hooks"
        return self.unseen_on(subject)


class Wrapped:
    """A part with some of its methods replaced; everything else is the part's own."""

    def __init__(self, part, **methods) -> None:
        self._part = part
        self.__dict__.update(methods)

    def __getattr__(self, name: str):
        return getattr(self._part, name)
