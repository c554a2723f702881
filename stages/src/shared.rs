//! What several stages share: model folders, the training loop's settings, facts about models before they exist.

pub(crate) mod facts;
pub(crate) mod folder;
pub(crate) mod needles;
pub(crate) mod records;
pub(crate) mod tokens;
pub(crate) mod training;
