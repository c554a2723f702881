//! Files of artifacts: reading them, laying them out as a folder, publishing new ones.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use dsv3_core::{Artifact, Error, FileEntry, Kind, Manifest};
use dsv3_store::StoreError;
use serde_json::Value;

use crate::Ctx;

impl Ctx {
    /// The manifest of an artifact.
    ///
    /// # Errors
    /// When it is missing, damaged or of another kind.
    pub fn manifest<K: Kind>(&self, artifact: &Artifact<K>) -> Result<Manifest, Error> {
        Ok(self.blobs().manifest_of(artifact)?)
    }

    /// One file of an artifact, verified.
    ///
    /// # Errors
    /// When the artifact has no such file, or it is missing or damaged.
    pub fn read<K: Kind>(&self, artifact: &Artifact<K>, path: &str) -> Result<Bytes, Error> {
        let manifest = self.manifest(artifact)?;
        let Some(entry) = manifest.file(path) else {
            let files = manifest.files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>().join(", ");
            return Err(StoreError::NoSuchFile { kind: manifest.kind, path: path.to_owned(), files }.into());
        };
        Ok(self.blobs().get(entry)?)
    }

    /// Local paths of all files of an artifact, in its order, verified. Their names need not be those of the artifact.
    ///
    /// # Errors
    /// When a file is missing or damaged.
    pub fn local_files<K: Kind>(&self, artifact: &Artifact<K>) -> Result<Vec<(FileEntry, PathBuf)>, Error> {
        let (manifest, name) = (self.manifest(artifact)?, self.name_of(artifact));
        let place = |entry: FileEntry| {
            let path = self.blobs().local_path(&entry)?;
            self.note_file(&name, &entry, &path);
            Ok((entry, path))
        };
        manifest.files.into_iter().map(place).collect()
    }

    /// A local folder that holds the artifact's files under their names, verified, as links where the system has them.
    /// Do not write to it.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the folder cannot be made.
    pub fn local_dir<K: Kind>(&self, artifact: &Artifact<K>) -> Result<PathBuf, Error> {
        let folder = self.scratch_dir()?.join("artifacts").join(artifact.digest().to_string());
        let name = self.name_of(artifact);
        self.note_folder(&name, &folder);
        for (entry, source) in self.local_files(artifact)? {
            let target = folder.join(&entry.path);
            self.note_file(&name, &entry, &target);
            place(&source, &target).map_err(|source| {
                Error::unavailable(format!("cannot lay out {} as {}", entry.path, target.display())).source(source)
            })?;
        }
        Ok(folder)
    }

    /// Stores `bytes` as the file `path` of an artifact to be published.
    ///
    /// # Errors
    /// When the store refuses.
    pub fn put(&self, path: &str, bytes: impl Into<Bytes>) -> Result<FileEntry, Error> {
        Ok(self.blobs().put(path, bytes)?)
    }

    /// Stores a local file as the file `path` of an artifact to be published, in constant memory.
    ///
    /// # Errors
    /// When the file cannot be read or the store refuses.
    pub fn put_file(&self, path: &str, file: &Path) -> Result<FileEntry, Error> {
        Ok(self.blobs().put_file(path, file)?)
    }

    /// Publishes an artifact. `meta` must be deterministic: no clock, rate, host, run id.
    ///
    /// # Errors
    /// When a file was never stored or the store refuses.
    pub fn publish<K: Kind>(&self, files: Vec<FileEntry>, meta: Value) -> Result<Artifact<K>, Error> {
        let manifest = Manifest { format: Manifest::FORMAT, kind: K::NAME.to_owned(), files, meta };
        Ok(Artifact::new(self.blobs().publish(&manifest)?))
    }

    /// Publishes all files below a local folder, sorted by path.
    ///
    /// # Errors
    /// When a file cannot be read or the store refuses.
    pub fn publish_dir<K: Kind>(&self, folder: &Path, meta: Value) -> Result<Artifact<K>, Error> {
        let unreadable = |source: io::Error| {
            Error::unavailable(format!("cannot read the folder {}", folder.display())).source(source)
        };
        let mut paths = Vec::new();
        walk(folder, String::new(), &mut paths).map_err(unreadable)?;
        paths.sort_unstable();
        let files = paths.iter().map(|path| self.put_file(path, &folder.join(path))).collect::<Result<_, _>>()?;
        self.publish(files, meta)
    }
}

/// Relative paths with `/` of all files below `folder`.
fn walk(folder: &Path, prefix: String, paths: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
        // Links count as what they lead to.
        if fs::metadata(entry.path())?.is_dir() {
            walk(&entry.path(), format!("{path}/"), paths)?;
        } else {
            paths.push(path);
        }
    }
    Ok(())
}

/// Makes `target` show the content of `source`: symbolic link, else hard link, else copy.
fn place(source: &Path, target: &Path) -> io::Result<()> {
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder)?;
    }
    match fs::remove_file(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let source = fs::canonicalize(source)?;
    #[cfg(unix)]
    if std::os::unix::fs::symlink(&source, target).is_ok() {
        return Ok(());
    }
    if fs::hard_link(&source, target).is_ok() {
        return Ok(());
    }
    fs::copy(&source, target).map(drop)
}
