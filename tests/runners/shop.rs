//! Where runners meet: a store on a local disk or on an S3 server, and processes that are read one event at a time. A process
//! that is not read stops at the next event that does not fit into its pipe, so a test decides how far each one is.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, ChildStdout, Command},
    thread::JoinHandle,
};

use dsv3_test_s3::S3Server;
use serde_json::Value;

use crate::tiny::{self, Ended, Place, undisturbed};

/// A store that several processes share.
pub(super) struct Shop {
    place: Place,
    server: Option<S3Server>,
}

impl Shop {
    /// On the local disk: a copy of the store of `place`.
    pub(super) fn on_disk(place: &Place) -> Self {
        Self { place: Place::copy_of(place), server: None }
    }

    /// On an S3 server of its own, filled with the store of `place`.
    pub(super) fn on_s3(place: &Place) -> Self {
        let server = S3Server::start();
        let target = server.bucket_folder().join("runs");
        if place.store().exists() {
            let copied = Command::new("cp").arg("-r").arg(place.store()).arg(&target).status();
            assert!(copied.expect("cp runs").success());
        }
        Self { place: Place::new(), server: Some(server) }
    }

    /// Both kinds.
    pub(super) fn both(place: &Place) -> [(&'static str, Self); 2] {
        [("local disk", Self::on_disk(place)), ("S3", Self::on_s3(place))]
    }

    pub(super) fn url(&self) -> String {
        self.server.as_ref().map_or_else(|| "file://./runs".to_owned(), |server| server.url("runs"))
    }

    /// Environment of a process that opens the store.
    pub(super) fn env(&self) -> Vec<(String, String)> {
        self.server.as_ref().map(S3Server::env).unwrap_or_default()
    }

    /// Folder whose files are the objects.
    pub(super) fn folder(&self) -> PathBuf {
        self.server.as_ref().map_or_else(|| self.place.store(), |server| server.bucket_folder().join("runs"))
    }

    pub(super) fn command(&self, args: &[&str]) -> Command {
        let mut command = self.place.command(args);
        command.envs(self.env());
        command
    }

    /// Starts a subcommand that prints events.
    pub(super) fn start(&self, args: &[&str]) -> Runner {
        let mut child = self.command(args).args(["--json", "--store", &self.url()]).spawn().expect("the program runs");
        let stdout = child.stdout.take().expect("piped");
        tiny::narrow(&stdout);
        let mut stderr = child.stderr.take().expect("piped");
        let said = std::thread::spawn(move || {
            let mut text = String::new();
            // What was read until an error is shown all the same.
            let _ = stderr.read_to_string(&mut text);
            text
        });
        Runner { child, out: BufReader::with_capacity(256, stdout), events: Vec::new(), said }
    }

    fn json(&self, path: &str) -> Value {
        let path = self.folder().join(path);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).expect("a whole record")
    }

    /// The result of a stage is that of the undisturbed run.
    pub(super) fn is_undisturbed(&self, stage: &str) {
        let (calm, whole) = undisturbed();
        let key = whole.key(stage);
        let (expected, found) = (calm.result(&key), self.json(&format!("stages/{key}/result.json")));
        let timeless = |result: &Value| {
            let mut result = result.clone();
            // The only figure that is a clock's.
            result["metrics"]["tokens_per_second"].take();
            [result["outputs"].take(), result["metrics"].take(), result["lineage"].take()]
        };
        assert_eq!(timeless(&found), timeless(&expected), "{stage}");
    }

    /// Kind and epoch of every checkpoint record of a stage, by number.
    pub(super) fn records(&self, key: &str) -> BTreeMap<u64, (String, u64)> {
        let folder = format!("stages/{key}/checkpoints");
        let Ok(entries) = std::fs::read_dir(self.folder().join(&folder)) else { return BTreeMap::new() };
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let numbers = names.filter_map(|name| name.strip_suffix(".json")?.parse::<u64>().ok().map(|seq| (seq, name)));
        numbers
            .map(|(seq, name)| {
                let record = self.json(&format!("{folder}/{name}"));
                let kind = record["kind"].as_str().expect("a kind").to_owned();
                (seq, (kind, record["epoch"].as_u64().expect("an epoch")))
            })
            .collect()
    }

    /// The newest status of a run.
    pub(super) fn status(&self, run: &str) -> Value {
        let folder = format!("runs/{run}/status");
        let entries = std::fs::read_dir(self.folder().join(&folder)).expect("statuses").flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let last = names.filter(|name| name.ends_with(".json")).max().expect("a status");
        self.json(&format!("{folder}/{last}"))
    }
}

/// A process, and what it has said so far.
pub(super) struct Runner {
    child: Child,
    out: BufReader<ChildStdout>,
    events: Vec<Value>,
    said: JoinHandle<String>,
}

impl Runner {
    /// Reads on to the first event that `wanted` knows; none when the process ends before.
    pub(super) fn until(&mut self, wanted: impl Fn(&Value) -> bool) -> Option<Value> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.out.read_line(&mut line).unwrap_or(0) == 0 {
                return None;
            }
            let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
            self.events.push(event.clone());
            if wanted(&event) {
                return Some(event);
            }
        }
    }

    /// Reads on to the commit of a checkpoint of `stage` at number `seq` or later.
    pub(super) fn until_checkpoint(&mut self, stage: &str, seq: u64) {
        let wanted = |event: &Value| {
            event["event"] == "checkpoint" && event["stage"] == stage && event["seq"].as_u64() >= Some(seq)
        };
        assert!(self.until(wanted).is_some(), "no checkpoint {seq} of {stage}");
    }

    /// Reads on to a log line that holds `text`.
    pub(super) fn until_log(&mut self, text: &str) {
        let wanted = |event: &Value| event["event"] == "log" && event["message"].to_string().contains(text);
        assert!(self.until(wanted).is_some(), "never said: {text}");
    }

    /// What it has said so far.
    pub(super) fn seen(&self) -> &[Value] {
        &self.events
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn signal(&self, number: i32) {
        tiny::kill(self.child.id(), number);
    }

    /// Reads to the end.
    pub(super) fn end(mut self) -> Ended {
        self.until(|_| false);
        let code = self.child.wait().expect("an end").code();
        Ended { code, events: self.events, errors: self.said.join().expect("read") }
    }
}

/// Numbers of the checkpoints of `stage` whose commit the process was told to have succeeded.
pub(super) fn committed(ended: &Ended, stage: &str) -> Vec<u64> {
    ended.of("checkpoint", stage).filter_map(|event| event["seq"].as_u64()).collect()
}
