//! The scheduler on a thread of its own, behind a bounded channel, so that any kind of caller (async or not) can use it.
//!
//! Updates leave through a callback per request, on the engine's thread; it must not block. **Invariant:** a request that
//! was taken gets [`Update::Finished`] exactly once, or its sink is dropped because the engine died.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{Counters, Decoder, Error, Finish, Options, Request, Scheduler, Update, scheduler};

/// Receives a request's updates; answers false when nobody listens any more.
pub type Sink = Box<dyn FnMut(Update) -> bool + Send>;

/// Refuses, on the caller's thread, what the engine could never serve.
type Check = Box<dyn Fn(&Request) -> Result<(), Error> + Send + Sync>;

enum Command {
    Submit(u64, Request, Sink),
    Cancel(u64),
    Stop,
}

/// A running scheduler. Dropping it stops the thread and cancels what is left.
pub struct Engine {
    commands: SyncSender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
    stop: Arc<AtomicBool>,
    counters: Arc<Mutex<Counters>>,
    next: AtomicU64,
    check: Check,
    cache_tokens: usize,
    cache_bytes: usize,
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`Error::Thread`] when the operating system refuses one.
    pub fn start<D: Decoder + 'static>(decoder: Arc<D>, options: Options) -> Result<Self, Error> {
        let (commands, receiver) = sync_channel(options.waiting_max.max(1));
        let counters = Arc::new(Mutex::new(Counters::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let pages = options.cache_tokens.div_ceil(decoder.page_tokens()).max(1);
        let cache_tokens = pages * decoder.page_tokens();
        let cache_bytes = cache_tokens * decoder.token_bytes();
        let checked = Arc::clone(&decoder);
        let check = Box::new(move |request: &Request| scheduler::validate(request, checked.as_ref(), pages));
        let shared = (Arc::clone(&counters), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("dsv3-infer".to_owned())
            .spawn(move || serve(decoder.as_ref(), options, &receiver, &shared.0, &shared.1))
            .map_err(Error::Thread)?;
        let thread = Mutex::new(Some(thread));
        let next = AtomicU64::new(0);
        Ok(Self { commands, thread, stop, counters, next, check, cache_tokens, cache_bytes })
    }

    /// Tokens the cache holds over all sequences, in whole pages.
    pub fn cache_tokens(&self) -> usize {
        self.cache_tokens
    }

    /// Bytes of the cache when every page has been used; pages take memory when they are first written.
    pub fn cache_bytes(&self) -> usize {
        self.cache_bytes
    }

    /// Hands a request over and returns its number, for [`Self::cancel`].
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Busy`] when the channel is full, [`Error::Stopped`].
    pub fn submit(&self, request: Request, sink: Sink) -> Result<u64, Error> {
        (self.check)(&request)?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.commands.try_send(Command::Submit(id, request, sink)).map_err(|error| match error {
            TrySendError::Full(_) => Error::Busy { waiting: self.counters().waiting as usize },
            TrySendError::Disconnected(_) => Error::Stopped,
        })?;
        Ok(id)
    }

    /// Ends a request early, unless the engine is too busy to hear it: a sink that answers false does so too.
    pub fn cancel(&self, id: u64) {
        // Both failures are harmless: a full channel leaves the sink's own answer, a closed one has no request left.
        let _ = self.commands.try_send(Command::Cancel(id));
    }

    /// Totals and current numbers as of the last step.
    pub fn counters(&self) -> Counters {
        *self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancels what runs and waits, and ends the thread after the step in progress, which it awaits for at most `wait`.
    /// A thread still busy then ends on its own.
    pub fn stop(&self, wait: Duration) {
        self.stop.store(true, Ordering::SeqCst);
        // An idle thread blocks on the channel, so wake it; a full channel means that it is not idle.
        let _ = self.commands.try_send(Command::Stop);
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let asked = Instant::now();
        while !thread.is_finished() && asked.elapsed() < wait {
            std::thread::sleep(Duration::from_millis(2));
        }
        if thread.is_finished() && thread.join().is_err() {
            tracing::error!("the inference thread panicked");
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop(Duration::from_secs(1));
    }
}

fn serve<D: Decoder>(
    decoder: &D,
    options: Options,
    commands: &Receiver<Command>,
    counters: &Mutex<Counters>,
    stop: &AtomicBool,
) {
    let mut scheduler = Scheduler::new(decoder, options);
    let mut sinks: BTreeMap<u64, Sink> = BTreeMap::new();
    while !stop.load(Ordering::SeqCst) {
        let command = match scheduler.is_idle() {
            true => commands.recv().map_err(|_| TryRecvError::Disconnected),
            false => commands.try_recv(),
        };
        match command {
            Ok(Command::Submit(id, request, mut sink)) => match scheduler.submit(id, request) {
                Ok(()) => drop(sinks.insert(id, sink)),
                Err(error) => {
                    tracing::warn!(%error, "a request was refused by the scheduler");
                    sink(Update::Finished(Finish::Cancelled));
                }
            },
            Ok(Command::Cancel(id)) => scheduler.cancel(id, &mut |id, update| pass(&mut sinks, id, update)),
            Ok(Command::Stop) | Err(TryRecvError::Disconnected) => break,
            Err(TryRecvError::Empty) => {
                if let Err(error) = scheduler.step(&mut |id, update| pass(&mut sinks, id, update)) {
                    tracing::error!(error = &error as &dyn std::error::Error, "the inference engine stops");
                    break;
                }
            }
        }
        *counters.lock().unwrap_or_else(PoisonError::into_inner) = scheduler.counters();
    }
    for sink in sinks.values_mut() {
        sink(Update::Finished(Finish::Cancelled));
    }
    while let Ok(command) = commands.try_recv() {
        if let Command::Submit(_, _, mut sink) = command {
            sink(Update::Finished(Finish::Cancelled));
        }
    }
}

fn pass(sinks: &mut BTreeMap<u64, Sink>, id: u64, update: Update) -> bool {
    let over = matches!(update, Update::Finished(_));
    let listened = sinks.get_mut(&id).is_some_and(|sink| sink(update));
    if over {
        sinks.remove(&id);
    }
    listened
}
