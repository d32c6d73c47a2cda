"""Reference log-probs: computed once per response, stored by content, found again by every later run."""

from .columns import export_columns, import_columns
from .keys import dataset_keys, identify, model_digest, response_key, weights_digest
from .lookup import default_store_path, load_ref_logps, load_ref_sums, load_weighted_sums
from .precompute import PrecomputeReport, precompute
from .store import ReferenceStore
from .verify import verify_rows

__all__ = [
    "PrecomputeReport",
    "ReferenceStore",
    "dataset_keys",
    "default_store_path",
    "export_columns",
    "identify",
    "import_columns",
    "load_ref_logps",
    "load_ref_sums",
    "load_weighted_sums",
    "model_digest",
    "precompute",
    "response_key",
    "verify_rows",
    "weights_digest",
]
