"""``python -m fastlora``: the command line."""

from __future__ import annotations

from fastlora.cli import main

if __name__ == "__main__":
    main()
