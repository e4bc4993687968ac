"""Python code in several processes at the cost of one: they fork after an import of torch."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

FORKS = """
import json, os, sys, traceback, torch
code, cases = sys.argv[1:]
for variables in json.loads(cases):
    if os.fork() == 0:
        os.environ.update(variables)
        try:
            exec(code)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(0)
    if status := os.wait()[1]:
        print(f"the process died: status {status}")
    print(end="\\0", flush=True)
"""


def in_forks(
    code: str,
    cases: Iterable[dict[str, str]],
    *options: str,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> list[str]:
    """What `code` prints or raises with each case's environment variables; a last line tells if it
    died.

    options: of Python.
    """
    command = [sys.executable, *options, "-c", FORKS, code, json.dumps([*cases])]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("\0")[:-1]
