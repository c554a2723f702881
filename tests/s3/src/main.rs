//! The server of the tests as a program, for trying things by hand and for tests of other languages:
//!
//!     cargo run -p dsv3-test-s3 -- FOLDER [PORT]
//!
//! It prints the variables to export, one `NAME=VALUE` a line, then a line with the URL of a store, and serves until its
//! standard input ends or it is killed. The objects are files of FOLDER and stay.

use std::{io::Read, path::Path, process::ExitCode};

use dsv3_test_s3::S3Server;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let folder = args.next();
    let port = args.next().map_or(Ok(0), |port| port.parse());
    let (Some(folder), Ok(port)) = (folder, port) else {
        eprintln!("usage: dsv3-test-s3 FOLDER [PORT]");
        return ExitCode::from(64);
    };
    let server = match S3Server::start_at(Path::new(&folder), port) {
        Ok(server) => server,
        Err(error) => {
            eprintln!("error: cannot serve {folder}: {error}");
            return ExitCode::from(69);
        }
    };
    for (name, value) in server.env() {
        println!("{name}={value}");
    }
    println!("{}", server.url("runs"));
    // An input that cannot be read has ended.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    ExitCode::SUCCESS
}
