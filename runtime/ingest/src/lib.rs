//! dsv3-ingest
