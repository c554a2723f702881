//! `dsv3-pipeline serve` as a client meets it: the binary on every oracle folder, its numbers against the outside
//! implementation's, its exit codes and how it ends.
//!
//! Folders are those under `tests/data/oracles/`, or under `$DSV3_ORACLES`, that hold `oracle.safetensors`; nothing here
//! names one.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use dsv3_data::Tokenizer;
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Log-probabilities over HTTP against the oracle's.
const LOGPROB_LIMIT: f64 = 2e-3;

/// A running server; killed when dropped.
pub(crate) struct Server {
    child: Child,
    address: SocketAddr,
}

fn serve(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsv3-pipeline"));
    command.arg("serve").args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

impl Server {
    /// The binary under test on `folder`.
    pub(crate) fn start(folder: &Path, args: &[&str]) -> Self {
        Self::of(None, folder, args)
    }

    /// Another binary, if one is named.
    pub(crate) fn of(binary: Option<&Path>, folder: &Path, args: &[&str]) -> Self {
        let folder = folder.to_str().expect("a UTF-8 path");
        let mut command = Command::new(binary.unwrap_or(Path::new(env!("CARGO_BIN_EXE_dsv3-pipeline"))));
        command.args(["serve", "--model", folder, "--port", "0"]).args(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut line).expect("a line");
        let address = line.trim().rsplit_once("http://").and_then(|(_, address)| address.parse().ok());
        let Some(address) = address else {
            let output = child.wait_with_output().expect("it ended");
            panic!("no address in {line:?}; {}", String::from_utf8_lossy(&output.stderr));
        };
        Self { child, address }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn get(&self, path: &str) -> String {
        dsv3_http::request(self.address, "GET", path, b"", Duration::from_secs(60)).expect("an answer").text()
    }

    fn ask(&self, path: &str, body: &Value) -> dsv3_http::Reply {
        let body = body.to_string();
        dsv3_http::request(self.address, "POST", path, body.as_bytes(), Duration::from_secs(60)).expect("an answer")
    }

    /// The first choice of a completion.
    pub(crate) fn complete(&self, body: &Value) -> Value {
        let reply = self.ask("/v1/completions", body);
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json().expect("JSON")["choices"][0].clone()
    }

    /// Sends `signal`; exit code and time it took.
    fn end(mut self, signal: i32) -> (Option<i32>, Duration) {
        let asked = Instant::now();
        kill(self.child.id(), signal);
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            assert!(asked.elapsed() < Duration::from_secs(30), "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        (status.code(), asked.elapsed())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[allow(unsafe_code)]
fn kill(pid: u32, signal: i32) {
    // SAFETY: the call takes two integers; the process is our own child, not yet waited for, so its id is not reused.
    let result = unsafe { libc::kill(pid as libc::pid_t, signal) };
    assert_eq!(result, 0, "signal {signal} to {pid}");
}

/// Two rows of an oracle and what an outside implementation says after each of their tokens.
struct Oracle {
    rows: Vec<Vec<u32>>,
    /// `[rows][positions][vocab]`.
    logits: Vec<Vec<Vec<f32>>>,
    /// Prompts and their greedy continuations.
    greedy: Vec<Vec<u32>>,
}

fn oracle_folders() -> Vec<PathBuf> {
    let set = std::env::var_os("DSV3_ORACLES").map(PathBuf::from);
    let set = set.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles"));
    let entries = std::fs::read_dir(&set).unwrap_or_else(|error| panic!("{}: {error}", set.display()));
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    folders.sort();
    let any = folders.iter().any(|folder| folder.join("config.json").is_file());
    assert!(any, "{} holds no checkpoint", set.display());
    folders.retain(|folder| folder.join("oracle.safetensors").is_file() && folder.join("tokenizer.json").is_file());
    folders
}

impl Oracle {
    fn read(folder: &Path) -> Option<Self> {
        let bytes = std::fs::read(folder.join("oracle.safetensors")).expect("readable");
        let records = SafeTensors::deserialize(&bytes).expect("safetensors");
        let ids = |name: &str| {
            let record = records.tensor(name).ok()?;
            let width = *record.shape().last()?;
            let all = record.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("eight")) as u32);
            let all: Vec<u32> = all.collect();
            Some(all.chunks(width).map(<[u32]>::to_vec).collect::<Vec<_>>())
        };
        let record = records.tensor("logits").ok()?;
        let &[_, positions, vocab] = record.shape() else { panic!("logits of shape {:?}", record.shape()) };
        let values = record.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four")));
        let values: Vec<f32> = values.collect();
        let rows = values.chunks(positions * vocab).map(|row| row.chunks(vocab).map(<[f32]>::to_vec).collect());
        Some(Self { rows: ids("input_ids")?, logits: rows.collect(), greedy: ids("greedy").unwrap_or_default() })
    }

    /// What differs between the server's answers and the record.
    fn faults(&self, server: &Server, tokenizer: &Tokenizer) -> Vec<String> {
        let mut faults = Vec::new();
        for (row, logits) in self.rows.iter().zip(&self.logits) {
            let body = json!({"prompt": row, "max_tokens": 0, "echo": true, "logprobs": 1, "temperature": 0});
            let choice = server.complete(&body);
            let got = choice["logprobs"]["token_logprobs"].as_array().cloned().unwrap_or_default();
            if got.len() != row.len() || !got[0].is_null() {
                faults.push(format!(
                    "{} log-probabilities for {} tokens, the first {:?}",
                    got.len(),
                    row.len(),
                    got.first()
                ));
                continue;
            }
            for position in 1..row.len() {
                let want = log_probability(&logits[position - 1], row[position]);
                let got = got[position].as_f64().unwrap_or(f64::NAN);
                if (got - want).abs().is_nan() || (got - want).abs() > LOGPROB_LIMIT {
                    faults.push(format!("position {position}: {got} instead of {want}"));
                }
            }
        }
        for (text, row) in self.greedy.iter().zip(&self.rows) {
            let shared = text.iter().zip(row).take_while(|(a, b)| a == b).count().min(text.len() - 1);
            let (prompt, want) = text.split_at(shared);
            let body = json!({
                "prompt": prompt, "max_tokens": want.len(), "temperature": 0, "logprobs": 0, "ignore_eos": true
            });
            let got = server.complete(&body)["logprobs"]["tokens"].clone();
            let want: Vec<String> = want.iter().map(|id| tokenizer.decode_token(*id)).collect();
            if got != json!(want) {
                faults.push(format!("greedy tokens {got} instead of {want:?}"));
            }
        }
        faults
    }
}

fn log_probability(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().fold(f64::NEG_INFINITY, |max, v| max.max(f64::from(*v)));
    let sum: f64 = logits.iter().map(|v| (f64::from(*v) - max).exp()).sum();
    f64::from(logits[id as usize]) - max - sum.ln()
}

#[test]
fn golden_log_probabilities_and_greedy_tokens_over_http() {
    for folder in oracle_folders() {
        let Some(mut oracle) = Oracle::read(&folder) else { continue };
        let server = Server::start(&folder, &[]);
        let tokenizer = Tokenizer::from_folder(&folder).expect("a tokenizer");
        let faults = oracle.faults(&server, &tokenizer);
        assert!(faults.is_empty(), "{}: {faults:#?}", folder.display());
        // The test of the test: a wrong value in the record must show.
        let last = oracle.rows[0].len() - 1;
        oracle.logits[0][last - 1][oracle.rows[0][last] as usize] += 0.01;
        assert!(!oracle.faults(&server, &tokenizer).is_empty());
        oracle.logits[0][last - 1][oracle.rows[0][last] as usize] -= 0.01;
        if let Some(id) = oracle.greedy.first_mut().and_then(|text| text.last_mut()) {
            *id ^= 1;
            assert!(!oracle.faults(&server, &tokenizer).is_empty());
        }
    }
}

#[test]
fn streams_chat_models_and_every_precision() {
    let Some(folder) = oracle_folders().into_iter().next() else { return };
    for precision in ["f32", "bf16", "fp8"] {
        let server = Server::start(&folder, &["--precision", precision, "--name", "tiny"]);
        let get =
            |path| dsv3_http::request(server.address, "GET", path, b"", Duration::from_secs(20)).expect("an answer");
        assert_eq!(get("/health").status, 200);
        assert_eq!(get("/v1/models").json().expect("JSON")["data"][0]["id"], "tiny");
        let body = |stream: bool| json!({"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 8, "seed": 3, "ignore_eos": true, "stream": stream});
        let text = server.complete(&body(false))["text"].clone();
        let mut streamed = String::new();
        for data in server.ask("/v1/completions", &body(true)).text().lines().filter_map(|l| l.strip_prefix("data: ")) {
            let chunk: Value = serde_json::from_str(data).unwrap_or_default();
            streamed.push_str(chunk["choices"][0]["text"].as_str().unwrap_or_default());
        }
        assert_eq!(text, streamed, "{precision}");
        assert_eq!(server.ask("/v1/completions", &json!({"model": "other", "prompt": [5]})).status, 404);
        let long = json!({"prompt": vec![5; 1_000_000], "max_tokens": 1});
        assert_eq!(server.ask("/v1/completions", &long).status, 400);
    }
}

#[test]
fn the_cache_is_reported_and_takes_half_in_bf16() {
    let Some(folder) = oracle_folders().into_iter().next() else { return };
    let body = json!({"prompt": (5..90).collect::<Vec<u32>>(), "max_tokens": 0, "echo": true, "logprobs": 0});
    let ask = |args: &[&str]| {
        let server = Server::start(&folder, args);
        let metrics = server.get("/metrics");
        let bytes = metrics.lines().find_map(|line| line.strip_prefix("dsv3_cache_bytes ")).expect("it is reported");
        let logprobs = server.complete(&body)["logprobs"]["token_logprobs"].clone();
        let logprobs: Vec<f64> = logprobs.as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
        (bytes.parse::<u64>().expect("a number"), logprobs)
    };
    let (plain, narrow) = (ask(&[]), ask(&["--cache", "bf16"]));
    assert_eq!(plain.0, 2 * narrow.0);
    let gaps: Vec<f64> = plain.1.iter().zip(&narrow.1).map(|(a, b)| (a - b).abs()).collect();
    let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
    assert!(gaps.len() == 84 && mean > 0.0 && mean < 2e-2, "{} differences, {mean} on average", gaps.len());
}

#[test]
fn signals_end_it_with_zero_also_in_the_middle_of_an_answer() {
    let Some(folder) = oracle_folders().into_iter().next() else { return };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let server = Server::start(&folder, &[]);
        let address = server.address;
        // An idle connection and one that is never finished must not hold it up.
        let idle = std::net::TcpStream::connect(address).expect("a connection");
        let mut half = std::net::TcpStream::connect(address).expect("a connection");
        std::io::Write::write_all(&mut half, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{")
            .expect("sent");
        let asking = std::thread::spawn(move || {
            let body = json!({"prompt": [5], "max_tokens": 100, "n": 100, "ignore_eos": true}).to_string();
            dsv3_http::request(address, "POST", "/v1/completions", body.as_bytes(), Duration::from_secs(30))
        });
        std::thread::sleep(Duration::from_millis(20));
        let (code, took) = server.end(signal);
        assert_eq!(code, Some(0));
        assert!(took < Duration::from_secs(5), "{took:?}");
        // Finished, refused or cut, but never left hanging.
        let _ = asking.join().expect("no panic");
        drop((idle, half));
    }
}

fn refused(args: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = serve(args).output().expect("the binary runs");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn bad_starts_have_their_exit_codes() {
    let (code, message) = refused(&["--model", "/no/such/folder"]);
    assert_eq!(code, Some(64), "{message}");
    assert!(message.contains("/no/such/folder"), "{message}");
    assert_eq!(refused(&[]).0, Some(64));
    let Some(folder) = oracle_folders().into_iter().next() else { return };
    let model = folder.to_str().expect("a UTF-8 path");
    assert_eq!(refused(&["--model", model, "--precision", "int3"]).0, Some(64));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let (code, message) = refused(&["--model", model, "--port", &port]);
    assert_eq!(code, Some(69), "{message}");
    assert!(message.contains(&port) && message.contains("another program"), "{message}");
    let damaged = tempfile::tempdir().expect("a folder");
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(folder.join(file), damaged.path().join(file)).expect("copied");
    }
    std::fs::write(damaged.path().join("model.safetensors"), b"not safetensors at all").expect("written");
    let (code, message) = refused(&["--model", damaged.path().to_str().expect("a UTF-8 path"), "--port", "0"]);
    assert_eq!(code, Some(65), "{message}");
    assert!(message.contains("model.safetensors"), "{message}");
}
