//! dsv3-core
