"""Arrow columns: JSON features are decoded, and a cell that is no value stops only where its column is read."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config.schema import DataConfig
from engine.data import load_dataset_groups
from engine.data.readers import read_file
from engine.errors import UserError

PAIRS = {"prompt": ["hi", "ho"], "chosen": [" a", " b"], "rejected": [" c", " d"]}
BAD_TEXT = pa.StringArray.from_buffers(2, pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00\x04\x00\x00\x00"),
                                       pa.py_buffer(b"h\xffho"))  # fmt: skip
FAR_DATES = pa.array([2_932_897, 1], pa.int32()).view(pa.date32())


@pytest.fixture
def write(tmp_path):
    def write(columns, fields=None):
        path = tmp_path / "rows.parquet"
        arrays = {
            name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()
        }
        schema = pa.schema([(fields or {}).get(name, pa.field(name, array.type)) for name, array in arrays.items()])
        pq.write_table(pa.Table.from_arrays(list(arrays.values()), schema=schema), path)
        return path

    return write


@pytest.mark.parametrize("name", ["prompt", "chosen"])
def test_text_that_is_not_utf8_is_an_error_by_row(write, plain_tokenizer, name):
    path = write(PAIRS | {name: BAD_TEXT})
    with pytest.raises(UserError, match=rf"rows\.parquet, row 0: column '{name}' holds text that is not UTF-8"):
        load_dataset_groups(DataConfig(dataset_name=str(path)), plain_tokenizer, split="train")


@pytest.mark.parametrize("values", [BAD_TEXT, FAR_DATES, pa.StructArray.from_arrays([FAR_DATES], ["until"])])
def test_a_column_that_is_not_read_may_hold_anything(write, plain_tokenizer, values):
    dataset, report = load_dataset_groups(
        DataConfig(dataset_name=str(write(PAIRS | {"note": values}))), plain_tokenizer, split="train"
    )
    assert (len(dataset), report.counts) == (2, {})


@pytest.mark.parametrize("as_type", [True, False])
def test_json_features_are_decoded_wherever_they_are(write, as_type):
    values = [{"city": "Oslo"}, [1, None], None, "text"]
    texts = pa.array([json.dumps(value) if value is not None else None for value in values])
    kind = pa.json_(pa.string()) if as_type else pa.string()
    field = pa.field("x", kind, metadata=None if as_type else {"ARROW:extension:name": "arrow.json"})
    json_array = pa.ExtensionArray.from_storage(kind, texts) if as_type else texts
    inner = pa.StructArray.from_arrays([json_array, pa.array([1, 2, 3, 4])], fields=[field, pa.field("n", pa.int64())])
    nested = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int32()), inner)
    path = write({"x": json_array, "nested": nested}, {"x": field})
    rows = [row.data for row in read_file(path)]
    assert [row["x"] for row in rows] == values
    assert [row["nested"] for row in rows] == [[{"x": value, "n": i + 1}] for i, value in enumerate(values)]
