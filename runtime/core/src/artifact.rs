//! Artifacts: what stages hand to each other. An artifact is a manifest of named files with digests; its identity is the
//! digest of that manifest, so equal content is the same artifact wherever it lies.

use std::{fmt, marker::PhantomData};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Digest;

/// A type of artifact. Ports of stages are typed by it.
pub trait Kind: Send + Sync + 'static {
    /// Name in plans, manifests and diagnostics.
    const NAME: &'static str;
    /// What the files hold, for the schema and error messages.
    const ABOUT: &'static str;
}

/// The kinds the pipeline knows.
pub mod kinds {
    use super::Kind;

    macro_rules! kind {
        ($name:ident, $text:literal, $about:literal) => {
            #[doc = $about]
            #[derive(Clone, Copy, Debug)]
            pub enum $name {}
            impl Kind for $name {
                const NAME: &'static str = $text;
                const ABOUT: &'static str = $about;
            }
        };
    }

    kind!(Documents, "documents", "Parquet or JSONL documents with a text column");
    kind!(Tokens, "tokens", "One flat stream of shuffled, packed documents as Parquet rows of token ids");
    kind!(Tokenizer, "tokenizer", "A tokenizer.json");
    kind!(Chat, "chat", "Parquet or JSONL conversations: messages, or prompt and completion");
    kind!(Prompts, "prompts", "Parquet or JSONL prompts with answers and metadata for rewards");
    kind!(Benchmark, "benchmark", "Parquet or JSONL questions in a benchmark's published columns");
    kind!(Model, "model", "A Hugging Face folder: config.json, safetensors, tokenizer.json");
    kind!(Report, "report", "JSON figures a stage measured");
}

/// An artifact of kind `K`.
pub struct Artifact<K> {
    digest: Digest,
    kind: PhantomData<fn() -> K>,
}

impl<K: Kind> Artifact<K> {
    /// Names the artifact with this manifest digest.
    pub fn new(digest: Digest) -> Self {
        Self { digest, kind: PhantomData }
    }

    /// Digest of the manifest.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The same without the type.
    pub fn erase(&self) -> ArtifactRef {
        ArtifactRef { kind: K::NAME.to_owned(), digest: self.digest }
    }
}

impl<K> Clone for Artifact<K> {
    fn clone(&self) -> Self {
        Self { digest: self.digest, kind: PhantomData }
    }
}

impl<K: Kind> fmt::Debug for Artifact<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", K::NAME, self.digest.short())
    }
}

impl<K: Kind> Serialize for Artifact<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.erase().serialize(serializer)
    }
}

impl<'de, K: Kind> Deserialize<'de> for Artifact<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let reference = ArtifactRef::deserialize(deserializer)?;
        if reference.kind != K::NAME {
            let text = format!("an artifact of kind {} is expected, this one is {}", K::NAME, reference.kind);
            return Err(serde::de::Error::custom(text));
        }
        Ok(Self::new(reference.digest))
    }
}

/// An artifact whose kind is known only at run time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArtifactRef {
    /// [`Kind::NAME`].
    pub kind: String,
    /// Digest of the manifest.
    pub digest: Digest,
}

/// One file of an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Relative path with `/`, without `..`.
    pub path: String,
    /// Digest of the content, which lies at `blobs/<digest>` or at a source the plan names.
    pub digest: Digest,
    /// Length.
    pub bytes: u64,
}

/// What an artifact consists of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format: 1.
    pub format: u32,
    /// [`Kind::NAME`].
    pub kind: String,
    /// Files, in the order the stage published them.
    pub files: Vec<FileEntry>,
    /// Facts about the content (counts, vocabulary size, shapes). Deterministic only: no clock, host or run id.
    pub meta: serde_json::Value,
}

impl Manifest {
    /// Version written by this build.
    pub const FORMAT: u32 = 1;

    /// Canonical bytes, whose digest is the artifact's identity.
    pub fn to_bytes(&self) -> Vec<u8> {
        // A map with text keys and plain values always serialises.
        crate::canonical_json(&serde_json::to_value(self).unwrap_or_default()).into_bytes()
    }

    /// Sum of the file lengths. What a damaged manifest claims may be more than can be counted.
    pub fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes))
    }

    /// The file at `path`.
    pub fn file(&self, path: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.path == path)
    }
}
