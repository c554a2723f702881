//! dsv3-data
