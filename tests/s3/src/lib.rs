//! A real S3 server over HTTP for tests: `s3s-fs` behind `hyper` on a port of this machine, with signed requests (SigV4)
//! and faults on the way to it.
//!
//! ```ignore
//! let server = S3Server::start();                       // in process: a thread of its own, a folder that goes with it
//! command.envs(server.env());                           // a child process: the variables that `object_store` reads
//! let store = Store::open_with(&server.url("a"), &StoreOptions::default(), &server.env())?; // this process
//! server.faults().plan("PUT", "checkpoints/", Fault::LostAnswer(500), 1);
//! ```
//!
//! `cargo run -p dsv3-test-s3` is the same server as a program (`main.rs`).
//!
//! Invariants: of racing conditional puts exactly one wins (`s3s-fs` checks and then writes, so puts and deletes take turns
//! here, each with its body read before its turn, so that a client that is paused in mid-request stops nobody else); a list
//! has pages of 1000; parts of a multipart upload other than the last have at least 5 MiB.

mod faults;
mod serve;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use tokio::{net::TcpListener, sync::oneshot};

pub use faults::{Fault, Faults, Request};

/// The one bucket there is.
pub const BUCKET: &str = "bucket";
const ACCESS_KEY: &str = "test-access-key";
const SECRET_KEY: &str = "test-secret-key";

/// A running server; it ends when dropped.
#[derive(Debug)]
pub struct S3Server {
    address: SocketAddr,
    faults: Faults,
    folder: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
    /// Removed with the server.
    _temporary: Option<tempfile::TempDir>,
}

impl S3Server {
    /// Starts a server on a free port with an empty bucket in a temporary folder.
    ///
    /// # Panics
    /// When no port or folder can be had.
    pub fn start() -> Self {
        let temporary = tempfile::tempdir().expect("a temporary folder");
        let mut server = Self::start_at(temporary.path(), 0).expect("a server");
        server._temporary = Some(temporary);
        server
    }

    /// Starts a server on `port` (0: any free one) whose objects are the files of `folder`; they stay.
    ///
    /// # Errors
    /// When the port is taken or the folder cannot be made.
    pub fn start_at(folder: &Path, port: u16) -> io::Result<Self> {
        std::fs::create_dir_all(folder.join(BUCKET))?;
        let faults = Faults::default();
        // Bound here, so that a port that is taken is told; served elsewhere, so that a test may itself be a task.
        let listener = std::net::TcpListener::bind(("127.0.0.1", port))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let service = Arc::new(serve::service(folder, ACCESS_KEY, SECRET_KEY, faults.clone())?);
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let thread = thread::Builder::new().name("s3-server".into()).spawn(move || {
            runtime.block_on(async {
                // A listener that is bound can be registered with a runtime that runs.
                let listener = TcpListener::from_std(listener).expect("a listener");
                tokio::select! {
                    () = serve::accept(listener, service) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        })?;
        let folder = folder.to_owned();
        Ok(Self { address, faults, folder, stop: Some(stop), thread: Some(thread), _temporary: None })
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// URL of a store below `prefix` of the bucket; an empty prefix is the whole bucket. The names of `s3s-fs`'s own files
    /// are made of keys, so keep a prefix below 60 bytes.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}").trim_end_matches('/').to_owned()
    }

    /// The environment variables by which `object_store` finds this server and is let in.
    pub fn env(&self) -> Vec<(String, String)> {
        let mut vars = self.credentials();
        vars.push(("AWS_ENDPOINT".into(), self.endpoint()));
        vars.push(("AWS_ALLOW_HTTP".into(), "true".into()));
        vars
    }

    /// The same without the endpoint, for tests that give it in another way.
    pub fn credentials(&self) -> Vec<(String, String)> {
        let vars =
            [("AWS_ACCESS_KEY_ID", ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", SECRET_KEY), ("AWS_REGION", "us-east-1")];
        vars.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    /// What goes wrong between client and server.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Folder whose files are the objects of the bucket: key `a/b` is the file `a/b`.
    pub fn bucket_folder(&self) -> PathBuf {
        self.folder.join(BUCKET)
    }

    /// Number of multipart uploads that were neither completed nor aborted.
    pub fn open_uploads(&self) -> usize {
        let names = std::fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.filter(|name| name.to_string_lossy().starts_with(".upload-")).count()
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Whether it panicked was seen by the requests it did not answer.
            let _ = thread.join();
        }
    }
}
