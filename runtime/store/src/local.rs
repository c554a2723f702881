//! Durable create on a local disk: write a file under `tmp/`, sync it, link it to its name, sync the folder. The link
//! fails when the name is taken, which makes the create conditional; a crash leaves at most a file in `tmp/`, which
//! nobody reads. (The object store's own local put does not sync, so a power cut could keep a name and lose its bytes.)

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{Create, host::nonce};

/// A step of a durable create that is about to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The temporary file is made.
    Stage,
    /// It is written, and synced now.
    Sync,
    /// It gets its name.
    Link,
    /// The folder of the name is synced.
    SyncFolder,
    /// The caller is told.
    Answer,
}

/// Told of each step before it is done; an error ends the create there. This is how tests put faults on a local disk.
pub(crate) trait Steps: fmt::Debug + Send + Sync {
    /// `path` is the name the file will get (`tmp` while it is unknown), `staged` the temporary file.
    fn step(&self, step: Step, path: &str, staged: &Path) -> io::Result<()>;

    /// Whether the process has died by an injected crash: then it cleans up nothing.
    fn is_dead(&self) -> bool;
}

/// The root folder of a store on a local disk.
#[derive(Clone, Debug)]
pub(crate) struct Root {
    path: PathBuf,
    steps: Option<Arc<dyn Steps>>,
}

impl Root {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, steps: None }
    }

    /// The same folder, with its steps told to `steps`.
    pub(crate) fn with_steps(&self, steps: Option<Arc<dyn Steps>>) -> Self {
        Self { path: self.path.clone(), steps }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nobody is told of its steps.
    pub(crate) fn is_plain(&self) -> bool {
        self.steps.is_none()
    }

    fn step(&self, step: Step, path: &str, staged: &Path) -> io::Result<()> {
        self.steps.as_ref().map_or(Ok(()), |steps| steps.step(step, path, staged))
    }
}

/// A file under `tmp/` that is removed when dropped.
pub(crate) struct Staged {
    path: PathBuf,
    steps: Option<Arc<dyn Steps>>,
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.steps.as_ref().is_some_and(|steps| steps.is_dead()) {
            return;
        }
        // A file that stays behind costs space and nothing else.
        let _ = fs::remove_file(&self.path);
    }
}

/// Writes a synced file under `root/tmp`, for the object at `relative`, `tmp` while that is unknown.
pub(crate) fn stage(
    root: &Root,
    relative: &str,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<Staged> {
    let folder = root.path.join("tmp");
    let staged = Staged { path: folder.join(nonce()), steps: root.steps.clone() };
    root.step(Step::Stage, relative, &staged.path)?;
    create_folders(&root.path, &folder)?;
    let mut file = OpenOptions::new().write(true).create_new(true).open(&staged.path)?;
    write(&mut file)?;
    root.step(Step::Sync, relative, &staged.path)?;
    file.sync_all()?;
    Ok(staged)
}

/// Gives a staged file its name, unless the name is taken.
pub(crate) fn link(root: &Root, staged: &Staged, relative: &str) -> io::Result<Create> {
    let target = root.path.join(relative);
    let folder = target.parent().unwrap_or(&root.path);
    root.step(Step::Link, relative, &staged.path)?;
    create_folders(&root.path, folder)?;
    match fs::hard_link(&staged.path, &target) {
        Ok(()) => {
            root.step(Step::SyncFolder, relative, &staged.path)?;
            sync_folder(folder)?;
            root.step(Step::Answer, relative, &staged.path)?;
            Ok(Create::Created)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Create::AlreadyExists),
        Err(error) => Err(error),
    }
}

/// Creates `root/relative` with `bytes`, durably, unless it exists.
pub(crate) fn create(root: &Root, relative: &str, bytes: &[u8]) -> io::Result<Create> {
    if root.path.join(relative).try_exists()? {
        return Ok(Create::AlreadyExists);
    }
    link(root, &stage(root, relative, |file| file.write_all(bytes))?, relative)
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
