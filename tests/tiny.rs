//! The tiny recipe of `tests/data/tiny` run by the binary, watched event by event: what the tests of pipelines and faults
//! share.
//!
//! A watched process writes its events into a pipe of one page, so it is never more than a few steps ahead of the test
//! that reads them, however busy the machine is: a signal sent at a step arrives near that step.

use std::{
    io::{BufRead, BufReader, Read},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    thread,
};

use dsv3_test_s3::S3Server;
use serde_json::Value;

/// The recipe.
pub(crate) fn recipe() -> String {
    file("life.yaml")
}

/// Absolute path of a file beside it.
pub(crate) fn file(name: &str) -> String {
    format!("{}/tests/data/tiny/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A store in a folder of its own, or in a bucket.
pub(crate) struct Place {
    folder: tempfile::TempDir,
    url: String,
    /// Where the store's objects are files.
    store: PathBuf,
    /// Variables by which the program finds a bucket.
    env: Vec<(String, String)>,
}

/// A signal for a watched process, and what to wait for before it is sent; the events are read meanwhile.
pub(crate) struct Signal {
    pub(crate) number: i32,
    pub(crate) wait: Option<Box<dyn FnOnce() + Send>>,
}

impl Signal {
    /// Without a wait.
    pub(crate) fn at_once(number: i32) -> Self {
        Self { number, wait: None }
    }

    pub(crate) fn after(number: i32, wait: impl FnOnce() + Send + 'static) -> Self {
        Self { number, wait: Some(Box::new(wait)) }
    }
}

/// How a process ended and what it said.
pub(crate) struct Ended {
    /// None when a signal ended it.
    pub(crate) code: Option<i32>,
    /// Its event stream; a last line cut by a signal is left out.
    pub(crate) events: Vec<Value>,
    /// Standard error.
    pub(crate) errors: String,
}

impl Place {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self { url: "file://./runs".into(), store: folder.path().join("runs"), env: Vec::new(), folder }
    }

    /// A place whose store lies below `prefix` of the bucket of a server.
    pub(crate) fn in_bucket(server: &S3Server, prefix: &str) -> Self {
        let store = server.bucket_folder().join(prefix);
        Self { url: server.url(prefix), store, env: server.env(), ..Self::new() }
    }

    /// The same place, its store given and reached in another way.
    pub(crate) fn reached(self, url: impl Into<String>, env: Vec<(String, String)>) -> Self {
        Self { url: url.into(), env, ..self }
    }

    /// A place whose store is a copy of that of another.
    pub(crate) fn copy_of(other: &Self) -> Self {
        let place = Self::new();
        if other.store().exists() {
            let copied = Command::new("cp").arg("-r").arg(other.store()).arg(place.store()).status();
            assert!(copied.expect("cp runs").success());
        }
        place
    }

    /// Folder of the store and of files that the test writes.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path().join(name);
        std::fs::write(&path, content).expect("a written file");
        path.display().to_string()
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dsv3-pipeline"));
        command
            .args(args)
            .current_dir(self.path())
            .env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"))
            .envs(self.env.iter().cloned())
            .env_remove("RUST_LOG")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs the recipe with more arguments, to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Ended {
        self.watch(&[&["run", &recipe()], args].concat(), |_| None)
    }

    /// Runs the recipe with more arguments, which must end well.
    pub(crate) fn done(&self, args: &[&str]) -> Ended {
        let ended = self.run(args);
        assert_eq!(ended.code, Some(0), "{args:?}\n{}", ended.errors);
        ended
    }

    /// Runs a subcommand that prints events. Sends the signal that `stop` first asks for, and reads to the end.
    pub(crate) fn watch(&self, args: &[&str], mut stop: impl FnMut(&Value) -> Option<i32>) -> Ended {
        self.watch_late(args, None, |event| stop(event).map(Signal::at_once))
    }

    /// As [`Self::watch`]; the signal may come later than the event that asks for it, or be `planned` before any.
    pub(crate) fn watch_late(
        &self,
        args: &[&str],
        planned: Option<Signal>,
        mut stop: impl FnMut(&Value) -> Option<Signal>,
    ) -> Ended {
        let mut child = self.command(args).args(["--json", "--store", &self.url]).spawn().expect("the program runs");
        let stdout = child.stdout.take().expect("piped");
        narrow(&stdout);
        let stderr = child.stderr.take().expect("piped");
        let said = std::thread::spawn(move || {
            let mut text = String::new();
            // What was read until an error is shown all the same.
            let _ = BufReader::new(stderr).read_to_string(&mut text);
            text
        });
        let id = child.id();
        let mut sending = planned.map(|signal| send(id, signal));
        let mut events = Vec::new();
        for line in BufReader::with_capacity(256, stdout).lines().map_while(Result::ok) {
            let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
            if sending.is_none() {
                sending = stop(&event).map(|signal| send(id, signal));
            }
            events.push(event);
        }
        // Its id is not reused before it is waited for.
        sending.flatten().into_iter().for_each(|sending| sending.join().expect("sent"));
        let code = child.wait().expect("an end").code();
        Ended { code, events, errors: said.join().expect("read") }
    }

    /// Results in the store by stage name, as the event stream of one run names their keys.
    pub(crate) fn result(&self, key: &str) -> Value {
        let path = self.store().join("stages").join(key).join("result.json");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).expect("a result")
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.store.clone()
    }

    /// Path of the blob of `digest`, made writable: blobs are read-only.
    pub(crate) fn blob(&self, digest: &str) -> PathBuf {
        let path = self.store().join("blobs").join(digest);
        let mut permissions = std::fs::metadata(&path).expect("a blob").permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
        std::fs::set_permissions(&path, permissions).expect("a writable blob");
        path
    }

    /// Digest of the file called `name` of the artifact of `digest`; of its largest file when `name` is empty.
    pub(crate) fn file_digest(&self, digest: &str, name: &str) -> String {
        let bytes = std::fs::read(self.store().join("blobs").join(digest)).expect("a manifest");
        let manifest: Value = serde_json::from_slice(&bytes).expect("JSON");
        let files = manifest["files"].as_array().expect("files").iter();
        let file = files
            .filter(|file| name.is_empty() || file["path"] == name)
            .max_by_key(|file| file["bytes"].as_u64())
            .expect("a file");
        file["digest"].as_str().expect("a digest").to_owned()
    }
}

