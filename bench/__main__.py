"""``python -m bench``: timings on this machine's GPU; ``python -m bench gate``: the compile gate, no GPU needed."""

from __future__ import annotations

import sys

import torch


def main() -> None:
    """Dispatch on the first argument."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["gate"]:
        from bench.compile_gate import main as gate

        return gate()
    if arguments[:1] in ([], ["linear"]):
        if not torch.cuda.is_available():
            print("not timed: no GPU on this machine (python -m bench gate needs none)")
            return None
        from bench.linear import main as linear

        return linear(arguments[1] if len(arguments) > 1 else None)
    print(f"bench: unknown argument {arguments[0]!r}; allowed: linear [FILE], gate", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
