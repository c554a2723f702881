//! Whether a store honours conditional create, found out before a run writes to it.
//!
//! A small object with a name of its own is created twice, with different content; a store that takes the second one does
//! not honour the condition. Then a run is refused, unless its options say `conditional_create: single_writer`: in that
//! mode [`Store::create`] looks whether the object is there and then writes, so that two processes may both believe to have
//! won. The mode is never entered unless the probe has failed and the option was given.

use bytes::Bytes;
use futures::FutureExt;
use object_store::{ObjectStoreExt, PutPayload};

use crate::{
    ConditionalCreate, Create, Store,
    error::{Result, StoreError},
};

/// What keeps two writers of one object apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateMode {
    /// The store: of racing creates one wins.
    Conditional,
    /// The user's promise that there is one writer.
    SingleWriter,
}

impl Store {
    /// Finds out whether conditional create is honoured; to be called before a run writes. Local and memory stores are
    /// ours and need no probe; others are asked once for each opened store.
    ///
    /// # Errors
    /// [`StoreError::Unconditional`] when it is not and `wanted` does not allow for that.
    pub async fn probe(&self, wanted: ConditionalCreate) -> Result<CreateMode> {
        if self.local_root().is_some() || self.url().starts_with("memory://") {
            return Ok(CreateMode::Conditional);
        }
        let wanted = match self.options().conditional_create {
            // Said at opening, for runs whose plan does not say it.
            ConditionalCreate::SingleWriter => ConditionalCreate::SingleWriter,
            ConditionalCreate::Required => wanted,
        };
        let honoured = *self.honoured().get_or_try_init(|| self.try_conditional_create()).await?;
        match wanted {
            _ if honoured => Ok(CreateMode::Conditional),
            ConditionalCreate::SingleWriter => {
                self.set_single_writer();
                Ok(CreateMode::SingleWriter)
            }
            ConditionalCreate::Required => Err(StoreError::Unconditional { url: self.url().to_owned() }),
        }
    }

    async fn try_conditional_create(&self) -> Result<bool> {
        let path = format!("probe/{}", crate::nonce());
        let honoured = match self.create(&path, Bytes::from_static(b"first\n")).await {
            Ok(Create::Created) => {
                let second = self.create(&path, Bytes::from_static(b"second\n")).await?;
                second == Create::AlreadyExists
            }
            // Nobody else knows the name.
            Ok(Create::AlreadyExists) => false,
            // Some servers refuse the condition itself. One that takes nothing at all says so by its error.
            Err(error @ StoreError::Unavailable { .. }) => {
                let (location, payload) = (self.location(&path)?, PutPayload::from_static(b"plain\n"));
                match self.objects().put(&location, payload).boxed().await {
                    Ok(_) => false,
                    Err(_) => return Err(error),
                }
            }
            Err(error) => return Err(error),
        };
        if let Err(error) = self.delete(&path).await {
            // A few bytes stay behind.
            tracing::warn!(%error, "the probe's object was not deleted");
        }
        Ok(honoured)
    }
}
