//! Figures that belong together by their names: cells of a small matrix, and the same figure before and after.
//!
//! ```text
//! needle.words.256.50, needle.256.50.words    cell of the matrix needle.words, row 256, column 50
//! X_before, X_base                            before        X_yarn_untrained    YaRN untrained
//! X                                           after         X_gain              gain
//! ```

use std::collections::BTreeMap;

use serde::Serialize;

use super::{FigureRow, Spread};

/// What a figure is to others of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// Before the stage, or of the model it is compared with.
    Before,
    /// With YaRN and no training at the new length.
    YarnUntrained,
    /// After it.
    After,
    /// The difference.
    Gain,
}

impl Variant {
    /// For a legend.
    pub fn label(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::YarnUntrained => "YaRN untrained",
            Self::After => "after",
            Self::Gain => "gain",
        }
    }

    /// The name without what marks the variant, and the variant.
    pub fn split(name: &str) -> (&str, Self) {
        let marks = [
            ("_before", Self::Before),
            ("_base", Self::Before),
            ("_yarn_untrained", Self::YarnUntrained),
            ("_gain", Self::Gain),
        ];
        let found = marks.into_iter().find_map(|(mark, variant)| Some((name.strip_suffix(mark)?, variant)));
        found.unwrap_or((name, Self::After))
    }
}

/// Figures of one stage by two numbers in their names.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Matrix {
    /// Stage that measured them.
    pub stage: String,
    /// Their name without the numbers and the variant.
    pub figure: String,
    /// Before, after, or the difference.
    pub variant: Variant,
    /// First number of each row, such as a length.
    pub rows: Vec<u64>,
    /// Second number of each column, such as a depth.
    pub columns: Vec<u64>,
    /// Mean and spread over the runs, `rows` × `columns`; none where nothing was measured.
    pub cells: Vec<Vec<Option<Spread>>>,
}

impl Matrix {
    /// Whether a figure of this name is a cell of a matrix.
    pub fn holds(metric: &str) -> bool {
        cell(metric).is_some()
    }
}

/// One share before and after.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Contrast {
    /// Stage that measured it.
    pub stage: String,
    /// Its name without the variant.
    pub figure: String,
    /// Mean and spread over the runs by variant, in the order before, YaRN untrained, after.
    pub variants: Vec<(Variant, Spread)>,
}

/// Sorts names as a reader would: `n.96` before `n.128`.
pub(super) fn reading_order(metric: &str) -> Vec<(u64, String)> {
    metric.split('.').map(|part| (part.parse().unwrap_or(u64::MAX), part.to_owned())).collect()
}

/// The figure, row and column of a cell; none when the name has no two numbers side by side.
pub(super) fn cell(name: &str) -> Option<(String, u64, u64)> {
    let mut parts: Vec<&str> = name.split('.').collect();
    let number = |part: &str| part.parse::<u64>().ok();
    let at = parts.windows(2).position(|pair| pair.iter().all(|part| number(part).is_some()))?;
    let (row, column) = (number(parts[at])?, number(parts[at + 1])?);
    parts.drain(at..at + 2);
    let words = !parts.is_empty() && parts.iter().all(|part| number(part).is_none());
    words.then(|| (parts.join("."), row, column))
}

/// The matrices among the figures, in the order of the stages; before, after and gain of one name together.
pub(super) fn matrices(rows: &[FigureRow]) -> Vec<Matrix> {
    type Cells = BTreeMap<(u64, u64), Option<Spread>>;
    type Families = BTreeMap<(String, Variant), Cells>;
    let mut found: Vec<(String, Families)> = Vec::new();
    for row in rows {
        let Some((name, length, depth)) = cell(&row.metric) else { continue };
        let (figure, variant) = Variant::split(&name);
        if found.last().is_none_or(|(stage, _)| *stage != row.stage) {
            found.push((row.stage.clone(), BTreeMap::new()));
        }
        if let Some((_, families)) = found.last_mut() {
            families.entry((figure.to_owned(), variant)).or_default().insert((length, depth), row.spread);
        }
    }
    let matrix = |stage: &str, (figure, variant): (String, Variant), cells: Cells| {
        let sorted = |of: fn(&(u64, u64)) -> u64| -> Vec<u64> {
            cells.keys().map(of).collect::<std::collections::BTreeSet<_>>().into_iter().collect()
        };
        let (rows, columns) = (sorted(|at| at.0), sorted(|at| at.1));
        let line = |row: &u64| columns.iter().map(|column| cells.get(&(*row, *column)).copied().flatten()).collect();
        let cells = rows.iter().map(line).collect();
        Matrix { stage: stage.to_owned(), figure, variant, rows, columns, cells }
    };
    let of_stage = |(stage, families): (String, Families)| {
        families.into_iter().map(|(name, cells)| matrix(&stage, name, cells)).collect::<Vec<_>>()
    };
    found.into_iter().flat_map(of_stage).collect()
}

