"""The progress bar of fit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

AfterEpoch = Callable[..., None]  # epoch, loss and, if there are such, validation loss and metric


@contextmanager
def progress_bar(epochs: int) -> Iterator[AfterEpoch | None]:
    """A callback that shows each epoch's loss; None where nobody would see a bar."""
    if not (sys.stderr.isatty() or _is_notebook()):
        yield None
    elif find_spec("tqdm"):
        from tqdm.auto import tqdm

        with tqdm(total=epochs, unit="epoch") as bar:

            def show(epoch: int, *losses: float) -> None:
                bar.set_postfix_str(_text(losses), refresh=False)
                bar.update()

            yield show
    else:
        shown = 0.0

        def write(epoch: int, *losses: float) -> None:
            nonlocal shown
            if epoch + 1 == epochs or time.monotonic() - shown > 0.1:
                shown = time.monotonic()
                text = f"\repoch: {epoch} {_text(losses)}"
                print(text, end="", file=sys.stderr, flush=True)

        try:
            yield write
        finally:
            print(file=sys.stderr)


def _text(losses: Sequence[float]) -> str:
    names = ("loss", "validation loss", "metric")
    values = zip(names, losses, strict=False)
    return " ".join(f"{name}: {value:.4f}" for name, value in values)


def _is_notebook() -> bool:
    """Whether this is a Jupyter kernel, as tqdm.auto finds it out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config
