//! `serve`: an OpenAI-compatible server for one folder in DeepSeek-V3 format.
//!
//! Prints one line with what it holds and the address on standard output once requests are answered. SIGTERM and SIGINT end it with exit 0
//! within five seconds, also while it still loads. A missing folder is a bad command line (64), an unusable model bad data
//! (65), a taken port something unavailable (69).

use std::{
    io::Write,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use dsv3_core::Error;
use dsv3_http::{AppState, ModelText, Served};
use dsv3_infer::{Engine, Options};
use dsv3_model::{LatentType, LoadPrecision, Model};
use dsv3_ops::{Fp8Format, Fp8Scales, Precision};

/// Arguments of `serve`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face folder: config.json, safetensors, tokenizer.json
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// Precision of products; without it, the one the weights are stored in
    #[arg(long, value_enum)]
    pub(crate) precision: Option<ServePrecision>,
    /// Do not draft with the multi-token prediction head (drafting never changes an answer)
    #[arg(long)]
    pub(crate) no_speculate: bool,
    /// Name under /v1/models; without it, the folder's name
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Sequences that run at the same time
    #[arg(long, default_value_t = 64)]
    pub(crate) batch_max: usize,
    /// Most memory of the latent cache, in MiB
    #[arg(long, default_value_t = 2048)]
    pub(crate) cache_mib: usize,
    /// Element type of the latent cache: bf16 takes half the memory and rounds what it keeps
    #[arg(long, value_enum, default_value_t = CacheType::F32)]
    pub(crate) cache: CacheType,
}

/// Values of `--cache`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum CacheType {
    /// BF16
    Bf16,
    /// Single precision
    F32,
}

/// Dropped buffers kept for reuse: those of a step of a small model, and few enough to count as part of the program.
const BUFFER_BYTES_MAX: usize = 16 << 20;

/// Values of `--precision`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ServePrecision {
    /// Block-scaled FP8
    Fp8,
    /// BF16
    Bf16,
    /// Single precision
    F32,
}

impl ServePrecision {
    fn load(self) -> LoadPrecision {
        LoadPrecision::As(match self {
            Self::Fp8 => Precision::Fp8 { format: Fp8Format::default(), scales: Fp8Scales::default() },
            Self::Bf16 => Precision::Bf16,
            Self::F32 => Precision::F32,
        })
    }
}

/// Runs the server until SIGTERM or SIGINT. The caller must not wait for blocking tasks of its runtime afterwards
/// (`shutdown_background`), because a model that still loads cannot be interrupted.
///
/// # Errors
/// With the kind that decides the exit code.
pub(crate) async fn run(args: Args) -> Result<(), Error> {
    let shutdown = shutdown_signal()?;
    tokio::pin!(shutdown);
    check_folder(&args.model)?;
    let address = SocketAddr::new(args.host, args.port);
    let listener = tokio::net::TcpListener::bind(address).await.map_err(|source| unavailable(address, source))?;
    let bound = listener.local_addr().map_err(|source| unavailable(address, source))?;
    let name = args.name.clone().unwrap_or_else(|| folder_name(&args.model));
    let loading = tokio::task::spawn_blocking(move || load(&args, name));
    let (state, holds) = tokio::select! {
        loaded = loading => loaded.map_err(|error| Error::internal("loading the model failed").source(error))??,
        () = &mut shutdown => return Ok(()),
    };
    println!("serving {} ({holds}) on http://{bound}", state.model_id());
    std::io::stdout().flush().map_err(|error| Error::unavailable("cannot write to standard output").source(error))?;
    let (done, signalled) = tokio::sync::oneshot::channel::<()>();
    let server = dsv3_http::serve(listener, state, async move {
        // A dropped sender stops the server too.
        let _ = signalled.await;
    });
    tokio::pin!(server);
    tokio::select! {
        result = &mut server => return result.map_err(Error::from),
        () = &mut shutdown => {}
    }
    drop(done);
    server.await.map_err(Error::from)
}

fn unavailable(address: SocketAddr, source: std::io::Error) -> Error {
    let help = match source.kind() {
        std::io::ErrorKind::AddrInUse => "another program listens there: stop it, or choose another --port",
        std::io::ErrorKind::PermissionDenied => "ports below 1024 need privileges: choose another --port",
        _ => "choose another --host or --port",
    };
    Error::unavailable(format!("cannot listen on {address}: {source}")).help(help)
}

fn check_folder(folder: &Path) -> Result<(), Error> {
    if !folder.is_dir() {
        let text = format!("--model {}: there is no such folder", folder.display());
        return Err(Error::invalid(text).help("give a Hugging Face folder with config.json and safetensors"));
    }
    for file in ["config.json", "tokenizer.json"] {
        if !folder.join(file).is_file() {
            return Err(Error::invalid(format!("--model {}: the folder has no {file}", folder.display())));
        }
    }
    Ok(())
}

fn folder_name(folder: &Path) -> String {
    let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
    let full = || folder.canonicalize().ok()?.file_name().map(|name| name.to_string_lossy().into_owned());
    name.or_else(full).unwrap_or_else(|| "model".to_owned())
}

/// Everything that answers requests, and a phrase that says what memory it holds.
fn load(args: &Args, model_id: String) -> Result<(AppState, String), Error> {
    let precision = args.precision.map_or(LoadPrecision::Own, ServePrecision::load);
    let text = ModelText::from_folder(&args.model)?;
    dsv3_ops::keep_buffers(BUFFER_BYTES_MAX);
    let loaded = dsv3_model::load(&args.model, precision, false)?;
    for warning in &loaded.warnings {
        eprintln!("warning: {warning}");
    }
    let mut model: Model = loaded.model;
    model.set_latents(match args.cache {
        CacheType::Bf16 => LatentType::Bf16,
        CacheType::F32 => LatentType::F32,
    });
    model.prepare();
    // What reading and laying out weights needed beside them.
    dsv3_ops::return_freed_memory();
    let model = Arc::new(model);
    let weights = model.compute_bytes();
    let options = Options { batch_max: args.batch_max, ..Options::default() };
    let options = options.fitting(model.as_ref(), args.cache_mib << 20);
    let served = Served {
        model_id,
        aliases: vec![args.model.display().to_string()],
        text,
        context_tokens: model.config.max_position_embeddings,
        vocab_size: model.config.vocab_size,
        speculate: !args.no_speculate,
    };
    let engine = Engine::start(model, options)?;
    let (cache, tokens) = (engine.cache_bytes(), engine.cache_tokens());
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let holds = format!("weights {:.1} MiB, latent cache {:.1} MiB for {tokens} tokens", mib(weights), mib(cache));
    Ok((AppState::new(served, engine), holds))
}

/// Resolves at the first SIGTERM or SIGINT; the handlers stand when this returns.
fn shutdown_signal() -> Result<impl Future<Output = ()>, Error> {
    use tokio::signal::unix::{SignalKind, signal};
    let refused = |error| Error::internal("cannot watch for signals").source(error);
    let mut terminate = signal(SignalKind::terminate()).map_err(refused)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(refused)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
