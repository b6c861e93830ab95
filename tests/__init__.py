"""The tests, by purpose: unit, gpu, compat, meta, incidents, repo."""
