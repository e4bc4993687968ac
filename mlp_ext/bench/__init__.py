"""Benchmarks: cases and providers as tables, a runner that takes the providers in turn.

cases, providers -> work -> runner -> rows -> plot, command: each uses only those before it.
"""
