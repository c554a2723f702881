//! dsv3-posttrain
