//! The closing table: every figure, and its floor with the verdict where there is one. Figures of a grid, whose names end in
//! two numbers (`extended.needle.words.256.10`), are too many for it; the event stream and the store have them.

use std::collections::BTreeMap;

use dsv3_core::{Bound, Figure};

/// The table as text: the plain figures first, then those with a floor or a remark, so that these stand last on the
/// screen.
pub(crate) fn closing(figures: &BTreeMap<String, Figure>) -> String {
    let (judged, plain): (Vec<_>, Vec<_>) =
        figures.iter().partition(|(_, figure)| figure.floor.is_some() || figure.note.is_some());
    let plain: Vec<_> = plain.into_iter().filter(|(name, _)| !is_of_grid(name)).collect();
    let mut parts = Vec::new();
    if !plain.is_empty() {
        parts.push(lines(["figure", "value", "", "", ""], &plain));
    }
    if !judged.is_empty() {
        parts.push(lines(["figure", "value", "floor", "", ""], &judged));
    }
    let floors = figures.values().filter(|figure| figure.ok.is_some()).count();
    let missed = figures.values().filter(|figure| figure.ok == Some(false)).count();
    parts.push(match floors {
        0 => "done".to_owned(),
        _ => format!("{} of {floors} floors met", floors - missed),
    });
    parts.join("\n\n")
}

/// Whether the last two parts of a name are numbers, a row and a column.
fn is_of_grid(name: &str) -> bool {
    let mut parts = name.rsplitn(3, '.').map(|part| part.parse::<u64>().is_ok());
    parts.next() == Some(true) && parts.next() == Some(true)
}

fn lines(head: [&str; 5], figures: &[(&String, &Figure)]) -> String {
    let rows: Vec<[String; 5]> = std::iter::once(head.map(str::to_owned))
        .chain(figures.iter().map(|(name, figure)| row(name, figure)))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let [a, b, c, d] = [0, 1, 2, 3].map(width);
    let line = |[name, value, floor, verdict, note]: &[String; 5]| {
        format!("{name:a$}  {value:>b$}  {floor:>c$}  {verdict:d$}  {note}").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn row(name: &str, figure: &Figure) -> [String; 5] {
    let side = match figure.bound {
        Some(Bound::AtMost) => "<=",
        _ => ">=",
    };
    let floor = figure.floor.map_or_else(String::new, |floor| format!("{side} {}", number(floor)));
    let verdict = figure.ok.map_or("", |ok| if ok { "ok" } else { "MISSED" });
    let note = figure.note.clone().unwrap_or_default();
    [name.to_owned(), number(figure.value), floor, verdict.to_owned(), note]
}

/// Whole numbers in groups of three digits, others with four significant digits.
pub(crate) fn number(value: f64) -> String {
    if !value.is_finite() {
        return "none".to_owned();
    }
    if value.fract() == 0.0 && value.abs() < 1e15 {
        let digits = format!("{}", value.abs() as u64);
        let groups: Vec<&str> =
            digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or("")).collect();
        return format!("{}{}", if value < 0.0 { "-" } else { "" }, groups.join(","));
    }
    let size = value.abs();
    if size >= 1000.0 {
        format!("{value:.0}")
    } else if size >= 0.001 {
        let decimals = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
        format!("{value:.decimals$}")
    } else {
        format!("{value:.3e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (671_026_419_200.0, "671,026,419,200"),
            (-1234.0, "-1,234"),
            (0.123456, "0.1235"),
            (2.2, "2.200"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
        assert_eq!(number(12345.678), "12346");
        assert_eq!(number(1.5e-5), "1.500e-5");
        assert_eq!(number(f64::NAN), "none");
    }

    #[test]
    fn the_table_says_what_was_missed() {
        let mut figures = BTreeMap::new();
        figures.insert("a.speed".to_owned(), Figure::new(12.0));
        figures.insert("a.zloss".to_owned(), Figure::with_floor(2.5, Bound::AtMost, 2.0));
        let mut noted = Figure::with_floor(0.3, Bound::AtLeast, 0.25);
        noted.note = Some("no ability".to_owned());
        figures.insert("b.score".to_owned(), noted);
        let text = closing(&figures);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("a.speed"), "{text}");
        assert!(lines[4].starts_with("a.zloss") && lines[4].contains("MISSED"), "{text}");
        assert!(lines[5].ends_with("ok      no ability"), "{text}");
        assert_eq!(lines[7], "1 of 2 floors met");
        assert_eq!(closing(&BTreeMap::new()), "done");
        figures.insert("c.words.256.10".to_owned(), Figure::new(0.5));
        assert_eq!(closing(&figures), text, "a grid stays out of it");
    }
}
