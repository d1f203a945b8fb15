"""The fixtures of the packages that are measured."""

from tests.data.conftest import make_records, model_path  # noqa: F401
from tests.inference.conftest import decoder_only_run, encoder_decoder_run  # noqa: F401
from tests.train.conftest import eval_records, records  # noqa: F401
