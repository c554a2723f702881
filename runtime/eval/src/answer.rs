//! Finding the answer in a text, and comparing answers.

/// Where an answer is looked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Extractor {
    /// The whole text must be `<think>…</think>`, a line break, `#### N`; a text of any other form has no answer.
    #[default]
    ThinkThenHashes,
    /// What stands after the last `####`, up to the end of its line.
    AfterHashes,
    /// The last number of the text.
    LastNumber,
}

impl Extractor {
    /// The answer in `text`, or `None` when the text has not the asked form.
    pub fn extract(self, text: &str) -> Option<String> {
        match self {
            Self::ThinkThenHashes => think_then_hashes(text),
            Self::AfterHashes => {
                let after = text.rsplit_once("####")?.1.trim();
                let line = after.lines().next().unwrap_or_default();
                Some(normalise(line)).filter(|answer| !answer.is_empty())
            }
            Self::LastNumber => last_number(text),
        }
    }
}

/// `<think>[^<]*</think>\n#### -?\d+`, nothing before or after but white space.
fn think_then_hashes(text: &str) -> Option<String> {
    let (thought, answer) = text.trim().strip_prefix("<think>")?.split_once("</think>\n#### ")?;
    let digits = answer.strip_prefix('-').unwrap_or(answer);
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && !thought.contains('<')).then(|| normalise(answer))
}

fn last_number(text: &str) -> Option<String> {
    let in_number = |c: char| c.is_ascii_digit() || matches!(c, '.' | ',' | '-');
    let has_digit = |word: &&str| word.bytes().any(|byte| byte.is_ascii_digit());
    text.split(|c| !in_number(c)).rfind(has_digit).map(normalise)
}

/// The form in which answers are compared: no white space around, no currency sign, no thousands separators, no closing
/// full stop, no leading zeros, no `.0`.
pub fn normalise(answer: &str) -> String {
    let text = answer.trim().trim_start_matches('$').trim_end_matches(['.', ',', '%']).trim();
    let plain: String = text.chars().filter(|c| *c != ',').collect();
    let (sign, digits) = plain.strip_prefix('-').map_or(("", plain.as_str()), |digits| ("-", digits));
    let is_number =
        digits.bytes().any(|b| b.is_ascii_digit()) && digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if !is_number || digits.matches('.').count() > 1 {
        return text.to_owned();
    }
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let (whole, fraction) = (whole.trim_start_matches('0'), fraction.trim_end_matches('0'));
    let whole = if whole.is_empty() { "0" } else { whole };
    let sign = if whole == "0" && fraction.is_empty() { "" } else { sign };
    if fraction.is_empty() { format!("{sign}{whole}") } else { format!("{sign}{whole}.{fraction}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_asked_form_is_exact() {
        let extract = |text| Extractor::ThinkThenHashes.extract(text);
        assert_eq!(extract("<think> 9 - 8 = 1.</think>\n#### 14"), Some("14".to_owned()));
        assert_eq!(extract(" <think></think>\n#### -3\n"), Some("-3".to_owned()));
        for bad in [
            "#### 14",
            "<think></think>\n#### ",
            "<think></think>\n#### 1x",
            "<think></think>\n#### 1 2",
            "<think></think> #### 14",
            "<think><think></think>\n#### 14",
            "<think></think>\n#### 1</think>\n#### 2",
            "x<think></think>\n#### 14",
            "<think>no end\n#### 14",
            "<think></think>\n#### --1",
        ] {
            assert_eq!(extract(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn looser_extractors() {
        let text = "So 3 + 4 = 7.\n#### $1,234.00\nsome more 5";
        assert_eq!(Extractor::AfterHashes.extract(text), Some("1234".to_owned()));
        assert_eq!(Extractor::AfterHashes.extract("no answer"), None);
        assert_eq!(Extractor::LastNumber.extract("it is 12, or -7.50."), Some("-7.5".to_owned()));
        assert_eq!(Extractor::LastNumber.extract("none"), None);
    }

    #[test]
    fn numbers_compare_by_value_and_words_as_they_are() {
        for (one, other) in [("1,000", "1000"), ("$5", "5"), ("007", "7"), ("-0", "0"), ("2.50", "2.5"), ("14.", "14")]
        {
            assert_eq!(normalise(one), normalise(other));
        }
        assert_eq!(normalise(" white crow "), "white crow");
        assert_eq!(normalise("1.2.3"), "1.2.3");
        assert_ne!(normalise("-5"), normalise("5"));
    }
}
