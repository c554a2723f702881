"""Reads the token shards of an `ingest` stage with pyarrow alone, and holds them against their manifest.

    dsv3-pipeline run pipelines/full.yaml --until corpus
    dsv3-pipeline get latest corpus.tokens tokens/
    dsv3-pipeline inspect last corpus > result.json        # the digest of the output `tokens` is in it
    dsv3-pipeline inspect DIGEST > manifest.json
    pip install pyarrow==21.0.0
    python tests/clients/read_tokens.py tokens/ manifest.json [EOS]

Layout (runtime/data/src/tokens.rs): column `tokens`, a list of u32 for each row; column `document_starts`, the offsets
within the row at which a document begins. Token i of the stream lies in row i / row_tokens. EOS is 1 where the pipeline
trained its own tokenizer.
"""

import hashlib
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main(folder, manifest, eos=1):
    meta = json.loads(Path(manifest).read_text())["meta"]
    stream, starts, shard_tokens, rows = [], [], [], []
    for shard in sorted(Path(folder).glob("*.parquet")):
        table = pq.read_table(shard)
        assert table.schema.field("tokens").type.value_type == pa.uint32(), table.schema
        before = len(stream)
        for row, offsets in zip(table["tokens"].to_pylist(), table["document_starts"].to_pylist()):
            starts += [len(stream) + offset for offset in offsets]
            stream += row
            rows.append(len(row))
        shard_tokens.append(len(stream) - before)

    assert shard_tokens == meta["shard_tokens"], (shard_tokens, meta["shard_tokens"])
    assert len(stream) == meta["total_tokens"] == sum(meta["source_tokens"].values()) + padding(stream, meta)
    assert all(length == meta["row_tokens"] for length in rows[:-1]), "only the last row may be short"
    assert max(stream) < meta["vocab_size"]
    assert len(starts) == meta["documents"] and starts == sorted(set(starts)) and starts[0] == 0
    # A document begins where one has ended, or after the padding that aligned it.
    assert all(stream[start - 1] in (eos, meta["pad_token_id"]) for start in starts[1:])
    assert stream.count(eos) == len(starts), "every document has one end"

    digest = hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in stream)).hexdigest()
    print(f"{len(shard_tokens)} shards, {len(rows)} rows, {len(stream)} tokens, {len(starts)} documents")
    print(f"sha256 of the stream as little-endian u32: {digest}")


def padding(stream, meta):
    pad = meta["pad_token_id"]
    return 0 if pad is None else stream.count(pad)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
