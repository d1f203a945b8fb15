"""The fixtures of the packages that are measured."""

import pytest

from encdec.benchmarks import device_rates
from tests.data.conftest import make_records, model_path  # noqa: F401
from tests.inference.conftest import decoder_only_run, encoder_decoder_run  # noqa: F401
from tests.train.conftest import eval_records, records  # noqa: F401


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch, one_device):
    """The machine's rates from megabytes, on one device: they are not what is tested."""
    monkeypatch.setattr(device_rates, "_READ_BYTES", 2**22)
    monkeypatch.setattr(device_rates, "_SIDE", 128)
