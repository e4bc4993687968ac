"""Benchmarks: cases and providers as tables, a runner that takes the providers in turn.

cases, rows, training -> providers -> work -> runner; rows -> plot: each uses only those before it.
Only plot, as a command of its own, uses mlp_ext.commands.
"""
