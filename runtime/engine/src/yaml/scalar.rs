//! Plain scalars by the core schema of YAML 1.2: `true`, `null`, `12`, `0x1f`, `1e-4`; `yes` and `on` are texts.

use super::Value;

/// The value of an unquoted scalar, or why it is refused.
pub(crate) fn resolve(text: &str) -> Result<Value, String> {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Ok(Value::Null),
        "true" | "True" | "TRUE" => return Ok(Value::Bool(true)),
        "false" | "False" | "FALSE" => return Ok(Value::Bool(false)),
        _ => {}
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN") {
        return Err(format!("`{text}` is not a finite number; every number of a pipeline is"));
    }
    for (prefix, radix) in [("0x", 16), ("0o", 8)] {
        if let Some(digits) = text.strip_prefix(prefix)
            && !digits.is_empty()
            && digits.chars().all(|c| c.is_digit(radix))
        {
            return integer(i128::from_str_radix(digits, radix).ok(), text);
        }
    }
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return Ok(Value::Text(text.to_owned()));
    }
    if unsigned.bytes().all(|byte| byte.is_ascii_digit()) {
        if unsigned.len() > 1 && unsigned.starts_with('0') {
            return Err(format!("`{text}` can be read as decimal or as octal; drop the zero, write 0o.., or quote it"));
        }
        return integer(text.parse().ok(), text);
    }
    if is_float(unsigned) {
        return match text.parse::<f64>() {
            Ok(value) if value.is_finite() => Ok(Value::Float(value)),
            _ => Err(format!("`{text}` is beyond the range of a 64-bit float")),
        };
    }
    Ok(Value::Text(text.to_owned()))
}

fn integer(value: Option<i128>, text: &str) -> Result<Value, String> {
    match value {
        Some(value) if value >= i128::from(i64::MIN) && value <= i128::from(u64::MAX) => Ok(Value::Int(value)),
        _ => Err(format!("`{}` is beyond the range of a 64-bit integer", text.chars().take(40).collect::<String>())),
    }
}

/// `( \. [0-9]+ | [0-9]+ ( \. [0-9]* )? ) ( [eE] [-+]? [0-9]+ )?`
fn is_float(unsigned: &str) -> bool {
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent.strip_prefix(['+', '-']).unwrap_or(exponent))),
        None => (unsigned, None),
    };
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    digits(whole)
        && digits(fraction)
        && !(whole.is_empty() && fraction.is_empty())
        && exponent.is_none_or(|exponent| !exponent.is_empty() && digits(exponent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_follow_the_core_schema() {
        let text = |text: &str| Value::Text(text.to_owned());
        let cases = [
            ("yes", text("yes")),
            ("12", Value::Int(12)),
            ("-0", Value::Int(0)),
            ("0x1f", Value::Int(31)),
            ("0o17", Value::Int(15)),
            ("1e-4", Value::Float(1e-4)),
            (".5", Value::Float(0.5)),
            ("-1.", Value::Float(-1.0)),
            ("1.2.3", text("1.2.3")),
            ("1_000", text("1_000")),
            ("e5", text("e5")),
            ("+x", text("+x")),
            (".", text(".")),
            ("-", text("-")),
            ("18446744073709551615", Value::Int(u64::MAX.into())),
        ];
        for (written, value) in cases {
            assert_eq!(resolve(written).unwrap(), value, "{written}");
        }
        for refused in ["010", ".nan", "-.inf", "1e999", "18446744073709551616", &"9".repeat(100)] {
            assert!(resolve(refused).is_err(), "{refused}");
        }
    }
}
