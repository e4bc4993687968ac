"""All that the other files promise, on a GPU: their very tests, with tensors made there."""

from contextlib import suppress

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch finds no cuda device here", allow_module_level=True)

from test_dispatch import *  # noqa: F403
from test_errors import *  # noqa: F403
from test_gradients import *  # noqa: F403
from test_saved import *  # noqa: F403
from test_training import *  # noqa: F403
from test_transforms import *  # noqa: F403
from test_values import *  # noqa: F403

with suppress(ModuleNotFoundError):  # hypothesis may be missing on a machine without a network
    from test_properties import *  # noqa: F403

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("on_cuda", "poisoned_memory", "one_thread")]
