//! dsv3-engine
