//! Path against path: instruction sets, row counts, threads and encodings give the same bits.
