//! WAL positions as the harness needs them: plain numbers with PostgreSQL's notation. The
//! product's own type is not used, because the harness must be able to find it wrong.

/// Parses `16/B374D848`.
///
/// # Errors
/// When it is not of that form.
pub fn parse(text: &str) -> anyhow::Result<u64> {
    let half = |text: &str| u64::from(u32::from_str_radix(text, 16).unwrap_or(u32::MAX));
    match text.split_once('/') {
        Some((high, low))
            if u32::from_str_radix(high, 16).is_ok() && u32::from_str_radix(low, 16).is_ok() =>
        {
            Ok(half(high) << 32 | half(low))
        }
        _ => anyhow::bail!("{text:?} is not a WAL position"),
    }
}

/// Writes it as PostgreSQL does.
#[must_use]
pub fn show(lsn: u64) -> String {
    format!("{:X}/{:X}", lsn >> 32, lsn & 0xffff_ffff)
}
