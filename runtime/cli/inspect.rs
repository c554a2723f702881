//! `dsv3-pipeline inspect WHAT`: a digest of the store (an artifact's manifest), a stage of a run (`RUN STAGE`: its
//! result, and on standard error a line for everything its guard did and for each checkpoint; of a stage that has not
//! finished, its checkpoints), or a safetensors file or model folder (the tensors by name, type and shape).
//!
//! A safetensors file is `[u64 little-endian length of the header][header: JSON][data]`; only the header is read.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use dsv3_core::{Digest, Error};
use dsv3_store::{CheckpointRecord, Store, StoreError};
use serde_json::{Value, json};

use crate::common::{self, Failure};

/// Longest header believed; the format's own limit.
const HEADER_BYTES_MAX: u64 = 100 << 20;

/// Arguments of `inspect`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// A digest, a safetensors file, a model folder, or a run
    what: String,
    /// A stage of the run
    stage: Option<String>,
    /// Store of the digest or the run
    #[arg(long, value_name = "URL", default_value = common::DEFAULT_STORE)]
    store: String,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let path = Path::new(&args.what);
    if args.stage.is_none() && path.exists() {
        return tensors(path);
    }
    let engine = common::engine();
    let store = common::open_store(&engine, &args.store)?;
    let value = match &args.stage {
        Some(stage) => {
            let id = engine.find_run(&store, &args.what).await?;
            let runs = engine.runs(&store).await?;
            let key = runs.into_iter().find(|run| run.run == id).and_then(|run| run.keys.get(stage).cloned());
            let absent = || Error::invalid(format!("run {id} has not come to a stage `{stage}`"));
            let key = key.ok_or_else(absent)?;
            let (checkpoints, lines) = checkpoints(&store, &key).await?;
            let result = store.read_result(&key).await?;
            if let Some(result) = &result {
                result.incidents().iter().for_each(common::tell);
            } else if checkpoints.is_empty() {
                return Err(Error::invalid(format!("stage `{stage}` has not finished and has no checkpoint")).into());
            }
            lines.iter().for_each(common::tell);
            match result {
                Some(result) => serde_json::to_value(result),
                None => Ok(json!({ "key": key, "finished": false, "checkpoints": checkpoints })),
            }
        }
        None => {
            let digest: Digest = args.what.parse().map_err(|error| {
                Error::invalid(format!("{} is neither a path nor a digest", args.what)).source(error)
            })?;
            serde_json::to_value(store.manifest(digest).await?)
        }
    };
    let text = value.and_then(|value| serde_json::to_string_pretty(&value));
    common::say(text.map_err(|error| Error::internal("cannot write JSON").source(error))?);
    Ok(())
}

/// The checkpoints of a stage, with a line for each; fences and rewinds have lines alone.
async fn checkpoints(store: &Store, key: &str) -> Result<(Vec<Value>, Vec<String>), Failure> {
    let (mut checkpoints, mut lines) = (Vec::new(), Vec::new());
    for seq in store.checkpoint_seqs(key).await? {
        lines.push(match store.checkpoint_record(key, seq).await {
            Ok(CheckpointRecord::Checkpoint(checkpoint)) => {
                let bytes: u64 = checkpoint.files.iter().map(|file| file.bytes).sum();
                let (step, files) = (checkpoint.step, checkpoint.files.len());
                checkpoints.push(json!({ "seq": seq, "step": step, "files": files, "bytes": bytes }));
                let plural = if files == 1 { "file" } else { "files" };
                format!("checkpoint {seq}: step {step}, {files} {plural}, {bytes} bytes")
            }
            Ok(CheckpointRecord::Fence { epoch }) => format!("{seq}: a fence, of the holder with epoch {epoch}"),
            Ok(CheckpointRecord::Rewind { to, run }) => format!("{seq}: back to checkpoint {to}, by run {run}"),
            Err(error @ (StoreError::Damaged { .. } | StoreError::Missing { .. })) => format!("{seq}: {error}"),
            Err(error) => return Err(error.into()),
        });
    }
    Ok((checkpoints, lines))
}

fn tensors(path: &Path) -> Result<(), Failure> {
    let unreadable = |path: &Path, error| Error::data(format!("{} cannot be read", path.display())).source(error);
    let mut files: Vec<PathBuf> = if path.is_dir() {
        let entries = std::fs::read_dir(path).map_err(|error| unreadable(path, error))?;
        entries.flatten().map(|entry| entry.path()).collect()
    } else {
        vec![path.to_owned()]
    };
    files.retain(|file| file.extension().is_some_and(|end| end == "safetensors"));
    files.sort_unstable();
    if files.is_empty() {
        return Err(Error::invalid(format!("{} holds no safetensors", path.display())).into());
    }
    let (mut count, mut elements) = (0u64, 0u128);
    for file in &files {
        for (name, tensor) in header(file)? {
            let shape: Vec<u64> = tensor["shape"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
            let dtype = tensor["dtype"].as_str().unwrap_or("?");
            count += 1;
            elements += shape.iter().map(|size| u128::from(*size)).product::<u128>();
            common::say(format!("{dtype:8} {:20} {name}", format!("{shape:?}")));
        }
    }
    common::say(format!("{count} tensors, {elements} elements, {} files", files.len()));
    Ok(())
}

/// Names and descriptions of a file's tensors, by name.
fn header(path: &Path) -> Result<Vec<(String, Value)>, Error> {
    let bad = |why: String| Error::data(format!("{} is no safetensors file: {why}", path.display()));
    let mut file = File::open(path).map_err(|error| bad(error.to_string()))?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|error| bad(error.to_string()))?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(bad(format!("its header claims {length} bytes")));
    }
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text).map_err(|error| bad(error.to_string()))?;
    let header: Value = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    let tensors = header.as_object().ok_or_else(|| bad("its header is no map".to_owned()))?;
    let mut tensors: Vec<(String, Value)> =
        tensors.iter().filter(|(name, _)| *name != "__metadata__").map(|(n, t)| (n.clone(), t.clone())).collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(tensors)
}
