//! "Did you mean": the known name nearest to a mistyped one.

/// Similarity below which a suggestion would confuse more than it helps (Jaro-Winkler, 0 to 1).
const ENOUGH: f64 = 0.75;

/// The candidate most similar to `given`, if any is similar at all.
pub(crate) fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = given.to_ascii_lowercase().replace('-', "_");
    known
        .into_iter()
        .map(|name| (strsim::jaro_winkler(&plain, &name.to_ascii_lowercase()), name))
        .filter(|(score, _)| *score >= ENOUGH)
        .max_by(|(left, _), (right, _)| left.total_cmp(right))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn finds_slips_of_the_finger_and_nothing_for_rubbish() {
        let known = ["flush_interval", "flush_size", "compression"];
        assert_eq!(nearest("flush_intervall", known), Some("flush_interval"));
        assert_eq!(nearest("flush-size", known), Some("flush_size"));
        assert_eq!(nearest("compresion", known), Some("compression"));
        assert_eq!(nearest("xyzzy", known), None);
    }
}
