//! Retrieval of needles: shared by `evaluate` and by `context_extension`, which measures it before and after.

use std::path::PathBuf;

use dsv3_core::{Cancel, Error};
use dsv3_data::{Tokenizer, read_needles};
use dsv3_eval::{NeedleReport, find_needles, needle_items};
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

/// Shares of right words and of right answers by length: `256.words`, `256.exact`.
pub(crate) fn figures(report: &NeedleReport) -> Vec<(String, f64)> {
    let at = |length: usize| {
        let count = report.at(length);
        [(format!("{length}.words"), count.word_share()), (format!("{length}.exact"), count.exact_share())]
    };
    report.lengths().flat_map(at).collect()
}

/// Publishes retrieval before extension, with YaRN untrained, and after: by length as figures, by depth as metrics.
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
        for (depth, count) in trained.cells.get(&length).into_iter().flatten() {
            ctx.set_metric(&name(&format!("words_at_{depth}")), count.word_share());
        }
    }
}
