//! What files of artifacts are called in messages. A stage reads them at paths of ours (a blob, a link in the scratch
//! folder) that say nothing to a person; errors name the external file, or the blob with its name in its artifact and the
//! output it is.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
};

use dsv3_core::{Artifact, Digest, Error, FileEntry, Kind};

use crate::Ctx;

/// Paths that a stage was handed, and what to say instead.
#[derive(Debug, Default)]
pub(crate) struct Names(Mutex<Vec<(String, String)>>);

impl Names {
    fn note(&self, path: &Path, said: String) {
        let path = path.display().to_string();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if path != said && !all.iter().any(|(known, _)| *known == path) {
            all.push((path, said));
        }
    }

    /// `text` with every path replaced; what was replaced before stays as it is.
    fn replace(&self, text: &str) -> String {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        let (mut out, mut rest) = (String::new(), text);
        while let Some(c) = rest.chars().next() {
            let said = all.iter().find(|(_, said)| rest.starts_with(said.as_str())).map(|(_, said)| (said.len(), said));
            let path = || all.iter().find(|(path, _)| rest.starts_with(path.as_str()));
            match said.or_else(|| path().map(|(path, said)| (path.len(), said))) {
                Some((length, said)) => {
                    out += said;
                    rest = &rest[length..];
                }
                None => {
                    out.push(c);
                    rest = &rest[c.len_utf8()..];
                }
            }
        }
        out
    }
}

impl Ctx {
    /// What a person calls an artifact: `stage.output`, the external file or folder, or its digest.
    pub fn name_of<K: Kind>(&self, artifact: &Artifact<K>) -> String {
        let digest = artifact.digest();
        if let Some(origin) = self.origin(digest) {
            return format!("`{origin}`");
        }
        let Ok(manifest) = self.blobs().manifest(digest) else { return self.unnamed(digest) };
        let Some(first) = manifest.files.first() else { return self.unnamed(digest) };
        match self.blobs().source(first.digest) {
            Some(source) if manifest.files.len() == 1 => source.to_owned(),
            Some(source) => {
                source.strip_suffix(&first.path).map_or(source, |folder| folder.trim_end_matches('/')).to_owned()
            }
            None => self.unnamed(digest),
        }
    }

    fn unnamed(&self, digest: Digest) -> String {
        format!("artifact {}", digest.short())
    }

    /// Says in `error` which artifact it is about, unless it names a file of it.
    pub fn in_artifact<K: Kind>(&self, artifact: &Artifact<K>, error: impl Into<Error>) -> Error {
        let error: Error = error.into();
        let before = error.message.clone();
        let error = self.name_files(error);
        if error.message != before {
            return error;
        }
        let name = self.name_of(artifact);
        if error.message.contains(&name) { error } else { error.context(name) }
    }

    /// Says in `error` what the files that this stage was handed are called.
    pub(crate) fn name_files(&self, mut error: Error) -> Error {
        error.message = self.names().replace(&error.message);
        error
    }

    /// Remembers what to say of the file `entry` of an artifact called `artifact` that lies at `path`.
    pub(crate) fn note_file(&self, artifact: &str, entry: &FileEntry, path: &Path) {
        let said = match self.blobs().source(entry.digest) {
            Some(source) => source.to_owned(),
            None => {
                let blob = self.blobs().store().display_path(&format!("blobs/{}", entry.digest));
                format!("{blob} (file {} of {artifact})", entry.path)
            }
        };
        self.names().note(path, said);
    }

    /// Remembers what to say of an artifact laid out as `folder`.
    pub(crate) fn note_folder(&self, artifact: &str, folder: &Path) {
        self.names().note(folder, artifact.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_replaced_once_and_the_longest_first() {
        let names = Names::default();
        names.note(Path::new("/tmp/a"), "`base.model`".to_owned());
        names.note(Path::new("/tmp/a/w"), "/runs/blobs/12 (file w of `base.model`)".to_owned());
        names.note(Path::new("/runs/blobs/12"), "/runs/blobs/12 (file w of `base.model`)".to_owned());
        let once = names.replace("/tmp/a/w: bad; /tmp/a: é; /runs/blobs/12: worse");
        let said = "/runs/blobs/12 (file w of `base.model`)";
        assert_eq!(once, format!("{said}: bad; `base.model`: é; {said}: worse"));
        assert_eq!(names.replace(&once), once);
    }
}
