//! Inputs outside the pipeline: a file, a folder, or a pattern with `*`, `?` and `**`, in the order of their names.
//!
//! Invariant: the names in the result are unique and relative, with `/`, so that they can be paths of an artifact.

use std::path::{Component, Path, PathBuf};

/// Files one input may have at most.
const FILES_MAX: usize = 200_000;
/// Folders followed downwards at most, links included.
const DEPTH_MAX: usize = 32;

/// One file of an external input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExternalFile {
    /// Path inside the artifact.
    pub(crate) name: String,
    /// Where it lies: absolute.
    pub(crate) path: PathBuf,
}

/// Absolute path of `text`: `file://./x` from the current directory, `x` from `base`.
pub(crate) fn locate(text: &str, base: &Path, current_dir: &Path) -> PathBuf {
    let path = match text.strip_prefix("file://") {
        Some(path) => current_dir.join(path),
        None => current_dir.join(base).join(text),
    };
    // `.` and `..` are taken out so that messages and the plan name the place plainly.
    path.components().fold(PathBuf::new(), |mut clean, part| {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                clean.pop();
            }
            other => clean.push(other),
        }
        clean
    })
}

/// Whether the text is a URI of an object store.
pub(crate) fn is_remote(text: &str) -> bool {
    ["s3://", "gs://", "az://"].iter().any(|scheme| text.starts_with(scheme))
}

/// Whether the text is a pattern.
pub(crate) fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?'])
}

/// The files that the absolute path or pattern means. An error says what is wrong in words.
pub(crate) fn expand(path: &Path) -> Result<Vec<ExternalFile>, String> {
    let shown = path.display();
    let text = path.to_string_lossy();
    let found = if is_pattern(&text) {
        let fixed: PathBuf =
            path.components().take_while(|part| !is_pattern(&part.as_os_str().to_string_lossy())).collect();
        let pattern: Vec<String> = path
            .components()
            .skip(fixed.components().count())
            .map(|part| part.as_os_str().to_string_lossy().into_owned())
            .collect();
        let mut found = Vec::new();
        walk(&fixed, String::new(), &pattern, 0, &mut found)?;
        if found.is_empty() {
            return Err(format!("no file matches {shown}"));
        }
        found
    } else if path.is_dir() {
        let mut found = Vec::new();
        walk(path, String::new(), &["**".to_owned(), "*".to_owned()], 0, &mut found)?;
        if found.is_empty() {
            return Err(format!("the folder {shown} holds no files"));
        }
        found
    } else if path.is_file() {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        vec![ExternalFile { name, path: path.to_owned() }]
    } else if path.exists() {
        return Err(format!("{shown} is neither a file nor a folder"));
    } else {
        return Err(format!("{shown} does not exist"));
    };
    Ok(found)
}

/// Several values of one port as one list; equal names are told apart by the folders above them.
pub(crate) fn join(parts: Vec<Vec<ExternalFile>>) -> Vec<ExternalFile> {
    let mut all: Vec<ExternalFile> = parts.into_iter().flatten().collect();
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|file| seen.insert(file.path.clone()));
    for depth in 1..DEPTH_MAX {
        let mut count = std::collections::BTreeMap::new();
        all.iter().for_each(|file| *count.entry(file.name.clone()).or_insert(0) += 1);
        if count.values().all(|count| *count == 1) {
            break;
        }
        for file in all.iter_mut().filter(|file| count.get(&file.name) != Some(&1)) {
            let parts: Vec<String> =
                file.path.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
            file.name = parts[parts.len().saturating_sub(depth + 1)..].join("/").trim_start_matches('/').to_owned();
        }
    }
    all
}

/// Whether `name` matches one pattern segment of literal characters, `*` and `?`.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        if p < pattern.len() && pattern[p] == '*' {
            star = Some((p, n));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == '?' || pattern[p] == name[n]) {
            (p, n) = (p + 1, n + 1);
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            (p, n) = (at + 1, from + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

fn walk(
    dir: &Path,
    prefix: String,
    pattern: &[String],
    depth: usize,
    found: &mut Vec<ExternalFile>,
) -> Result<(), String> {
    let Some((first, rest)) = pattern.split_first() else { return Ok(()) };
    if depth > DEPTH_MAX {
        return Err(format!("folders are nested deeper than {DEPTH_MAX} levels at {}", dir.display()));
    }
    if first == "**" {
        walk(dir, prefix.clone(), rest, depth, found)?;
    }
    let listing = match std::fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(format!("{} cannot be listed: {error}", dir.display())),
    };
    let mut names: Vec<String> =
        listing.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    for name in names.into_iter().filter(|name| !name.starts_with('.') || first.starts_with('.')) {
        let path = dir.join(&name);
        let below = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
        if first == "**" {
            if path.is_dir() {
                walk(&path, below, pattern, depth + 1, found)?;
            }
        } else if matches(first, &name) {
            if rest.is_empty() && path.is_file() {
                found.push(ExternalFile { name: below, path });
            } else if !rest.is_empty() && path.is_dir() {
                walk(&path, below, rest, depth + 1, found)?;
            }
        }
        if found.len() > FILES_MAX {
            return Err(format!("more than {FILES_MAX} files below {}", dir.display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names() {
        for (pattern, name, expected) in [
            ("*.parquet", "a.parquet", true),
            ("*.parquet", "a.json", false),
            ("a?c*", "abcd", true),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "aXc", false),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn paths_lose_their_dots() {
        let at = |text: &str| locate(text, Path::new("pipelines"), Path::new("/w"));
        assert_eq!(at("data/x"), Path::new("/w/pipelines/data/x"));
        assert_eq!(at("../data"), Path::new("/w/data"));
        assert_eq!(at("file://./runs"), Path::new("/w/runs"));
        assert_eq!(at("file:///abs"), Path::new("/abs"));
    }

    #[test]
    fn equal_names_are_told_apart() {
        let file = |path: &str| ExternalFile { name: "x".to_owned(), path: path.into() };
        let joined = join(vec![vec![file("/a/x")], vec![file("/b/x"), file("/a/x")]]);
        let names: Vec<&str> = joined.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["a/x", "b/x"]);
    }
}
