//! dsv3-stages
