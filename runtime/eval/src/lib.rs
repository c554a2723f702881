//! dsv3-eval
