//! Events to a person or a program: JSON lines on standard output, bars with rate and time left on a terminal, plain
//! lines otherwise (both on standard error).

use std::{
    collections::BTreeMap,
    io::IsTerminal,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use dsv3_core::{Event, Events, Level, Outcome};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    common::{say, tell},
    table::number,
};

/// Time between two plain progress lines of a stage.
const PLAIN_EVERY: Duration = Duration::from_secs(5);
/// Figures of the current step shown beside the progress.
const FIGURES_SHOWN: usize = 3;
/// Names that are shown before others, by their beginning.
const PREFERRED: [&str; 6] = ["loss", "val_loss", "reward", "tokens_per_second", "tokens_per_s", "lr"];

/// Where the events of a run go.
pub(crate) fn events(json: bool) -> Events {
    if json {
        return Events::new(|event| match serde_json::to_string(&event) {
            Ok(line) => say(line),
            Err(error) => tracing::error!(%error, "an event cannot be written"),
        });
    }
    let screen = Mutex::new(Screen::new(std::io::stderr().is_terminal()));
    Events::new(move |event| screen.lock().unwrap_or_else(PoisonError::into_inner).event(event))
}

/// What is known of the stage that runs.
#[derive(Default)]
struct Current {
    /// First position and its time: the rate is that of this process, not of an earlier attempt.
    first: Option<(u64, Instant)>,
    last_line: Option<Instant>,
    figures: BTreeMap<String, f64>,
    /// What the last progress said: done and total.
    last: (u64, Option<u64>),
}

/// The terminal or the log.
struct Screen {
    bar: Option<ProgressBar>,
    current: Current,
}

impl Screen {
    fn new(terminal: bool) -> Self {
        let bar = terminal.then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) = ProgressStyle::with_template("{prefix:16} [{bar:28}] {wide_msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        Self { bar, current: Current::default() }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| tell(text)),
            None => tell(text),
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::RunStarted { run, pipeline, stages } => {
                let plural = if stages.len() == 1 { "" } else { "s" };
                self.line(&format!("run {run} of {pipeline}: {} stage{plural}", stages.len()));
            }
            Event::StageStarted { stage, kind, key, resumed_from } => {
                self.current = Current::default();
                if let Some(bar) = &self.bar {
                    bar.reset();
                    bar.set_prefix(stage.clone());
                }
                let from = resumed_from.map_or_else(String::new, |step| format!(", goes on after step {step}"));
                self.line(&format!("[{stage}] {kind} {}{from}", key.get(..12).unwrap_or(&key)));
            }
            Event::Progress { stage, done, total, unit } => self.progress(&stage, done, total, &unit),
            Event::Metric { name, value, .. } => {
                self.current.figures.insert(name, value);
            }
            Event::Log { stage, level, message } => {
                let mark = if level == Level::Warn { "warning: " } else { "" };
                self.line(&format!("[{stage}] {mark}{message}"));
            }
            Event::Artifact { stage, port, artifact, bytes } => {
                self.line(&format!(
                    "[{stage}] {port}: {} {} ({} bytes)",
                    artifact.kind,
                    artifact.digest.short(),
                    number(bytes as f64)
                ));
            }
            Event::Checkpoint { .. } => {}
            Event::StageFinished { stage, outcome, seconds, .. } => {
                let word = match &outcome {
                    Outcome::Done => format!("done in {}", span(seconds)),
                    Outcome::Cached => "finished before".to_owned(),
                    Outcome::Cancelled => "stopped; run again to go on".to_owned(),
                    Outcome::Failed { .. } => "failed".to_owned(),
                };
                self.line(&format!("[{stage}] {word}"));
            }
            Event::RunFinished { run, outcome, seconds, .. } => {
                if let Some(bar) = &self.bar {
                    bar.finish_and_clear();
                }
                if outcome == Outcome::Done {
                    self.line(&format!("run {run} done in {}", span(seconds)));
                }
            }
        }
    }

    fn progress(&mut self, stage: &str, done: u64, total: Option<u64>, unit: &str) {
        let now = Instant::now();
        // A next phase or task of the stage counts anew, and so does its rate.
        if done < self.current.last.0 || total != self.current.last.1 {
            (self.current.first, self.current.last_line) = (None, None);
        }
        self.current.last = (done, total);
        let (first, since) = *self.current.first.get_or_insert((done, now));
        let rate = done.saturating_sub(first) as f64 / now.duration_since(since).as_secs_f64().max(1e-9);
        let mut text = match total {
            Some(total) => format!("{done}/{total} {unit}"),
            None => format!("{done} {unit}"),
        };
        if rate > 0.0 && done > first {
            // "documents read" come in documents a second.
            let counted = unit.split(' ').next().unwrap_or(unit);
            text += &format!(", {} {counted}/s", number(rate));
            if let Some(total) = total.filter(|total| *total > done) {
                text += &format!(", {} left", span((total - done) as f64 / rate));
            }
        }
        text += &self.figures();
        match &self.bar {
            Some(bar) => {
                bar.set_prefix(stage.to_owned());
                bar.set_length(total.unwrap_or(done.max(1)));
                bar.set_position(done);
                bar.set_message(text);
            }
            None => {
                let due = self.current.last_line.is_none_or(|last| now.duration_since(last) >= PLAIN_EVERY);
                if due || total == Some(done) {
                    self.current.last_line = Some(now);
                    tell(format!("[{stage}] {text}"));
                }
            }
        }
    }

    fn figures(&self) -> String {
        let rank = |name: &str| PREFERRED.iter().position(|word| name.starts_with(word)).unwrap_or(PREFERRED.len());
        let mut names: Vec<(&String, &f64)> = self.current.figures.iter().collect();
        names.sort_by_key(|(name, _)| rank(name));
        let shown = names.into_iter().take(FIGURES_SHOWN);
        shown.map(|(name, value)| format!("; {name} {}", number(*value))).collect()
    }
}

/// `850 ms`, `12 s`, `3 min 20 s`, `2 h 5 min`.
pub(crate) fn span(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 1.0 => format!("{:.0} ms", seconds * 1000.0),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}
