//! The report's recipe and the demo's, at their boundaries.

use super::*;
use crate::plan::Schedules;

const T: u64 = 1_000_000_000_000;
const B: u64 = 1_000_000_000;

fn report() -> Schedules {
    serde_json::from_value(serde_json::json!({
        "lr": {
            "warmup": { "steps": 2000 },
            "segments": [
                { "shape": "constant", "lr": 2.2e-4, "until": { "tokens": 10e12 } },
                { "shape": "cosine", "from": 2.2e-4, "to": 2.2e-5, "until": { "tokens": 14_300_000_000_000u64 } },
                { "shape": "constant", "lr": 2.2e-5, "until": { "tokens": 14.633e12 } },
                { "shape": "constant", "lr": 7.3e-6 },
            ],
        },
        "batch": { "sequences": 15360, "ramp": { "from": 3072, "until": { "tokens": 469e9 }, "multiple_of": 16 } },
        "mtp_weight": { "value": 0.3, "switches": [{ "at": { "tokens": 10e12 }, "value": 0.1 }] },
        "bias_speed": { "value": 0.001, "switches": [{ "at": { "tokens": 14.3e12 }, "value": 0.0 }] },
    }))
    .unwrap()
}

#[test]
fn report_at_its_boundaries() {
    let (s, run) = (report(), Horizon::Tokens(14_800 * B));
    assert_eq!(s.check(run), []);
    let at = |tokens| {
        let a = s.at_tokens(tokens, 4096, run);
        (a.lr, a.sequences, a.mtp_weight, a.bias_speed)
    };
    assert_eq!(at(0), (0.0, 3072, 0.3, 0.001));
    let warm = s.at_step(2000, 4096, run);
    assert_eq!((warm.steps, warm.lr), (2000, 2.2e-4));
    assert_eq!(s.at_step(1000, 4096, run).lr, 1.1e-4);
    assert_eq!(at(469 * B), (2.2e-4, 15360, 0.3, 0.001));
    assert_eq!(at(469 * B - 1).1, 15344);
    assert_eq!(at(234_500 * (B / 1000)).1, 9216);
    assert_eq!(at(10 * T - 1), (2.2e-4, 15360, 0.3, 0.001));
    assert_eq!(at(10 * T), (2.2e-4, 15360, 0.1, 0.001));
    assert!((at(12_150 * B).0 - 1.21e-4).abs() < 1e-12);
    assert_eq!(at(14_300 * B), (2.2e-5, 15360, 0.1, 0.0));
    assert_eq!(at(14_633 * B), (7.3e-6, 15360, 0.1, 0.0));
    assert_eq!(at(14_633 * B - 1).0, 2.2e-5);
    assert_eq!(at(14_800 * B), (7.3e-6, 15360, 0.1, 0.0));
}

#[test]
fn demo_by_fractions_of_the_run() {
    let s: Schedules = serde_json::from_value(serde_json::json!({
        "lr": {
            "warmup": { "fraction": 0.03 },
            "segments": [
                { "shape": "constant", "lr": 3e-3, "until": { "fraction": 0.6 } },
                { "shape": "cosine", "from": 3e-3, "to": 3e-4 },
            ],
        },
        "batch": { "sequences": 8, "ramp": { "from": 4, "until": { "fraction": 0.1 }, "shape": "step" } },
        "mtp_weight": { "value": 0.3, "switches": [{ "at": { "fraction": 0.7 }, "value": 0.1 }] },
        "bias_speed": { "value": 0.01, "switches": [{ "at": { "fraction": 0.95 }, "value": 0.0 }] },
    }))
    .unwrap();
    let run = Horizon::Tokens(1_600_000);
    assert_eq!(s.check(run), []);
    let at = |tokens| s.at_tokens(tokens, 128, run);
    assert_eq!((at(0).lr, at(0).sequences), (0.0, 4));
    assert_eq!(at(24_000).lr, 1.5e-3);
    assert_eq!((at(159_999).sequences, at(160_000).sequences), (4, 8));
    assert_eq!(at(960_000).lr, 3e-3);
    assert!((at(1_280_000).lr - 1.65e-3).abs() < 1e-12);
    assert_eq!(at(1_600_000).lr, 3e-4);
    assert_eq!((at(1_119_999).mtp_weight, at(1_120_000).mtp_weight), (0.3, 0.1));
    assert_eq!((at(1_519_999).bias_speed, at(1_520_000).bias_speed), (0.01, 0.0));
}

#[test]
fn runs_in_steps_decay_in_steps() {
    let lr = LrSchedule {
        warmup: Some(Extent::Steps(5)),
        segments: vec![LrSegment::Linear { from: 1.0, to: 0.0, until: None }],
    };
    let run = Horizon::Steps(10);
    let at = |step| lr.at(Position { step, tokens: 0, tokens_after: 0 }, run);
    assert_eq!((at(0), at(1), at(6)), (0.0, 0.2, 0.5));
}

#[test]
fn mistakes_are_named() {
    let run = Horizon::Steps(100);
    let json = r#"{"segments": [{"shape": "constant", "lr": -1, "until": {"tokens": 5}}, {"shape": "constant", "lr": 1, "until": {"fraction": 2}}]}"#;
    let paths: Vec<String> =
        serde_json::from_str::<LrSchedule>(json).unwrap().check(run).into_iter().map(|p| p.path).collect();
    assert_eq!(paths, ["segments.0", "segments.0.until", "segments.1.until"]);
    for bad in [r#"{"segments": [{"shape": "constant", "lr": 1, "extra": 1}]}"#, r#"{"segments": [], "x": 1}"#] {
        assert!(serde_json::from_str::<LrSchedule>(bad).is_err(), "{bad}");
    }
    assert!(serde_json::from_str::<Extent>(r#"{"tokens": 1.5}"#).is_err());
}
