"""Performance regression suites and the compile gate (no GPU needed for the gate)."""
