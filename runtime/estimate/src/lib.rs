//! dsv3-estimate
