"""The command `mlp-ext`: a file for each command, and what they share."""
