//! The data the recipes ship with.
