"""Let a module be called as the function it is named after.

``fastlora.exact`` is a function users call and also the module that holds it. Importing the submodule sets
the package's attribute to the module, whatever the package had there; so the module itself answers the call.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable


def make_callable(function: Callable) -> None:
    """Make ``function``'s module callable: ``module(...)`` is ``function(...)``.

    Assigning a module's ``__class__`` is the documented way (Python data model, "Customizing module
    attribute access").
    """
    module = sys.modules[function.__module__]

    class CallableModule(types.ModuleType):
        __doc__ = module.__doc__
        __call__ = staticmethod(function)

    module.__class__ = CallableModule
