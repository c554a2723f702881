//! dsv3-train
