//! Runs: `runs/<id>/plan.json` (created once), `status/<n>.json` (the highest number counts) and
//! `events/<segment>.jsonl` (a line with the format, then one event a line, in segments that are created whole).

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use dsv3_core::{Digest, Event, Events};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinHandle};

use crate::{
    Create, Store,
    error::{Result, StoreError},
    record,
};

/// Digits of a status or segment number in a path.
const NUMBER_DIGITS: usize = 8;
/// A segment is written when this many events wait ...
const SEGMENT_EVENTS: usize = 1000;
/// ... or this much time has passed since the first of them.
const SEGMENT_WAIT: Duration = Duration::from_secs(5);

/// State of a run, for `runs` and `resume`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunStatus {
    /// Version of this record: 1.
    pub format: u32,
    /// `running`, `done`, `cancelled` or `failed`.
    pub state: String,
    /// Milliseconds since 1970 when this was written.
    pub unix_millis: u64,
    /// What else the engine wants to find again, such as the state of each stage.
    pub detail: Value,
}

impl RunStatus {
    /// Version written by this build.
    pub const FORMAT: u32 = record::FORMAT;
}

impl Store {
    /// Creates a run with its plan.
    ///
    /// # Errors
    /// [`StoreError::Taken`] when the id is in use.
    pub async fn create_run(&self, id: &str, plan: Bytes) -> Result<()> {
        let path = format!("runs/{id}/plan.json");
        match self.create(&path, plan).await? {
            Create::Created => Ok(()),
            Create::AlreadyExists => Err(StoreError::Taken { path: self.display_path(&path) }),
        }
    }

    /// The plan of a run, as it was given.
    pub async fn read_plan(&self, id: &str) -> Result<Bytes> {
        self.read(&format!("runs/{id}/plan.json")).await
    }

    /// Ids of all runs, oldest first.
    pub async fn list_runs(&self) -> Result<Vec<String>> {
        let names = self.list("runs").await?;
        Ok(names.iter().filter_map(|name| name.strip_suffix('/')).map(str::to_owned).collect())
    }

    /// Adds a status.
    pub async fn write_status(&self, id: &str, status: &RunStatus) -> Result<()> {
        self.update_status(id, |_| status.clone()).await
    }

    /// Adds the status that follows from the newest one. Of two processes of one run that do so at the same time the later
    /// one starts again from what the other wrote, so nothing that either says is lost.
    pub async fn update_status(&self, id: &str, next: impl Fn(Option<RunStatus>) -> RunStatus) -> Result<()> {
        let folder = format!("runs/{id}/status");
        loop {
            let last = self.last_number(&folder, ".json").await?;
            let status = next(self.status_up_to(id, last).await?);
            let path = numbered(&folder, last + 1, ".json");
            if self.create(&path, record::seal(&path, &status)?).await? == Create::Created {
                return Ok(());
            }
        }
    }

    /// The newest status that can be read.
    pub async fn read_status(&self, id: &str) -> Result<Option<RunStatus>> {
        let last = self.last_number(&format!("runs/{id}/status"), ".json").await?;
        self.status_up_to(id, last).await
    }

    async fn status_up_to(&self, id: &str, last: u64) -> Result<Option<RunStatus>> {
        let folder = format!("runs/{id}/status");
        for number in (1..=last).rev() {
            let path = numbered(&folder, number, ".json");
            let Some(bytes) = self.read_if_exists(&path).await? else { continue };
            match record::unseal(&self.display_path(&path), &bytes) {
                Ok(status) => return Ok(Some(status)),
                Err(error) => tracing::warn!(%error, "skipping a status"),
            }
        }
        Ok(None)
    }

    /// All events of a run, in the order they were stored. A line that cannot be read is skipped.
    pub async fn read_events(&self, id: &str) -> Result<Vec<Event>> {
        Ok(parse_events(&self.read_event_segments(id).await?))
    }

    /// The segments of a run's events as stored, for a reader that looks before it parses them with [`parse_events`].
    pub async fn read_event_segments(&self, id: &str) -> Result<Vec<Bytes>> {
        let folder = format!("runs/{id}/events");
        let mut segments = Vec::new();
        for name in self.list(&folder).await? {
            let path = format!("{folder}/{name}");
            let segment = self.read(&path).await?;
            check_segment(&self.display_path(&path), &segment)?;
            if is_whole(&segment) {
                segments.push(segment);
            } else {
                tracing::warn!(path = self.display_path(&path), "skipping events: their check digest does not match");
            }
        }
        Ok(segments)
    }

