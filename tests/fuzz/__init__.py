"""Differential fuzzing: hypothesis draws cases, native torch in float64 judges them.

A case is a dataclass of plain values, so its repr, as a failure prints it, is code that makes it
again. `check(case)` runs it with mlp_ext, with native torch and with native torch in float64.
`make fuzz MINUTES=60` draws for long; tests/test_fuzz.py draws a few, and holds what was found.
"""
