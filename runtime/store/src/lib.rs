//! dsv3-store
