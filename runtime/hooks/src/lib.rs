//! dsv3-hooks
