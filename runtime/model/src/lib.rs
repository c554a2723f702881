//! dsv3-model
