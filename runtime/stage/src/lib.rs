//! dsv3-stage
