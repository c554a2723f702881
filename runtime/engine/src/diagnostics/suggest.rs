//! "Did you mean": the nearest of the known names by edit distance.

/// Optimal string alignment distance (insert, delete, replace, swap of neighbours), ignoring case and `-` against `_`.
fn distance(a: &str, b: &str) -> usize {
    let plain = |text: &str| -> Vec<char> { text.to_lowercase().replace('-', "_").chars().take(64).collect() };
    let (a, b) = (plain(a), plain(b));
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

/// The known names as a sentence part: `a, b and c`, shortened when there are many.
pub(crate) fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    match names.as_slice() {
        [] => "none".to_owned(),
        [one] => format!("`{one}`"),
        [first @ .., last] if names.len() <= 16 => format!("`{}` and `{last}`", first.join("`, `")),
        _ => format!("`{}` and {} more", names[..15].join("`, `"), names.len() - 15),
    }
}

/// The known name that was most likely meant, if one is near.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = known.into_iter().map(|candidate| (distance(name, candidate), candidate)).min()?;
    (near.0 <= (name.chars().count() / 3).max(1)).then_some(near.1)
}

/// Help for an unknown name: the nearest known one, or the list of all.
pub(crate) fn did_you_mean<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let known: Vec<&str> = known.into_iter().collect();
    match nearest(name, known.iter().copied()) {
        Some(candidate) => Some(format!("did you mean `{candidate}`?")),
        None if known.is_empty() => None,
        None => Some(format!("known here: {}", list(known))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_proposed_and_far_ones_listed() {
        assert_eq!(did_you_mean("stesp", ["steps", "seed"]).unwrap(), "did you mean `steps`?");
        assert_eq!(did_you_mean("xyz", ["steps", "seed"]).unwrap(), "known here: `steps` and `seed`");
        assert_eq!(did_you_mean("x", []), None);
        assert_eq!(distance("ca", "abc"), 3);
    }
}