impl Ended {
    /// Events of one type of one stage.
    pub(crate) fn of(&self, kind: &str, stage: &str) -> impl Iterator<Item = &Value> {
        self.events.iter().filter(move |event| event["event"] == kind && event["stage"] == stage)
    }

    /// Key of a stage that began.
    pub(crate) fn key(&self, stage: &str) -> String {
        let started = self.of("stage_started", stage).next().unwrap_or_else(|| panic!("{stage} did not begin"));
        started["key"].as_str().expect("a key").to_owned()
    }

    /// How a stage ended: `done`, `cached`, ..; nothing when it was not reached.
    pub(crate) fn outcome(&self, stage: &str) -> Option<&str> {
        self.of("stage_finished", stage).next().and_then(|event| event["outcome"].as_str())
    }

    /// Digest of an output that the stage made in this process.
    pub(crate) fn output(&self, stage: &str, port: &str) -> String {
        let made = self.of("artifact", stage).find(|event| event["port"] == port);
        made.expect("an artifact event")["artifact"]["digest"].as_str().expect("a digest").to_owned()
    }

    pub(crate) fn last(&self) -> &Value {
        self.events.last().expect("events")
    }
}

/// One undisturbed run of the whole recipe with two threads, for every test of this process.
pub(crate) fn undisturbed() -> &'static (Place, Ended) {
    static RUN: OnceLock<(Place, Ended)> = OnceLock::new();
    RUN.get_or_init(|| {
        let place = Place::new();
        let ended = place.done(&["--threads", "2"]);
        (place, ended)
    })
}

/// Makes the pipe as small as the system allows: one page.
#[allow(unsafe_code)]
pub(crate) fn narrow(pipe: &impl AsRawFd) {
    // SAFETY: the call changes the capacity of a pipe whose descriptor is open while `pipe` is borrowed; no memory is shared.
    let size = unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, 1) };
    assert!(size > 0, "{}", std::io::Error::last_os_error());
}

/// Sends a signal, from a thread of its own when there is something to wait for, so that reading goes on. The thread must be
/// joined before the child is waited for.
fn send(child: u32, signal: Signal) -> Option<thread::JoinHandle<()>> {
    let Some(wait) = signal.wait else {
        kill(child, signal.number);
        return None;
    };
    Some(thread::spawn(move || {
        wait();
        kill(child, signal.number);
    }))
}

pub(crate) fn kill(child: u32, signal: i32) {
    assert!(kill_if_there(child, signal), "process {child} has ended");
}

/// As [`kill`], for a child that another thread waits for; whether it was there.
#[allow(unsafe_code)]
pub(crate) fn kill_if_there(child: u32, signal: i32) -> bool {
    // SAFETY: the call takes two integers; the process is our own child, waited for a moment ago at most.
    let result = unsafe { libc::kill(child as libc::pid_t, signal) };
    let error = std::io::Error::last_os_error();
    assert!(result == 0 || error.raw_os_error() == Some(libc::ESRCH), "{error}");
    result == 0
}