    async fn last_number(&self, folder: &str, suffix: &str) -> Result<u64> {
        let names = self.list(folder).await?;
        Ok(names.iter().filter_map(|name| name.strip_suffix(suffix)?.parse().ok()).max().unwrap_or(0))
    }
}

/// The events of segments, in order. A line that cannot be read is skipped.
pub fn parse_events(segments: &[Bytes]) -> Vec<Event> {
    let lines = segments.iter().flat_map(|segment| segment.split(|byte| *byte == b'\n'));
    lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// The header of a segment, its first line; segments were once written without.
fn header(line: &[u8]) -> Option<Value> {
    let value: Value = serde_json::from_slice(line).ok()?;
    (value.get("event").is_none() && value.get("format").is_some()).then_some(value)
}

/// Refuses a segment of a newer build.
fn check_segment(path: &str, segment: &[u8]) -> Result<()> {
    let first = segment.split(|byte| *byte == b'\n').next().and_then(header);
    first.map_or(Ok(()), |header| record::check_format(&header, u64::from(record::FORMAT), path))
}

/// Whether the lines of a segment are those that its header's digest is of; old headers have none.
fn is_whole(segment: &[u8]) -> bool {
    let cut = segment.iter().position(|byte| *byte == b'\n').map_or(segment.len(), |end| end + 1);
    let (first, rest) = segment.split_at(cut);
    let check = header(first).and_then(|header| header.get("check")?.as_str().map(str::to_owned));
    check.is_none_or(|check| check == Digest::of(rest).to_string())
}

/// What is wrong with a segment, if anything: its header holds the digest of what follows, unless it is an old one.
pub fn segment_problem(segment: &[u8]) -> Option<String> {
    let cut = segment.iter().position(|byte| *byte == b'\n').map_or(segment.len(), |end| end + 1);
    let header = header(&segment[..cut]);
    if !is_whole(segment) {
        return Some("its check digest does not match".to_owned());
    }
    let mut lines = segment.split(|byte| *byte == b'\n').enumerate().skip(usize::from(header.is_some()));
    let bad = lines.find(|(_, line)| !line.is_empty() && serde_json::from_slice::<Event>(line).is_err());
    bad.map(|(i, _)| format!("line {} is no event", i + 1))
}

fn numbered(folder: &str, number: u64, suffix: &str) -> String {
    format!("{folder}/{number:0width$}{suffix}", width = NUMBER_DIGITS)
}

/// Writes the events of a run into its segments, in the background.
#[derive(Debug)]
pub struct EventLog {
    sender: Arc<Mutex<Option<mpsc::UnboundedSender<Event>>>>,
    writer: JoinHandle<Result<()>>,
}

impl EventLog {
    /// Starts to write the events of run `id`. Call within a tokio runtime.
    pub fn start(store: Store, id: &str) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        let writer = tokio::spawn(write_segments(store, format!("runs/{id}/events"), receiver));
        Self { sender: Arc::new(Mutex::new(Some(sender))), writer }
    }

    /// Where to send the events. Progress events are dropped: they are many and soon stale.
    pub fn sink(&self) -> Events {
        let sender = self.sender.clone();
        Events::new(move |event| {
            if !matches!(event, Event::Progress { .. })
                && let Some(sender) = &*sender.lock().unwrap_or_else(PoisonError::into_inner)
            {
                // The writer ends early only on an error, which `close` reports.
                let _ = sender.send(event);
            }
        })
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// The first error of any segment.
    pub async fn close(self) -> Result<()> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.writer.await?
    }
}

async fn write_segments(store: Store, folder: String, mut events: mpsc::UnboundedReceiver<Event>) -> Result<()> {
    let mut number = store.last_number(&folder, ".jsonl").await? + 1;
    while let Some(first) = events.recv().await {
        let mut segment = Vec::new();
        push_line(&mut segment, &first);
        let deadline = tokio::time::Instant::now() + SEGMENT_WAIT;
        for _ in 1..SEGMENT_EVENTS {
            match tokio::time::timeout_at(deadline, events.recv()).await {
                Ok(Some(event)) => push_line(&mut segment, &event),
                Ok(None) | Err(_) => break,
            }
        }
        let segment = Bytes::from([record::header_line(&segment), segment].concat());
        while store.create(&numbered(&folder, number, ".jsonl"), segment.clone()).await? == Create::AlreadyExists {
            number += 1;
        }
        number += 1;
    }
    Ok(())
}

fn push_line(segment: &mut Vec<u8>, event: &Event) {
    // An event is a map with text keys and plain values: it always serialises.
    segment.extend(serde_json::to_vec(event).unwrap_or_default());
    segment.push(b'\n');
}