/// Shares that were measured before and after, in the order of the figures; cells of matrices apart.
pub(super) fn contrasts(rows: &[FigureRow]) -> Vec<Contrast> {
    let mut found: Vec<Contrast> = Vec::new();
    for row in rows.iter().filter(|row| cell(&row.metric).is_none()) {
        let ((figure, variant), Some(spread)) = (Variant::split(&row.metric), row.spread) else { continue };
        // What guessing would score is the same before and after.
        if variant == Variant::Gain || figure.ends_with(".chance") {
            continue;
        }
        match found.iter_mut().find(|one| one.stage == row.stage && one.figure == figure) {
            Some(contrast) => contrast.variants.push((variant, spread)),
            None => {
                let (stage, figure) = (row.stage.clone(), figure.to_owned());
                found.push(Contrast { stage, figure, variants: vec![(variant, spread)] });
            }
        }
    }
    let has = |contrast: &Contrast, wanted: Variant| contrast.variants.iter().any(|(variant, _)| *variant == wanted);
    let share = |contrast: &Contrast| contrast.variants.iter().all(|(_, spread)| (0.0..=1.0).contains(&spread.mean));
    found.retain(|one| has(one, Variant::Before) && has(one, Variant::After) && share(one));
    found.iter_mut().for_each(|contrast| contrast.variants.sort_by_key(|(variant, _)| *variant));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(metric: &str, value: f64) -> FigureRow {
        let spread = Spread::of([value]);
        FigureRow { stage: "s".to_owned(), metric: metric.to_owned(), figures: Vec::new(), spread }
    }

    #[test]
    fn two_numbers_in_a_name_are_a_cell() {
        let at = |name: &str| cell(name).map(|(figure, row, column)| format!("{figure} {row} {column}"));
        assert_eq!(at("needle.256.50.words").as_deref(), Some("needle.words 256 50"));
        assert_eq!(at("needle.words_base.256.50").as_deref(), Some("needle.words_base 256 50"));
        assert_eq!(at("needle.256.words"), None);
        assert_eq!(at("needle.256.words_at_0.1"), None);
        assert_eq!(at("1.2"), None);
        assert_eq!(at("a.1.2.3"), None);
    }

    #[test]
    fn names_are_read_with_their_numbers() {
        let mut names = ["n.128.b", "n.96.b", "n.96.a", "a"];
        names.sort_by_cached_key(|name| reading_order(name));
        assert_eq!(names, ["a", "n.96.a", "n.96.b", "n.128.b"]);
    }

    #[test]
    fn cells_make_matrices_before_and_after() {
        let names = ["n.256.0.w", "n.256.50.w", "n.512.50.w", "n.512.50.w_base"];
        let rows: Vec<FigureRow> = names.iter().map(|name| row(name, 0.5)).collect();
        let found = matrices(&rows);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].variant, &found[0].rows[..]), (Variant::Before, &[512][..]));
        assert_eq!((found[1].variant, &found[1].columns[..]), (Variant::After, &[0, 50][..]));
        assert!(found[1].cells[1][0].is_none() && found[1].cells[1][1].is_some());
    }

    #[test]
    fn shares_with_a_before_are_contrasts() {
        let rows = [
            row("a.accuracy", 0.9),
            row("a.accuracy_before", 0.1),
            row("a.accuracy_gain", 0.8),
            row("a.tokens", 20.0),
            row("a.tokens_before", 10.0),
            row("alone", 0.5),
        ];
        let found = contrasts(&rows);
        assert_eq!(found.len(), 1);
        let variants: Vec<Variant> = found[0].variants.iter().map(|(variant, _)| *variant).collect();
        assert_eq!((found[0].figure.as_str(), variants), ("a.accuracy", vec![Variant::Before, Variant::After]));
    }
}
