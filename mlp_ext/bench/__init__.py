"""Benchmarks: tables of cases and providers, and a runner that times the providers in turn.

cases, rows, training -> machine, plans -> providers -> own, work -> runner; rows -> noise, plot:
each uses only those before it. Only plot, which is also a command, uses mlp_ext.commands.
"""
