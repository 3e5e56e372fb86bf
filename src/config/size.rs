//! Sizes as people write them. Invariant: a text without a unit is refused, never guessed.

/// Reads `512MiB`, `1GiB`, `500MB` or `2 GB`; a fraction such as `1.5GiB` is fine.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: write for example 512MiB or 1GiB");
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit_bytes = match unit.trim().to_ascii_lowercase().as_str() {
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(wrong()),
    };
    let bytes = number * unit_bytes;
    // Beyond that a double does not count single bytes, and no disk is that large.
    if bytes < 9e15 { Ok(bytes as u64) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_understood() {
        for (text, bytes) in [
            ("1GiB", 1 << 30),
            ("512 MiB", 512 << 20),
            ("1.5kib", 1536),
            ("2TB", 2_000_000_000_000),
            ("10MB", 10_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "10", "MiB", "-1GB", "1 GB more", "1..2GB", "10G", "99999999TiB"] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }
}
