//! A pipeline made small: what each stage type says of its config, as arguments of `--set`, and the first rows of every
//! external data file.

use std::path::Path;

use bytes::Bytes;
use dsv3_core::{Digest, Error, Manifest};

use crate::{
    Engine,
    plan::{InputRef, Plan},
};

/// The first rows of a data file as a file of the same format; none for a file that is to stay whole.
pub type Head<'a> = &'a (dyn Fn(&Path) -> Result<Option<Vec<u8>>, Error> + Sync);

impl Engine {
    /// `PATH=VALUE` for all that makes the stages of a plan small, except fields that `sets` name, parts of them included.
    ///
    /// # Errors
    /// When a stage type is unknown.
    pub fn shrink_sets(&self, plan: &Plan, sets: &[String]) -> Result<Vec<String>, Error> {
        let own: Vec<&str> = sets.iter().filter_map(|set| set.split_once('=')).map(|(path, _)| path.trim()).collect();
        let mut shrunk = Vec::new();
        for stage in &plan.stages {
            let entry = self.entry(&stage.kind, stage.version)?;
            for (path, value) in entry.shrink_changes(&stage.config) {
                let path = format!("stages.{}.config.{path}", stage.name);
                let named = own.iter().any(|own| lies_in(own, &path) || lies_in(&path, own));
                if !named {
                    shrunk.push(format!("{path}={value}"));
                }
            }
        }
        Ok(shrunk)
    }
}

/// Whether `path` is `folder` or below it.
fn lies_in(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

impl Plan {
    /// Puts the first rows of local data files, written below `folder`, in the place of external inputs. Answers how many
    /// files and bytes there were and how many bytes are left.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn shrink_inputs(&mut self, folder: &Path, head: Head<'_>) -> Result<(usize, u64, u64), Error> {
        let (mut files, mut before, mut after) = (0, 0, 0);
        for input in self.stages.iter_mut().flat_map(|stage| &mut stage.inputs) {
            for value in &mut input.values {
                let InputRef::External { digest, bytes } = value else { continue };
                let manifest = self.blobs.get(digest).and_then(|text| serde_json::from_slice::<Manifest>(text).ok());
                let Some(mut manifest) = manifest else { continue };
                for file in &mut manifest.files {
                    let Some(source) = self.sources.get(&file.digest).map(Path::new) else { continue };
                    if !source.is_file() {
                        continue;
                    }
                    let Some(text) = head(source)? else { continue };
                    let digest = Digest::of(&text);
                    let extension = source.extension().map_or_else(String::new, |e| e.to_string_lossy().into_owned());
                    let copy = folder.join(format!("{digest}.{extension}"));
                    std::fs::write(&copy, &text).map_err(|error| {
                        Error::unavailable(format!("cannot write {}", copy.display())).source(error)
                    })?;
                    (files, before, after) = (files + 1, before + file.bytes, after + text.len() as u64);
                    (file.digest, file.bytes) = (digest, text.len() as u64);
                    self.sources.insert(digest, copy.display().to_string());
                }
                let text = Bytes::from(manifest.to_bytes());
                (*digest, *bytes) = (Digest::of(&text), manifest.bytes());
                self.blobs.insert(*digest, text);
            }
        }
        Ok((files, before, after))
    }
}
