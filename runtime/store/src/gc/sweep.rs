//! Removing what a collection found, in its order, a few objects at a time.

use std::{fs, path::Path, time::Instant};

use futures::{StreamExt, TryStreamExt};

use super::{Item, Removed, turn::Turn};
use crate::{LeaseOptions, error::Result};

/// Objects removed at the same time.
const PARALLEL_DELETES: usize = 8;

/// Removes `items`. Whether it still is this process's turn is looked at again and again: after a pause not more than the
/// deletions that were under way follow.
pub(super) async fn sweep(turn: &Turn, items: &[Item]) -> Result<()> {
    let often = LeaseOptions::default().expire / 4;
    turn.check().await?;
    let mut checked = Instant::now();
    for group in groups(items) {
        if checked.elapsed() >= often {
            turn.check().await?;
            checked = Instant::now();
        }
        let store = &turn.store;
        let deletes = futures::stream::iter(group).map(|(what, path)| async move {
            if let (Removed::Blob, Some(digest)) = (what, super::digest_of(&path)) {
                store.forget_blob(digest);
            }
            store.delete(&path).await
        });
        deletes.buffer_unordered(PARALLEL_DELETES).try_collect::<Vec<()>>().await?;
    }
    if let Some(root) = turn.store.local_root() {
        items.iter().filter(|item| item.what == Removed::Run).for_each(|item| remove_empty(&root.join(&item.path)));
    }
    Ok(())
}

/// Removes the folders of a run, which a local disk keeps without their files. One that is not empty stays.
fn remove_empty(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_empty(&entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}

/// Blobs and files go together in groups; the objects of a record, a stage or a run one after another.
fn groups(items: &[Item]) -> Vec<Vec<(Removed, String)>> {
    let mut groups: Vec<Vec<(Removed, String)>> = Vec::new();
    for item in items {
        let together = matches!(item.what, Removed::Blob | Removed::Temporary);
        for path in &item.objects {
            match groups.last_mut() {
                Some(group)
                    if together
                        && group.len() < PARALLEL_DELETES
                        && group.iter().all(|(what, _)| *what == item.what) =>
                {
                    group.push((item.what, path.clone()));
                }
                _ => groups.push(vec![(item.what, path.clone())]),
            }
        }
    }
    groups
}
