//! Retrieval of needles: shared by `evaluate` and by `context_extension`, which measures it before and after.

use std::path::PathBuf;

use dsv3_core::{Cancel, Error};
use dsv3_data::{Tokenizer, read_needles};
use dsv3_eval::{NeedleCount, NeedleReport, find_needles, needle_items};
use dsv3_model::Model;
use dsv3_stage::Ctx;

/// Scores every needle of the files at `paths`.
pub(crate) fn find(
    model: &Model,
    tokenizer: &Tokenizer,
    paths: &[PathBuf],
    cancel: &Cancel,
) -> Result<NeedleReport, Error> {
    let items = needle_items(tokenizer, &read_needles(paths)?)?;
    Ok(find_needles(model, &items, cancel)?)
}

/// Shares of right words and of right answers by length, `256.words` and `256.exact`; the first by length and depth too,
/// `words.256.10`, the depth in percent of the text.
pub(crate) fn figures(report: &NeedleReport) -> Vec<(String, f64)> {
    let at = |length: usize| {
        let count = report.at(length);
        [(format!("{length}.words"), count.word_share()), (format!("{length}.exact"), count.exact_share())]
    };
    let cell = |(place, count): (String, NeedleCount)| (format!("words.{place}"), count.word_share());
    report.lengths().flat_map(at).chain(cells(report).map(cell)).collect()
}

/// Publishes retrieval before extension, with YaRN untrained, and after, by length and by length and depth.
pub(crate) fn compare(ctx: &Ctx, base: &NeedleReport, untrained: &NeedleReport, trained: &NeedleReport) {
    for length in trained.lengths() {
        let (old, middle, new) = (base.at(length), untrained.at(length), trained.at(length));
        let name = |figure: &str| format!("needle.{length}.{figure}");
        ctx.set_metric(&name("words_base"), old.word_share());
        ctx.set_metric(&name("words_yarn_untrained"), middle.word_share());
        ctx.set_metric(&name("words"), new.word_share());
        ctx.set_metric(&name("words_gain"), new.word_share() - old.word_share());
        ctx.set_metric(&name("exact_base"), old.exact_share());
        ctx.set_metric(&name("exact_yarn_untrained"), middle.exact_share());
        ctx.set_metric(&name("exact"), new.exact_share());
    }
    for (figure, report) in [("words_base", base), ("words_yarn_untrained", untrained), ("words", trained)] {
        for (place, count) in cells(report) {
            ctx.set_metric(&format!("needle.{figure}.{place}"), count.word_share());
        }
    }
}

/// Counts by `LENGTH.DEPTH`, the depth in whole percent.
fn cells(report: &NeedleReport) -> impl Iterator<Item = (String, NeedleCount)> + '_ {
    report.lengths().flat_map(|length| {
        let name = move |(percent, count)| (format!("{length}.{percent}"), count);
        report.by_percent(length).into_iter().map(name)
    })
}
