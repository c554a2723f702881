//! dsv3-infer
