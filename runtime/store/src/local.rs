//! Durable create on a local disk: write a file under `tmp/`, sync it, link it to its name, sync the folder. The link
//! fails when the name is taken, which makes the create conditional; a crash leaves at most a file in `tmp/`, which
//! nobody reads. (The object store's own local put does not sync, so a power cut could keep a name and lose its bytes.)

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::{Create, host::nonce};

/// A file under `tmp/` that is removed when dropped.
pub(crate) struct Staged {
    path: PathBuf,
}

impl Drop for Staged {
    fn drop(&mut self) {
        // A file that stays behind costs space and nothing else.
        let _ = fs::remove_file(&self.path);
    }
}

/// Writes a synced file under `root/tmp`.
pub(crate) fn stage(root: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<Staged> {
    let folder = root.join("tmp");
    create_folders(root, &folder)?;
    let staged = Staged { path: folder.join(nonce()) };
    let mut file = OpenOptions::new().write(true).create_new(true).open(&staged.path)?;
    write(&mut file)?;
    file.sync_all()?;
    Ok(staged)
}

/// Gives a staged file its name, unless the name is taken.
pub(crate) fn link(root: &Path, staged: &Staged, relative: &str) -> io::Result<Create> {
    let target = root.join(relative);
    let folder = target.parent().unwrap_or(root);
    create_folders(root, folder)?;
    match fs::hard_link(&staged.path, &target) {
        Ok(()) => sync_folder(folder).map(|()| Create::Created),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Create::AlreadyExists),
        Err(error) => Err(error),
    }
}

/// Creates `root/relative` with `bytes`, durably, unless it exists.
pub(crate) fn create(root: &Path, relative: &str, bytes: &[u8]) -> io::Result<Create> {
    if root.join(relative).try_exists()? {
        return Ok(Create::AlreadyExists);
    }
    link(root, &stage(root, |file| file.write_all(bytes))?, relative)
}

/// Creates the folders from `root` down to `folder`, each synced into its parent.
fn create_folders(root: &Path, folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent()
        && folder != root
    {
        create_folders(root, parent)?;
    }
    match fs::create_dir(folder) {
        Ok(()) => folder.parent().map_or(Ok(()), sync_folder),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}
