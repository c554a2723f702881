//! What every command that runs stages takes: how it keeps apart from other runners, and when it stops by itself.

use std::{fmt, str::FromStr, time::Duration};

use dsv3_engine::LeaseSettings;
use dsv3_store::IfHeld;

/// Arguments of `run`, `resume` and `exec`.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct RunnerArgs {
    /// While another process holds a stage: wait for it, or end at once with exit 75
    #[arg(long, value_enum, value_name = "WHAT")]
    if_held: Option<IfHeldArg>,
    /// Time between two heartbeats of a held stage, such as 2s
    #[arg(long, value_name = "SPAN")]
    lease_beat: Option<Span>,
    /// Silence after which a holder is replaced, such as 10s; at least two heartbeats
    #[arg(long, value_name = "SPAN")]
    lease_expire: Option<Span>,
    /// Stop at a checkpoint after this time and exit 75, for a batch queue: 50m, 1h30m, 90s, 01:30:00
    #[arg(long, value_name = "SPAN")]
    pub(crate) stop_after: Option<Span>,
}

/// Values of `--if-held`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum IfHeldArg {
    /// Wait until it has ended or is silent for too long
    Wait,
    /// End with exit 75
    Refuse,
}

impl RunnerArgs {
    /// The settings of leases given here.
    pub(crate) fn lease(&self) -> LeaseSettings {
        LeaseSettings {
            if_held: self.if_held.map(|word| match word {
                IfHeldArg::Wait => IfHeld::Wait,
                IfHeldArg::Refuse => IfHeld::Refuse,
            }),
            beat_seconds: self.lease_beat.map(|span| span.0.as_secs_f64()),
            expire_seconds: self.lease_expire.map(|span| span.0.as_secs_f64()),
        }
    }
}

/// A length of time as people and queues write it: `90` or `90s`, `500ms`, `50m`, `2h`, `1d`, put together as `1h30m`; or
/// `HH:MM:SS`, `MM:SS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is no length of time; write 90s, 50m, 1h30m, 2d or HH:MM:SS");
        let millis = if text.contains(':') { by_colons(text) } else { by_units(text) };
        millis.map(|millis| Self(Duration::from_millis(millis))).ok_or_else(bad)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::progress::span(self.0.as_secs_f64()))
    }
}

fn by_colons(text: &str) -> Option<u64> {
    let parts: Vec<&str> = text.split(':').collect();
    if !(2..=3).contains(&parts.len()) {
        return None;
    }
    let mut seconds = 0u64;
    for (i, part) in parts.iter().enumerate() {
        let value: u64 = part.bytes().all(|byte| byte.is_ascii_digit()).then(|| part.parse().ok())??;
        if i > 0 && value >= 60 {
            return None;
        }
        seconds = seconds.checked_mul(60)?.checked_add(value)?;
    }
    seconds.checked_mul(1000)
}

fn by_units(text: &str) -> Option<u64> {
    let mut rest = text.trim();
    let mut millis = 0u64;
    if rest.is_empty() {
        return None;
    }
    if rest.bytes().all(|byte| byte.is_ascii_digit()) {
        return rest.parse::<u64>().ok()?.checked_mul(1000);
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, after) = rest.split_at(digits);
        let letters = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let (unit, after) = after.split_at(letters);
        let unit = match unit {
            "ms" => 1,
            "s" | "sec" => 1000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        millis = millis.checked_add(number.parse::<u64>().ok()?.checked_mul(unit)?)?;
        rest = after.trim_start();
    }
    Some(millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_as_people_and_queues_write_them() {
        let seconds = |text: &str| text.parse::<Span>().map(|span| span.0.as_secs_f64());
        for (text, expected) in [
            ("90", 90.0),
            ("90s", 90.0),
            ("50m", 3000.0),
            ("1h30m", 5400.0),
            ("1h 30min", 5400.0),
            ("2d", 172_800.0),
            ("250ms", 0.25),
            ("01:30:00", 5400.0),
            ("10:30", 630.0),
            ("0s", 0.0),
        ] {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
        for text in ["", "m", "50x", "1:2:3:4", "1:60", "-5s", "1.5h", "99999999999999999999s", "1h:30"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
