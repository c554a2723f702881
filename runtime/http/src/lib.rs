//! dsv3-http
