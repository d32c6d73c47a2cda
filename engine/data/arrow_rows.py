"""A dataset of token ids as an Arrow table, a row a group, whose buffers are the dataset's own arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ..arrow import numpy_of
from .groups import PreferenceDataset


def to_arrow(dataset: PreferenceDataset) -> pa.RecordBatch:
    """The groups of a dataset; copies nothing but reference log-probs."""
    arrays = dataset.arrays()

    def parts(values: np.ndarray) -> pa.Array:
        """A list of prompt and responses a group, each a list of values."""
        tokens = pa.LargeListArray.from_arrays(pa.array(arrays["offsets"]), pa.array(values))
        return pa.LargeListArray.from_arrays(pa.array(arrays["first_part"]), tokens)

    pairs = pa.FixedSizeListArray.from_arrays(pa.array(arrays["pairs"].reshape(-1)), 2)
    columns = {
        "row": pa.array(arrays["rows"]),
        "source": pa.array(arrays["sources"]),
        "ids": parts(arrays["tokens"]),
        "pairs": pa.LargeListArray.from_arrays(pa.array(arrays["first_pair"]), pairs),
        "weight": pa.array(arrays["weights_G"]),
        "margin": pa.array(arrays["margins_G"]),
    }
    if "weights" in arrays:
        columns["token_weights"] = parts(arrays["weights"])
    if any(sums is not None for sums in dataset.ref_logps):
        columns["ref_logps"] = pa.array(dataset.ref_logps, type=pa.list_(pa.float64()))
    return pa.RecordBatch.from_pydict(columns)


def from_arrow(batch: pa.RecordBatch, source_names: Sequence[str]) -> PreferenceDataset:
    """The dataset of ``to_arrow``, on the buffers of the batch, which may be a file that is mapped into memory."""
    ids, pairs = batch.column("ids"), batch.column("pairs")
    arrays = {
        "rows": batch.column("row"),
        "sources": batch.column("source"),
        "first_part": ids.offsets,
        "offsets": ids.values.offsets,
        "tokens": ids.values.values,
        "first_pair": pairs.offsets,
        "pairs": pairs.values.values,
        "weights_G": batch.column("weight"),
        "margins_G": batch.column("margin"),
    }
    names = batch.schema.names
    if "token_weights" in names:
        arrays["weights"] = batch.column("token_weights").values.values
    sums = batch.column("ref_logps").to_pylist() if "ref_logps" in names else [None] * batch.num_rows
    return PreferenceDataset.of_arrays(
        {name: numpy_of(values) for name, values in arrays.items()},
        [None if found is None else tuple(found) for found in sums],
        tuple(source_names),
    )
